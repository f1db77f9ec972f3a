"""What every corpus looks like to the rest: shards of keyed rows, read one after the other."""

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Shard:
    """A piece of a corpus that one task reads.

    Attributes:
        index: Position in the corpus, from 0 without gaps.
        source: Absolute path, or name, of what is read.
        start: Where the piece begins, in the reader's own unit (rows, bytes of a metadata file).
        stop: Where it ends, exclusive, in the same unit.
        first: Number of its first row in the source, where `start` does not tell.
    """

    index: int
    source: str
    start: int
    stop: int
    first: int = 0

    @property
    def name(self) -> str:
        """What it is called however many other sources there are; sorts by place in its source."""
        return f"{hashlib.sha256(self.source.encode()).hexdigest()[:12]}-{self.start:012d}"


MAX_SLICES = 32  # of a file or folder: whoever reads one looks into the whole, if only at names


def rows_per_slice(num_rows: int, rows_per_shard: int) -> int:
    """Return how many rows of a file or folder make a shard: `rows_per_shard`, or 2, 4, 8... of it.

    So a source that grows is cut elsewhere only when it has doubled.
    """
    least = max(1, math.ceil(num_rows / (MAX_SLICES * rows_per_shard)))
    return rows_per_shard << (least - 1).bit_length()


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as it was found: nothing is decoded or judged yet.

    Attributes:
        key: Identity of the row; should be unique in the corpus.
        image: Encoded picture, None if the reader found none.
        caption: Caption as written, or a list of several; None if there is none.
        problem: What the reader already knows to be wrong, one of `quarantine.REASONS`.
        detail: The problem in words.
        columns: What else the corpus says of the row, by name; see `corpora.labels`.
    """

    key: str
    image: bytes | None
    caption: str | list[str] | None
    problem: str | None = None
    detail: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)

    @property
    def first_caption(self) -> str | None:
        """The first caption that is text: what patterns are searched in."""
        found = self.caption if isinstance(self.caption, list) else [self.caption]
        return next((caption for caption in found if isinstance(caption, str)), None)


class Corpus(Protocol):
    """Captioned pictures, in a fixed order, cut into shards.

    Attributes:
        attribution: Licence line to show beside pictures, None if there is none.
    """

    attribution: str | None

    def shards(self) -> list[Shard]:
        """Return all shards in corpus order.

        Raises:
            CorpusError: if there is nothing to read.
        """
        ...

    def keys(self, shard: Shard) -> Iterator[str]:
        """Yield the key of every row of a shard in order, without reading pictures."""
        ...

    def read(self, shard: Shard) -> Iterator[RawRow]:
        """Yield exactly one row for each of `keys(shard)`, in the same order."""
        ...

    def version(self, shard: Shard) -> str:
        """Return what becomes another text when rows of a shard change; no picture is read."""
        ...
