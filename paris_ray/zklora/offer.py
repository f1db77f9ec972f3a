"""What a contributor keeps of an adapter that is for sale: manifest, sealed weights and their key.

    zklora.json   the signed manifest, which users pin
    sealed.bin    the weights, encrypted; harmless to show
    key.bin       what unseals them, readable by its owner alone

Commitments are drawn once: the same folder gives the same adapter, with the same budget, whenever
its service is started again.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from paris_ray.bundle import Bundle
from paris_ray.errors import ArtifactError
from paris_ray.folders import Folder
from paris_ray.identity import Identity, write_new
from paris_ray.signatures import SignedDocument
from paris_ray.zklora.adapter import PeftAdapter, quantise_adapter
from paris_ray.zklora.commitment import ModuleOpening, commit
from paris_ray.zklora.fixed_point import QuantisedModule
from paris_ray.zklora.manifest import (
    MANIFEST,
    AdapterManifest,
    Base,
    build_manifest,
    default_budget,
)
from paris_ray.zklora.sealing import KEY, SEALED, seal, unseal


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


def base_of_expert(bundle: Bundle, expert: int) -> Base:
    """Return what an adapter of one expert of a bundle is for."""
    digest, router = (bundle.weights_digest(part) for part in (f"expert_{expert}", "router"))
    return Base(digest=digest, expert=expert, router_digest=router)


def open_offer(folder: Path, identity: Identity, adapter: PeftAdapter, terms: AskedTerms) -> Offer:
    """Return the offer in a folder, made now if there is none.

    Args:
        folder: The contributor's own; it holds the key.
        identity: Who offers.
        adapter: What is offered.
        terms: What is asked for it.

    Raises:
        ArtifactError: if the folder has an offer of other weights or terms.
        ParisError: if the adapter cannot be quantised, or a term is not allowed.
    """
    if not (folder / MANIFEST).exists():
        _make(folder, identity, adapter, terms)
    offer = load_offer(folder)
    _check_same(folder, offer, identity, adapter, terms)
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


def _make(folder: Path, identity: Identity, adapter: PeftAdapter, terms: AskedTerms) -> None:
    openings = {name: commit(module)[1] for name, module in quantise_adapter(adapter).items()}
    sealed, key = seal(openings)
    budget_rows = terms.budget_rows
    if budget_rows is None:
        budget_rows = default_budget([opening.module.d_in for opening in openings.values()])
    manifest = build_manifest(
        openings,
        adapter.config,
        base=terms.base,
        adapter=terms.name,
        price=terms.price,
        price_per_row=_price_per_row(terms, budget_rows),
        budget_rows=budget_rows,
        sealed=sealed,
        key=key,
        contributor_certificate=identity.certificate,
        escrow_certificate=terms.escrow_certificate,
    )
    # The manifest comes last: without it, what an interruption left is made anew.
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    (folder / KEY).unlink(missing_ok=True)
    write_new(folder / KEY, key, 0o600)
    Folder(str(folder)).write(SEALED, sealed)
    Folder(str(folder)).write_json(MANIFEST, manifest.sign(identity).to_json())


def _price_per_row(terms: AskedTerms, budget_rows: int) -> int:
    if terms.price_per_row is not None:
        return terms.price_per_row
    if terms.escrow_certificate is None:
        return 0
    return max(1, -(-terms.price // max(1, budget_rows)))


def _check_same(
    folder: Path, offer: Offer, identity: Identity, adapter: PeftAdapter, terms: AskedTerms
) -> None:
    manifest = offer.manifest
    stated = {
        "base": (manifest.base, terms.base),
        "name": (manifest.adapter, terms.name),
        "price": (manifest.price, terms.price),
        "price_per_row": (
            manifest.price_per_row,
            _price_per_row(terms, manifest.budget_rows),
        ),
        "budget_rows": (manifest.budget_rows, terms.budget_rows or manifest.budget_rows),
        "escrow_certificate": (manifest.escrow_certificate, terms.escrow_certificate),
        "contributor": (manifest.contributor, identity.public_key),
        "weights": (_digests(offer.openings()), _adapter_digests(adapter)),
    }
    differ = [name for name, (found, wanted) in stated.items() if found != wanted]
    if differ:
        raise ArtifactError(
            f"{folder} holds an offer with another {', '.join(differ)}: choose another folder, "
            "which makes another adapter of it, with a budget of its own"
        )


def _digests(openings: Mapping[str, ModuleOpening]) -> dict[str, str]:
    return {name: opening.module.digest for name, opening in openings.items()}


def _adapter_digests(adapter: PeftAdapter) -> dict[str, str]:
    return {name: module.digest for name, module in quantise_adapter(adapter).items()}
