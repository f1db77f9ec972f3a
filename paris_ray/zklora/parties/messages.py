"""What parties say to each other: the values of every request, by name, and how they are checked.

Texts, numbers, lists and signed documents are fields of a message; bytes and arrays are tensors.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paris_ray.documents import printable
from paris_ray.errors import ProtocolError
from paris_ray.signatures import SignedDocument
from paris_ray.zklora.parties.frames import Message

Form = tuple[type[np.generic], tuple[int | None, ...]]
"""Type and shape of a tensor; a length that is None may be any."""

Value = str | int | bytes | SignedDocument

Types = Mapping[str, type | Form]
"""Of the values of a message; those of `object` are JSON that whoever takes them must check."""

MAX_ASKED = 2**23  # bytes of the rows in one request
MAX_CALLS_BYTES = 2**26  # of inputs and answers of all calls of one request

BYTES: Form = (np.uint8, (None,))

# What a user asks a contributor for.
REQUESTS: Mapping[str, Types] = {
    # Begin a session, or return to one after a lost connection: the nonce names it.
    "open": {"adapter_id": str, "nonce_u": str},
    # Ask for the updates of some modules whose inputs are the same rows. Each module is a call of
    # its own, of the numbers from `seq` on. The answer has the tensors `y` and `seeds` of each,
    # after its number among them. `owed` is the running total that is signed for, if it has grown.
    "call": {
        "session": str,
        "seq": int,
        "modules": list,
        "exponent": int,
        "owed": object,
        "x": (np.int16, (None, None)),
    },
    # Hand over the signed log; the answer is the contributor's signature.
    "close": {"session": str, "statement": SignedDocument},
    # Break an open session off; what it has paid for stays paid.
    "end": {"session": str},
    # Fix the verifier's nonce, and ask for the proofs; asked again until they are there.
    "prove": {"session": str, "nonce_v": str},
    # Say that the escrow holds the price, so that the key can go there.
    "release": {"session": str},
}

# What the operations of an escrow are given, in the order in which they take it after their caller.
OPERATIONS: Mapping[str, Types] = {
    "list_adapter": {"manifest": bytes},
    "upload": {"adapter_id": str, "piece": int, "content": bytes},
    "open_trade": {
        "adapter_id": str,
        "session": str,
        "nonce_user": str,
        "nonce_contributor": str,
        "deposit_rows": int,
    },
    "owe": {"session": str, "by_buyer": SignedDocument},
    "pay": {"session": str},
    "deposit_key": {"session": str, "key": bytes},
    "key": {"session": str},
    "sealed": {"session": str, "piece": int},
    "opened": {"session": str},
    "trade": {"session": str},
    "statement": {"session": str},
    "balance": {},
}


def message_of(kind: str, values: Mapping[str, Value]) -> Message:
    """Return a message of values."""
    fields: dict[str, Any] = {}
    tensors: dict[str, NDArray[Any]] = {}
    for name, value in values.items():
        if isinstance(value, bytes):
            tensors[name] = np.frombuffer(value, np.uint8)
        else:
            fields[name] = value.to_json() if isinstance(value, SignedDocument) else value
    return Message(kind, fields, tensors)


def values_of(message: Message, types: Types) -> list[Any]:
    """Return the values of a message that `message_of` made, if they are those expected.

    Args:
        message: What the other side sent.
        types: Of each value by its name, in the order in which they are returned.

    Raises:
        ProtocolError: if one is missing, of another type, not expected, or text or a number that
            no file holds.
        SignatureError: if one is to be a signed document, and has not the form of any.
    """
    forms = {name: BYTES if kind is bytes else kind for name, kind in types.items()}
    tensors = tensors_of(message, {n: form for n, form in forms.items() if isinstance(form, tuple)})
    names, where = types.keys() - tensors.keys(), _kind(message)
    if message.fields.keys() != names:
        raise ProtocolError(f"{where} has the fields {', '.join(sorted(names)) or 'none'}")

    def value(name: str, kind: type | Form) -> Any:
        if kind is bytes or isinstance(kind, tuple):
            return tensors[name].tobytes() if kind is bytes else tensors[name]
        field = message.fields[name]
        if kind is SignedDocument:
            return SignedDocument.from_json(field)
        if kind is not object and type(field) is not kind:
            raise ProtocolError(f"{name} of {where} must be of type {kind.__name__}")
        if isinstance(field, str | int) and not _can_be_stored(field):
            raise ProtocolError(f"{name} of {where} must be text in UTF-8 or a number of 64 bits")
        return field

    return [value(name, kind) for name, kind in types.items()]


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
            raise ProtocolError(f"{_kind(message)}: tensor {name[:80]!r} is not expected")
        dtype, shape = form
        if tensor is None or tensor.dtype != dtype or not _fits(tensor.shape, shape):
            allowed = ", ".join("any" if length is None else str(length) for length in shape)
            raise ProtocolError(
                f"{_kind(message)}: tensor {name!r} is {found}, not {np.dtype(dtype).name} of "
                f"shape ({allowed})"
            )
    return dict(message.tensors)


def _can_be_stored(value: str | int) -> bool:
    """Return whether files and tables can hold a value of JSON, which knows half surrogates."""
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    return not any("\ud800" <= character <= "\udfff" for character in value)


def _kind(message: Message) -> str:
    """Return the kind of a message for an error: an answer's is the other side's own words."""
    return printable(message.kind, 80)


def _fits(shape: tuple[int, ...], allowed: tuple[int | None, ...]) -> bool:
    return len(shape) == len(allowed) and all(
        most in (None, length) for length, most in zip(shape, allowed, strict=True)
    )
