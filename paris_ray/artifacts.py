"""Artefacts: folders with a manifest, at a local path or any `pyarrow.fs` URI.

A stage writes its files into the folder and `manifest.json` last. A folder without a manifest does
not exist to readers, so a half-written artefact is never read.
"""

import atexit
import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from paris_ray.errors import ArtifactError
from paris_ray.folders import LOCKS, Folder, parse_json
from paris_ray.storage import (
    temporary_folder,
)
from paris_ray.traffic import note_read

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
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
RAY_HEAD = "cluster.json"  # of a run's own Ray, which is there before anything is made
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


def file_sha256(folder: Folder, name: str) -> str:
    """Return the SHA-256 of a file that need not fit into memory, in hexadecimal.

    Raises:
        ArtifactError: if the file does not exist.
    """
    with folder.open(name) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


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
