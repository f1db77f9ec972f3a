"""Calls of a session, and the log of them that both parties sign before anything is proved."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from paris_ray.artifacts import canonical_json
from paris_ray.errors import ProtocolError
from paris_ray.zklora.fixed_point import MAX_EXPONENT, Int16, Int64

LABEL = "paris_ray zklora"
MAX_SEQ = 2**31 - 1
MAX_ROWS = 4096  # of one call
CLOSE = "close"  # the kind of document that both parties sign


def check_request(seq: object, module: object, exponent: object, x: NDArray[Any]) -> None:
    """Raise ProtocolError unless these may be what a user sends in one call."""
    if type(seq) is not int or not 0 <= seq <= MAX_SEQ:
        raise ProtocolError(f"seq={seq!r} is not allowed: an integer from 0 to {MAX_SEQ}")
    if not isinstance(module, str) or not module.isprintable():
        raise ProtocolError(f"module={module!r} is not the name of a module")
    if type(exponent) is not int or abs(exponent) > MAX_EXPONENT:
        raise ProtocolError(f"exponent={exponent!r} is not allowed: at most {MAX_EXPONENT}")
    _check_rows("x", x, np.int16)


def _check_rows(name: str, rows: NDArray[Any], dtype: type[np.generic]) -> None:
    if rows.dtype != dtype or rows.ndim != 2 or rows.size == 0:
        raise ProtocolError(
            f"{name} must be a matrix of {np.dtype(dtype).name} with rows, "
            f"not {rows.dtype} with shape {rows.shape}"
        )


@dataclass(frozen=True, eq=False, slots=True)
class Call:
    """One question about one module, and its answer.

    Attributes:
        seq: Number in the session, from 0.
        module: Name of the module.
        exponent: The inputs are `x * 2^-exponent`.
        x: `(rows, d_in)` int16.
        y: `(rows, d_out)` int64.

    Raises:
        ProtocolError: if a type, range or shape is not allowed.
    """

    seq: int
    module: str
    exponent: int
    x: Int16
    y: Int64

    def __post_init__(self) -> None:
        check_request(self.seq, self.module, self.exponent, self.x)
        _check_rows("y", self.y, np.int64)
        if len(self.x) != len(self.y):
            raise ProtocolError(f"call {self.seq} has {len(self.x)} rows, {len(self.y)} answers")

    @property
    def payload(self) -> tuple[bytes, bytes]:
        """The numbers of x and of y, little-endian."""
        return self.x.astype("<i2").tobytes(), self.y.astype("<i8").tobytes()

    @property
    def digest(self) -> bytes:
        """SHA-256 of all of it: each part comes after its length in 8 bytes, little-endian."""
        statement = {
            "label": f"{LABEL} call",
            "seq": self.seq,
            "module": self.module,
            "exponent": self.exponent,
            "shapes": {"x": self.x.shape, "y": self.y.shape},
        }
        digest = hashlib.sha256()
        for part in (canonical_json(statement), *self.payload):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
        return digest.digest()


class Log(NamedTuple):
    """What is signed of a session.

    Attributes:
        root: What binds all calls and their order, in hexadecimal: SHA-256 over their digests.
        calls: How many there are.
        rows: Number of rows of each module.
    """

    root: str
    calls: int
    rows: dict[str, int]

    @classmethod
    def of(cls, calls: Sequence[tuple[str, int, bytes]]) -> "Log":
        """Return the log of some calls.

        Args:
            calls: Module, number of rows and digest of each.

        Raises:
            ProtocolError: if there are none: nothing can be proved of nothing.
        """
        if not calls:
            raise ProtocolError("an empty log has no root: there is nothing to prove")
        digest, counts = hashlib.sha256(f"{LABEL} log".encode()), dict[str, int]()
        for module, rows, call in calls:
            digest.update(call)
            counts[module] = counts.get(module, 0) + rows
        return cls(digest.hexdigest(), len(calls), counts)


def closing_statement(sid: str, adapter_id: str, log: Log) -> dict[str, Any]:
    """Return what both parties sign, as kind CLOSE, when a session ends."""
    return {"session": sid, "adapter_id": adapter_id, **log._asdict()}
