"""What a contributor offers, signed before anyone tries it, and pinned by whoever does.

A manifest names the base, commits to the weights of every module and to the file that will be
delivered, and states budget and price. Its digest, the `adapter_id`, enters every session.
"""

import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from paris_ray.artifacts import canonical_json, sha256_hex
from paris_ray.config import LoRAConfig
from paris_ray.errors import ParisError, ProtocolError, SignatureError, VerificationError
from paris_ray.identity import public_key_of
from paris_ray.receipts import DIGEST, MAX_MODULES
from paris_ray.signatures import SignedDocument, Signer
from paris_ray.zklora.commitment import ModuleCommitment, ModuleOpening
from paris_ray.zklora.curve import POINT_BYTES
from paris_ray.zklora.fixed_point import check_dimensions
from paris_ray.zklora.transcript import session_id

MANIFEST = "zklora.json"
KIND = "manifest"
PROTOCOL = "paris_ray zklora 2"

MAX_POINTS = 2**17  # of all modules; checking one takes a tenth of a millisecond
MAX_BYTES = 24 * 2**20  # of the file: as many modules, points and characters fit
MAX_D_OUT = 2**18
MAX_EXPERT = 2**16
# With its manifest an adapter is handed to the escrow in one frame of 2^28 bytes, and from there to
# its buyer in another.
MAX_SEALED_BYTES = 200 * 2**20
MAX_COUNT = 2**53 - 1  # exact in every reader of JSON
MIN_ALPHA = 1e-6
# Few: what a thief has by then, `bench_zklora.py share` measures.
BUDGET_DIVISOR = 64
# Delivered factors are float32, in which every 15-bit integer times 2^-exponent must be normal.
MIN_EXPONENT, MAX_EXPONENT = -112, 126

POINT = re.compile(f"[0-9a-f]{{{2 * POINT_BYTES}}}")
ADAPTER_NAME = re.compile("[A-Za-z0-9_.-]{1,100}")
MODULE_NAME = re.compile("[!-~]{1,256}")  # printed on terminals, so nothing that steers one


@dataclass(frozen=True, slots=True)
class Base:
    """The model that an adapter is for.

    Attributes:
        digest: SHA-256 of its safetensors.
        expert: Which expert of a bundle it is; None: it is none of a bundle.
        router_digest: SHA-256 of the router's safetensors, if the bundle has one.
    """

    digest: str
    expert: int | None
    router_digest: str | None

    def __post_init__(self) -> None:
        _require_match(DIGEST, "base.digest", self.digest, "64 hexadecimal digits")
        if self.expert is not None:
            _require_integer("base.expert", self.expert, 0, MAX_EXPERT)
        if self.router_digest is not None:
            _require_match(
                DIGEST, "base.router_digest", self.router_digest, "null, or 64 hexadecimal digits"
            )


