"""What a contributor keeps of an adapter that is for sale: manifest, sealed weights and their key.

    zklora.json   the signed manifest, which users pin
    sealed.bin    the weights, encrypted; harmless to show
    key.bin       what unseals them, readable by its owner alone

Commitments are drawn once: the same folder gives the same adapter, with the same budget, whenever
its service is started again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paris_ray.artifacts import sha256_hex
from paris_ray.config import LoRAConfig
from paris_ray.errors import ArtifactError
from paris_ray.folders import Folder
from paris_ray.identity import Identity, write_new
from paris_ray.signatures import SignedDocument
from paris_ray.zklora.adapter import PeftAdapter, quantise_adapter
from paris_ray.zklora.commitment import ModuleOpening, commit
from paris_ray.zklora.fixed_point import QuantisedModule
from paris_ray.zklora.manifest import (
    MANIFEST,
    PROTOCOL,
    AdapterManifest,
    Base,
    ModuleTerms,
)
from paris_ray.zklora.sealing import KEY, SEALED, seal, unseal

# Few: what a thief has by then, `bench_zklora.py share` measures.
BUDGET_DIVISOR = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class AskedTerms:
    """What a contributor asks for.

    Attributes:
        base: What the adapter is for.
        name: What users call it.
        price: In units of the ledger.
        price_per_row: Of a row of every module, part of the price if it is bought; None: whoever
            asks for the whole budget has paid the price, and each row costs something, if there is
            an escrow.
        budget_rows: Rows of each module that are ever answered, over all users; None: as
            `default_budget` has it.
        escrow_certificate: Who holds key and payment, as PEM; None: the adapter can be tried and
            verified, not bought.
    """

    base: Base
    name: str
    price: int = 0
    price_per_row: int | None = None
    budget_rows: int | None = None
    escrow_certificate: str | None = None

    def stated(self, identity: Identity, budget_rows: int) -> dict[str, Any]:
        """Return the fields of the manifest in which a contributor states it, with this budget."""
        price_per_row = self.price_per_row
        if price_per_row is None:
            of_the_price = -(-self.price // max(1, budget_rows))
            price_per_row = 0 if self.escrow_certificate is None else max(1, of_the_price)
        return {
            "base": self.base,
            "adapter": self.name,
            "price": self.price,
            "price_per_row": price_per_row,
            "budget_rows": budget_rows,
            "contributor_certificate": identity.certificate,
            "escrow_certificate": self.escrow_certificate,
        }


@dataclass(frozen=True, slots=True)
class Offer:
    """An adapter for sale.

    Attributes:
        signed: The manifest, as users read it.
        manifest: The same, checked.
        sealed: The encrypted weights.
        key: What unseals them.
    """

    signed: SignedDocument
    manifest: AdapterManifest
    sealed: bytes
    key: bytes

    def openings(self) -> dict[str, ModuleOpening]:
        """Return the weights and blinders by the name of their module.

        Each goes with the commitment that it opens: whoever proves does not commit again.
        """
        opened = unseal(self.sealed, self.key, self.manifest)
        terms = self.manifest.terms
        return {name: opening.of(terms[name].commitment) for name, opening in opened.items()}

    def modules(self) -> dict[str, QuantisedModule]:
        """Return the weights by the name of their module."""
        return {name: opening.module for name, opening in self.openings().items()}


def open_offer(folder: Path, identity: Identity, adapter: PeftAdapter, terms: AskedTerms) -> Offer:
    """Return the offer in a folder, made now if there is none.

    Raises:
        ArtifactError: if the folder has an offer of other weights or terms.
        ParisError: if the adapter cannot be quantised, or a term is not allowed.
    """
    modules = quantise_adapter(adapter)
    if not (folder / MANIFEST).exists():
        _make(folder, identity, modules, adapter.config, terms)
    offer = load_offer(folder)
    stated = terms.stated(identity, terms.budget_rows or offer.manifest.budget_rows)
    differ = [name for name, value in stated.items() if getattr(offer.manifest, name) != value]
    if _digests(offer.modules()) != _digests(modules):
        differ.append("weights")
    if differ:
        raise ArtifactError(
            f"{folder} holds an offer with another {', '.join(differ)}: choose another folder, "
            "which makes another adapter of it, with a budget of its own"
        )
    return offer


def load_offer(folder: Path) -> Offer:
    """Return the offer in a folder.

    Raises:
        ArtifactError: if a file is missing.
        ParisError: if the manifest is damaged.
    """
    signed = SignedDocument.read(folder / MANIFEST)
    manifest = AdapterManifest.from_signed(signed)
    try:
        sealed, key = (folder / SEALED).read_bytes(), (folder / KEY).read_bytes()
    except OSError as error:
        raise ArtifactError(f"{folder} has a manifest, but no weights: {error}") from None
    return Offer(signed, manifest, sealed, key)


def _make(
    folder: Path,
    identity: Identity,
    modules: Mapping[str, QuantisedModule],
    config: LoRAConfig,
    terms: AskedTerms,
) -> None:
    openings = {name: commit(module)[1] for name, module in modules.items()}
    sealed, key = seal(openings)
    budget_rows = terms.budget_rows
    if budget_rows is None:
        budget_rows = default_budget([module.d_in for module in modules.values()])
    stated = terms.stated(identity, budget_rows)
    manifest = build_manifest(openings, config, sealed, key, **stated)
    # The manifest comes last: without it, what an interruption left is made anew.
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    (folder / KEY).unlink(missing_ok=True)
    write_new(folder / KEY, key, 0o600)
    Folder(str(folder)).write(SEALED, sealed)
    Folder(str(folder)).write_json(MANIFEST, manifest.sign(identity).to_json())


def _digests(modules: Mapping[str, QuantisedModule]) -> dict[str, str]:
    return {name: module.digest for name, module in modules.items()}


def default_budget(widths: Sequence[int]) -> int:
    """Return how many rows are answered, of modules of these `d_in`, unless somebody says more."""
    return max(1, min(widths, default=0) // BUDGET_DIVISOR)


def build_manifest(
    openings: Mapping[str, ModuleOpening],
    config: LoRAConfig,
    sealed: bytes,
    key: bytes,
    **terms: Any,
) -> AdapterManifest:
    """Return the manifest of an adapter that one has.

    Args:
        openings: Its modules, by name.
        config: Its rank and scale.
        sealed: The weights as they will be delivered.
        key: What unseals them; only its digest is stated.
        terms: The other fields of an `AdapterManifest`. Unless they are given, rows are free,
            `budget_rows` is that of `default_budget`, and there is no escrow.

    Raises:
        ParisError: like `AdapterManifest`.
    """
    defaults = {
        "price_per_row": 0,
        "budget_rows": default_budget([opening.module.d_in for opening in openings.values()]),
        "escrow_certificate": None,
    }
    return AdapterManifest(
        protocol=PROTOCOL,
        modules=tuple(ModuleTerms.of(name, opening) for name, opening in openings.items()),
        lora_alpha=config.lora_alpha,
        r=config.r,
        use_rslora=config.use_rslora,
        sealed_digest=sha256_hex(sealed),
        sealed_bytes=len(sealed),
        key_digest=sha256_hex(key),
        **defaults | terms,
    )
