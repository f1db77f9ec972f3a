"""Prepare, part three: cluster the features and write one shard of training data a cluster."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from paris_ray.artifacts import Folder, Manifest, publish
from paris_ray.clustering import Clustering, fit_clustering
from paris_ray.config import Config
from paris_ray.embeddings import (
    NULL_TEXT,
    part_names,
    read_parts,
    read_table,
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
MAX_SPLIT_TASKS = 64  # also the number of files of a shard
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
    groups = np.array_split(part_names(run.embeddings), MAX_SPLIT_TASKS)
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
    features = tensor_column(read_table(run.embeddings, ["features"]), "features")
    if len(features) > MAX_FIT_ROWS:
        generator = numpy_generator(config.seed, "cluster sample")
        features = features[generator.choice(len(features), MAX_FIT_ROWS, replace=False)]
    seed = derive_seed(config.seed, "cluster")
    fit_clustering(features.astype(np.float32), config.cluster, seed).save(run.clusters)


@ray.remote
def split_parts(config: Config, index: int, names: Sequence[str]) -> None:
    """Send the rows of some embedding files to the shards of their clusters."""
    run = Run(config)
    columns = ["key", "caption", "thumbnail", "latents", "features", "text_embedding"]
    table = read_parts(run.embeddings, names, columns)
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
    rows = read_table(shard, ["key"]).num_rows if part_names(shard) else 0
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
    table = read_table(shard, ["caption", "thumbnail"])
    words = frequent_words(table["caption"].to_pylist(), WORDS_PER_CLUSTER)
    step = max(1, table.num_rows // PICTURES_PER_CLUSTER)
    encoded: list[Any] = table["thumbnail"].to_pylist()[::step][:PICTURES_PER_CLUSTER]
    grid = picture_grid(decode_thumbnails(encoded), columns=20)
    text = ", ".join(f"{word} ({count})" for word, count in words)
    return section(title, paragraph(text), inline_image(grid, title, width=960))
