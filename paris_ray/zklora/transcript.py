"""What was said in a session, in a file, and what the session and its proofs are named by.

Digests, identifiers and nonces are 32 bytes in lower-case hexadecimal.
"""

import os
import secrets
import tempfile
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from paris_ray.artifacts import canonical_json, sha256_hex
from paris_ray.documents import Document, Size
from paris_ray.errors import ArtifactError, ProtocolError
from paris_ray.folders import Folder
from paris_ray.receipts import DIGEST
from paris_ray.zklora.fixed_point import Int16, Int64
from paris_ray.zklora.log import LABEL, Call, Log

ROWS, CALLS = "rows.bin", "calls.json"  # of a transcript in a folder


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


def _digests(**named: object) -> dict[str, str]:
    return {name: check_digest(name, value) for name, value in named.items()}


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
    names = _digests(
        adapter_id=adapter_id, base_digest=base_digest, nonce_u=nonce_u, nonce_c=nonce_c
    )
    statement = {"label": f"{LABEL} session", "protocol": protocol, **names}
    return sha256_hex(canonical_json(statement))


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
    names = _digests(adapter_id=adapter_id, session=sid, root=root, nonce_v=nonce_v)
    return canonical_json({"label": f"{LABEL} proof", "module": module, **names})


class Entry(Document):
    """A call whose arrays lie in a file.

    Attributes:
        module: Name of the module.
        exponent: Of the inputs.
        rows: How many there are.
        d_in: Width of the inputs.
        d_out: Width of the answers.
    """

    module: str
    exponent: int
    rows: Size
    d_in: Size
    d_out: Size

    @property
    def sizes(self) -> tuple[int, int]:
        """Bytes of the inputs, and of the answers after them."""
        return 2 * self.rows * self.d_in, 8 * self.rows * self.d_out


class _Kept(NamedTuple):
    """A call, where its bytes begin in the file, and its digest."""

    entry: Entry
    start: int
    digest: bytes


class Transcript:
    """Every call of a session. Its arrays lie in a file, once; none is kept in memory.

    Args:
        calls: Those made so far.
        path: The file, begun anew; None: one without a name, which ends with the transcript.

    Raises:
        ProtocolError: as `append` does.
    """

    def __init__(self, calls: Iterable[Call] = (), path: Path | None = None) -> None:
        if path is None:
            descriptor, name = tempfile.mkstemp()
            Path(name).unlink()
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)  # who was interrupted may still write into the old one
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        self._use(descriptor)
        self._kept: list[_Kept] = []
        self._widths: dict[str, tuple[int, int]] = {}
        for call in calls:
            self.append(call)

    def _use(self, descriptor: int) -> None:
        self._file = descriptor
        weakref.finalize(self, os.close, descriptor)

    def __len__(self) -> int:
        return len(self._kept)

    def append(self, call: Call) -> None:
        """Add the next call.

        Raises:
            ProtocolError: if its number is not the next, or its widths are not the module's.
        """
        (rows, d_in), d_out = call.x.shape, call.y.shape[1]
        entry = Entry(module=call.module, exponent=call.exponent, rows=rows, d_in=d_in, d_out=d_out)
        start, both = self._check_next(call.seq, entry), b"".join(call.payload)
        if os.pwrite(self._file, both, start) != len(both):
            raise ArtifactError(f"call {call.seq} could not be written: is the disk full?")
        self._kept.append(_Kept(entry, start, call.digest))

    def _check_next(self, seq: int, entry: Entry) -> int:
        """Return where a call begins in the file; raises ProtocolError unless it is the next."""
        if seq != len(self):
            raise ProtocolError(f"seq={seq} is not allowed: the next is {len(self)}")
        widths = entry.d_in, entry.d_out
        if widths != (known := self._widths.setdefault(entry.module, widths)):
            raise ProtocolError(f"call {seq}: {entry.module} has widths {known}, not {widths}")
        return self._kept[-1].start + sum(self._kept[-1].entry.sizes) if self._kept else 0

    @property
    def log(self) -> Log:
        """What is signed of it; raises ProtocolError if there are no calls."""
        return Log.of([(kept.entry.module, kept.entry.rows, kept.digest) for kept in self._kept])

    def rows(self, module: str) -> tuple[Int16, Int64]:
        """Return all inputs and answers of a module, stacked in the order of the calls.

        Returns:
            `(rows, d_in)` int16 and `(rows, d_out)` int64.

        Raises:
            ProtocolError: if the module was never called.
        """
        found = [self._read(*kept[:2]) for kept in self._kept if kept.entry.module == module]
        if not found:
            raise ProtocolError(f"module={module!r} was never called in this session")
        x, y = zip(*found, strict=True)
        return np.concatenate(x), np.concatenate(y)

    def call(self, seq: int) -> Call:
        """Return a call with its arrays."""
        entry, start, _ = self._kept[seq]
        return Call(seq, entry.module, entry.exponent, *self._read(entry, start))

    def _read(self, entry: Entry, start: int) -> tuple[Int16, Int64]:
        size, rest = entry.sizes
        both = os.pread(self._file, size + rest, start)
        x, y = np.frombuffer(both[:size], "<i2"), np.frombuffer(both[size:], "<i8")
        return (
            x.reshape(entry.rows, entry.d_in).astype(np.int16, copy=False),
            y.reshape(entry.rows, entry.d_out).astype(np.int64, copy=False),
        )

    def save(self, folder: Path) -> None:
        """Write what `load` needs; the rows are copied only if they do not lie there already."""
        target = folder / ROWS
        mine = os.fstat(self._file)
        if not target.exists() or not os.path.samestat(target.stat(), mine):
            with Folder(str(folder)).writing(ROWS) as temporary, temporary.open("wb") as copy:
                for entry, start, _ in self._kept:
                    copy.write(os.pread(self._file, sum(entry.sizes), start))
        os.fsync(self._file)
        Folder(str(folder)).write_json(CALLS, [kept.entry.to_json() for kept in self._kept])

    @classmethod
    def load(cls, folder: Path) -> "Transcript":
        """Return the transcript in a folder, after reading every row once.

        Raises:
            ArtifactError: if a file is missing, or they hold none.
        """
        result = cls()
        try:
            result._use(os.open(folder / ROWS, os.O_RDONLY))
            size, end = os.fstat(result._file).st_size, 0
            for seq, values in enumerate(Folder(str(folder)).read_json(CALLS)):
                entry = Entry.from_json(values)
                start = result._check_next(seq, entry)
                if (end := start + sum(entry.sizes)) > size:  # before memory is taken for it
                    raise ValueError(f"{ROWS} ends in call {seq}")
                arrays = result._read(entry, start)
                digest = Call(seq, entry.module, entry.exponent, *arrays).digest
                result._kept.append(_Kept(entry, start, digest))
            if size != end:
                raise ValueError(f"{ROWS} has {size} bytes, not {end}")
        except (OSError, ValueError, TypeError) as error:
            raise ArtifactError(f"{folder} holds no transcript: {error}") from None
        return result
