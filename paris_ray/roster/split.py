"""A cluster that grew becomes two: its rows are split by what clusters them, into a new run."""

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa

from paris_ray.artifacts import canonical_json, find_finished, publish, sha256_hex
from paris_ray.clustering import FEATURE_COLUMNS, Clustering, fit_clustering, unit_length
from paris_ray.config import Config, identity
from paris_ray.embeddings import (
    NULL_TEXT,
    part_names,
    read_part,
    read_rows,
    tensor_column,
    write_part,
)
from paris_ray.errors import ConfigError
from paris_ray.folders import LOCKS, Folder
from paris_ray.roster.sample import Shard
from paris_ray.run import SHARD, Run
from paris_ray.run_lock import locked
from paris_ray.seeding import derive_seed

logger = logging.getLogger("paris_ray")

HALVES = 2
MAX_FIT_ROWS = 200_000


def split(shard: Shard, config: Config, target: Run) -> None:
    """Write the rows of a cluster as the shards of a run of two clusters.

    One file of the cluster is in memory at a time.

    Args:
        shard: The cluster.
        config: The run that made it: `cluster` and `seed` say how its rows are split.
        target: The new run, whose experts `jobs.train_experts` then trains.

    Raises:
        ConfigError: if clusters are random, or there are fewer rows than halves.
        ArtifactError: if the new run has other shards, or the cluster cannot be read.
        LockError: if another job splits into it.
    """
    columns = FEATURE_COLUMNS[config.cluster.features]
    if not columns:
        raise ConfigError("cluster.features='random' is not allowed: there is nothing to split by")
    settings = {"seed": config.seed, "cluster": identity(config.cluster)}
    digest, parents = sha256_hex(canonical_json(settings)), {SHARD: shard.digest}
    halves = [target.shard(half) for half in range(HALVES)]
    with locked(target.folder / LOCKS / "clusters", target.clusters.uri) as held:
        if all(
            find_finished(half, SHARD, config_digest=digest, parents=parents) for half in halves
        ):
            logger.info("roster: already split, kept (%s)", target.clusters.uri)
            return
        clustering = _fit(shard, columns, config)
        for half in halves:
            half.clear()  # what another split, that was killed, left in it
        sizes = _write(shard, clustering, columns, halves)
        held.check()
        for half, rows in zip(halves, sizes, strict=True):
            publish(half, SHARD, config_digest=digest, parents=parents, facts={"rows": rows})
    logger.info("roster: split into %s rows (%s)", " and ".join(map(str, sizes)), target.folder.uri)


def _fit(shard: Shard, columns: Sequence[str], config: Config) -> Clustering:
    """Fit two clusters to evenly spread rows."""
    count = min(shard.count, MAX_FIT_ROWS)
    table = read_rows(shard.folder, np.arange(count) * shard.count // count, columns)
    features = unit_length([tensor_column(table, name) for name in columns])
    halves = replace(config.cluster, num_clusters=HALVES)
    return fit_clustering(features, halves, derive_seed(config.seed, "split"))


def _write(
    shard: Shard, clustering: Clustering, columns: Sequence[str], halves: Sequence[Folder]
) -> list[int]:
    """Write each row into its half; return how many rows each has."""
    sizes = [0] * len(halves)
    for name in part_names(shard.folder):
        table = read_part(shard.folder, name)
        chosen = clustering.assign(unit_length([tensor_column(table, each) for each in columns]))
        for number, half in enumerate(halves):
            rows = table.filter(pa.array(chosen == number))
            sizes[number] += rows.num_rows
            if rows.num_rows:
                write_part(half, name, rows)
    for half in halves:
        half.write(NULL_TEXT, shard.folder.read(NULL_TEXT))
    return sizes
