"""Prepare, part three: cluster the features and write one shard of training data a cluster."""

import logging
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray

from paris_ray.artifacts import Folder, Manifest, publish
from paris_ray.clustering import Clustering, fit_clustering
from paris_ray.config import Config
from paris_ray.embeddings import (
    NULL_TEXT,
    column_names,
    num_rows,
    part_names,
    read_parts,
    read_table,
    stream_column,
    tensor_column,
    write_part,
)
from paris_ray.errors import ConfigError
from paris_ray.pipeline.stage import Stage
from paris_ray.reports import (
    decode_thumbnails,
    frequent_words,
    inline_image,
    page,
    paragraph,
    picture_grid,
    section,
)
from paris_ray.run import CLUSTERS, SHARD, Run
from paris_ray.seeding import derive_seed, numpy_generator

logger = logging.getLogger("paris_ray")

SECTIONS = ("seed", "cluster")
MAX_FIT_ROWS = 200_000
MIN_SPLIT_TASKS = 64  # as many as there are files, if there are fewer; a shard has a file of each
SPLIT_TASK_ROWS = 20_000  # about so many does one task hold in memory
PICTURES_PER_CLUSTER = 60
WORDS_PER_CLUSTER = 12


def prepare_clusters(config: Config, embeddings: Manifest) -> Manifest:
    """Publish `clusters/`: centroids, shards and `report.html`."""
    run = Run(config)
    parents = {"embeddings": embeddings.digest}
    stage = Stage(CLUSTERS, run.clusters, config, sections=SECTIONS, parents=parents)
    manifest = stage.finished()
    if manifest is not None:
        return manifest
    stage.begin()
    num_cpus = config.cluster.num_cpus
    ray.get(fit_clusters.options(num_cpus=num_cpus).remote(config))
    num_tasks = max(MIN_SPLIT_TASKS, embeddings.facts["rows"] // SPLIT_TASK_ROWS)
    groups = np.array_split(part_names(run.embeddings), num_tasks)
    split = split_parts.options(num_cpus=num_cpus)
    ray.get([split.remote(config, i, list(map(str, g))) for i, g in enumerate(groups) if len(g)])
    sizes = [_publish_shard(run, stage.config_digest, k) for k in range(run.num_experts)]
    logger.info("cluster: sizes %s", sizes)
    if not all(sizes):
        raise ConfigError(
            f"cluster.num_clusters={run.num_experts} leaves empty clusters (sizes {sizes}): "
            "choose fewer"
        )
    attribution = embeddings.facts["attribution"]
    ray.get(write_report.options(num_cpus=num_cpus).remote(config, sizes, attribution))
    return stage.publish({"sizes": sizes})


@ray.remote
def fit_clusters(config: Config) -> None:
    """Fit the centres to a sample of the features."""
    run = Run(config)
    seed = derive_seed(config.seed, "cluster")
    fit_clustering(_sample_features(run), config.cluster, seed).save(run.clusters)


def _sample_features(run: Run) -> NDArray[np.float32]:
    """Return the features of MAX_FIT_ROWS random rows, or of all, in corpus order."""
    count = sum(num_rows(run.embeddings, name) for name in part_names(run.embeddings))
    wanted = np.ones(count, bool)
    if count > MAX_FIT_ROWS:
        order = numpy_generator(run.config.seed, "cluster sample").permutation(count)
        wanted[order[MAX_FIT_ROWS:]] = False
    chunks, start = [], 0
    for chunk in stream_column(run.embeddings, "features"):
        chunks.append(chunk[wanted[start : start + len(chunk)]].astype(np.float32))
        start += len(chunk)
    return np.concatenate(chunks)


@ray.remote
def split_parts(config: Config, index: int, names: Sequence[str]) -> None:
    """Send the rows of some embedding files to the shards of their clusters."""
    run = Run(config)
    table = read_parts(run.embeddings, names, column_names(run.embeddings))
    features = tensor_column(table, "features").astype(np.float32)
    clusters = Clustering.load(run.clusters).assign(features)
    for k in range(run.num_experts):
        rows = table.filter(pa.array(clusters == k))
        if rows.num_rows:
            write_part(run.shard(k), f"part-{index:06d}.parquet", rows)


def _publish_shard(run: Run, config_digest: str, cluster: int) -> int:
    """Make a shard an artefact of its own, so that an expert needs to read nothing else."""
    shard = run.shard(cluster)
    shard.write(NULL_TEXT, run.encoders.read(NULL_TEXT))
    rows = sum(num_rows(shard, name) for name in part_names(shard))
    publish(shard, SHARD, config_digest=config_digest, parents={}, facts={"rows": rows})
    return rows


@ray.remote
def write_report(config: Config, sizes: Sequence[int], attribution: str | None) -> None:
    """Write `report.html`: size, pictures and frequent words of every cluster."""
    run = Run(config)
    sections = [_cluster_section(run.shard(k), k, sizes) for k in range(run.num_experts)]
    title = f"{sum(sizes)} captioned pictures in {len(sizes)} clusters"
    run.clusters.write("report.html", page(title, sections, attribution))


def _cluster_section(shard: Folder, cluster: int, sizes: Sequence[int]) -> str:
    title = f"Cluster {cluster}: {sizes[cluster]} pictures, {sizes[cluster] / sum(sizes):.1%}"
    if not sizes[cluster]:
        return section(title, paragraph("empty"))
    words = frequent_words(read_table(shard, ["caption"])["caption"].to_pylist(), WORDS_PER_CLUSTER)
    grid = picture_grid(decode_thumbnails(_spread_thumbnails(shard, sizes[cluster])), columns=20)
    text = ", ".join(f"{word} ({count})" for word, count in words)
    return section(title, paragraph(text), inline_image(grid, title, width=960))


def _spread_thumbnails(shard: Folder, num_pictures: int) -> list[bytes]:
    """Return evenly spread thumbnails of a shard, read a file at a time."""
    step = max(1, num_pictures // PICTURES_PER_CLUSTER)
    chosen: list[bytes] = []
    start = 0
    for name in part_names(shard):
        column = read_parts(shard, [name], ["thumbnail"])["thumbnail"]
        chosen += column.to_pylist()[-start % step :: step]
        start += len(column)
    return chosen[:PICTURES_PER_CLUSTER]
