"""Receipts of adapters that were bought through ZKLoRA: all that serving knows of a purchase.

Beside the `adapter_model.safetensors` of a bought adapter lies `receipt.json`: what its buyer saw
of the trade, signed by the buyer. Its format is checked here to the letter; whether the proofs
and payments that it tells of took place, `jobs.verify_lora` has checked before it signed.
"""

import hashlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, NamedTuple

from paris_ray.errors import ReceiptError, SignatureError
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


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionFacts:
    """The session in which the adapter was tried, and whose proofs hold.

    Attributes:
        session: Its identity.
        transcript_root: What binds all rows, which both sides signed.
    """

    session: str
    transcript_root: str


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

    name: str
    d_in: int
    r: int
    d_out: int
    rows: int
    proof_bytes: int
    peak_to_rms: float
    input_error: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Receipt:
    """What the buyer of an adapter states of the trade.

    Digests and public keys are 32 bytes in lower-case hexadecimal.

    Attributes:
        protocol: Version of the protocol.
        adapter_id: SHA-256 of the contributor's manifest.
        adapter: What the contributor calls the adapter.
        base_digest: SHA-256 of the safetensors file of the base.
        expert: Number of the expert that the base is; None: it is no expert of a bundle.
        router_digest: SHA-256 of the safetensors file of the router; None: there is none.
        state: How far the trade came, a `State`.
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
        source: Where it was read, for messages; no part of the document.
    """

    protocol: str
    adapter_id: str
    adapter: str
    base_digest: str
    expert: int | None
    router_digest: str | None
    state: str
    session: SessionFacts | None
    weights_sha256: str | None
    config_sha256: str | None
    integers_sha256: str | None
    price: int
    contributor: str
    escrow: str | None
    escrow_statement: dict[str, Any] | None
    modules: tuple[ModuleFacts, ...]
    totals: dict[str, float]
    created: str
    source: str = field(default=RECEIPT, compare=False)

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
        return cls._from_document(document, source)

    def sign(self, signer: Signer) -> dict[str, Any]:
        """Return what `RECEIPT` holds: the statement's fields, and key and signature of its buyer.

        Raises:
            ReceiptError: if a field is not allowed.
        """
        document = self._to_document()
        _check_document(document, self.source)
        signed = SignedDocument.sign(KIND, document, signer)
        return {**document, "public_key": signed.public_key, "signature": signed.signature}

    def require_opened(self) -> None:
        """Raise ReceiptError unless the weights were released, and opened as the proved ones."""
        _require(
            self.state == State.OPENED,
            f"{self.source}: state={self.state!r} is not allowed here: 'OPENED' is needed, the "
            "adapter paid for and its weights found to be the proved ones; finish the purchase "
            "with jobs.verify_lora",
        )
        for name in OPENED_NEEDS:
            value = getattr(self, name)
            _require(bool(value), f"{self.source}: {name}={value!r} does not go with state=OPENED")

    def require_files(
        self, adapter_id: str | None, weights_sha256: str, config_sha256: str
    ) -> None:
        """Raise ReceiptError unless these weights were bought, with this scale.

        Args:
            adapter_id: The metadata `ADAPTER_ID` of the weights; None: they have none.
            weights_sha256: SHA-256 of the weights' file.
            config_sha256: SHA-256 of the configuration's file.
        """
        self._require_same("adapter_id", self.adapter_id, adapter_id, "the weights' metadata")
        self._require_same("weights_sha256", self.weights_sha256, weights_sha256, "the weights")
        self._require_same("config_sha256", self.config_sha256, config_sha256, "the configuration")

    def require_base(self, digest: str, where: str) -> None:
        """Raise ReceiptError unless the adapter was bought for these weights.

        Number and router of the expert may have changed since: what an adapter does to it is the
        same.

        Args:
            digest: SHA-256 of the expert's safetensors file.
            where: Which expert that is, for the error.
        """
        self._require_same("base.digest", self.base_digest, digest, where)

    def _require_same(self, name: str, stated: object, found: object, where: str) -> None:
        _require(stated == found, f"{self.source}: {name}={stated!r}, but {where}: {found!r:.80}")

    @classmethod
    def _from_document(cls, document: Mapping[str, Any], source: str) -> "Receipt":
        _check_document(document, source)
        fields = dict(document)
        base, modules, session = (fields.pop(name) for name in ("base", "modules", "session"))
        return cls(
            **fields,
            base_digest=base["digest"],
            expert=base["expert"],
            router_digest=base["router_digest"],
            modules=tuple(ModuleFacts(**module) for module in modules),
            session=None if session is None else SessionFacts(**session),
            source=source,
        )

    def _to_document(self) -> dict[str, Any]:
        document = asdict(self)
        del document["source"]
        document["base"] = {
            "digest": document.pop("base_digest"),
            "expert": document.pop("expert"),
            "router_digest": document.pop("router_digest"),
        }
        document["modules"] = list(document["modules"])
        return document


def _unflatten(fields: Any) -> SignedDocument:
    """Return the signed statement in a receipt's file; raises SignatureError if it holds none."""
    if not isinstance(fields, dict):
        raise SignatureError("it is not a mapping")
    document = dict(fields)
    signature = {name: document.pop(name, None) for name in ("public_key", "signature")}
    return SignedDocument.from_json({"kind": KIND, "document": document, **signature})


