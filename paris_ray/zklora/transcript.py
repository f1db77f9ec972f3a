"""What was said in a session: a Merkle log that both parties sign before anything is proved.

Digests, identifiers and nonces are 32 bytes in lower-case hexadecimal; leaves and paths are bytes.
"""

import hashlib
import itertools
import json
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from paris_ray.artifacts import Folder, canonical_json
from paris_ray.errors import ArtifactError, ProtocolError
from paris_ray.receipts import DIGEST, Mode
from paris_ray.zklora.fixed_point import MAX_EXPONENT, Int16, Int64
from paris_ray.zklora.merkle import MerkleTree, hash_leaf

LABEL = "paris_ray zklora"
MAX_SEQ = 2**31 - 1
CLOSE = "close"  # the kind of document that both parties sign


def new_nonce() -> str:
    """Return 32 fresh random bytes in hexadecimal."""
    return secrets.token_hex(32)


def check_digest(name: str, value: object) -> str:
    """Return a digest, identifier or nonce.

    Raises:
        ProtocolError: if it is not 32 bytes in lower-case hexadecimal.
    """
    if not isinstance(value, str) or not DIGEST.fullmatch(value):
        raise ProtocolError(f"{name}={value!r} is not 32 bytes in lower-case hexadecimal")
    return value


def session_id(protocol: str, adapter_id: str, base_digest: str, nonce_u: str, nonce_c: str) -> str:
    """Return the name of a session that neither party can choose alone.

    Args:
        protocol: Version, as the manifest states it.
        adapter_id: Digest of the manifest.
        base_digest: Digest of the base model's weights.
        nonce_u: The user's nonce.
        nonce_c: The contributor's nonce.

    Raises:
        ProtocolError: if one of the last four is not 32 bytes in hexadecimal.
    """
    names = {
        "adapter_id": adapter_id,
        "base_digest": base_digest,
        "nonce_u": nonce_u,
        "nonce_c": nonce_c,
    }
    for name, value in names.items():
        check_digest(name, value)
    statement = {"label": f"{LABEL} session", "protocol": protocol, **names}
    return hashlib.sha256(canonical_json(statement)).hexdigest()


def proof_context(adapter_id: str, sid: str, root: str, module: str, nonce_v: str) -> bytes:
    """Return what every challenge of a module's proof depends on.

    Args:
        adapter_id: Digest of the manifest.
        sid: The session.
        root: Root of the log that both parties signed.
        module: Name of the module.
        nonce_v: Drawn by the user after the signatures, so that no proof can be made before them.

    Raises:
        ProtocolError: if one of the digests is not 32 bytes in hexadecimal.
    """
    names = {"adapter_id": adapter_id, "session": sid, "root": root, "nonce_v": nonce_v}
    for name, value in names.items():
        check_digest(name, value)
    return canonical_json({"label": f"{LABEL} proof", "module": module, **names})


def drawing_digest(request: Mapping[str, Any], pictures: NDArray[np.uint8]) -> str:
    """Return what binds the pictures of an audit to what was asked for, in hexadecimal.

    Args:
        request: All that was asked for, as JSON values.
        pictures: `(n, S, S, 3)`.
    """
    statement = {"label": f"{LABEL} drawing", "request": request, "shape": pictures.shape}
    header = canonical_json(statement)
    framed = len(header).to_bytes(8, "little") + header + pictures.tobytes()
    return hashlib.sha256(framed).hexdigest()


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
    def leaf(self) -> bytes:
        """The call's leaf in the log."""
        header = {"seq": self.seq, "module": self.module, "exponent": self.exponent}
        return _leaf("call", header, self.x, self.y)


def row_leaf(module: str, call: int, row: int, exponent: int, x_row: Int16, y_row: Int64) -> bytes:
    """Return the leaf of one audited row.

    Args:
        module: Name of the module.
        call: How often the module was called before.
        row: Number of the row among all rows of the module in the session, from 0.
        exponent: The inputs are `x_row * 2^-exponent`.
        x_row: `(d_in,)` int16.
        y_row: `(d_out,)` int64.
    """
    header = {"module": module, "call": call, "row": row, "exponent": exponent}
    return _leaf("row", header, x_row, y_row)


def _leaf(kind: str, header: dict[str, Any], x: NDArray[Any], y: NDArray[Any]) -> bytes:
    shapes = {"x": x.shape, "y": y.shape}
    statement = {"label": f"{LABEL} {kind}", "shapes": shapes, **header}
    return hash_leaf(
        canonical_json(statement), x.astype("<i2").tobytes(), y.astype("<i8").tobytes()
    )


