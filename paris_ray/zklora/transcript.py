"""What was said in a session: a log that both parties sign before anything is proved.

Digests, identifiers and nonces are 32 bytes in lower-case hexadecimal.
"""

import hashlib
import json
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from paris_ray.artifacts import canonical_json
from paris_ray.errors import ArtifactError, ProtocolError
from paris_ray.folders import Folder
from paris_ray.receipts import DIGEST
from paris_ray.zklora.fixed_point import MAX_EXPONENT, Int16, Int64

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
        for part in (
            canonical_json(statement),
            self.x.astype("<i2").tobytes(),
            self.y.astype("<i8").tobytes(),
        ):
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


class Transcript:
    """Every call of a session, with its arrays.

    Args:
        calls: Those made so far.

    Raises:
        ProtocolError: as `append` does.
    """

    def __init__(self, calls: Iterable[Call] = ()) -> None:
        self.calls: list[Call] = []
        self._digests: list[bytes] = []
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
        self._digests.append(call.digest)

    @property
    def log(self) -> Log:
        """What is signed of it; raises ProtocolError if there are no calls."""
        calls = zip(self.calls, self._digests, strict=True)
        return Log.of([(call.module, len(call.x), digest) for call, digest in calls])

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


def closing_statement(sid: str, adapter_id: str, log: Log) -> dict[str, Any]:
    """Return what both parties sign, as kind CLOSE, when a session ends."""
    return {"session": sid, "adapter_id": adapter_id, **log._asdict()}
