"""Files of a corpus on this machine, or in a store: `s3://`, `gs://`, `hf://`, `http://` and more.

A place in a store has so much of `pathlib.Path` as readers of a corpus use.
"""

import io
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple, cast
from urllib.parse import quote, unquote, urlsplit, urlunsplit

import pyarrow.parquet as pq
from pyarrow import NativeFile, fs

from paris_ray.storage import is_uri, is_web, joined_uri, open_store

_PLAIN = "/ !$&'()*+,;=:@"  # in the path of a URI, but for letters and digits
_ABSENT, _REFUSED = (404, 410), (401, 403)  # what web servers answer
READ_AHEAD = 1 << 22  # bytes of a request: members of a tar are read one after the other


class Found(NamedTuple):
    """What is known of a file."""

    st_size: int


@dataclass(frozen=True, slots=True, order=True)
class RemotePath:
    """A file or folder in a store.

    Attributes:
        uri: Its URI, without a slash at the end.
    """

    uri: str

    def __str__(self) -> str:
        return self.uri

    def __truediv__(self, name: str | PurePosixPath) -> "RemotePath":
        return RemotePath(joined_uri(self.uri, quote(str(name), safe=_PLAIN)))

    @property
    def _path(self) -> PurePosixPath:
        return PurePosixPath("/", unquote(urlsplit(self.uri).path).lstrip("/"))

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self._path.name

    @property
    def suffix(self) -> str:
        """The end of its name, with a dot."""
        return self._path.suffix

    @property
    def parent(self) -> "RemotePath":
        """The folder that it is in."""
        return self / ".."

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of its path."""
        return self._path.parts

    def with_name(self, name: str) -> "RemotePath":
        """Return the place of another file in the same folder."""
        return self.parent / name

    def relative_to(self, other: "RemotePath") -> PurePosixPath:
        """Return the path from a folder to it."""
        return self._path.relative_to(other._path)

    def names(self) -> list[str]:
        """Return the names of the files in this very folder, sorted."""
        with self._opened() as (store, path):
            found = store.get_file_info(fs.FileSelector(path))
        return sorted(info.base_name for info in found if info.type == fs.FileType.File)

    def is_file(self) -> bool:
        """Return whether there is a file that may be read: a bucket may refuse what is absent."""
        try:
            return self._type() == fs.FileType.File
        except PermissionError:
            return False

    def is_dir(self) -> bool:
        """Return whether there is a folder."""
        return self._type() == fs.FileType.Directory

    def exists(self) -> bool:
        """Return whether there is anything."""
        return self._type() != fs.FileType.NotFound

    def _type(self) -> fs.FileType:
        with self._opened() as (store, path):
            return _web_type(store, path) if is_web(self.uri) else store.get_file_info(path).type

    def stat(self) -> Found:
        """Return its size.

        Raises:
            FileNotFoundError: if it is no file.
        """
        return Found(self._info().size or 0)

    def version(self) -> str:
        """Return what becomes another text when it is written again: by its time, ETag or the like.

        Raises:
            FileNotFoundError: if it is no file.
        """
        info = self._info()
        with self._opened() as (store, path):
            if isinstance(store, fs.PyFileSystem):  # of fsspec, which tells more than times
                return f"{info.size} {store.handler.fs.checksum(path)}"
        return f"{info.size} {info.mtime_ns}"

    def _info(self) -> fs.FileInfo:
        with self._opened() as (store, path):
            info = store.get_file_info(path)
        if info.type != fs.FileType.File:
            raise FileNotFoundError(f"{self} is not a file")
        return info

    def read_bytes(self) -> bytes:
        """Return its content."""
        with self.native() as stream:
            return bytes(stream.read())

    def open(self, mode: str = "rb") -> BinaryIO:
        """Open it for reading, at any position, in pieces of READ_AHEAD bytes."""
        if mode != "rb":
            raise ValueError(f"mode={mode!r} is not allowed: 'rb'")
        return cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, self.native()), READ_AHEAD))

    def native(self) -> NativeFile:
        """Open it for reading; every read is a request to the store."""
        with self._opened() as (store, path):
            return store.open_input_file(path)

    def walk(self) -> Iterator[tuple["RemotePath", list[str]]]:
        """Yield every folder with files, from this one down, and the names of its files, sorted."""
        found = defaultdict(list)
        with self._opened() as (store, path):
            infos = store.get_file_info(fs.FileSelector(path, recursive=True))
        for info in infos:
            if info.type == fs.FileType.File:
                place = PurePosixPath(info.path).relative_to(path)
                found[place.parent].append(place.name)
        for folder in sorted(found):
            yield self / folder, sorted(found[folder])

    @contextmanager
    def _opened(self) -> Iterator[tuple[fs.FileSystem, str]]:
        """Give its store, which is opened once a process, and its path there.

        Raises:
            OSError: for whatever the store raises.
        """
        parts = urlsplit(self.uri)
        top = "" if parts.netloc else "/"  # of file:///
        store, root = _open_once(urlunsplit(parts._replace(path=top)))
        try:
            # To the web the address is the file, with its options and as it is written.
            yield store, self.uri if is_web(self.uri) else f"{root}{unquote(parts.path)}"
        except OSError:
            raise
        except Exception as error:  # each library of a store has its own
            raise OSError(f"{self}: {type(error).__name__}: {error}") from error


Place = Path | RemotePath


def _web_type(store: fs.PyFileSystem, address: str) -> fs.FileType:
    """Return whether a web server has something: it tells of files alone.

    fsspec calls whatever goes wrong an absence; the cause is what differs.

    Raises:
        PermissionError: if the server does not say, since it is asked by a stranger.
        ConnectionError: if it says something else or nothing.
    """
    try:
        store.handler.fs.info(address)
    except FileNotFoundError as error:
        cause = error.__cause__
        status = getattr(cause, "status", None)
        if cause is None or isinstance(cause, FileNotFoundError) or status in _ABSENT:
            return fs.FileType.NotFound
        kind = PermissionError if status in _REFUSED else ConnectionError
        raise kind(f"{address} is out of reach: {type(cause).__name__}: {cause}") from None
    return fs.FileType.File


@lru_cache(maxsize=16)
def _open_once(uri: str) -> tuple[fs.FileSystem, str]:
    store, path = open_store(uri)
    return store, path.rstrip("/")


def place(location: str) -> Place:
    """Return the place of a path or a URI, as text."""
    return RemotePath(joined_uri(location, ".")) if is_uri(location) else Path(location)


def open_parquet(file: Place) -> pq.ParquetFile:
    """Open a Parquet file; a remote one is read in large pieces."""
    if isinstance(file, Path):
        return pq.ParquetFile(file)
    return pq.ParquetFile(file.native(), pre_buffer=True)


def version_of(file: Place) -> str:
    """Return what becomes another text when a file is written again.

    Raises:
        OSError: if it cannot be looked up.
    """
    if isinstance(file, RemotePath):
        return file.version()
    found = file.stat()
    return f"{found.st_size} {found.st_mtime_ns}"
