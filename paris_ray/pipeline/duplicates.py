"""Rows whose key an earlier row has are set aside, once everything is encoded.

They are found by 64-bit hashes of keys, which tasks share out among each other by value, so that
none holds more than some millions. That two keys of a hundred million have one by chance has a
probability of 0.03 %, of a billion 3 %; then the later row is lost.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from paris_ray.artifacts import Folder
from paris_ray.config import Config
from paris_ray.corpora import QuarantinedRow
from paris_ray.embeddings import read_part, write_part
from paris_ray.pipeline.accounts import (
    TASK_CPUS,
    ShardFiles,
    files_by_shard,
    set_aside,
    shard_of,
)
from paris_ray.run import Run

DUPLICATE = "duplicate_key"
FILES_A_TASK = 256
ROWS_A_TASK = 8_000_000  # 16 bytes each, and as much again to sort them
PLACE = np.dtype([("hash", np.uint64), ("file", np.uint32), ("row", np.uint32)])
Places = NDArray[np.void]  # (N,) of PLACE, in the order of the corpus


@dataclass(frozen=True, slots=True)
class PartFile:
    """A file of rows.

    Attributes:
        number: Its place in the order of the corpus.
        held_out: Of which of the two folders it is.
        name: Its name.
    """

    number: int
    held_out: bool
    name: str

    @property
    def shard(self) -> str:
        """Name of the shard whose rows it has."""
        return shard_of(self.name)

    def folder(self, run: Run) -> Folder:
        """Return where it is."""
        return run.held_out if self.held_out else run.embeddings


def drop_duplicates(config: Config, shards: Sequence[str]) -> None:
    """Move rows whose key an earlier row has from `embeddings/` to `quarantine/`, by tasks.

    A shard that an interruption leaves half moved is not whole, and encoded again.

    Args:
        config: The run; all of its shards have been encoded.
        shards: Their names, in the order of the corpus.
    """
    files = part_files(files_by_shard(Run(config)), shards)
    groups = [files[i : i + FILES_A_TASK] for i in range(0, len(files), FILES_A_TASK)]
    num_parts = 1 + len(files) * config.corpus.rows_per_shard // ROWS_A_TASK
    read = _places.options(num_returns=num_parts)
    of_groups = [read.remote(config, group, num_parts) for group in groups]
    of_parts = zip(*of_groups, strict=True) if num_parts > 1 else [of_groups]
    repeated: list[Any] = [_repeated.remote(*of_part) for of_part in of_parts]
    affected = sorted(set().union(*ray.get([numbers for numbers, _ in repeated])))
    places = [found for _, found in repeated]
    jobs = by_shard([files[number] for number in affected])
    ray.get([_move.remote(config, job, *places) for job in jobs])


def drop_few_duplicates(run: Run, shards: Sequence[str]) -> None:
    """Do the same in this process, for a corpus whose keys fit into memory."""
    files = part_files(files_by_shard(run), shards)
    repeated = repeated_places(places_of(run, files))
    affected = [files[number] for number in np.unique(repeated["file"])]
    for job in by_shard(affected):
        move(run, job, [repeated])


def part_files(found: Mapping[str, ShardFiles], shards: Sequence[str]) -> list[PartFile]:
    """Return the files of rows of some shards in their order, of each those to train on first."""
    kinds = (
        (held_out, names)
        for shard in shards
        for held_out, names in ((False, found[shard].embeddings), (True, found[shard].held_out))
    )
    pairs = ((held_out, name) for held_out, names in kinds for name in names)
    return [PartFile(number, held_out, name) for number, (held_out, name) in enumerate(pairs)]


def by_shard(files: Sequence[PartFile]) -> Iterator[list[PartFile]]:
    """Yield the files of each shard."""
    for _, group in groupby(files, key=lambda file: file.shard):
        yield list(group)


@ray.remote(num_cpus=TASK_CPUS)
def _places(config: Config, files: Sequence[PartFile], num_parts: int) -> Any:
    """Return where each key of some files stands, in parts by its hash."""
    places = places_of(Run(config), files)
    part = places["hash"] % np.uint64(num_parts)
    return places if num_parts == 1 else tuple(places[part == i] for i in range(num_parts))


def places_of(run: Run, files: Sequence[PartFile]) -> Places:
    """Return where each key of some files stands."""
    found = [np.empty(0, PLACE)]
    for file in files:
        keys = read_part(file.folder(run), file.name, ["key"])["key"].to_pylist()
        digests = b"".join(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
        places = np.empty(len(keys), PLACE)
        places["hash"] = np.frombuffer(digests, np.uint64)
        places["file"], places["row"] = file.number, np.arange(len(keys))
        found.append(places)
    return np.concatenate(found)


@ray.remote(num_cpus=TASK_CPUS, num_returns=2)
def _repeated(*places: Places) -> tuple[list[int], Places]:
    """Return the numbers of the files that repeat keys, and where they do."""
    repeated = repeated_places(np.concatenate([np.empty(0, PLACE), *places]))
    return np.unique(repeated["file"]).tolist(), repeated


def repeated_places(places: Places) -> Places:
    """Return all places of each hash but the first, in the order of the corpus."""
    order = np.argsort(places["hash"], kind="stable")
    hashes = places["hash"][order]
    return places[np.sort(order[1:][hashes[1:] == hashes[:-1]])]


@ray.remote(num_cpus=TASK_CPUS, max_retries=0)  # a second time would move other rows
def _move(config: Config, files: Sequence[PartFile], *repeated: Places) -> None:
    move(Run(config), files, repeated)


def move(run: Run, files: Sequence[PartFile], repeated: Sequence[Places]) -> None:
    """Move rows of one shard to its file of `quarantine/`, which is written first.

    Args:
        run: Where they are.
        files: Files of the shard.
        repeated: Which rows; those of other files are left alone.
    """
    moved = {file: _rows_of(file, repeated) for file in files}
    good, held_out = (
        sum(len(moved[f]) for f in files if f.held_out is kind) for kind in (False, True)
    )
    bad = []
    for file, rows in moved.items():
        keys = read_part(file.folder(run), file.name, ["key"])["key"].take(rows).to_pylist()
        bad += [QuarantinedRow(key, DUPLICATE, "an earlier row has this key") for key in keys]
    set_aside(run.quarantine, files[0].shard, good, held_out, bad)
    for file, rows in moved.items():
        _rewrite(file.folder(run), file.name, rows)


def _rows_of(file: PartFile, repeated: Sequence[Places]) -> NDArray[np.int64]:
    """Return, ascending, the rows of a file among places that are sorted by file."""
    rows = []
    for places in repeated:
        first, last = np.searchsorted(places["file"], [file.number, file.number + 1])
        rows.append(places["row"][first:last].astype(np.int64))
    return np.sort(np.concatenate(rows))


def _rewrite(folder: Folder, name: str, without: NDArray[np.int64]) -> None:
    table = read_part(folder, name)
    kept = np.setdiff1d(np.arange(table.num_rows), without)
    if len(kept):
        write_part(folder, name, table.take(kept))
    else:
        folder.delete(name)
