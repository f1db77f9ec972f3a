"""Rows that models' filters take, once everything is encoded and scored.

The scores are columns of `embeddings/`. Each task moves what is out of the limits from the files of
some shards to their files of `quarantine/`; what a row is filtered for depends on no other row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import ray

from paris_ray.artifacts import Folder
from paris_ray.config import Config, FiltersConfig
from paris_ray.corpora import QuarantinedRow
from paris_ray.corpora.filters.scores import judge_scores, score_name
from paris_ray.embeddings import read_part, write_part
from paris_ray.pipeline.accounts import (
    SHARDS_A_TASK,
    TASK_CPUS,
    ShardFiles,
    files_by_shard,
    set_aside,
    shard_of,
)
from paris_ray.run import Run


@dataclass(frozen=True, slots=True)
class _Taken:
    """Rows of one file that are to go, by number."""

    folder: Folder
    name: str
    rows: Mapping[int, QuarantinedRow]


def drop_filtered(config: Config) -> None:
    """Move rows whose scores `corpus.filters` do not want to `quarantine/`, by tasks.

    A shard that an interruption leaves half moved is not whole, and encoded again; one that has
    been moved has nothing left to move.

    Args:
        config: The run; all of its shards have been encoded.
    """
    if not config.corpus.filters.scores:
        return
    shards = list(files_by_shard(Run(config)).values())
    groups = [shards[i : i + SHARDS_A_TASK] for i in range(0, len(shards), SHARDS_A_TASK)]
    ray.get([_filter.remote(config, group) for group in groups])


@ray.remote(num_cpus=TASK_CPUS, max_retries=0)  # a second time would set rows aside twice
def _filter(config: Config, shards: Sequence[ShardFiles]) -> None:
    for files in shards:
        filter_shard(Run(config), files, config.corpus.filters)


def filter_shard(run: Run, files: ShardFiles, filters: FiltersConfig) -> None:
    """Move what filters take of one shard to its file of `quarantine/`, which is written first."""
    good, held_out = (
        [each for name in names if (each := _taken(folder, name, filters)).rows]
        for folder, names in ((run.embeddings, files.embeddings), (run.held_out, files.held_out))
    )
    if not good and not held_out:
        return
    bad = [row for taken in (*good, *held_out) for row in taken.rows.values()]
    num_good, num_held_out = (sum(len(t.rows) for t in each) for each in (good, held_out))
    shard = shard_of(files.quarantine[0])
    set_aside(run.quarantine, shard, num_good, num_held_out, bad)
    for taken in (*good, *held_out):
        _rewrite(taken)


def _taken(folder: Folder, name: str, filters: FiltersConfig) -> _Taken:
    columns = ["key", *map(score_name, filters.scores)]
    rows = {}
    for number, row in enumerate(read_part(folder, name, columns).to_pylist()):
        found = judge_scores(row, filters)
        if found is not None:
            rows[number] = QuarantinedRow(row["key"], *found)
    return _Taken(folder, name, rows)


def _rewrite(taken: _Taken) -> None:
    table: pa.Table = read_part(taken.folder, taken.name)
    kept = np.setdiff1d(np.arange(table.num_rows), list(taken.rows))
    if len(kept):
        write_part(taken.folder, taken.name, table.take(kept))
    else:
        taken.folder.delete(taken.name)