@dataclass(frozen=True, slots=True)
class ModuleTerms:
    """What is said in public of one module.

    Attributes:
        name: Its name in the base model.
        commitment: Dimensions, and commitments to both factors.
        exponent_a: A is integers times `2^-exponent_a`.
        exponent_b: Likewise for B.
    """

    name: str
    commitment: ModuleCommitment
    exponent_a: int
    exponent_b: int

    def __post_init__(self) -> None:
        _require_match(MODULE_NAME, "a module's name", self.name, "1 to 256 printable characters")
        for field in ("exponent_a", "exponent_b"):
            value = getattr(self, field)
            _require_integer(f"{self.name}: {field}", value, MIN_EXPONENT, MAX_EXPONENT)
        commitment = self.commitment
        for field in ("d_in", "r", "d_out"):
            _require_integer(f"{self.name}: {field}", getattr(commitment, field), 1, MAX_D_OUT)
        try:
            check_dimensions(commitment.d_in, commitment.r, commitment.d_out)
        except ParisError as error:
            raise ProtocolError(f"{self.name}: {error}") from None
        for field, points in (("a", commitment.a), ("b", commitment.b)):
            holds = len(points) == commitment.r and all(len(p) == POINT_BYTES for p in points)
            allowed = f"r = {commitment.r} points of {POINT_BYTES} bytes"
            _require(holds, f"{self.name}: {field}", points, allowed)

    @property
    def dimensions(self) -> tuple[int, int, int]:
        """`d_in`, `r` and `d_out`."""
        return self.commitment.d_in, self.commitment.r, self.commitment.d_out

    @property
    def row_bytes(self) -> int:
        """Bytes of an input, and of its answer."""
        return 2 * self.commitment.d_in + 8 * self.commitment.d_out

    @classmethod
    def of(cls, name: str, opening: ModuleOpening) -> "ModuleTerms":
        """Return what is said in public of a module that one has."""
        module = opening.module
        return cls(name, opening.commitment, module.exponent_a, module.exponent_b)

    @classmethod
    def from_document(cls, document: Any) -> "ModuleTerms":
        """Return the terms in parsed JSON; raises ProtocolError."""
        names = ("name", "d_in", "r", "d_out", "exponent_a", "exponent_b", "a", "b")
        _require_fields("a module", document, names)
        points = [_points(f"{document['name']!r:.99}: {field}", document[field]) for field in "ab"]
        commitment = ModuleCommitment(
            document["d_in"], document["r"], document["d_out"], points[0], points[1]
        )
        return cls(document["name"], commitment, document["exponent_a"], document["exponent_b"])

    @property
    def document(self) -> dict[str, Any]:
        """The terms as JSON values."""
        return {
            "name": self.name,
            "d_in": self.commitment.d_in,
            "r": self.commitment.r,
            "d_out": self.commitment.d_out,
            "exponent_a": self.exponent_a,
            "exponent_b": self.exponent_b,
            "a": [point.hex() for point in self.commitment.a],
            "b": [point.hex() for point in self.commitment.b],
        }

    def check_points(self) -> None:
        """Raise VerificationError unless all points are ones of the group."""
        try:
            self.commitment.points()
        except VerificationError as error:
            raise VerificationError(f"{self.name}: {error}") from None