class Transcript:
    """Every call of a session in exact mode, with its arrays.

    Args:
        calls: Those made so far.

    Raises:
        ProtocolError: as `append` does.
    """

    mode = Mode.EXACT
    drawing = None

    def __init__(self, calls: Iterable[Call] = ()) -> None:
        self.calls: list[Call] = []
        self._leaves: list[bytes] = []
        self._widths: dict[str, tuple[int, int]] = {}
        for call in calls:
            self.append(call)

    def append(self, call: Call) -> None:
        """Add the next call.

        Raises:
            ProtocolError: if its number is not the next, or its widths are not the module's.
        """
        if call.seq != len(self.calls):
            raise ProtocolError(f"seq={call.seq} is not allowed: the next is {len(self.calls)}")
        widths = call.x.shape[1], call.y.shape[1]
        if widths != (known := self._widths.setdefault(call.module, widths)):
            raise ProtocolError(f"call {call.seq}: {call.module} has widths {known}, not {widths}")
        self.calls.append(call)
        self._leaves.append(call.leaf)

    @property
    def root(self) -> str:
        """Root of the tree over all calls; raises ProtocolError if there are none."""
        return MerkleTree(self._leaves).root

    @property
    def num_leaves(self) -> int:
        """Number of calls."""
        return len(self._leaves)

    @property
    def counts(self) -> dict[str, int]:
        """Number of rows of each module."""
        counts: dict[str, int] = {}
        for call in self.calls:
            counts[call.module] = counts.get(call.module, 0) + len(call.x)
        return counts

    def rows(self, module: str) -> tuple[Int16, Int64]:
        """Return all inputs and answers of a module, stacked in the order of the calls.

        Returns:
            `(rows, d_in)` int16 and `(rows, d_out)` int64.

        Raises:
            ProtocolError: if the module was never called.
        """
        calls = [call for call in self.calls if call.module == module]
        if not calls:
            raise ProtocolError(f"module={module!r} was never called in this session")
        return np.concatenate([c.x for c in calls]), np.concatenate([c.y for c in calls])

    def save(self, path: Path) -> None:
        """Write all calls into one safetensors file, which appears complete or not at all."""
        header = [{"module": call.module, "exponent": call.exponent} for call in self.calls]
        tensors: dict[str, NDArray[Any]] = {}
        for call in self.calls:
            tensors |= {f"{call.seq}.x": call.x, f"{call.seq}.y": call.y}
        metadata = {"calls": canonical_json(header).decode()}
        with Folder(path.parent).writing(path.name) as temporary:
            save_file(tensors, temporary, metadata)

    @classmethod
    def load(cls, path: Path) -> "Transcript":
        """Return the transcript in a file.

        Raises:
            ArtifactError: if the file is missing or holds none.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                return cls(
                    Call(
                        seq,
                        call["module"],
                        call["exponent"],
                        file.get_tensor(f"{seq}.x"),
                        file.get_tensor(f"{seq}.y"),
                    )
                    for seq, call in enumerate(json.loads(file.metadata()["calls"]))
                )
        except (OSError, SafetensorError, ValueError, LookupError, TypeError) as error:
            raise ArtifactError(f"{path} holds no transcript: {error}") from None


class RowLog:
    """Every row of a session in audit mode: leaves alone, module by module in order of name."""

    mode = Mode.AUDIT
    drawing = None  # only the summary of a log knows: see `LogSummary.of`

    def __init__(self) -> None:
        self._leaves: dict[str, list[bytes]] = {}
        self._calls: dict[str, int] = {}
        self._tree: MerkleTree | None = None

    def append(self, module: str, exponent: int, x: Int16, y: Int64) -> tuple[int, int]:
        """Add the rows of one call of a module.

        Args:
            module: Its name.
            exponent: The inputs are `x * 2^-exponent`.
            x: `(rows, d_in)` int16.
            y: `(rows, d_out)` int64.

        Returns:
            Number of the call, and of its first row, each among the module's.

        Raises:
            ProtocolError: if a type, range or shape is not allowed.
        """
        number = self._calls.get(module, 0)
        call = Call(number, module, exponent, x, y)
        leaves = self._leaves.setdefault(module, [])
        first = len(leaves)
        for x_row, y_row in zip(call.x, call.y, strict=True):
            leaves.append(row_leaf(module, number, len(leaves), exponent, x_row, y_row))
        self._calls[module] = number + 1
        self._tree = None
        return number, first

    @property
    def tree(self) -> MerkleTree:
        """The tree over all rows; raises ProtocolError if there are none."""
        if self._tree is None:
            leaves = (self._leaves[module] for module in sorted(self._leaves))
            self._tree = MerkleTree(list(itertools.chain.from_iterable(leaves)))
        return self._tree

    @property
    def root(self) -> str:
        """Root of the tree; raises ProtocolError if there are no rows."""
        return self.tree.root

    @property
    def num_leaves(self) -> int:
        """Number of rows of all modules."""
        return sum(self.counts.values())

    @property
    def counts(self) -> dict[str, int]:
        """Number of rows of each module."""
        return {module: len(leaves) for module, leaves in self._leaves.items()}

    def prove_inclusion(self, module: str, row: int) -> list[bytes]:
        """Return the path of a module's row; raises ProtocolError if there is no such row."""
        return self.tree.path(leaf_index(self.counts, module, row))


