"""Rows that leave: all are listed, by shard, before the first is moved to `quarantine/`.

What repeats what is asked of all rows at once. So a run that was interrupted while it moved them
must not ask again, of those that are left; it moves what its lists, `quarantine/_repeated/`, say. A
shard of them that is not whole is encoded again: then it has the rows that its list names, if
perhaps in other files. So a row is called by its key and, since keys repeat, by how many rows of
its shard have that key before it.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray

from paris_ray.artifacts import canonical_json, sha256_hex
from paris_ray.config import FILTERS, Config, identity
from paris_ray.corpora import QuarantinedRow
from paris_ray.embeddings import part_names, read_part, write_part
from paris_ray.folders import Folder
from paris_ray.pipeline.accounts import (
    TASK_CPUS,
    Account,
    ShardFiles,
    Told,
    in_groups,
    part_name,
    read_account,
    set_aside,
    shard_of,
)
from paris_ray.pipeline.tasks import gather
from paris_ray.run import Run

# Why rows leave; of several reasons the first counts.
REPEATED: Mapping[str, str] = {
    "duplicate_key": "an earlier row has this key",
    **{name: FILTERS[name] for name in ("repeated_captions", "picture_distance", "max_similarity")},
}
LISTS = "_repeated"  # who reads `quarantine/` as one table passes over such names
LISTED_OF = "corpus.json"  # written last: of which corpus the lists are
# What is compared, and where: the number of a PartFile, and of a row in it.
PLACE = np.dtype([("value", np.uint64), ("file", np.uint32), ("row", np.uint32)])
Places = NDArray[np.void]  # (N,) of PLACE, in the order of the rows
RowName = tuple[str, int]  # of a row in its shard: its key, and how many have that before it
Leaving = Mapping[RowName, tuple[str, str]]  # rows of a shard, each with its reason and detail


@dataclass(frozen=True, slots=True)
class PartFile:
    """A file of rows.

    Attributes:
        number: Its place in the order of all files.
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


def part_files(found: Mapping[str, ShardFiles], shards: Sequence[str]) -> list[PartFile]:
    """Return the files of rows in the order that says which row is earlier.

    First all to train on, then all held out, each in the order of the shards: so no held-out row
    stays that repeats a row to train on.
    """
    training = [(False, name) for shard in shards for name in found[shard].embeddings]
    held_out = [(True, name) for shard in shards for name in found[shard].held_out]
    return [PartFile(number, *pair) for number, pair in enumerate((*training, *held_out))]


def by_shard(files: Sequence[PartFile]) -> list[list[PartFile]]:
    """Return the files of each shard."""
    found: dict[str, list[PartFile]] = {}
    for file in files:
        found.setdefault(file.shard, []).append(file)
    return list(found.values())


def are_listed(config: Config, versions: Mapping[str, str]) -> bool:
    """Return whether there are lists of what repeats in this very corpus, by these filters.

    Args:
        config: The run.
        versions: Versions of the corpus's shards, by name.
    """
    lists, asked = Run(config).quarantine / LISTS, _asked(config, versions)
    return lists.exists(LISTED_OF) and bool(lists.read_json(LISTED_OF) == asked)


def _asked(config: Config, versions: Mapping[str, str]) -> dict[str, str]:
    asked = [dict(versions), identity(config.corpus.filters)]
    return {"corpus": sha256_hex(canonical_json(asked))}


def num_left(account: Account) -> int:
    """Return how many rows of a shard were set aside since others are like them."""
    counts = {**account.quarantined, **account.filtered}
    return sum(counts.get(reason, 0) for reason in REPEATED)


def would_leave_again(
    config: Config, told: Mapping[str, Told], versions: Mapping[str, str]
) -> bool:
    """Return whether rows that left would leave the corpus as it is now, and are not missed there.

    What they repeat is there if shards came in, but none went or changed. And what repeats the key
    of one of them repeats that, too; but in other respects a new row may be like it alone.

    Args:
        config: The run.
        told: What is there of the shards that were read, by name.
        versions: Versions of the corpus's shards, by name.
    """
    by_key_alone = REPEATED.keys().isdisjoint(config.corpus.filters.on)
    read = {name: each.version for name, each in told.items() if each.version is not None}
    return by_key_alone and read.items() <= versions.items()


def list_rows(
    config: Config,
    files: Sequence[PartFile],
    repeated: Mapping[str, Sequence[Any]],
    versions: Mapping[str, str],
    check: Callable[[], object],
) -> None:
    """Write the list of every shard of which rows leave, by tasks, before the first is moved.

    It names those that have left before, too: they are there again if the shard is not whole when
    the run ends, and so is encoded again. That holds for a shard without files, too: all of its
    rows have left.

    Args:
        config: The run.
        files: All files of rows.
        repeated: References to the `Places` of rows that leave, by reason.
        versions: Versions of the corpus's shards, by name.
        check: Called every second; what it raises ends the tasks.
    """
    lists = Run(config).quarantine / LISTS
    if lists.exists(LISTED_OF):
        lists.delete(LISTED_OF)
    for name in set(part_names(lists)) - {part_name(shard, 0) for shard in versions}:
        lists.delete(name)
    reasons = [reason for reason, places in repeated.items() for _ in places]
    places = [each for group in repeated.values() for each in group]
    of_shard = {found[0].shard: found for found in by_shard(files)}
    groups = in_groups([(shard, of_shard.get(shard, [])) for shard in versions])
    gather([_write_lists.remote(config, group, reasons, *places) for group in groups], check)
    lists.write_json(LISTED_OF, _asked(config, versions))


