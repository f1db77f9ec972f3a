"""What became of the rows of each corpus shard: the account that its file of `quarantine/` holds.

A shard with an account has been read to its end. Whether all that was read has also been written,
the files of `embeddings/` tell. So a run goes on by shard, without a list of rows, and no process
knows more than how many there are.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import reduce
from typing import NamedTuple, TypeVar

import pyarrow as pa
import ray

from paris_ray.config import FILTERS, Config
from paris_ray.corpora import QuarantinedRow
from paris_ray.embeddings import num_rows, opened_part, part_names, read_parts, write_part
from paris_ray.folders import Folder
from paris_ray.run import Run

# Of tasks that read and write: small, since they share a small machine with the encoders' actors;
# and unlike the encoders' default, else Ray Data would fuse reading into the text encoder's actor.
TASK_CPUS = 0.3
SHARDS_A_TASK = FILES_A_TASK = 256  # a worker takes longer to start than to look
_ACCOUNT = b"account"  # in the metadata of a quarantine file
_COLUMNS = ("key", "reason", "detail")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Account:
    """What became of the rows of one shard, or of several.

    Attributes:
        version: Of which version of the shard they were; of several, nothing.
        good: How many are there to train on.
        held_out: How many are held out.
        quarantined: How many cannot be used, by reason.
        filtered: How many could, but were filtered, by reason.
    """

    version: str = ""
    good: int = 0
    held_out: int = 0
    quarantined: Mapping[str, int] = field(default_factory=dict)
    filtered: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, version: str, good: int, held_out: int, bad: Iterable[QuarantinedRow]) -> "Account":
        """Return the account of so many rows, and of those that were set aside."""
        reasons = count_reasons(bad)
        filtered = {reason: count for reason, count in reasons.items() if reason in FILTERS}
        quarantined = {r: count for r, count in reasons.items() if r not in FILTERS}
        return cls(version, good, held_out, quarantined, filtered)

    def __add__(self, other: "Account") -> "Account":
        """Return the account of the rows of both."""
        quarantined = _sum(self.quarantined, other.quarantined)
        filtered = _sum(self.filtered, other.filtered)
        good, held_out = self.good + other.good, self.held_out + other.held_out
        return Account("", good, held_out, quarantined, filtered)


def _sum(some: Mapping[str, int], others: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted((Counter(some) + Counter(others)).items()))


@dataclass(slots=True)
class ShardFiles:
    """Names of the files that a run has of one shard, in order, by folder."""

    embeddings: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    quarantine: list[str] = field(default_factory=list)


def in_groups(items: Sequence[T], size: int = SHARDS_A_TASK) -> list[Sequence[T]]:
    """Return items in their order, in groups of at most `size`: each group is for one task."""
    return [items[first : first + size] for first in range(0, len(items), size)]


def part_name(shard: str, first_row: int) -> str:
    """Return the name of a file with rows of a corpus shard, good or quarantined ones.

    It stays the same when other sources come to the corpus. Names sort in the order of a source.
    """
    return f"part-{shard}-{first_row:08d}.parquet"


def shard_of(name: str) -> str:
    """Return the name of the corpus shard whose rows a file holds."""
    return name.removeprefix("part-").rpartition("-")[0]


def files_by_shard(run: Run) -> dict[str, ShardFiles]:
    """Return the files that a run has of each shard."""
    found: dict[str, ShardFiles] = {}
    for kind in ("embeddings", "held_out", "quarantine"):
        for name in part_names(getattr(run, kind)):
            getattr(found.setdefault(shard_of(name), ShardFiles()), kind).append(name)
    return found


def delete_files(run: Run, files: ShardFiles) -> None:
    """Delete the files of a shard."""
    for kind, names in asdict(files).items():
        for name in names:
            getattr(run, kind).delete(name)


def write_account(
    quarantine: Folder, shard: str, account: Account, bad: Sequence[QuarantinedRow]
) -> None:
    """Write the file of `quarantine/` of a shard, also if no row of it is bad."""
    columns = {name: pa.array([getattr(r, name) for r in bad], pa.string()) for name in _COLUMNS}
    table = pa.table(columns).replace_schema_metadata({_ACCOUNT: json.dumps(asdict(account))})
    write_part(quarantine, part_name(shard, 0), table)


def read_account(quarantine: Folder, shard: str) -> Account | None:
    """Return the account in the file of `quarantine/` of a shard; None if it has none."""
    with opened_part(quarantine, part_name(shard, 0)) as file:
        metadata = file.schema_arrow.metadata or {}
    return Account(**json.loads(metadata[_ACCOUNT])) if _ACCOUNT in metadata else None


def set_aside(
    quarantine: Folder, shard: str, good: int, held_out: int, bad: Sequence[QuarantinedRow]
) -> None:
    """Add rows to the file of `quarantine/` of a shard, and take them off its account.

    Args:
        quarantine: Where it is.
        shard: Name of the shard.
        good: How many of the rows were there to train on.
        held_out: How many were held out.
        bad: The rows.
    """
    before = read_account(quarantine, shard)
    assert before is not None, "a shard that has been written has an account"
    rows = read_parts(quarantine, [part_name(shard, 0)], _COLUMNS).to_pylist()
    everything = [*(QuarantinedRow(**row) for row in rows), *bad]
    account = Account.of(before.version, before.good - good, before.held_out - held_out, everything)
    write_account(quarantine, shard, account, everything)


def count_reasons(rows: Iterable[QuarantinedRow]) -> dict[str, int]:
    """Return how many rows were set aside for each reason."""
    return dict(sorted(Counter(row.reason for row in rows).items()))


def account_of(run: Run, files: ShardFiles) -> Account | None:
    """Return the account of a shard; None if it is not there, or not all of its rows are."""
    return _told(run, files).of_whole


class Told(NamedTuple):
    """What is there of a shard: its account, if it has one, and whether all of its rows are."""

    account: Account | None
    is_whole: bool

    @property
    def of_whole(self) -> Account | None:
        """The account, if all of the rows are there."""
        return self.account if self.is_whole else None

    @property
    def version(self) -> str | None:
        """Which version of the shard was read to its end, if one was."""
        return None if self.account is None else self.account.version


def _told(run: Run, files: ShardFiles) -> Told:
    if not files.quarantine:
        return Told(None, is_whole=False)
    account = read_account(run.quarantine, shard_of(files.quarantine[0]))
    written = tuple(
        sum(num_rows(folder, name) for name in names)
        for folder, names in ((run.embeddings, files.embeddings), (run.held_out, files.held_out))
    )
    return Told(account, account is not None and written == (account.good, account.held_out))


def told_of(config: Config, files: Mapping[str, ShardFiles]) -> dict[str, Told]:
    """Return what is there of every shard, by name, as tasks find it."""
    tasks = [_told_of.remote(config, group) for group in in_groups(list(files.values()))]
    told = (each for group in ray.get(tasks) for each in group)
    return dict(zip(files, told, strict=True))


@ray.remote(num_cpus=TASK_CPUS)
def _told_of(config: Config, files: Sequence[ShardFiles]) -> list[Told]:
    run = Run(config)
    return [_told(run, each) for each in files]


def total(accounts: Iterable[Account]) -> Account:
    """Return the account of the rows of all."""
    return reduce(Account.__add__, accounts, Account())
