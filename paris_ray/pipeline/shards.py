"""Reading and writing corpus shards in Ray Data.

This module imports nothing heavy: its classes run in plain tasks, whose workers come and go, and
an import of torch would take longer than their work.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from paris_ray.artifacts import Folder
from paris_ray.config import Config
from paris_ray.corpora import DecodedRow, QuarantinedRow, Shard, decode_row, open_corpus
from paris_ray.embeddings import (
    LATENTS,
    LATENTS_FLIPPED,
    TEXT_EMBEDDING,
    TOKEN_IDS,
    to_table,
    write_part,
)
from paris_ray.reports import png_bytes, thumbnail
from paris_ray.run import Run

Batch = dict[str, NDArray[Any]]

# Of text a batch has one of the two; mirrored latents only if training wants them.
TENSORS = (LATENTS, LATENTS_FLIPPED, "features", TEXT_EMBEDDING, TOKEN_IDS)


def part_name(shard: int, first_row: int) -> str:
    """Return the name of a file with rows of a corpus shard, good or quarantined ones.

    Names sort in corpus order.
    """
    return f"part-{shard:06d}-{first_row:08d}.parquet"


def shard_of(name: str) -> int:
    """Return the corpus shard whose rows a file holds."""
    return int(name.split("-")[1])


class ShardReader:
    """Reads one corpus shard: good rows go on, bad rows go to `quarantine/`."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def __call__(self, batch: Batch) -> Iterator[Batch]:
        """Yield the good rows of the one shard that `batch` describes, some at a time.

        The quarantine file comes last, also when there is nothing to put into it: a shard with one
        has been read to its end.
        """
        shard = Shard(
            index=int(batch["index"][0]),
            source=str(batch["source"][0]),
            start=int(batch["start"][0]),
            stop=int(batch["stop"][0]),
        )
        duplicates = set(np.asarray(batch["duplicates"][0]).tolist())
        good: list[DecodedRow] = []
        bad: list[QuarantinedRow] = []
        first = 0
        for row in self._decode(shard, duplicates):
            if isinstance(row, QuarantinedRow):
                bad.append(row)
            else:
                good.append(row)
            if len(good) == self.config.corpus.rows_per_shard:
                yield self._columns(shard, first, good)
                first, good = first + len(good), []
        if good:
            yield self._columns(shard, first, good)
        _write_quarantine(Run(self.config).quarantine, shard, bad)

    def _decode(self, shard: Shard, duplicates: set[int]) -> Iterator[DecodedRow | QuarantinedRow]:
        for i, raw in enumerate(open_corpus(self.config.corpus).read(shard)):
            if i in duplicates:
                yield QuarantinedRow(raw.key, "duplicate_key", "an earlier row has this key")
            else:
                yield decode_row(raw, self.config.corpus)

    def _columns(self, shard: Shard, first: int, rows: list[DecodedRow]) -> Batch:
        return {
            "shard": np.full(len(rows), shard.index),
            "row": np.arange(first, first + len(rows)),
            "key": np.array([row.key for row in rows], dtype=object),
            "caption": np.array([row.caption for row in rows], dtype=object),
            "image": np.stack([row.image for row in rows]),
        }


def _write_quarantine(folder: Folder, shard: Shard, rows: list[QuarantinedRow]) -> None:
    names = ("key", "reason", "detail")
    columns = {name: pa.array([getattr(r, name) for r in rows], pa.string()) for name in names}
    write_part(folder, part_name(shard.index, 0), pa.table(columns))


class ShardWriter:
    """Writes rows as one file of `embeddings/`; returns how many."""

    def __init__(self, config: Config) -> None:
        self.folder = Run(config).embeddings

    def __call__(self, batch: Batch) -> Batch:
        """Write rows that follow each other in one shard: Ray Data may have cut it into blocks."""
        count = len(batch["row"])
        if count:
            shard, first = int(batch["shard"][0]), int(batch["row"][0])
            assert (batch["shard"] == shard).all(), "a block holds rows of several shards"
            assert (batch["row"] == np.arange(first, first + count)).all(), "rows lost their order"
            write_part(self.folder, part_name(shard, first), _embeddings_table(batch))
        return {"rows": np.array([count])}


def _embeddings_table(batch: Batch) -> pa.Table:
    thumbnails = [png_bytes(Image.fromarray(thumbnail(image))) for image in batch["image"]]
    return to_table(
        {
            "key": [str(key) for key in batch["key"]],
            "caption": [str(caption) for caption in batch["caption"]],
            "thumbnail": thumbnails,
            **{name: batch[name] for name in TENSORS if name in batch},
        }
    )
