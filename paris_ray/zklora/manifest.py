"""What a contributor offers, signed before anyone tries it, and pinned by whoever does.

A manifest names the base, commits to the weights of every module and to the file that will be
delivered, and states budget and price. Its digest, the `adapter_id`, enters every session.
"""

from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, SkipValidation, model_validator

from paris_ray.artifacts import canonical_json, sha256_hex
from paris_ray.config import LoRAConfig
from paris_ray.config.lora import require
from paris_ray.documents import MAX_COUNT, Count, Digest, Document, Size
from paris_ray.errors import ProtocolError, SignatureError, VerificationError, naming
from paris_ray.identity import public_key_of
from paris_ray.receipts import MAX_MODULES
from paris_ray.signatures import SignedDocument, Signer
from paris_ray.zklora.commitment import ModuleCommitment, ModuleOpening
from paris_ray.zklora.curve import POINT_BYTES
from paris_ray.zklora.fixed_point import MAX_RANK, MAX_WIDTH
from paris_ray.zklora.transcript import session_id

MANIFEST = "zklora.json"
KIND = "manifest"
PROTOCOL: Literal["paris_ray zklora 2"] = "paris_ray zklora 2"

MAX_POINTS = 2**17  # of all modules; checking one takes a tenth of a millisecond
MAX_BYTES = 24 * 2**20  # of the file: as many modules, points and characters fit
MAX_EXPERT = 2**16
# With its manifest an adapter is handed to the escrow in one frame of 2^28 bytes, and from there to
# its buyer in another.
MAX_SEALED_BYTES = 200 * 2**20
MIN_ALPHA = 1e-6
# Delivered factors are float32, in which every 15-bit integer times 2^-exponent must be normal.
MIN_EXPONENT, MAX_EXPONENT = -112, 126


def _check_certificate(certificate: str) -> str:
    public_key_of(certificate)
    return certificate


Width = Annotated[int, Field(ge=1, le=MAX_WIDTH)]
Rank = Annotated[int, Field(ge=1, le=MAX_RANK)]
Exponent = Annotated[int, Field(ge=MIN_EXPONENT, le=MAX_EXPONENT)]
Certificate = Annotated[str, AfterValidator(_check_certificate)]
Point = Annotated[str, Field(pattern=f"^[0-9a-f]{{{2 * POINT_BYTES}}}$")]
# Of JSON, which has lists alone; a list that is too long, or wrong, is not read to its end.
Points = Annotated[tuple[Point, ...], Field(strict=False, max_length=MAX_RANK, fail_fast=True)]


class Base(Document):
    """The model that an adapter is for.

    Attributes:
        digest: SHA-256 of its safetensors.
        expert: Which expert of a bundle it is; None: it is none of a bundle.
        router_digest: SHA-256 of the router's safetensors, if the bundle has one.
    """

    digest: Digest
    expert: Annotated[int, Field(ge=0, le=MAX_EXPERT)] | None
    router_digest: Digest | None


class ModuleTerms(Document):
    """What is said in public of one module.

    Attributes:
        name: Its name in the base model; it is printed on terminals, so nothing that steers one.
        d_in: Width of the inputs.
        r: Rank.
        d_out: Width of the outputs.
        exponent_a: A is integers times `2^-exponent_a`.
        exponent_b: Likewise for B.
        a: The r commitments to columns of A, in hexadecimal.
        b: The r commitments to rows of B.
    """

    name: Annotated[str, Field(pattern="^[!-~]{1,256}$")]
    d_in: Width
    r: Rank
    d_out: Width
    exponent_a: Exponent
    exponent_b: Exponent
    a: Points
    b: Points

    @model_validator(mode="after")
    def _check(self) -> Self:
        for side, points in (("a", self.a), ("b", self.b)):
            require(len(points) == self.r, side, points, f"r = {self.r} points")
        return self

    @cached_property
    def commitment(self) -> ModuleCommitment:
        """Dimensions, and commitments to both factors."""
        a, b = (tuple(map(bytes.fromhex, points)) for points in (self.a, self.b))
        return ModuleCommitment(self.d_in, self.r, self.d_out, a, b)

    @property
    def dimensions(self) -> tuple[int, int, int]:
        """`d_in`, `r` and `d_out`."""
        return self.d_in, self.r, self.d_out

    @property
    def row_bytes(self) -> int:
        """Bytes of an input, and of its answer."""
        return 2 * self.d_in + 8 * self.d_out

    @classmethod
    def of(cls, name: str, opening: ModuleOpening) -> Self:
        """Return what is said in public of a module that one has."""
        module, commitment = opening.module, opening.commitment
        return cls(
            name=name,
            d_in=module.d_in,
            r=module.r,
            d_out=module.d_out,
            exponent_a=module.exponent_a,
            exponent_b=module.exponent_b,
            a=tuple(point.hex() for point in commitment.a),
            b=tuple(point.hex() for point in commitment.b),
        )

    def check_points(self) -> None:
        """Raise VerificationError unless all points are ones of the group."""
        with naming(self.name, VerificationError):
            self.commitment.points()


