"""What every stage does around its work: skip if finished, say so, publish, keep the time."""

import json
import logging
import shlex
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from paris_ray.artifacts import (
    IN_PROGRESS,
    MANIFEST,
    RESOLVED_CONFIG,
    TIMINGS,
    Manifest,
    find_finished,
    publish,
    read_manifest,
)
from paris_ray.config import Config, LoRARun, TrainingConfig, digest, run_folder, to_yaml
from paris_ray.errors import ArtifactError
from paris_ray.folders import LOCKS, Folder
from paris_ray.run import FEDERATION
from paris_ray.run_lock import HeldLock, locked

if TYPE_CHECKING:
    from paris_ray.planning.ledger import Taken

logger = logging.getLogger("paris_ray")

PART = "prepare: "  # so begin the names of its parts in timings.jsonl
INPUTS = "inputs"  # a fact of manifests: digests of what was read and is no artefact


class Stage:
    """One artefact being made.

    Args:
        kind: Name of the artefact.
        folder: Where it goes.
        config: The whole configuration.
        sections: Top-level sections of it that decide the result.
        parents: Digests of the artefacts read, by name.
        inputs: Digests of what else was read, by name. Where they alone change, a finished artefact
            is taken up again: what did not change of it may be kept.
    """

    def __init__(
        self,
        kind: str,
        folder: Folder,
        config: Config | LoRARun,
        *,
        sections: tuple[str, ...],
        parents: Mapping[str, str],
        inputs: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.kind, self.folder, self.config, self.parents = kind, folder, config, parents
        self.inputs = dict(inputs)
        self.config_digest = digest(config, *sections)
        self._held: HeldLock | None = None
        self._began = time.perf_counter()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other jobs from writing this artefact; those that write others go on beside.

        Raises:
            LockError: if another job writes it, or began to because this one seemed dead.
        """
        with locked(self._claims, self.folder.uri) as self._held:
            self._began = time.perf_counter()
            yield

    @property
    def _claims(self) -> Folder:
        """Where jobs claim to write the artefact: not in its folder, which others copy and read."""
        home, place = self._home
        return home / LOCKS / place if place else home / LOCKS

    @property
    def _home(self) -> tuple[Folder, str]:
        """Return the folder of the run and the artefact's place in it; a LoRA is its own run."""
        if isinstance(self.config, LoRARun):
            return self.folder, ""
        run = Folder(run_folder(self.config))
        return run, run.place_of(self.folder)

    def check(self) -> None:
        """Raise LockError if another job took over the lock that this one holds."""
        if self._held is not None:
            self._held.check()

    def finished(self) -> Manifest | None:
        """Return the manifest if this very artefact exists already, and say that it is kept.

        Raises:
            ArtifactError: if the folder holds one made another way.
        """
        manifest = find_finished(
            self.folder, self.kind, config_digest=self.config_digest, parents=self.parents
        )
        if manifest is not None and manifest.facts.get(INPUTS, {}) != self.inputs:
            changed = " and ".join(self.inputs)
            logger.warning("%s: %s changed since it was finished", self.kind, changed)
            self.folder.write_json(IN_PROGRESS, self._identity)
            self.folder.delete(MANIFEST)
            return None
        if manifest is not None:
            logger.info("%s: already finished, kept (%s)", self.kind, self.folder.uri)
        return manifest

    @property
    def _identity(self) -> dict[str, Any]:
        return {"config_digest": self.config_digest, "parents": dict(self.parents)}

    def begun(self) -> bool:
        """Return whether an interrupted run of this very identity left something in the folder."""
        known = self.folder.exists(IN_PROGRESS)
        return known and bool(self.folder.read_json(IN_PROGRESS) == self._identity)

    def begin(self, *more: Folder) -> None:
        """Make the folder ready: keep what an interrupted run of this very identity left in it.

        Anything else there, left by another configuration, is unfinished and deleted, so that the
        two are never mixed.

        Args:
            more: Further folders that belong to the artefact.

        Raises:
            LockError: if another job took over the lock.
        """
        self.check()
        if not self.begun():
            for folder in (self.folder, *more):
                folder.clear()
            self.folder.write_json(IN_PROGRESS, self._identity)

    def publish(
        self,
        facts: Mapping[str, Any],
        *,
        files: Mapping[str, str] | None = None,
        taken: "Taken | None" = None,
    ) -> Manifest:
        """Write the resolved configuration and the manifest, and say what was made.

        Args:
            facts: Counts and measured numbers.
            files: SHA-256 of the files by name, where they have been taken already.
            taken: What it took, of a training; None: the time since the lock was taken.

        Raises:
            LockError: if another job took over the lock.
        """
        self.check()
        self.folder.write(RESOLVED_CONFIG, to_yaml(self.config).encode())
        self._note(taken)
        manifest = publish(
            self.folder,
            self.kind,
            config_digest=self.config_digest,
            parents=self.parents,
            facts={**facts, INPUTS: self.inputs} if self.inputs else facts,
            files=files,
        )
        logger.info("%s: finished (%s)", self.kind, self.folder.uri)
        return manifest

    def _note(self, taken: "Taken | None") -> None:
        """Write what it took into the ledger, before it counts as finished."""
        # Imported only now: it imports torch, and the tasks of prepare do without.
        from paris_ray.planning.ledger import taken_by_job, write_taken

        home, place = self._home
        seconds = time.perf_counter() - self._began
        write_taken(home, place or self.kind, taken or taken_by_job(self.folder, seconds))


def start_parent(training: TrainingConfig, weights: str) -> dict[str, str]:
    """Return the digest of the weights that a training starts from, as the parent `init`.

    Args:
        training: Its `init_from` is a folder of a model, or null.
        weights: Name of the weights file in it.

    Raises:
        ArtifactError: if there is no such file.
    """
    if training.init_from is None:
        return {}
    return {"init": Folder(training.init_from).sha256(weights)}


def federation_parent(config: Config) -> dict[str, str]:
    """Return the digest of what gave a site its encoders and centroids, as the parent `federation`.

    Raises:
        ArtifactError: if it is not finished.
    """
    folder = config.federation.folder
    if folder is None:
        return {}
    return {FEDERATION: read_manifest(Folder(folder), FEDERATION).digest}


def watch_hint(folder: str) -> str:
    """Return the line that says how to watch what is trained in a folder."""
    return f"watch: python -m jobs.watch {shlex.quote(folder)}"


class StageTimer:
    """Appends the seconds of one verb to the run's `timings.jsonl`; a context manager."""

    def __init__(self, config: Config, stage: str) -> None:
        self.config, self.stage = config, stage

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        seconds = round(time.perf_counter() - self._started, 2)
        failed = exception[0] is not None
        # Where a stage failed because the disk is full, its time has no room either.
        with suppress(ArtifactError) if failed else nullcontext():
            note_seconds(self.config, self.stage, seconds, failed=failed)
        logger.info("%s: %.0f s", self.stage, seconds)


def note_seconds(config: Config, stage: str, seconds: float, *, failed: bool = False) -> None:
    """Append to the run's `timings.jsonl` how long something took.

    Of two jobs that append in the same moment one may lose its row: it is for people alone.
    """
    folder = Folder(run_folder(config))
    row = {"stage": stage, "seconds": round(seconds, 2), "failed": failed}
    earlier = folder.read(TIMINGS) if folder.exists(TIMINGS) else b""
    folder.write(TIMINGS, earlier + json.dumps(row).encode() + b"\n")
