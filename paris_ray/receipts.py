"""Receipts of adapters that were bought through ZKLoRA: all that serving knows of a purchase.

Beside the `adapter_model.safetensors` of a bought adapter lies `receipt.json`: what its buyer saw
of the trade, signed by the buyer. Its format is checked here to the letter; whether the proofs
and payments that it tells of took place, `jobs.verify_lora` has checked before it signed.
"""

import re
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

from paris_ray.artifacts import canonical_json
from paris_ray.documents import Count, Digest, Size, check_printable, first_problem
from paris_ray.errors import ReceiptError, SignatureError, naming
from paris_ray.folders import Folder
from paris_ray.signatures import SignedDocument, Signer

RECEIPT = "receipt.json"
KIND = "receipt"
ADAPTER_ID = "zklora_adapter_id"  # metadata of the weights of an adapter that was bought
DIGEST = re.compile("[0-9a-f]{64}")
MAX_MODULES = 4096  # of an adapter
MAX_TEXT = 512  # characters


class State(StrEnum):
    """How far a purchase is, as its buyer sees it."""

    COMMITTED = "COMMITTED"  # the manifest is pinned
    INFERRED = "INFERRED"  # both have signed the transcript
    PROVED = "PROVED"  # the proofs are here
    VERIFIED = "VERIFIED"  # they hold
    RELEASED = "RELEASED"  # it is paid, and the key passed the escrow's opening check
    OPENED = "OPENED"  # the weights are open, and are the proved ones
    REFUNDED = "REFUNDED"  # the trade has failed


# What needs proofs.
PROVEN = (State.VERIFIED, State.RELEASED, State.OPENED)
# What a receipt cannot lack when it says that the weights were opened.
OPENED_NEEDS = ("session", "weights_sha256", "config_sha256", "integers_sha256", "modules")


def _check_time(text: str) -> str:
    if datetime.fromisoformat(text).tzinfo is None:
        raise ValueError("it must have its time zone")
    return text


Text = Annotated[str, Field(min_length=1, max_length=MAX_TEXT), AfterValidator(check_printable)]
Number = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_STRICT = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseFacts:
    """The model that the adapter is for.

    Attributes:
        digest: SHA-256 of its safetensors file.
        expert: Number of the expert that it is; None: it is no expert of a bundle.
        router_digest: SHA-256 of the safetensors file of the router; None: there is none.
    """

    __pydantic_config__ = _STRICT

    digest: Digest
    expert: Count | None
    router_digest: Digest | None


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionFacts:
    """The session in which the adapter was tried, and whose proofs hold.

    Attributes:
        session: Its identity.
        transcript_root: What binds all rows, which both sides signed.
    """

    __pydantic_config__ = _STRICT

    session: Digest
    transcript_root: Digest


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleFacts:
    """What the buyer measured of one module.

    Attributes:
        name: Its name in the base.
        d_in: Width of its input.
        r: Rank of its update.
        d_out: Width of its output.
        rows: Rows that the proofs cover, in all.
        proof_bytes: Size of the proofs.
        peak_to_rms: Largest absolute value of the inputs over their root mean square.
        input_error: Relative root-mean-square error of the inputs that were answered: rounded to
            int16, the last bit drawn.
    """

    __pydantic_config__ = _STRICT

    name: Text
    d_in: Size
    r: Size
    d_out: Size
    rows: Count
    proof_bytes: Count
    peak_to_rms: Number
    input_error: Number