def file_sha256(folder: Folder, name: str) -> str:
    """Return the SHA-256 of a file that need not fit into memory, in hexadecimal.

    Raises:
        ArtifactError: if the file does not exist.
    """
    with folder.open(name) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class _Rule(NamedTuple):
    """Which values a field may have."""

    holds: Callable[[Any], bool]
    allowed: str

    def or_null(self) -> "_Rule":
        return _Rule(lambda value: value is None or self.holds(value), f"{self.allowed}, or null")


def _is_text(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_TEXT and value.isprintable()


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 <= value < math.inf


def _is_totals(value: object) -> bool:
    return isinstance(value, dict) and all(_is_text(k) and _is_number(v) for k, v in value.items())


def _is_time(value: object) -> bool:
    try:
        return isinstance(value, str) and datetime.fromisoformat(value).tzinfo is not None
    except ValueError:
        return False


_DIGEST = _Rule(
    lambda value: isinstance(value, str) and DIGEST.fullmatch(value) is not None,
    "64 lower-case hexadecimal digits",
)
_TEXT = _Rule(_is_text, f"a printable text of 1 to {MAX_TEXT} characters")
_COUNT = _Rule(lambda value: type(value) is int and value >= 0, "an integer of at least 0")
_SIZE = _Rule(lambda value: type(value) is int and value >= 1, "an integer of at least 1")
_NUMBER = _Rule(_is_number, "a finite number of at least 0")
_MAPPING = _Rule(lambda value: isinstance(value, dict), "a mapping")

_FIELDS = {
    "protocol": _TEXT,
    "adapter_id": _DIGEST,
    "adapter": _TEXT,
    "base": _MAPPING,
    "state": _Rule(lambda value: value in tuple(State), ", ".join(State)),
    "session": _MAPPING.or_null(),
    "weights_sha256": _DIGEST.or_null(),
    "config_sha256": _DIGEST.or_null(),
    "integers_sha256": _DIGEST.or_null(),
    "price": _COUNT,
    "contributor": _DIGEST,
    "escrow": _DIGEST.or_null(),
    "escrow_statement": _MAPPING.or_null(),
    "modules": _Rule(
        lambda value: isinstance(value, list) and len(value) <= MAX_MODULES,
        f"a list of at most {MAX_MODULES}",
    ),
    "totals": _Rule(_is_totals, "a mapping of names to finite numbers of at least 0"),
    "created": _Rule(_is_time, "an ISO 8601 time with its time zone"),
}
_BASE_FIELDS = {"digest": _DIGEST, "expert": _COUNT.or_null(), "router_digest": _DIGEST.or_null()}
_SESSION_FIELDS = {
    "session": _DIGEST,
    "transcript_root": _DIGEST,
}
_MODULE_FIELDS = {
    "name": _TEXT,
    "d_in": _SIZE,
    "r": _SIZE,
    "d_out": _SIZE,
    "rows": _COUNT,
    "proof_bytes": _COUNT,
    "peak_to_rms": _NUMBER,
    "input_error": _NUMBER,
}


def _check_document(document: Mapping[str, Any], source: str) -> None:
    _check_fields(document, _FIELDS, f"{source}: ")
    _check_fields(document["base"], _BASE_FIELDS, f"{source}: base.")
    if document["session"] is not None:
        _check_fields(document["session"], _SESSION_FIELDS, f"{source}: session.")
    _check_list(document["modules"], _MODULE_FIELDS, "name", f"{source}: modules")
    _check_escrow(document["escrow_statement"], document["escrow"], source)
    if document["state"] in PROVEN:
        for name in ("session", "modules"):
            _require(bool(document[name]), f"{source}: {name} is empty: nothing was verified")
        for i, module in enumerate(document["modules"]):
            _require(module["rows"] > 0, f"{source}: modules[{i}].rows=0: it was not verified")


def _check_fields(document: Mapping[str, Any], rules: Mapping[str, _Rule], where: str) -> None:
    """Refuse fields that are missing or unknown, and values that are not allowed."""
    for name in document:
        known = ", ".join(rules)
        _require(name in rules, f"{where}{name!r:.80} is unknown, known: {known}")
    for name, rule in rules.items():
        _require(name in document, f"{where}{name} is missing")
        value = document[name]
        _require(rule.holds(value), f"{where}{name}={value!r:.80} is not allowed: {rule.allowed}")


def _check_list(parts: Any, rules: Mapping[str, _Rule], key: str, where: str) -> None:
    """Check every part of a list; the values of `key` must differ."""
    seen = set()
    for i, part in enumerate(parts):
        _require(isinstance(part, dict), f"{where}[{i}] is not a mapping")
        _check_fields(part, rules, f"{where}[{i}].")
        _require(part[key] not in seen, f"{where}[{i}].{key}={part[key]!r} is there twice")
        seen.add(part[key])


def _check_escrow(envelope: Any, escrow: str | None, source: str) -> None:
    """Refuse a statement that its escrow has not signed; what it says is for people to read."""
    if envelope is None:
        return
    _require(escrow is not None, f"{source}: escrow_statement is there, but escrow=null")
    try:
        statement = SignedDocument.from_json(envelope)
        statement.check(statement.kind, escrow)
    except ValueError as error:
        raise ReceiptError(f"{source}: escrow_statement: {error}") from None


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ReceiptError(message)
