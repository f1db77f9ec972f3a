"""Rows that models' filters take, once everything is encoded and scored.

The scores are columns of `embeddings/`. Each task moves what is out of the limits from the files of
some shards to their files of `quarantine/`; what a row is filtered for depends on no other row.
"""

from collections.abc import Callable, Sequence

import ray

from paris_ray.config import Config, FiltersConfig
from paris_ray.corpora.filters.scores import judge_scores, score_name
from paris_ray.embeddings import read_part
from paris_ray.pipeline.accounts import TASK_CPUS, files_by_shard, in_groups
from paris_ray.pipeline.moving import PartFile, by_shard, move, part_files, row_names
from paris_ray.pipeline.tasks import gather
from paris_ray.run import Run


def drop_filtered(config: Config, check: Callable[[], object] = lambda: None) -> None:
    """Move rows whose scores `corpus.filters` do not want to `quarantine/`, by tasks.

    A shard that an interruption leaves half moved is not whole, and encoded again; one that has
    been moved has nothing left to move.

    Args:
        config: The run; all of its shards have been encoded.
        check: Called every second; what it raises ends the tasks.
    """
    if not config.corpus.filters.scores:
        return
    found = files_by_shard(Run(config))
    shards = by_shard(part_files(found, list(found)))
    gather([_filter.remote(config, group) for group in in_groups(shards)], check)


@ray.remote(num_cpus=TASK_CPUS, max_retries=0)  # a second time would set rows aside twice
def _filter(config: Config, shards: Sequence[Sequence[PartFile]]) -> None:
    for files in shards:
        filter_shard(Run(config), files, config.corpus.filters)


def filter_shard(run: Run, files: Sequence[PartFile], filters: FiltersConfig) -> None:
    """Move what filters take of one shard's files to its file of `quarantine/`."""
    columns = [score_name(reason) for reason in filters.scores]
    leaving = {}
    for file, names in row_names(run, files).items():
        scores = read_part(file.folder(run), file.name, columns).to_pylist()
        for name, row in zip(names, scores, strict=True):
            found = judge_scores(row, filters)
            if found is not None:
                leaving[name] = found
    if leaving:
        move(run, files, leaving)
