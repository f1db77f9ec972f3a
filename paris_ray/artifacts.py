"""Artefacts: folders with a manifest, at a local path or any `pyarrow.fs` URI.

A stage writes its files into the folder and `manifest.json` last. A folder without a manifest does
not exist to readers, so a half-written artefact is never read. Local files appear by rename; object
stores publish a file when its upload completes.
"""

import atexit
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
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

SCHEMA_VERSION = 1
STREAMED_BYTES = 1 << 23  # of a request to a store; much less would take as many round trips more
LISTINGS = 10  # of a folder that others write to; one in a thousand fails
MANIFEST = "manifest.json"
_COPY = "copy"  # of a file of a store, in a folder of its own on this machine
RESOLVED_CONFIG = "resolved_config.yaml"
TIMINGS = "timings.jsonl"
PROGRESS = "progress.json"
SPENT = "spent.json"  # seconds that a training has taken, over all of its processes
# These describe the run (where, how fast, how often logged), not the result: digests ignore them.
CHECKPOINT = "checkpoint.safetensors"
METRICS = "metrics.jsonl"
EVENTS = "events.out.tfevents"  # a name that TensorBoard looks for
WANDB = "wandb"  # a folder of Weights & Biases' own files
SAMPLES = "samples"  # a folder of pictures drawn on the way
IN_PROGRESS = "in_progress.json"
LOCKS = "locks"  # a folder with who is writing what
LEDGER = "ledger"  # a folder with what making each artefact took
REPORT = "report.html"  # a page for people; may tell how long things took
UNHASHED = frozenset(
    {
        MANIFEST,
        RESOLVED_CONFIG,
        TIMINGS,
        PROGRESS,
        SPENT,
        CHECKPOINT,
        METRICS,
        EVENTS,
        WANDB,
        SAMPLES,
        IN_PROGRESS,
        LOCKS,
        LEDGER,
        REPORT,
    }
)


def canonical_json(value: Any) -> bytes:
    """Return the one JSON form that digests are taken of: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def sha256_hex(payload: bytes) -> str:
    """Return the SHA-256 of bytes as lower-case hexadecimal."""
    return hashlib.sha256(payload).hexdigest()


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What an artefact is and what it was made from.

    Attributes:
        kind: Name of the artefact, for example `embeddings` or `expert`.
        config_digest: Digest of the configuration sections that the stage depends on.
        parents: Digests of the artefacts read, by name.
        files: SHA-256 of every file, by relative name; or of what lists them, where they are many.
        facts: Counts and measured numbers; not part of the digest.
    """

    kind: str
    config_digest: str
    parents: Mapping[str, str]
    files: Mapping[str, str]
    facts: Mapping[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    @property
    def digest(self) -> str:
        """Digest of everything but the facts."""
        identity = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "facts"}
        return sha256_hex(canonical_json(identity))


def publish(
    folder: Folder,
    kind: str,
    *,
    config_digest: str,
    parents: Mapping[str, str],
    facts: Mapping[str, Any],
    files: Mapping[str, str] | None = None,
) -> Manifest:
    """Write the manifest of a folder: from now on the artefact exists.

    Args:
        folder: Where its files are.
        kind: Its name.
        config_digest: Digest of the configuration sections that it depends on.
        parents: Digests of the artefacts read, by name.
        facts: Counts and measured numbers.
        files: SHA-256 by name, where they have been taken already; else every file is hashed here.
    """
    if files is None:
        files = {name: folder.sha256(name) for name in hashed_names(folder)}
    manifest = Manifest(
        kind=kind, config_digest=config_digest, parents=parents, files=files, facts=facts
    )
    folder.write_json(MANIFEST, asdict(manifest))
    folder.delete(PROGRESS)
    folder.delete(IN_PROGRESS)  # last: without either, what is finished would count as a stranger's
    return manifest


def hashed_names(folder: Folder) -> list[str]:
    """Return the names of the files of a folder that its digest depends on, sorted."""
    return [name for name in folder.files() if UNHASHED.isdisjoint(name.split("/"))]