class AdapterManifest(Document):
    """What a contributor offers; whoever makes one, its fields are checked.

    Attributes:
        protocol: Version of the scheme.
        base: What the adapter is for.
        adapter: Its name: letters, digits, points, hyphens and underscores.
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
    """

    protocol: Literal["paris_ray zklora 2"]
    base: Base
    adapter: Annotated[str, Field(pattern="^[A-Za-z0-9_.-]{1,100}$")]
    modules: Annotated[
        tuple[ModuleTerms, ...],
        Field(strict=False, min_length=1, max_length=MAX_MODULES, fail_fast=True),
    ]
    # 3 and 3.0 are two documents: as a float alone, 3 would be written as 3.0, and the digest would
    # not be that of what is signed. `config` checks it.
    lora_alpha: SkipValidation[int | float]
    r: Rank
    use_rslora: bool
    budget_rows: Size
    price: Count
    price_per_row: Count
    sealed_digest: Digest
    sealed_bytes: Annotated[int, Field(ge=1, le=MAX_SEALED_BYTES)]
    key_digest: Digest
    contributor_certificate: Certificate
    escrow_certificate: Certificate | None

    @model_validator(mode="after")
    def _check(self) -> Self:
        alpha, price, count = self.config.lora_alpha, self.price_per_row, len(self.modules)
        require(alpha >= MIN_ALPHA, "lora_alpha", alpha, f"at least {MIN_ALPHA}")
        require(len(self.terms) == count, "modules", list(self.terms), "each name once")
        for terms in self.modules:
            allowed = f"{self.r}, that of the adapter"
            require(terms.r == self.r, f"{terms.name}: r", terms.r, allowed)
        points = 2 * self.r * count
        require(points <= MAX_POINTS, "number of points", points, f"at most {MAX_POINTS}")
        most = MAX_COUNT // self.budget_rows
        require(price <= most, "price_per_row", price, f"at most {most} of so many rows")
        allowed = "0, since escrow_certificate names nobody who could take it"
        require(not price or self.escrow_certificate is not None, "price_per_row", price, allowed)
        return self

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
        return sha256_hex(canonical_json(self.to_json()))

    def module(self, name: str) -> ModuleTerms:
        """Return the terms of a module; raises ProtocolError if the adapter has none such."""
        if name not in self.terms:
            raise ProtocolError(f"module={name!r:.80} is not allowed: the adapter has none")
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
        return SignedDocument.sign(KIND, self.to_json(), contributor)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Return the manifest in a file; raises like `from_signed`."""
        if not path.is_file():
            raise SignatureError(f"{path} is not a file")
        if (size := path.stat().st_size) > MAX_BYTES:
            raise ProtocolError(f"{path} has {size} bytes, allowed: at most {MAX_BYTES} bytes")
        return cls.from_signed(SignedDocument.read(path))

    @classmethod
    def from_signed(cls, signed: SignedDocument) -> Self:
        """Return a manifest that anybody may have made, with everything checked.

        Raises:
            SignatureError: if it is not signed with the key of its contributor's certificate.
            ProtocolError: naming a field that is missing, unknown or not allowed.
            VerificationError: if a commitment is no point of the group.
        """
        # Fields before signature: they say whose it must be, and are no number that JSON lacks.
        manifest = cls.from_json(signed.document)
        signed.check(KIND, manifest.contributor)
        for terms in manifest.modules:
            terms.check_points()
        return manifest