@dataclass(frozen=True)
class AdapterManifest:
    """What a contributor offers; whoever makes one, its fields are checked.

    Attributes:
        protocol: Version of the scheme.
        base: What the adapter is for.
        adapter: Its name.
        modules: What is said of each module, in the order in which sessions go through them.
        lora_alpha: Numerator of the scale.
        r: Rank of every module.
        use_rslora: Whether the scale has the square root of the rank below.
        budget_rows: Rows of each module that are ever answered, over all users.
        price: In units of the ledger.
        price_per_row: What a row of every module costs, part of the price if it is bought; above 0
            an escrow holds a deposit for them.
        sealed_digest: SHA-256 of the sealed weights.
        sealed_bytes: Their size.
        key_digest: SHA-256 of the key that unseals them.
        contributor_certificate: Who offers it, as PEM.
        escrow_certificate: Who holds key and payment, as PEM; None: nobody does.

    Raises:
        ProtocolError: naming the field, its value and what is allowed.
        SignatureError: if a certificate is not allowed.
    """

    protocol: str
    base: Base
    adapter: str
    modules: tuple[ModuleTerms, ...]
    lora_alpha: float
    r: int
    use_rslora: bool
    budget_rows: int
    price: int
    price_per_row: int
    sealed_digest: str
    sealed_bytes: int
    key_digest: str
    contributor_certificate: str
    escrow_certificate: str | None

    def __post_init__(self) -> None:
        _require(self.protocol == PROTOCOL, "protocol", self.protocol, PROTOCOL)
        allowed = "1 to 100 letters, digits, points, hyphens and underscores"
        _require_match(ADAPTER_NAME, "adapter", self.adapter, allowed)
        self._check_modules()
        _require_integer("budget_rows", self.budget_rows, 1, MAX_COUNT)
        _require_integer("price", self.price, 0, MAX_COUNT)
        _require_integer("price_per_row", self.price_per_row, 0, MAX_COUNT // self.budget_rows)
        _require_integer("sealed_bytes", self.sealed_bytes, 1, MAX_SEALED_BYTES)
        for field in ("sealed_digest", "key_digest"):
            _require_match(DIGEST, field, getattr(self, field), "64 hexadecimal digits")
        _check_certificate("contributor_certificate", self.contributor_certificate)
        if self.escrow_certificate is not None:
            _check_certificate("escrow_certificate", self.escrow_certificate)
        elif self.price_per_row:
            allowed = "0, since escrow_certificate names nobody who could take it"
            _require(False, "price_per_row", self.price_per_row, allowed)

    def _check_modules(self) -> None:
        count = len(self.modules)
        _require(1 <= count <= MAX_MODULES, "number of modules", count, f"1 to {MAX_MODULES}")
        _require(len(self.terms) == count, "modules", list(self.terms), "each name once")
        try:
            config = self.config
        except ParisError as error:
            raise ProtocolError(str(error)) from None
        least = f"at least {MIN_ALPHA}"
        _require(config.lora_alpha >= MIN_ALPHA, "lora_alpha", config.lora_alpha, least)
        for terms in self.modules:
            rank = terms.commitment.r
            _require(rank == self.r, f"{terms.name}: r", rank, f"{self.r}, that of the adapter")
        points = 2 * self.r * count
        _require(points <= MAX_POINTS, "number of points", points, f"at most {MAX_POINTS}")

    @property
    def config(self) -> LoRAConfig:
        """Rank, scale and targets, the latter by their full names."""
        return LoRAConfig(
            r=self.r,
            lora_alpha=self.lora_alpha,
            target_modules=tuple(self.terms),
            use_rslora=self.use_rslora,
        )

    @property
    def scale(self) -> float:
        """What the products `x A B` are multiplied by."""
        return self.config.scale

    @cached_property
    def contributor(self) -> str:
        """Public key of the contributor, in hexadecimal."""
        return public_key_of(self.contributor_certificate)

    @cached_property
    def adapter_id(self) -> str:
        """SHA-256 of the manifest, in hexadecimal: what a user pins."""
        return sha256_hex(canonical_json(self.document))

    @property
    def document(self) -> dict[str, Any]:
        """The manifest as JSON values."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        modules = [terms.document for terms in self.modules]
        return values | {"base": asdict(self.base), "modules": modules}

    def module(self, name: str) -> ModuleTerms:
        """Return the terms of a module; raises ProtocolError if the adapter has none such."""
        if name not in self.terms:
            raise ProtocolError(f"module={reprlib.repr(name)} is not allowed: the adapter has none")
        return self.terms[name]

    @cached_property
    def terms(self) -> dict[str, ModuleTerms]:
        """The terms of every module, by its name."""
        return {terms.name: terms for terms in self.modules}

    def session_id(self, nonce_u: str, nonce_c: str) -> str:
        """Return the name of the session of these nonces; raises ProtocolError if one is none."""
        return session_id(self.protocol, self.adapter_id, self.base.digest, nonce_u, nonce_c)

    def sign(self, contributor: Signer) -> SignedDocument:
        """Return the manifest, signed by its contributor; raises SignatureError if it is not."""
        if contributor.public_key != self.contributor:
            raise SignatureError(f"{contributor.public_key} is not the contributor's key")
        return SignedDocument.sign(KIND, self.document, contributor)

    @classmethod
    def read(cls, path: Path) -> "AdapterManifest":
        """Return the manifest in a file; raises like `from_signed`."""
        if not path.is_file():
            raise SignatureError(f"{path} is not a file")
        size = path.stat().st_size
        _require(size <= MAX_BYTES, f"size of {path}", size, f"at most {MAX_BYTES} bytes")
        return cls.from_signed(SignedDocument.read(path))

    @classmethod
    def from_signed(cls, signed: SignedDocument) -> "AdapterManifest":
        """Return a manifest that anybody may have made, with everything checked.

        Raises:
            SignatureError: if it is not signed with the key of its contributor's certificate.
            ProtocolError: naming a field that is missing, unknown or not allowed.
            VerificationError: if a commitment is no point of the group.
        """
        # Fields before signature: they say whose it must be, and are no number that JSON lacks.
        manifest = cls.from_document(signed.document)
        signed.check(KIND, manifest.contributor)
        for terms in manifest.modules:
            terms.check_points()
        return manifest

    @classmethod
    def from_document(cls, document: Any) -> "AdapterManifest":
        """Return a manifest whose signature and points need no check, or not yet.

        Raises:
            SignatureError: if a certificate is not allowed.
            ProtocolError: naming a field that is missing, unknown or not allowed.
        """
        _require_fields("a manifest", document, [field.name for field in fields(cls)])
        base, modules = document["base"], document["modules"]
        _require_fields("base", base, [field.name for field in fields(Base)])
        _require(isinstance(modules, list), "modules", modules, "a list")
        _require(len(modules) <= MAX_MODULES, "modules", modules, f"at most {MAX_MODULES}")
        terms = tuple(ModuleTerms.from_document(module) for module in modules)
        return cls(**document | {"base": Base(**base), "modules": terms})


def default_budget(widths: Sequence[int]) -> int:
    """Return how many rows of each module are answered unless its contributor says otherwise.

    Args:
        widths: Of the inputs of all modules.
    """
    return max(1, min(widths, default=0) // BUDGET_DIVISOR)


def build_manifest(
    openings: Mapping[str, ModuleOpening],
    config: LoRAConfig,
    *,
    base: Base,
    adapter: str,
    price: int,
    price_per_row: int = 0,
    sealed: bytes,
    key: bytes,
    contributor_certificate: str,
    escrow_certificate: str | None = None,
    budget_rows: int | None = None,
) -> AdapterManifest:
    """Return the manifest of an adapter that one has.

    Args:
        openings: Its modules, by name.
        config: Its rank and scale.
        base: What it is for.
        adapter: Its name.
        price: In units of the ledger.
        price_per_row: Likewise, of a row of every module; a part of the price if it is bought.
        sealed: The weights as they will be delivered.
        key: What unseals them; only its digest is stated.
        contributor_certificate: One's own, as PEM.
        escrow_certificate: Who holds key and payment.
        budget_rows: Rows of each module over all users; None: as `default_budget` has it.

    Raises:
        ParisError: like `AdapterManifest`.
    """
    widths = [opening.module.d_in for opening in openings.values()]
    return AdapterManifest(
        protocol=PROTOCOL,
        base=base,
        adapter=adapter,
        modules=tuple(ModuleTerms.of(name, opening) for name, opening in openings.items()),
        lora_alpha=config.lora_alpha,
        r=config.r,
        use_rslora=config.use_rslora,
        budget_rows=default_budget(widths) if budget_rows is None else budget_rows,
        price=price,
        price_per_row=price_per_row,
        sealed_digest=sha256_hex(sealed),
        sealed_bytes=len(sealed),
        key_digest=sha256_hex(key),
        contributor_certificate=contributor_certificate,
        escrow_certificate=escrow_certificate,
    )


def _require(holds: bool, field: str, value: object, allowed: str) -> None:
    if not holds:
        raise ProtocolError(f"{field}={reprlib.repr(value)} is not allowed: {allowed}")


def _require_integer(field: str, value: object, low: int, high: int) -> None:
    holds = type(value) is int and low <= value <= high  # True is an int of Python, not of JSON
    _require(holds, field, value, f"an integer, {low} to {high}")


def _require_match(pattern: re.Pattern[str], field: str, value: object, allowed: str) -> None:
    holds = isinstance(value, str) and pattern.fullmatch(value) is not None
    _require(holds, field, value, allowed)


def _require_fields(what: str, document: object, names: Sequence[str]) -> None:
    _require(isinstance(document, dict), what, document, "a mapping")
    assert isinstance(document, dict)
    for name in sorted(document.keys() ^ set(names)):
        problem = "unknown" if name in document else "missing"
        raise ProtocolError(f"{what}: field {reprlib.repr(name)} is {problem}")


def _points(field: str, encodings: object) -> tuple[bytes, ...]:
    _require(isinstance(encodings, list), field, encodings, "a list of points")
    assert isinstance(encodings, list)
    for encoding in encodings:
        _require_match(POINT, field, encoding, f"points of {2 * POINT_BYTES} hexadecimal digits")
    return tuple(map(bytes.fromhex, encodings))


def _check_certificate(field: str, certificate: object) -> None:
    _require(isinstance(certificate, str), field, certificate, "a certificate in PEM")
    assert isinstance(certificate, str)
    try:
        public_key_of(certificate)
    except SignatureError as error:
        raise SignatureError(f"{field}: {error}") from None
