"""Reading and writing corpus shards in Ray Data.

This module imports nothing heavy: its classes run in plain tasks, whose workers come and go, and
an import of torch would take longer than their work.
"""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from paris_ray.artifacts import Folder
from paris_ray.config import Config
from paris_ray.corpora import DecodedRow, QuarantinedRow, Shard, decode_row, open_corpus
from paris_ray.embeddings import to_table, write_part
from paris_ray.reports import png_bytes, thumbnail
from paris_ray.run import Run

Batch = dict[str, NDArray[Any]]


def part_name(shard: int) -> str:
    """Return the name of a corpus shard's file, in `embeddings/` and in `quarantine/`."""
    return f"part-{shard:06d}.parquet"


def num_rows(folder: Folder, name: str) -> int:
    """Return a file's number of rows; a shard without good rows has no file."""
    if not folder.exists(name):
        return 0
    return int(pq.read_metadata(pa.BufferReader(folder.read(name))).num_rows)


def is_complete(run: Run, shard: Shard, num_keys: int) -> bool:
    """Return whether an earlier, interrupted run accounted for every row of a shard."""
    name = part_name(shard.index)
    if not run.quarantine.exists(name):
        return False
    return num_rows(run.embeddings, name) + num_rows(run.quarantine, name) == num_keys


class ShardReader:
    """Reads one corpus shard: good rows go on, bad rows go to `quarantine/`."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def __call__(self, batch: Batch) -> Batch:
        """Return the good rows of the one shard that `batch` describes."""
        fields = {name: batch[name][0] for name in ("index", "source", "start", "stop")}
        shard = Shard(
            int(fields["index"]), str(fields["source"]), int(fields["start"]), int(fields["stop"])
        )
        rows = self._decode(shard, set(np.asarray(batch["duplicates"][0]).tolist()))
        bad = [row for row in rows if isinstance(row, QuarantinedRow)]
        good = [row for row in rows if isinstance(row, DecodedRow)]
        _write_quarantine(Run(self.config).quarantine, shard, bad)
        side = self.config.corpus.image_size
        images = [row.image for row in good]
        return {
            "shard": np.full(len(good), shard.index),
            "key": np.array([row.key for row in good], dtype=object),
            "caption": np.array([row.caption for row in good], dtype=object),
            "image": np.stack(images) if good else np.empty((0, side, side, 3), np.uint8),
        }

    def _decode(self, shard: Shard, duplicates: set[int]) -> list[DecodedRow | QuarantinedRow]:
        rows: list[DecodedRow | QuarantinedRow] = []
        for i, raw in enumerate(open_corpus(self.config.corpus).read(shard)):
            if i in duplicates:
                rows.append(QuarantinedRow(raw.key, "duplicate_key", "kept its first occurrence"))
            else:
                rows.append(decode_row(raw, self.config.corpus))
        return rows


def _write_quarantine(folder: Folder, shard: Shard, rows: list[QuarantinedRow]) -> None:
    names = ("key", "reason", "detail")
    columns = {name: pa.array([getattr(r, name) for r in rows], pa.string()) for name in names}
    write_part(folder, part_name(shard.index), pa.table(columns))


class ShardWriter:
    """Writes one shard's rows as one file of `embeddings/`; returns how many."""

    def __init__(self, config: Config) -> None:
        self.folder = Run(config).embeddings

    def __call__(self, batch: Batch) -> Batch:
        """Write the rows of one shard."""
        shards = np.unique(batch["shard"])
        assert len(shards) <= 1, f"a block holds rows of several shards: {shards}"
        if len(shards):
            write_part(self.folder, part_name(int(shards[0])), _embeddings_table(batch))
        return {"rows": np.array([len(batch["shard"])])}


def _embeddings_table(batch: Batch) -> pa.Table:
    thumbnails = [png_bytes(Image.fromarray(thumbnail(image))) for image in batch["image"]]
    columns = {name: batch[name] for name in ("latents", "features", "text_embedding")}
    return to_table(
        {
            "key": [str(key) for key in batch["key"]],
            "caption": [str(caption) for caption in batch["caption"]],
            "thumbnail": thumbnails,
            **columns,
        }
    )