@dataclass(frozen=True, kw_only=True, slots=True)
class Receipt:
    """What the buyer of an adapter states of the trade.

    Digests and public keys are 32 bytes in lower-case hexadecimal.

    Attributes:
        protocol: Version of the protocol.
        adapter_id: SHA-256 of the contributor's manifest.
        adapter: What the contributor calls the adapter.
        base: What the adapter is for.
        state: How far the trade came.
        session: The one that was verified, which the trade is about; None before VERIFIED.
        weights_sha256: SHA-256 of `adapter_model.safetensors`; None before OPENED.
        config_sha256: SHA-256 of `adapter_config.json`, which holds the scale; None before OPENED.
        integers_sha256: SHA-256 of the integers that were proved, opened and written into that
            file; None before OPENED.
        price: What was agreed, in units of the ledger.
        contributor: Public key of the seller.
        escrow: Public key of the escrow; None: there is none.
        escrow_statement: The envelope of what the escrow signed about the outcome; None: nothing.
        modules: One entry for every module.
        totals: Measured sums, such as seconds and bytes, by name.
        created: When, in ISO 8601 with the offset of its time zone.
    """

    __pydantic_config__ = _STRICT

    protocol: Text
    adapter_id: Digest
    adapter: Text
    base: BaseFacts
    state: State
    session: SessionFacts | None
    weights_sha256: Digest | None
    config_sha256: Digest | None
    integers_sha256: Digest | None
    price: Count
    contributor: Digest
    escrow: Digest | None
    escrow_statement: dict[str, Any] | None
    modules: Annotated[tuple[ModuleFacts, ...], Field(max_length=MAX_MODULES)]
    totals: dict[Text, Number]
    created: Annotated[str, AfterValidator(_check_time)]

    @classmethod
    def read(cls, folder: Folder, public_key: str | None) -> "Receipt":
        """Return the receipt in a folder.

        Args:
            folder: Where `receipt.json` is.
            public_key: Whose receipts are believed: the buyer's key, which `jobs.verify_lora`
                prints. None believes nobody.

        Raises:
            ReceiptError: if there is none, it is not signed by this key, or a field of it is
                missing, unknown or not allowed.
        """
        source = f"{folder.uri}/{RECEIPT}"
        try:
            signed = _unflatten(folder.read_json(RECEIPT))
            document = signed.check(KIND, public_key)
        # Also the ValueError of values that cannot have been signed: NaN, infinity.
        except ValueError as error:
            raise ReceiptError(f"{source} is not a receipt of yours: {error}") from None
        if public_key is None:
            raise ReceiptError(
                f"{source}: receipt_key is missing, the public key of who signs your receipts; "
                f"this one is signed by receipt_key={signed.public_key}: set that only if the key "
                "is your own, as jobs.verify_lora printed it"
            )
        with naming(source, ReceiptError):
            return _receipt(document)

    def sign(self, signer: Signer) -> dict[str, Any]:
        """Return what `RECEIPT` holds: the statement's fields, and key and signature of its buyer.

        Raises:
            ReceiptError: if a field is not allowed.
        """
        document = asdict(self) | {"modules": [asdict(module) for module in self.modules]}
        with naming(RECEIPT, ReceiptError):
            _receipt(document)
        signed = SignedDocument.sign(KIND, document, signer)
        return {**document, "public_key": signed.public_key, "signature": signed.signature}

    def require_opened(self) -> None:
        """Raise ReceiptError unless the weights were released, and opened as the proved ones."""
        _require(
            self.state == State.OPENED,
            f"state={str(self.state)!r} is not allowed here: 'OPENED' is needed, the adapter paid "
            "for and its weights found to be the proved ones; finish the purchase with "
            "jobs.verify_lora",
        )
        for name in OPENED_NEEDS:
            value = getattr(self, name)
            _require(bool(value), f"{name}={value!r} does not go with state=OPENED")

    def require_files(
        self, adapter_id: str | None, weights_sha256: str, config_sha256: str
    ) -> None:
        """Raise ReceiptError unless these weights were bought, with this scale.

        Args:
            adapter_id: The metadata `ADAPTER_ID` of the weights; None: they have none.
            weights_sha256: SHA-256 of the weights' file.
            config_sha256: SHA-256 of the configuration's file.
        """
        _require_same("adapter_id", self.adapter_id, adapter_id, "the weights' metadata")
        _require_same("weights_sha256", self.weights_sha256, weights_sha256, "the weights")
        _require_same("config_sha256", self.config_sha256, config_sha256, "the configuration")

    def require_base(self, digest: str, where: str) -> None:
        """Raise ReceiptError unless the adapter was bought for these weights.

        Number and router of the expert may have changed since: what an adapter does to it is the
        same.

        Args:
            digest: SHA-256 of the expert's safetensors file.
            where: Which expert that is, for the error.
        """
        _require_same("base.digest", self.base.digest, digest, where)


_RECEIPT = TypeAdapter(Receipt)


def _receipt(document: dict[str, Any]) -> Receipt:
    """Return the receipt that a document is; raises ReceiptError, naming what is not allowed."""
    try:
        receipt = _RECEIPT.validate_json(canonical_json(document))
    except ValidationError as error:
        raise ReceiptError(first_problem(error)) from None
    except ValueError as error:  # NaN, infinity
        raise ReceiptError(f"it holds what JSON cannot: {error}") from None
    for name, count in Counter(module.name for module in receipt.modules).items():
        _require(count == 1, f"modules: {name!r} is there twice")
    _check_escrow(receipt.escrow_statement, receipt.escrow)
    if receipt.state in PROVEN:
        for field in ("session", "modules"):
            _require(bool(getattr(receipt, field)), f"{field} is empty: nothing was verified")
        for module in receipt.modules:
            _require(module.rows > 0, f"modules: {module.name!r} has rows=0: it was not verified")
    return receipt


def _check_escrow(envelope: dict[str, Any] | None, escrow: str | None) -> None:
    """Refuse a statement that its escrow has not signed; what it says is for people to read."""
    if envelope is None:
        return
    _require(escrow is not None, "escrow_statement is there, but escrow=null")
    with naming("escrow_statement", ReceiptError):
        statement = SignedDocument.from_json(envelope)
        statement.check(statement.kind, escrow)


def _unflatten(fields: Any) -> SignedDocument:
    """Return the signed statement in a receipt's file; raises SignatureError if it holds none."""
    if not isinstance(fields, dict):
        raise SignatureError("it is not a mapping")
    document = dict(fields)
    signature = {name: document.pop(name, None) for name in ("public_key", "signature")}
    return SignedDocument.from_json({"kind": KIND, "document": document, **signature})


def _require_same(name: str, stated: object, found: object, where: str) -> None:
    _require(stated == found, f"{name}={stated!r}, but {where}: {found!r:.80}")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ReceiptError(message)
