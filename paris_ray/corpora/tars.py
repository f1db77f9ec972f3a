"""The members of a tar, plain or gzipped, without extracting anything.

`tarfile` reads the headers. What it takes for the end of an archive, we take for damage, unless the
archive ends as archives do; and links are followed within the archive alone.
"""

import gzip
import io
import posixpath
import tarfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, cast

from paris_ray.corpora.places import Place, RemotePath
from paris_ray.corpora.samples import Member, TooLargeError

SUFFIXES = (".tar", ".tar.gz", ".tgz")
# What damage raises; tarfile raises ValueError and OverflowError for headers of arbitrary bytes.
READ_ERRORS = (tarfile.TarError, OSError, ValueError, OverflowError, EOFError, zlib.error)
_END = bytes(tarfile.BLOCKSIZE)  # an archive ends in blocks of zeros
MAX_RECENT_BYTES = 1 << 26  # of a gzipped tar, for links to what came before
_MAX_HEADER_BYTES = 1 << 20  # of one extended header
_GZIP = b"\x1f\x8b"


@dataclass(frozen=True, slots=True)
class _Stored:
    """A `Member` of a plain tar."""

    stream: IO[bytes]
    offset: int
    num_bytes: int

    def load(self, max_bytes: int) -> bytes:
        if self.num_bytes > max_bytes:
            raise TooLargeError(self.num_bytes, max_bytes)
        self.stream.seek(self.offset)
        return self.stream.read(self.num_bytes)


@dataclass(frozen=True, slots=True)
class _Kept:
    """A `Member` that was read in passing: of a gzipped tar, or of one that is far away."""

    content: bytes | None  # None: it was not wanted, or too large to keep
    num_bytes: int

    def load(self, max_bytes: int) -> bytes:
        if self.content is None or self.num_bytes > max_bytes:
            raise TooLargeError(self.num_bytes, max_bytes)
        return self.content


@dataclass(frozen=True, slots=True)
class _Unusable:
    """A `Member` that is not a file whose content stands in the tar."""

    reason: str

    def load(self, max_bytes: int) -> bytes:
        raise ValueError(self.reason)


class _Recent(OrderedDict[str, Member]):  # a dict would search for its first
    """The latest members of a gzipped tar by name, of at most MAX_RECENT_BYTES: what links find.

    A link has the very member that it leads to: that counts once, and each of its names a header.
    """

    def __init__(self) -> None:
        super().__init__()
        self._num_bytes = 0
        self._num_names = Counter[int]()  # of each member, by its `id`

    def __setitem__(self, name: str, member: Member) -> None:
        """Keep a member as the latest unless it is too large; let go of the oldest for it."""
        self._let_go(name)
        if _num_stored(member) > MAX_RECENT_BYTES:
            return
        super().__setitem__(name, member)
        self._num_bytes += tarfile.BLOCKSIZE + len(name)
        self._num_bytes += 0 if self._num_names[id(member)] else _num_stored(member)
        self._num_names[id(member)] += 1
        while self._num_bytes > MAX_RECENT_BYTES:
            self._let_go(next(iter(self)))

    def _let_go(self, name: str) -> None:
        member = self.pop(name, None)
        if member is None:
            return
        self._num_bytes -= tarfile.BLOCKSIZE + len(name)
        self._num_names[id(member)] -= 1
        if not self._num_names[id(member)]:
            del self._num_names[id(member)]
            self._num_bytes -= _num_stored(member)


def _num_stored(member: Member) -> int:
    """Return how many bytes a member holds."""
    if isinstance(member, _Unusable):
        return len(member.reason)
    return len(member.content or b"") if isinstance(member, _Kept) else 0