class LogSummary(NamedTuple):
    """What is signed of a log.

    Attributes:
        mode: `exact` or `audit`.
        root: Of its tree.
        num_leaves: Calls, or rows in audit mode.
        counts: Number of rows of each module.
        drawing: `drawing_digest(...)` of an audit's request and pictures; None in exact mode.
    """

    mode: str
    root: str
    num_leaves: int
    counts: dict[str, int]
    drawing: str | None = None

    @classmethod
    def of(cls, log: "Log", drawing: str | None = None) -> "LogSummary":
        """Return the summary of a log and a drawing; raises ProtocolError if the log is empty."""
        return cls(log.mode, log.root, log.num_leaves, log.counts, drawing)


def leaf_index(counts: Mapping[str, int], module: str, row: int) -> int:
    """Return the place of a module's row in a `RowLog`.

    Args:
        counts: Number of rows of each module, as signed.
        module: Name of the module.
        row: Number among the module's rows.

    Raises:
        ProtocolError: if there is no such row.
    """
    if not 0 <= row < counts.get(module, 0):
        raise ProtocolError(f"row={row} of module={module!r} is not in the log")
    return sum(count for name, count in counts.items() if name < module) + row


class Log(Protocol):
    """What a closing statement says of a `Transcript` or a `RowLog`, or of another's."""

    @property
    def mode(self) -> str:
        """`exact` or `audit`."""

    @property
    def root(self) -> str:
        """Root of the tree."""

    @property
    def num_leaves(self) -> int:
        """Number of its leaves."""

    @property
    def counts(self) -> dict[str, int]:
        """Number of rows of each module."""

    @property
    def drawing(self) -> str | None:
        """Digest of an audit's request and pictures."""


def closing_statement(sid: str, adapter_id: str, log: Log) -> dict[str, Any]:
    """Return what both parties sign, as kind CLOSE, when a session ends.

    Raises:
        ProtocolError: if the log is empty.
    """
    return {
        "session": sid,
        "adapter_id": adapter_id,
        "mode": log.mode,
        "root": log.root,
        "leaves": log.num_leaves,
        "rows": log.counts,
        "drawing": log.drawing,
    }


def challenge_rows(nonce_v: str, root: str, module: str, total_rows: int, m: int) -> list[int]:
    """Return which rows of a module are opened: a uniform subset that nobody could foresee.

    Args:
        nonce_v: Drawn by the user after both signed.
        root: Of the log.
        module: Name of the module.
        total_rows: Number of its rows.
        m: How many are opened; all, if there are no more.

    Returns:
        `min(m, total_rows)` distinct row numbers, ascending.

    Raises:
        ProtocolError: if a digest is malformed, or a number is below 1.

    Source: Floyd's algorithm, Bentley and Floyd 1987 (Programming pearls: a sample of brilliance).
    """
    check_digest("nonce_v", nonce_v)
    check_digest("root", root)
    if min(total_rows, m) < 1:
        raise ProtocolError(f"total_rows={total_rows}, m={m} is not allowed: each at least 1")
    names = {"nonce_v": nonce_v, "root": root, "module": module}
    words = _words(canonical_json({"label": f"{LABEL} rows", **names}))
    chosen: set[int] = set()
    for last in range(total_rows - min(m, total_rows), total_rows):
        row = _below(last + 1, words)
        chosen.add(last if row in chosen else row)
    return sorted(chosen)


def _words(seed: bytes) -> Iterator[int]:
    """Yield uniform 64-bit numbers."""
    for counter in itertools.count():
        block = hashlib.shake_256(counter.to_bytes(8, "little") + seed).digest(8)
        yield int.from_bytes(block, "little")


def _below(bound: int, words: Iterator[int]) -> int:
    """Return a uniform number below the bound: the uneven end of the range is drawn again."""
    even = 2**64 - 2**64 % bound
    return next(word for word in words if word < even) % bound
