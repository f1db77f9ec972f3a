"""Reading and writing corpus shards in Ray Data.

This module imports nothing heavy: what is in it runs in plain tasks, whose workers come and go, and
an import of torch would take longer than their work.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import cycle, islice
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray
from PIL import Image
from ray.util import metrics

from paris_ray.config import FILTERS, SCORES, Config
from paris_ray.corpora import DecodedRow, HeldOut, QuarantinedRow, Shard, decode_row, open_corpus
from paris_ray.corpora.filters import filters_of_rows
from paris_ray.corpora.filters.scores import score_name
from paris_ray.corpora.labels import label_names
from paris_ray.corpora.perceptual_hash import perceptual_hashes
from paris_ray.embeddings import (
    ATTRIBUTE,
    FEATURES,
    LATENTS,
    LATENTS_FLIPPED,
    PICTURE_HASH,
    TEXT_EMBEDDING,
    TOKEN_IDS,
    to_table,
    write_part,
)
from paris_ray.folders import Folder
from paris_ray.pipeline.accounts import TASK_CPUS, Account, part_name, write_account
from paris_ray.reports import png_bytes, thumbnail
from paris_ray.run import Run

Batch = dict[str, NDArray[Any]]

# Columns which only progress is told of: the bad rows that a shard had since the block before,
# those that each filter took, and whether this block is its last; a shard without a good row has
# none.
QUARANTINED, ENDED = "quarantined", "ended"
FILTERED = "filtered."  # and the name of the filter
BUSY = "busy."  # and the name of an encoder: seconds that it computed
# Of text a batch has one of the two; mirrored latents only if training wants them.
TENSORS = (LATENTS, LATENTS_FLIPPED, FEATURES, TEXT_EMBEDDING, TOKEN_IDS)
# What filters ask for comes on top.
STORED = (*TENSORS, PICTURE_HASH, *map(score_name, SCORES))
CAPTION = "caption"
OTHER_CAPTION = "caption."  # and a number: what is encoded, but not stored as text


def caption_variants(batch: Batch, templates: Sequence[str]) -> list[str]:
    """Return every caption of each row in every template: those of a row follow each other."""
    names = [name for name in batch if name == CAPTION or name.startswith(OTHER_CAPTION)]
    rows = zip(*(batch[name] for name in names), strict=True)
    return [t.replace("{}", str(c)) for row in rows for c in row for t in templates]


@ray.remote(num_cpus=TASK_CPUS)
def file_versions_of(config: Config, shards: Sequence[Shard]) -> list[str]:
    """Return the version of the files of each shard: a folder has one for each of its pictures."""
    corpus = open_corpus(config.corpus)
    return [corpus.version(shard) for shard in shards]


@dataclass(slots=True)
class _Block:
    """Good rows that wait to be passed on: those of training or those held out, never both."""

    shard: Shard
    held_out: bool
    first: int = 0
    rows: list[DecodedRow] = field(default_factory=list)


class ShardReader:
    """Reads one corpus shard: good rows go on, bad rows go to `quarantine/`.

    Args:
        config: The run.
        held_out: Which rows go on apart from the others, in blocks of their own.
        num_captions: How many captions of each row go on.
    """

    def __init__(self, config: Config, held_out: HeldOut, num_captions: int = 1) -> None:
        self.config, self.held_out, self.num_captions = config, held_out, num_captions
        self.attributes = label_names(config.corpus.attributes)
        self.filters = filters_of_rows(config.corpus.filters)

    def __call__(self, batch: Batch) -> Iterator[Batch]:
        """Yield the good rows of the one shard that `batch` describes, some at a time.

        Its account comes last: a shard that has one has been read to its end.
        """
        shard = Shard(
            index=int(batch["index"][0]),
            source=str(batch["source"][0]),
            start=int(batch["start"][0]),
            stop=int(batch["stop"][0]),
            first=int(batch["first"][0]),
        )
        bad: list[QuarantinedRow] = []
        num_told, counts = 0, Counter[bool]()
        for block, is_last in _with_last(self._good_rows(shard, bad)):
            count = len(block["row"])
            counts[bool(block["held_out"][0])] += count
            told = self._told(bad[num_told:]) | {ENDED: int(is_last)}
            yield block | {name: in_the_first(number, count) for name, number in told.items()}
            num_told = len(bad)
        account = Account.of(str(batch["version"][0]), counts[False], counts[True], bad)
        write_account(Run(self.config).quarantine, shard.name, account, bad)

    def _told(self, bad: Sequence[QuarantinedRow]) -> dict[str, int]:
        """Return what progress is told of rows that were set aside: numbers of the same names."""
        counts = Counter(r.reason if r.reason in FILTERS else QUARANTINED for r in bad)
        filtered = {f"{FILTERED}{name}": counts[name] for name in self.filters}
        return {QUARANTINED: counts[QUARANTINED], **filtered}

    def _good_rows(self, shard: Shard, bad: list[QuarantinedRow]) -> Iterator[Batch]:
        """Yield the good rows, some at a time, and append the bad ones to `bad`."""
        blocks = [_Block(shard, held_out) for held_out in (False, True)]
        for raw in open_corpus(self.config.corpus).read(shard):
            row = decode_row(raw, self.config.corpus)
            if isinstance(row, QuarantinedRow):
                bad.append(row)
                continue
            block = blocks[self.held_out.holds(raw)]
            block.rows.append(row)
            if len(block.rows) == self.config.corpus.rows_per_shard:
                yield self._pass_on(block)
        yield from (self._pass_on(block) for block in blocks if block.rows)

    def _pass_on(self, block: _Block) -> Batch:
        """Return the waiting rows as columns, and wait for the next ones."""
        first, rows = block.first, block.rows
        block.first, block.rows = first + len(rows), []
        batch = {
            "shard": np.full(len(rows), block.shard.name),
            "held_out": np.full(len(rows), block.held_out),
            "row": np.arange(first, first + len(rows)),
            "key": np.array([row.key for row in rows], dtype=object),
            CAPTION: np.array([row.caption for row in rows], dtype=object),
            "image": np.stack([row.image for row in rows]),
        }
        if self.config.corpus.filters.picture_distance is not None:
            batch[PICTURE_HASH] = perceptual_hashes(batch["image"])
        variants = [list(islice(cycle(row.captions), self.num_captions)) for row in rows]
        for i in range(1, self.num_captions):  # a row with fewer repeats its own
            batch[f"{OTHER_CAPTION}{i}"] = np.array([v[i] for v in variants], dtype=object)
        for name in self.attributes:
            values = [row.attributes.get(name, "") for row in rows]
            batch[f"{ATTRIBUTE}{name}"] = np.array(values, dtype=object)
        return batch


def in_the_first(number: float, count: int) -> NDArray[Any]:
    """Return a number and zeros, `(count,)`: their sum stays, however Ray Data cuts a block."""
    return np.array([number, *[type(number)()] * (count - 1)])


def _with_last(blocks: Iterator[Batch]) -> Iterator[tuple[Batch, bool]]:
    """Yield each block and whether it is the last one."""
    block = next(blocks, None)
    while block is not None:
        following = next(blocks, None)
        yield block, following is None
        block = following


class ShardWriter:
    """Writes rows as one file of `embeddings/` or of its `held_out/`; returns counts of them."""

    def __init__(self, config: Config) -> None:
        run = Run(config)
        self.folders = (run.embeddings, run.held_out)

    def __call__(self, batch: Batch) -> Batch:
        """Write rows of some shards: Ray Data may have cut or joined what their readers yielded."""
        for held_out, folder in enumerate(self.folders):
            for shard in np.unique(batch["shard"]):
                chosen = (batch["shard"] == shard) & (batch["held_out"] == bool(held_out))
                if chosen.any():
                    _write_rows(folder, {name: column[chosen] for name, column in batch.items()})
        held_out = int(batch["held_out"].sum())
        counts = {"good": len(batch["row"]) - held_out, "held_out": held_out}
        if len(batch["row"]):
            self._written.inc(len(batch["row"]))
        more = [name for name in batch if name.startswith((FILTERED, BUSY))]
        counts |= {name: batch[name].sum() for name in (QUARANTINED, *more, ENDED)}
        return {name: np.array([count]) for name, count in counts.items()}

    @cached_property
    def _written(self) -> metrics.Counter:
        return metrics.Counter("paris_prepare_rows", "rows that were encoded and written")


def _write_rows(folder: Folder, batch: Batch) -> None:
    shard, first = str(batch["shard"][0]), int(batch["row"][0])
    following = np.arange(first, first + len(batch["row"]))
    if not np.array_equal(batch["row"], following):
        raise RuntimeError(f"rows of {shard} from {first} on have lost their order")
    write_part(folder, part_name(shard, first), _embeddings_table(batch))


def _embeddings_table(batch: Batch) -> pa.Table:
    thumbnails = [png_bytes(Image.fromarray(thumbnail(image))) for image in batch["image"]]
    return to_table(
        {
            "key": _texts(batch["key"]),
            CAPTION: _texts(batch[CAPTION]),
            "thumbnail": thumbnails,
            **{name: _texts(batch[name]) for name in batch if name.startswith(ATTRIBUTE)},
            **{name: batch[name] for name in STORED if name in batch},
        }
    )


def _texts(column: NDArray[Any]) -> list[str]:
    return [str(value) for value in column]