@ray.remote(num_cpus=TASK_CPUS)
def _write_lists(
    config: Config,
    shards: Sequence[tuple[str, Sequence[PartFile]]],
    reasons: Sequence[str],
    *places: Places,
) -> None:
    run, repeated = Run(config), list(zip(reasons, places, strict=True))
    for shard, files in shards:
        leaving = {**_left_before(run, shard), **leaving_rows(run, files, repeated)}
        _write_list(run.quarantine / LISTS, part_name(shard, 0), leaving)


def _left_before(run: Run, shard: str) -> Leaving:
    """Return which rows of a shard left an earlier corpus."""
    account = read_account(run.quarantine, shard)
    return _listed(run, shard) if account and num_left(account) else {}


def _write_list(lists: Folder, name: str, leaving: Leaving) -> None:
    if leaving:
        keys, earlier = zip(*leaving, strict=True)
        reasons, _ = zip(*leaving.values(), strict=True)
        write_part(lists, name, pa.table({"key": keys, "earlier": earlier, "reason": reasons}))
    elif lists.exists(name):
        lists.delete(name)


def _listed(run: Run, shard: str) -> Leaving:
    """Return what the list of a shard says."""
    rows = read_part(run.quarantine / LISTS, part_name(shard, 0)).to_pylist()
    return {(r["key"], r["earlier"]): (r["reason"], REPEATED[r["reason"]]) for r in rows}


def leaving_rows(
    run: Run, files: Sequence[PartFile], repeated: Sequence[tuple[str, Places]]
) -> Leaving:
    """Return which rows of one shard's files repeat others, each for the first of its reasons."""
    found = {file: _reasons(file, repeated) for file in files}
    if not any(found.values()):
        return {}
    names = row_names(run, files)
    rows = ((file, row, reason) for file in files for row, reason in found[file].items())
    return {names[file][row]: (reason, REPEATED[reason]) for file, row, reason in rows}


def _reasons(file: PartFile, repeated: Sequence[tuple[str, Places]]) -> dict[int, str]:
    """Return why which rows of a file leave, by number."""
    reasons: dict[int, str] = {}
    for reason, places in repeated:
        first, last = np.searchsorted(places["file"], [file.number, file.number + 1])
        for row in places["row"][first:last].tolist():
            reasons.setdefault(row, reason)
    return dict(sorted(reasons.items()))


def row_names(run: Run, files: Sequence[PartFile]) -> dict[PartFile, list[RowName]]:
    """Return the names of all rows of a shard, file by file."""
    seen: Counter[str] = Counter()
    names: dict[PartFile, list[RowName]] = {}
    for file in files:
        names[file] = []
        for key in read_part(file.folder(run), file.name, ["key"])["key"].to_pylist():
            names[file].append((key, seen[key]))
            seen[key] += 1
    return names


def move_listed(config: Config, files: Sequence[PartFile], check: Callable[[], object]) -> None:
    """Move the rows that lists name, by tasks; those that have been moved stay where they are."""
    listed = set(part_names(Run(config).quarantine / LISTS))
    jobs = [job for job in by_shard(files) if part_name(job[0].shard, 0) in listed]
    gather([_move_listed.remote(config, job) for job in jobs], check)


@ray.remote(num_cpus=TASK_CPUS, max_retries=0)  # half of them moved, it would not be whole
def _move_listed(config: Config, files: Sequence[PartFile]) -> None:
    run, shard = Run(config), files[0].shard
    account = read_account(run.quarantine, shard)
    assert account is not None, "a shard that has been written has an account"
    listed = _listed(run, shard)
    if num_left(account) < len(listed):
        move(run, files, listed)


def move(run: Run, files: Sequence[PartFile], leaving: Leaving) -> None:
    """Move rows of one shard to its file of `quarantine/`, which is written first.

    Args:
        run: Where they are.
        files: All files of the shard.
        leaving: Which rows, and why.
    """
    counts: Counter[bool] = Counter()
    moved, kept = [], {}
    for file, names in row_names(run, files).items():
        gone = [name for name in names if name in leaving]
        counts[file.held_out] += len(gone)
        moved += [QuarantinedRow(name[0], *leaving[name]) for name in gone]
        if gone:
            kept[file] = [row for row, name in enumerate(names) if name not in leaving]
    set_aside(run.quarantine, files[0].shard, counts[False], counts[True], moved)
    for file, rows in kept.items():
        _rewrite(file.folder(run), file.name, rows)


def _rewrite(folder: Folder, name: str, rows: Sequence[int]) -> None:
    """Leave only these rows of a file."""
    if rows:
        write_part(folder, name, read_part(folder, name).take(rows))
    else:
        folder.delete(name)