class Tar:
    """An open tar.

    Attributes:
        size: How many bytes it has.
        stream: Its bytes as they are stored.
        is_gzipped: Whether they are compressed.
        is_remote: Whether it is in a store, where going back means to ask again.
    """

    def __init__(self, path: Place, stream: IO[bytes]) -> None:
        self.size, self.stream = path.stat().st_size, stream
        self.is_remote = isinstance(path, RemotePath)
        self.is_gzipped = stream.read(2) == _GZIP
        stream.seek(0)

    def members(self, is_wanted: Callable[[str, int], bool]) -> Iterator[tuple[str, Member]]:
        """Yield the names and contents of all members but folders, in order.

        Args:
            is_wanted: Whether a member of this name and so many bytes may be loaded: no other is
                read in passing, and kept until it is.

        Raises:
            tarfile.ReadError: where the tar is damaged, or another of `READ_ERRORS`.
        """
        stream: IO[bytes] = self.stream
        if self.is_gzipped:
            stream = cast(IO[bytes], gzip.GzipFile(fileobj=self.stream))
        headers = _Headers(stream)
        before: dict[str, Member] = _Recent() if self.is_gzipped else {}
        with tarfile.open(fileobj=headers, mode="r:", encoding="utf-8", errors="replace") as tar:
            while (header := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # else it keeps every header
                if tar.offset <= header.offset:  # a negative size would make us read in circles
                    raise tarfile.ReadError(f"the size of {header.name!r} is negative")
                if header.isdir():
                    continue
                if header.isreg() and not header.issparse():
                    member = self._file(header, stream, is_wanted(header.name, header.size))
                else:
                    member = self._link(header, before)
                before[posixpath.normpath(header.name)] = self._to_find_later(header, member)
                yield header.name, member
        if headers.last != _END:
            raise tarfile.ReadError(f"neither a header nor the end of the archive at {tar.offset}")

    def _file(self, header: tarfile.TarInfo, stream: IO[bytes], is_wanted: bool) -> Member:
        start, size = header.offset_data, header.size
        if not self.is_gzipped:
            if start + size > self.size:
                raise tarfile.ReadError(f"the data of {header.name!r} is cut off")
            if not self.is_remote:
                return _Stored(stream, start, size)
        if not is_wanted:
            return _Kept(None, size)
        content = stream.read(size)
        if len(content) < size:
            raise tarfile.ReadError(f"the data of {header.name!r} is cut off")
        return _Kept(content, size)

    def _to_find_later(self, header: tarfile.TarInfo, member: Member) -> Member:
        """Return a member as a link may find it: one can go back, but in a gzipped tar."""
        if not isinstance(member, _Kept):
            return member
        if not self.is_gzipped:
            return _Stored(self.stream, header.offset_data, header.size)
        if member.content is None:
            return _Unusable(
                f"{header.name!r} was passed over, by its extension or size, and a gzipped tar is "
                "read once: gunzip it"
            )
        return member

    def _link(self, header: tarfile.TarInfo, before: dict[str, Member]) -> Member:
        if not (header.islnk() or header.issym()):
            # A sparse file is not contiguous and may claim any size.
            return _Unusable(f"{header.name!r} is sparse, or no file")
        folder = posixpath.dirname(header.name) if header.issym() else ""
        target = posixpath.normpath(posixpath.join(folder, header.linkname))
        reason = f"{header.name!r} is a link to {target!r}, which is not before it in the tar"
        if self.is_gzipped:
            reason += f", or more than {MAX_RECENT_BYTES >> 20} MiB before: gunzip it"
        if target not in before:
            return _Unusable(reason)
        before[target] = before[target]  # the latest again: more links to it may follow
        return before[target]


class _Headers(io.BufferedIOBase):
    """A stream as `tarfile` reads it: headers alone, and none that fills the memory.

    Attributes:
        last: What was read last.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self.last = stream, b""

    def read(self, num_bytes: int | None = -1, /) -> bytes:
        """Read a header.

        Raises:
            tarfile.ReadError: if it is larger than headers are.
        """
        if num_bytes is None or not 0 <= num_bytes <= _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {num_bytes} bytes")
        self.last = self._stream.read(num_bytes)
        return self.last

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Go to a place."""
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        """Return the place."""
        return self._stream.tell()
