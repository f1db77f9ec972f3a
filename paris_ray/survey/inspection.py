"""What `jobs.inspect` finds out: everything that `prepare` would decide, of a sample."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from paris_ray.config import FILTERS, Config
from paris_ray.corpora import HeldOut, held_out_rule
from paris_ray.corpora.places import RemotePath, place
from paris_ray.survey.fields import Fields, taken_fields
from paris_ray.survey.listing import Listing
from paris_ray.survey.sample import SampledRow, sample_corpus

FILES_SHOWN = 5
MEASURED_FILES = 10_000  # asking for the sizes of more takes too long on a network disk
MEASURED_IN_A_STORE = 64  # each is a request or two


@dataclass(frozen=True, slots=True)
class Files:
    """What shards are cut of.

    Attributes:
        count: Number of files, or of folders where a shard is some files of one.
        num_bytes: Their size; None of folders, of very many files and of packaged pictures.
        first: The first of them.
    """

    count: int
    num_bytes: int | None
    first: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Inspection:
    """A corpus as `prepare` would see it.

    Attributes:
        config: The run; `corpus.kind` is the layout.
        other_kinds: Further layouts that can read it.
        files: What was listed.
        num_shards: How many shards that makes.
        is_whole: Whether everything was listed, not the first rows only.
        fields: What became picture and caption; None where that cannot be told.
        held_out: The rule of the rows that are set aside.
        rows: The sample.
        seconds: How long all of it took.
        attribution: Licence line, or None.
    """

    config: Config
    other_kinds: tuple[str, ...]
    files: Files
    num_shards: int
    is_whole: bool
    fields: Fields | None
    held_out: HeldOut
    rows: Sequence[SampledRow]
    seconds: float
    attribution: str | None

    @property
    def good(self) -> list[SampledRow]:
        """The rows that can be used."""
        return [row for row in self.rows if row.reason is None]

    @property
    def set_aside(self) -> Counter[str]:
        """How many rows would be set aside, by reason."""
        return Counter(row.reason for row in self.rows if row.reason is not None)

    @property
    def quarantined(self) -> Counter[str]:
        """How many of them could not be used."""
        return Counter({r: count for r, count in self.set_aside.items() if r not in FILTERS})

    @property
    def filtered(self) -> Counter[str]:
        """How many of them could, but are not wanted."""
        return self.set_aside - self.quarantined


def inspect_corpus(listing: Listing) -> Inspection:
    """Return what is found in a sample of a corpus.

    Raises:
        CorpusError: if `corpus.held_out_key` names no group.
    """
    started = time.monotonic()
    held_out = held_out_rule(
        listing.config.corpus, listing.corpus, listing.shards, listing.config.seed
    )
    rows = sample_corpus(listing, held_out)
    return Inspection(
        config=listing.config,
        other_kinds=listing.other_kinds,
        files=_files(listing),
        num_shards=len(listing.shards),
        is_whole=listing.is_whole,
        fields=taken_fields(listing),
        held_out=held_out,
        rows=rows,
        seconds=time.monotonic() - started,
        attribution=listing.corpus.attribution,
    )


def _files(listing: Listing) -> Files:
    names = list(dict.fromkeys(shard.source for shard in listing.shards))
    first = tuple(names[:FILES_SHOWN])
    files = [place(name) for name in names[: MEASURED_FILES + 1]]
    most = MEASURED_IN_A_STORE if isinstance(files[0], RemotePath) else MEASURED_FILES
    if len(files) > most or not all(file.is_file() for file in files):
        return Files(len(names), None, first)
    return Files(len(names), sum(file.stat().st_size for file in files), first)
