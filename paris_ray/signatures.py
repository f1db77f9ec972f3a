"""Signed JSON: what parties that do not trust each other state and can be held to.

Ed25519 over a label and the canonical form of a document; the label keeps a statement of one kind
from being shown as one of another.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from paris_ray.artifacts import canonical_json
from paris_ray.errors import SignatureError
from paris_ray.json_documents import load_json

LABEL = b"paris_ray signed document\0"
# Of the curve of Ed25519 (RFC 8032, section 5.1): y is a number below FIELD, and these belong to
# points whose eightfold is the neutral element. A key that is one of them has signatures that fit
# every document; libraries accept it.
FIELD = 2**255 - 19
_EIGHTH = 0x05FC536D880238B13933C6D305ACDFD5F098EFF289F4C345B027B2C28F95E826
SMALL_ORDER = frozenset({0, 1, FIELD - 1, _EIGHTH, FIELD - _EIGHTH})
MAX_TOLD = 80  # characters of a stranger's word, in an error
KEY, SIGNATURE = re.compile("[0-9a-f]{64}"), re.compile("[0-9a-f]{128}")


class Signer(Protocol):
    """Whoever holds an Ed25519 key."""

    @property
    def public_key(self) -> str:
        """The 32 bytes of the public key, in hexadecimal."""

    def sign(self, message: bytes) -> bytes:
        """Return the 64 bytes of a signature."""


@dataclass(frozen=True, slots=True)
class SignedDocument:
    """A JSON document and who signed it.

    Attributes:
        kind: What it states, such as `manifest`.
        document: The statement: JSON values alone.
        public_key: Who says that they signed it: 32 bytes in hexadecimal.
        signature: 64 bytes in hexadecimal.
    """

    kind: str
    document: dict[str, Any]
    public_key: str
    signature: str

    @classmethod
    def sign(cls, kind: str, document: dict[str, Any], signer: Signer) -> "SignedDocument":
        """Return a document that is signed by `signer`."""
        signature = signer.sign(_message(kind, document)).hex()
        return cls(kind, document, signer.public_key, signature)

    def check(self, kind: str, public_key: str | None = None) -> dict[str, Any]:
        """Return the document, if this kind of statement was signed by this key.

        Args:
            kind: The kind that is expected.
            public_key: Whose signature is expected; None: that of whom the document names.

        Raises:
            SignatureError: if it is of another kind, by somebody else, was changed, or holds what
                JSON cannot.
        """
        if self.kind != kind:
            told = f"kind={self.kind[:MAX_TOLD]!r}"
            raise SignatureError(f"{told} is not allowed here: {kind!r} is expected")
        if public_key not in (None, self.public_key):
            raise SignatureError(f"the {kind} is signed by {self.public_key}, not by {public_key}")
        try:
            message = _message(kind, self.document)
        except ValueError as error:  # NaN, infinity, half a surrogate pair
            raise SignatureError(f"the {kind} holds what JSON cannot: {error}") from None
        verify_signature(self.public_key, message, self.signature, kind)
        return self.document

    def to_json(self) -> dict[str, Any]:
        """Return the envelope as JSON values."""
        return {
            "kind": self.kind,
            "document": self.document,
            "public_key": self.public_key,
            "signature": self.signature,
        }

    @classmethod
    def from_json(cls, envelope: Any) -> "SignedDocument":
        """Return the document of an envelope; nothing is checked yet but its form.

        Raises:
            SignatureError: if it is no such envelope.
        """
        fields = {"kind": str, "document": dict, "public_key": str, "signature": str}
        if not isinstance(envelope, dict) or envelope.keys() != fields.keys():
            raise SignatureError(f"a signed document has the fields {', '.join(fields)}")
        for name, kind in fields.items():
            if not isinstance(envelope[name], kind):
                raise SignatureError(f"{name} of a signed document must be a {kind.__name__}")
        _check_hexadecimal(envelope["public_key"], envelope["signature"], "signed document")
        return cls(**envelope)

    @classmethod
    def read(cls, path: Path) -> "SignedDocument":
        """Return the document in a file.

        Raises:
            SignatureError: if the file holds none, or does not exist.
        """
        try:
            return cls.from_json(load_json(path.read_bytes()))
        except (OSError, ValueError) as error:
            raise SignatureError(f"{path} holds no signed document: {error}") from None


def check_public_key(public_key: bytes) -> None:
    """Raise SignatureError unless signatures of this key, 32 bytes, say something.

    A point of small order is nobody's key, and each point has one encoding.
    """
    y = int.from_bytes(public_key, "little") % 2**255  # above it is the sign of x
    if y >= FIELD or y in SMALL_ORDER:
        raise SignatureError(f"the public key {public_key.hex()} is a point that fits everything")


def verify_signature(public_key: str, message: bytes, signature: str, what: str) -> None:
    """Raise SignatureError unless the key, in hexadecimal, signed the message.

    Args:
        public_key: 32 bytes in hexadecimal.
        message: What was signed.
        signature: 64 bytes in hexadecimal.
        what: What the message is called in the error.
    """
    _check_hexadecimal(public_key, signature, what)
    check_public_key(bytes.fromhex(public_key))
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key))
        key.verify(bytes.fromhex(signature), message)
    except (InvalidSignature, ValueError):
        raise SignatureError(f"the signature of the {what} is not one of {public_key}") from None


def _check_hexadecimal(public_key: str, signature: str, what: str) -> None:
    # One spelling only: equal statements are equal documents.
    if not KEY.fullmatch(public_key) or not SIGNATURE.fullmatch(signature):
        raise SignatureError(f"the {what} has no key and signature in lower-case hexadecimal")


def _message(kind: str, document: dict[str, Any]) -> bytes:
    return LABEL + kind.encode() + b"\0" + canonical_json(document)
