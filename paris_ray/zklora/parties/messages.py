"""What parties say to each other, checked: the fields of requests, values, tensors."""

from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from paris_ray.errors import ProtocolError
from paris_ray.signatures import SignedDocument
from paris_ray.zklora.parties.frames import Message

Value = str | int | bytes | SignedDocument
"""What a message of the escrow holds under a name; bytes may be larger than the others."""

Form = tuple[type[np.generic], tuple[int | None, ...]]
"""Type and shape of a tensor."""

MAX_ROWS = 4096  # of one call
MAX_ASKED = 2**23  # bytes of the rows in one request
MAX_CALLS_BYTES = 2**26  # of inputs and answers of all calls of one request

DIGEST = Field(pattern="^[0-9a-f]{64}$")


class _Fields(BaseModel):
    """Fields that one sends, or has been sent.

    Raises:
        ProtocolError: naming each field that is missing, unknown or not allowed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    def __init__(self, /, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            problems = "; ".join(
                ": ".join(filter(None, (".".join(map(str, problem["loc"])), problem["msg"])))
                for problem in error.errors()
            )
            raise ProtocolError(f"{type(self).__name__}: {problems}") from None

    @classmethod
    def read(cls, message: Message) -> Self:
        """Return what a message without tensors asks."""
        tensors_of(message, {})
        return cls(**message.fields)


class OpenRequest(_Fields):
    """Begin a session, or return to one after a lost connection: the nonce names it."""

    adapter_id: str = DIGEST
    nonce_u: str = DIGEST


class CallRequest(_Fields):
    """Ask for the updates of some modules whose inputs are the same rows, the tensor `x`.

    Each module is a call of its own, of the numbers from `seq` on. The answer has the tensors `y`
    and `seeds` of each, after its number among them. `owed` is the running total that is signed
    for, if it has grown.
    """

    session: str = DIGEST
    seq: int
    modules: list[str] = Field(min_length=1)
    exponent: int
    owed: dict[str, Any] | None = None


class CloseRequest(_Fields):
    """Hand over the signed log; the answer is the contributor's signature."""

    session: str = DIGEST
    statement: dict[str, Any]


class EndRequest(_Fields):
    """Break an open session off; what it has paid for stays paid."""

    session: str = DIGEST


class ProveRequest(_Fields):
    """Fix the verifier's nonce, and ask for the proofs; asked again until they are there."""

    session: str = DIGEST
    nonce_v: str = DIGEST


class ReleaseRequest(_Fields):
    """Say that the escrow holds the price, so that the key can go there."""

    session: str = DIGEST


def tensors_of(message: Message, forms: Mapping[str, Form]) -> dict[str, NDArray[Any]]:
    """Return the tensors of a message, if they are those that are expected.

    Args:
        message: What the other side sent; nothing has been built from it yet.
        forms: Of each tensor by its name; a length that is None may be any.

    Raises:
        ProtocolError: if one is missing, of another type or shape, or not expected.
    """
    for name in sorted(message.tensors.keys() | forms.keys()):
        tensor, form = message.tensors.get(name), forms.get(name)
        found = "missing" if tensor is None else f"{tensor.dtype} of shape {tensor.shape}"
        if form is None:
            raise ProtocolError(f"{message.kind[:80]}: tensor {name[:80]!r} is not expected")
        dtype, shape = form
        if tensor is None or tensor.dtype != dtype or not _fits(tensor.shape, shape):
            allowed = ", ".join("any" if length is None else str(length) for length in shape)
            raise ProtocolError(
                f"{message.kind[:80]}: tensor {name!r} is {found}, not {np.dtype(dtype).name} of "
                f"shape ({allowed})"
            )
    return dict(message.tensors)


def _fits(shape: tuple[int, ...], allowed: tuple[int | None, ...]) -> bool:
    return len(shape) == len(allowed) and all(
        most in (None, length) for length, most in zip(shape, allowed, strict=True)
    )


def message_of(kind: str, values: Mapping[str, Value]) -> Message:
    """Return a message of values: bytes are its tensors, all others its fields."""
    tensors = {
        name: np.frombuffer(value, np.uint8)
        for name, value in values.items()
        if isinstance(value, bytes)
    }
    fields = {
        name: value.to_json() if isinstance(value, SignedDocument) else value
        for name, value in values.items()
        if name not in tensors
    }
    return Message(kind, fields, tensors)


def values_of(message: Message, types: Mapping[str, type]) -> list[Any]:
    """Return the values of a message that `message_of` made, if they are those expected.

    Args:
        message: What the other side sent.
        types: Of each value by its name, in the order in which they are returned.

    Raises:
        ProtocolError: if one is missing, of another type, or not expected.
        SignatureError: if one is to be a signed document, and has not the form of any.
    """
    found: dict[str, Any] = dict(message.fields)
    fields = {name: kind for name, kind in types.items() if kind is not bytes}
    if message.fields.keys() != fields.keys():
        raise ProtocolError(f"{message.kind[:80]} has the fields {', '.join(fields) or 'none'}")
    for name, kind in fields.items():
        if kind is SignedDocument:
            found[name] = SignedDocument.from_json(found[name])
        elif type(found[name]) is not kind:
            raise ProtocolError(f"{name} of {message.kind[:80]} must be of type {kind.__name__}")
    tensors = tensors_of(message, dict.fromkeys(types.keys() - fields, (np.uint8, (None,))))
    found |= {name: tensor.tobytes() for name, tensor in tensors.items()}
    return [found[name] for name in types]
