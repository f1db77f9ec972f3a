"""What user and contributor say to each other: the fields of every request, checked."""

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from paris_ray.errors import ProtocolError
from paris_ray.zklora.parties.frames import Message

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


class OpenRequest(_Fields):
    """Begin a session, or return to one after a lost connection: the nonce names it."""

    adapter_id: str = DIGEST
    nonce_u: str = DIGEST


class CallRequest(_Fields):
    """Ask for the update of some rows, the tensor `x`.

    `owed` is the running total that is signed for, if it has grown.
    """

    session: str = DIGEST
    seq: int
    module: str
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


def tensor_of(message: Message, name: str, dtype: type[np.generic], ndim: int) -> NDArray[Any]:
    """Return a tensor of an answer; raises ProtocolError if it has none of that type."""
    tensor = message.tensors.get(name)
    if tensor is None or tensor.dtype != dtype or tensor.ndim != ndim:
        raise ProtocolError(
            f"the answer {message.kind!r} has no {np.dtype(dtype).name} {name!r} of {ndim} "
            "dimensions"
        )
    return tensor


def seed_of(seed: object) -> bytes:
    """Return the seed of the last bits of an answer; raises ProtocolError if it is none."""
    if not isinstance(seed, str) or re.fullmatch("[0-9a-f]{64}", seed) is None:
        raise ProtocolError("the answer has no seed of 32 bytes, in hexadecimal")
    return bytes.fromhex(seed)
