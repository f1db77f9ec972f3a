"""Folders of files, at a local path or any `pyarrow.fs` URI, whose files appear whole.

Local files appear by rename; object stores publish a file when its upload completes.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from pyarrow import NativeFile, PythonFile, fs
from safetensors import SafetensorError

from paris_ray.errors import ArtifactError
from paris_ray.json_documents import load_json
from paris_ray.storage import (
    StoreFile,
    disk_is_full,
    is_uri,
    joined_uri,
    open_store,
    replacing,
    temporary_folder,
)
from paris_ray.traffic import note_read, note_written

STREAMED_BYTES = 1 << 23  # of a request to a store; much less would take as many round trips more
LISTINGS = 10  # of a folder that others write to; one in a thousand fails
LOCKS = "locks"  # a folder in a folder, with who is writing what
_COPY = "copy"  # of a file of a store, in a folder of its own on this machine


def parse_json(payload: bytes, source: str) -> Any:
    """Return parsed JSON; raises ArtifactError, naming the source, where `load_json` refuses it."""
    try:
        return load_json(payload)
    except ValueError as error:
        raise ArtifactError(f"{source} is not JSON: {error}") from None


def absolute_uri(location: str) -> str:
    """Return a location that means the same in every process: a URI as it is, a path absolute."""
    return location if is_uri(location) else str(Path(location).expanduser().resolve())


class Stamp(NamedTuple):
    """How large a file is, and when it was written: what tells that it changed.

    Attributes:
        size: In bytes.
        modified_ns: Unix time in nanoseconds; some stores know seconds only.
    """

    size: int
    modified_ns: int


class Folder:
    """A folder of small files on a local disk or an object store.

    Args:
        location: A path, or a URI that `pyarrow.fs` or fsspec understands (`s3://bucket/run`,
            `gs://...`).
    """

    def __init__(self, location: str | Path) -> None:
        self.uri = absolute_uri(str(location))
        if is_uri(self.uri):
            self._filesystem, self._path = open_store(self.uri)
        else:
            self._filesystem, self._path = fs.LocalFileSystem(), self.uri

    def __truediv__(self, name: str) -> "Folder":
        return Folder(joined_uri(self.uri, name) if is_uri(self.uri) else f"{self.uri}/{name}")

    def __repr__(self) -> str:
        return f"Folder({self.uri!r})"

    @property
    def is_local(self) -> bool:
        """Whether files can be opened by path on this machine."""
        return isinstance(self._filesystem, fs.LocalFileSystem)

    @property
    def local_path(self) -> Path:
        """Path on this machine; only for a local folder."""
        if not self.is_local:
            raise ValueError(f"{self.uri} is not a folder of this machine")
        return Path(self._path)

    def _full(self, name: str) -> str:
        return f"{self._path}/{name}" if name else self._path

    def place_of(self, inner: "Folder") -> str:
        """Return the path from here to a folder below."""
        return os.path.relpath(inner._path, self._path)

    def exists(self, name: str = "") -> bool:
        """Return whether the folder, or the file or folder `name` in it, exists."""
        with self._told(name):
            info = self._filesystem.get_file_info(self._full(name))
        return bool(info.type != fs.FileType.NotFound)

    def modified(self, name: str) -> int:
        """Return when a file was written, Unix time in seconds."""
        with self._told(name):
            return int(self._filesystem.get_file_info(self._full(name)).mtime_ns // 10**9)

    def stamp(self, name: str) -> "Stamp | None":
        """Return what changes with a file; None: there is none."""
        with self._told(name):
            info = self._filesystem.get_file_info(self._full(name))
        return _stamp(info) if info.type == fs.FileType.File else None

    def open(self, name: str) -> NativeFile:
        """Return a file for reading at any position, opened; the caller closes it.

        Raises:
            ArtifactError: if the file does not exist; of a store also later, when it fails.
        """
        with self._told(name):
            file = self._filesystem.open_input_file(self._full(name))
        note_read(f"{self.uri}/{name}", file.size)
        if self.is_local:
            return file
        return PythonFile(StoreFile(file, partial(self._told, name)), mode="r")

    def stream(self, name: str) -> NativeFile:
        """Return a file for reading from its beginning to its end; the caller closes it.

        A store is asked for large pieces, however small those are that are read.

        Raises:
            ArtifactError: if the file does not exist.
        """
        with self._told(name):
            note_read(f"{self.uri}/{name}", partial(self._size, name))
            return self._filesystem.open_input_stream(
                self._full(name), compression=None, buffer_size=STREAMED_BYTES
            )

    def _size(self, name: str) -> int:
        return int(self._filesystem.get_file_info(self._full(name)).size or 0)

    @contextmanager
    def _told(self, name: str, done: str = "read") -> Iterator[None]:
        """Tell in our words why something cannot be `done` to a file, or to the folder itself."""
        what = f"{self.uri}/{name}" if name else self.uri
        try:
            yield
        except FileNotFoundError:
            raise ArtifactError(f"{what} does not exist") from None
        except OSError as error:
            remedy = _make_room(f"{tempfile.gettempdir()} (TMPDIR)") if disk_is_full(error) else ""
            raise ArtifactError(f"{what} cannot be {done}: {error}{remedy}") from None

    def read(self, name: str) -> bytes:
        """Return a file's bytes.

        Raises:
            ArtifactError: if the file does not exist.
        """
        with self.open(name) as stream, self._told(name):
            return bytes(stream.read())

    def sha256(self, name: str) -> str:
        """Return the SHA-256 of a file, which need not fit into memory, as hexadecimal.

        Raises:
            ArtifactError: if the file does not exist or cannot be read.
        """
        with self.stream(name) as file, self._told(name):
            return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]

    def write(self, name: str, payload: bytes) -> None:
        """Write a file as `writing` does: readers see the old bytes or the new, never a part."""
        with self.writing(name) as path:
            path.write_bytes(payload)

    @contextmanager
    def reading(self, name: str) -> Iterator[Path]:
        """Give a path on this machine to a reader that wants one: a copy, if the file is remote.

        Raises:
            ArtifactError: if the file does not exist, or its copy has no room.
        """
        if self.is_local:
            with self.open(name):
                yield Path(self._full(name))
            return
        with temporary_folder() as copies:
            self.download(name, copies / _COPY)
            yield copies / _COPY

    def download(self, name: str, target: Path) -> None:
        """Copy a file to a path on this machine.

        Raises:
            ArtifactError: if the file does not exist or cannot be read, or its copy has no room.
        """
        with self.stream(name) as source, self._told(name), target.open("wb") as copy:
            shutil.copyfileobj(source, copy)

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Give a path on this machine to a writer; its file appears as `name` when it is done.

        Readers see the old file or the new one, never a part. A name has one writer at a time.

        Raises:
            ArtifactError: if there is no room for it, or it may not be written.
        """
        try:
            with self._written(name) as path:
                yield path
            note_written(f"{self.uri}/{name}", partial(self._size, name))
        except (OSError, SafetensorError) as error:
            remedy = ""
            if disk_is_full(error):
                place = self.uri if self.is_local else f"{tempfile.gettempdir()} (TMPDIR)"
                remedy = _make_room(place)
            raise ArtifactError(f"{self.uri}/{name} cannot be written: {error}{remedy}") from error

    @contextmanager
    def _written(self, name: str) -> Iterator[Path]:
        target = self._full(name)
        self._filesystem.create_dir(os.path.dirname(target), recursive=True)  # noqa: PTH120
        if self.is_local:
            with replacing(Path(target)) as temporary:
                yield temporary
            return
        with temporary_folder() as copies:
            yield copies / _COPY
            # In one call, which no signal cuts short: a stream that is closed half way appears.
            here = fs.LocalFileSystem()
            fs.copy_files(str(copies / _COPY), target, here, self._filesystem, use_threads=False)

    def read_json(self, name: str) -> Any:
        """Return a parsed JSON file.

        Raises:
            ArtifactError: if the file is missing or not JSON.
        """
        return parse_json(self.read(name), f"{self.uri}/{name}")

    def write_json(self, name: str, value: Any) -> None:
        """Write a value as indented JSON."""
        self.write(name, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())

    def delete(self, name: str) -> None:
        """Delete a file if it is there; another may do so meanwhile."""
        if self.exists(name):
            with self._told(name, "deleted"), suppress(FileNotFoundError):
                self._filesystem.delete_file(self._full(name))

    def clear(self) -> None:
        """Delete everything in the folder; who holds a lock there keeps it."""
        keeps_locks = self.exists(LOCKS)
        with self._told("", "cleared"):
            if not keeps_locks:
                self._filesystem.delete_dir_contents(self._path, missing_dir_ok=True)
                return
            for info in self._filesystem.get_file_info(fs.FileSelector(self._path)):
                if info.type == fs.FileType.File:
                    self._filesystem.delete_file(info.path)
                elif info.base_name != LOCKS:
                    self._filesystem.delete_dir(info.path)

    def files(self) -> list[str]:
        """Return the relative names of all finished files below the folder, sorted."""
        return sorted(self.stamps())

    def stamps(self) -> dict[str, "Stamp"]:
        """Return what changes with each finished file below the folder, by its relative name.

        One listing, however many files there are: of a store it costs less than asking for each.
        """
        if not self.exists():
            return {}
        with self._told("", "listed"):
            infos = self._listed()
        files = (info for info in infos if info.type == fs.FileType.File)
        named = {os.path.relpath(info.path, self._path): info for info in files}
        return {name: _stamp(info) for name, info in named.items() if ".tmp-" not in name}

    def _listed(self) -> list[fs.FileInfo]:
        selector = fs.FileSelector(self._path, recursive=True)
        for _ in range(LISTINGS - 1):
            with suppress(FileNotFoundError):  # a writer's temporary folder, gone meanwhile
                return list(self._filesystem.get_file_info(selector))
        return list(self._filesystem.get_file_info(selector))


def _stamp(info: fs.FileInfo) -> Stamp:
    return Stamp(int(info.size or 0), int(info.mtime_ns or 0))


def fault_of(error: BaseException) -> str:
    """Return what to say of a file that was not read: damage has no number of the system's."""
    is_unread = isinstance(error, OSError) and error.errno is not None
    return "cannot be read" if is_unread else "is damaged"


def _make_room(place: str) -> str:
    return f"; make room in {place} and run again: what is finished is kept"