def read_manifest(folder: Folder, kind: str) -> Manifest:
    """Return a finished artefact's manifest.

    Raises:
        ArtifactError: if the artefact is absent, unfinished, of another kind or schema.
    """
    if not folder.exists(MANIFEST):
        raise ArtifactError(f"no finished {kind} at {folder.uri}: it has no {MANIFEST}")
    document = folder.read_json(MANIFEST)
    try:
        manifest = Manifest(**document)
    except TypeError as error:
        raise ArtifactError(f"{folder.uri}/{MANIFEST} is not a manifest: {error}") from None
    allowed = (
        isinstance(manifest.config_digest, str)
        and all(map(_maps_to_text, (manifest.files, manifest.parents)))
        and isinstance(manifest.facts, dict)
    )
    if not allowed:
        raise ArtifactError(
            f"{folder.uri}/{MANIFEST} is not a manifest: config_digest, files, parents or facts"
        )
    if manifest.schema_version != SCHEMA_VERSION:
        raise ArtifactError(
            f"{folder.uri}/{MANIFEST} has schema_version {manifest.schema_version!r:.80}, "
            f"this version reads {SCHEMA_VERSION}"
        )
    if manifest.kind != kind:
        raise ArtifactError(f"{folder.uri} holds {manifest.kind!r:.80}, expected {kind!r}")
    return manifest


def _maps_to_text(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(inner, str) for inner in value.values())


def find_finished(
    folder: Folder, kind: str, *, config_digest: str, parents: Mapping[str, str]
) -> Manifest | None:
    """Return the manifest of a finished artefact with this very identity, or None if absent.

    Raises:
        ArtifactError: if the folder holds one made from another configuration or other parents;
            nothing is overwritten.
    """
    if not folder.exists(MANIFEST):
        return None
    manifest = read_manifest(folder, kind)
    remedy = "choose another folder or delete that one"
    if manifest.config_digest != config_digest:
        raise ArtifactError(
            f"{folder.uri} was made with another configuration "
            f"(compare its {RESOLVED_CONFIG}); {remedy}"
        )
    if dict(manifest.parents) != dict(parents):
        names = parents.keys() | manifest.parents.keys()
        changed = sorted(n for n in names if manifest.parents.get(n) != parents.get(n))
        raise ArtifactError(f"{folder.uri} was made from another {', '.join(changed)}; {remedy}")
    return manifest


@dataclass(frozen=True, slots=True)
class VerifiedFolder:
    """A folder whose files are compared with known digests when they are read.

    Attributes:
        folder: Where the files are.
        digests: SHA-256 by name relative to the folder; None where nobody published any.
    """

    folder: Folder
    digests: Mapping[str, str] | None

    def read(self, name: str) -> bytes:
        """Return a file's bytes.

        Raises:
            ArtifactError: if the file is missing or its bytes are not the published ones.
        """
        payload = self.folder.read(name)
        if self.digests is not None and self.digests.get(name) != sha256_hex(payload):
            raise self._damaged(name)
        return payload

    def read_json(self, name: str) -> Any:
        """Return a parsed JSON file; raises ArtifactError like `read`."""
        return parse_json(self.read(name), f"{self.folder.uri}/{name}")

    def part(self, name: str) -> "VerifiedFolder":
        """Return a sub-folder, with the digests of its files."""
        if self.digests is None:
            return VerifiedFolder(self.folder / name, None)
        prefix = f"{name}/"
        inside = {
            k.removeprefix(prefix): v for k, v in self.digests.items() if k.startswith(prefix)
        }
        return VerifiedFolder(self.folder / name, inside)

    def verified_file(self, name: str) -> Path:
        """Return the local path of a file that need not fit into memory; see `local_path`."""
        return self.local_path([name]) / name

    def local_path(self, names: Sequence[str]) -> Path:
        """Return a local folder with these files, copied to a temporary one if they are remote.

        Raises:
            ArtifactError: if a file is missing or its bytes are not the published ones.
        """
        root = self.folder.local_path if self.folder.is_local else self._download(names)
        for name in names:
            self._check_digest(name, root / name)
        return root

    def _download(self, names: Sequence[str]) -> Path:
        kept = ExitStack()
        root = kept.enter_context(temporary_folder())
        atexit.register(kept.close)
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            self.folder.download(name, root / name)
        return root

    def _check_digest(self, name: str, path: Path) -> None:
        """Compare a file with its digest, in pieces."""
        if not path.is_file():
            raise ArtifactError(f"{self.folder.uri}/{name} does not exist")
        note_read(f"{self.folder.uri}/{name}", lambda: path.stat().st_size)
        if self.digests is None:
            return
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if self.digests.get(name) != digest:
            raise self._damaged(name)

    def _damaged(self, name: str) -> ArtifactError:
        return ArtifactError(f"{self.folder.uri}/{name} does not have the digest of its {MANIFEST}")


def open_finished(folder: Folder, kind: str) -> VerifiedFolder:
    """Return a finished artefact for verified reading; raises ArtifactError if there is none."""
    return VerifiedFolder(folder, read_manifest(folder, kind).files)
