"""What two parties say to each other, as bytes: frames of raw tensors.

A frame is the length of its header (4 bytes, big-endian), the header as canonical JSON
`{kind, n, fields, tensors: [{name, dtype, shape}]}`, and the tensors' bytes, little-endian, one
after the other.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paris_ray.artifacts import canonical_json
from paris_ray.errors import ProtocolError

DTYPES = {name: np.dtype(name).newbyteorder("<") for name in ("int16", "int64", "uint8", "float32")}
MAX_DIMENSIONS = 4
MAX_NUMBER = 2**63 - 1


class ConnectionLost(ProtocolError):
    """The connection broke, or the other side was too slow; the request may be repeated."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """How large a frame may be.

    Attributes:
        header_bytes: Of its header.
        frame_bytes: Of all of it.
        of_kinds: Of all of it, for some kinds of message, in place of `frame_bytes`.
    """

    header_bytes: int = 2**20
    frame_bytes: int = 2**28
    of_kinds: Mapping[str, int] = field(default_factory=dict)

    def of(self, kind: str) -> int:
        """Return how many bytes a frame of this kind may have."""
        return self.of_kinds.get(kind, self.frame_bytes)


ANSWERS = Sizes()


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a protocol may use, at both ends.

    Strangers, whose TLS handshake is not done, are counted apart from those who are known.

    Attributes:
        requests: How large they may be.
        answers: Likewise.
        strangers: That a server listens to at a time; one more, and the oldest has to go.
        connections: That a server has at a time, strangers aside.
        connections_a_peer: Of these, with the same public key.
        handshake_s: Seconds that a server gives a stranger.
        connect_s: Seconds that a client gives a server, until both are known.
        idle_s: Seconds between two frames.
        frame_s: Seconds from the first byte of a frame to the last.
    """

    requests: Sizes = Sizes(frame_bytes=2**24)
    answers: Sizes = ANSWERS
    strangers: int = 128
    connections: int = 128
    connections_a_peer: int = 8
    handshake_s: float = 3
    connect_s: float = 10
    idle_s: float = 600
    frame_s: float = 120


DEFAULTS = Limits()


@dataclass(frozen=True, eq=False, slots=True)
class Message:
    """A request or an answer.

    Attributes:
        kind: What it is about.
        fields: JSON values.
        tensors: int16, int64, uint8 or float32, with at most four dimensions.
    """

    kind: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, NDArray[Any]] = field(default_factory=dict)


def encode(message: Message, n: int, sizes: Sizes = ANSWERS) -> bytes:
    """Return the frame of a message.

    Args:
        message: What to send.
        n: Number of the request.
        sizes: How large a frame may be.

    Raises:
        ProtocolError: if a tensor has another type, or the frame would be too large.
    """
    tensors = [
        {"name": name, "dtype": tensor.dtype.name, "shape": tensor.shape}
        for name, tensor in message.tensors.items()
    ]
    fields = dict(message.fields)
    header = canonical_json({"kind": message.kind, "n": n, "fields": fields, "tensors": tensors})
    _read_header(header, sizes)  # our own mistakes do not reach the other side
    payloads = [
        tensor.astype(DTYPES[tensor.dtype.name], copy=False).tobytes()
        for tensor in message.tensors.values()
    ]
    return b"".join([len(header).to_bytes(4, "big"), header, *payloads])


def read_message(
    length: bytes | bytearray, read: Callable[[int], bytearray], sizes: Sizes = ANSWERS
) -> tuple[int, Message]:
    """Return the number and message of a frame; sizes are checked before memory is taken.

    Args:
        length: The frame's first four bytes.
        read: Returns exactly so many of the following.
        sizes: How large a frame may be.

    Raises:
        ProtocolError: if the frame is malformed or too large.
    """
    size = int.from_bytes(length, "big")
    if size > sizes.header_bytes:
        raise ProtocolError(f"a header of {size} bytes is not allowed: {sizes.header_bytes}")
    header = _read_header(bytes(read(size)), sizes)
    tensors = {}
    for name, dtype, shape in header["tensors"]:
        little = np.frombuffer(read(_num_bytes(dtype, shape)), dtype).reshape(shape)
        tensors[name] = little.astype(dtype.newbyteorder("="), copy=False)
    return header["n"], Message(header["kind"], header["fields"], tensors)


def _read_header(payload: bytes, sizes: Sizes) -> dict[str, Any]:
    """Return a header whose tensors are `(name, dtype, shape)` and fit into a frame."""
    header = _parse(payload)
    _check(isinstance(header, dict) and header.keys() == {"kind", "n", "fields", "tensors"}, "keys")
    _check(isinstance(header["kind"], str), "kind")
    _check(type(header["n"]) is int and 0 < header["n"] <= MAX_NUMBER, "n")
    _check(isinstance(header["fields"], dict), "fields")
    _check(isinstance(header["tensors"], list), "tensors")
    most = sizes.of(header["kind"])
    tensors = [_read_tensor(tensor, most) for tensor in header["tensors"]]
    _check(len({name for name, _, _ in tensors}) == len(tensors), "names of tensors")
    size = 4 + len(payload) + sum(_num_bytes(dtype, shape) for _, dtype, shape in tensors)
    if len(payload) > sizes.header_bytes or size > most:
        raise ProtocolError(
            f"a frame of {size} bytes with a header of {len(payload)} is not allowed: at most "
            f"{most} and {sizes.header_bytes}"
        )
    return header | {"tensors": tensors}


def _parse(payload: bytes) -> Any:
    try:
        header = json.loads(payload)
        canonical = canonical_json(header) == payload
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"the header of a frame is not JSON: {error}") from None
    if not canonical:  # one spelling only; a repeated key has none
        raise ProtocolError("the header of a frame is not canonical JSON")
    return header


def _read_tensor(tensor: Any, most: int) -> tuple[str, np.dtype[Any], tuple[int, ...]]:
    _check(isinstance(tensor, dict) and tensor.keys() == {"name", "dtype", "shape"}, "tensors")
    name, dtype, shape = tensor["name"], tensor["dtype"], tensor["shape"]
    _check(isinstance(name, str), "name of a tensor")
    _check(isinstance(dtype, str) and dtype in DTYPES, f"dtype of tensor {name!r}")
    _check(isinstance(shape, list) and len(shape) <= MAX_DIMENSIONS, f"shape of tensor {name!r}")
    _check(all(type(n) is int and n >= 0 for n in shape), f"shape of tensor {name!r}")
    # Zeros aside, or numpy could refuse the others.
    _check(math.prod(filter(None, shape)) <= most, f"shape of tensor {name!r}")
    return name, DTYPES[dtype], tuple(shape)


def _check(allowed: bool, what: str) -> None:
    if not allowed:
        raise ProtocolError(f"the {what} in the header of a frame is not allowed")


def _num_bytes(dtype: np.dtype[Any], shape: Sequence[int]) -> int:
    return dtype.itemsize * math.prod(shape)
