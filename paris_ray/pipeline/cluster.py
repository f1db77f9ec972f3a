"""Prepare, part three: cluster the features and write one shard of training data a cluster."""

import base64
import logging
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray

from paris_ray.artifacts import Manifest, hashed_names, publish, read_manifest
from paris_ray.cluster_facts import (
    MAX_WORD_LENGTH,
    TOLD_PICTURES,
    TOLD_WORDS,
    ClusterFacts,
    write_clusters,
)
from paris_ray.clustering import (
    FEATURE_COLUMNS,
    WEIGHTS,
    Clustering,
    fit_clustering,
    random_clusters,
    unit_length,
)
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
from paris_ray.folders import Folder
from paris_ray.pipeline.file_list import digests_of, list_files
from paris_ray.pipeline.stage import Stage, federation_parent
from paris_ray.pipeline.tasks import gather
from paris_ray.reports import count_words, telling_words
from paris_ray.run import CLUSTERS, EMBEDDINGS, SHARD, Run
from paris_ray.seeding import derive_seed, numpy_generator

logger = logging.getLogger("paris_ray")

SECTIONS = ("seed", "cluster")
MAX_FIT_ROWS = 200_000
MIN_SPLIT_TASKS = 64  # as many as there are files, if there are fewer; a shard has a file of each
SPLIT_TASK_ROWS = 20_000  # about so many does one task hold in memory
MAX_SHARED_ROWS = 100_000


def prepare_clusters(config: Config, embeddings: Manifest) -> Manifest:
    """Publish `clusters/`: centroids, shards, held-out rows by cluster, what bundles tell of them.

    The centroids of a federation are copied; then clusters that are not trained here may be empty.
    Of random clusters there are no centroids. With `cluster.shared_share` also `shared/`, rows of
    the whole corpus for every expert.
    """
    run = Run(config)
    parents = {"embeddings": embeddings.digest} | federation_parent(config)
    stage = Stage(CLUSTERS, run.clusters, config, sections=SECTIONS, parents=parents)
    with stage.locked():
        return stage.finished() or _make_clusters(run, stage, embeddings)


def _make_clusters(run: Run, stage: Stage, embeddings: Manifest) -> Manifest:
    stage.begin()
    config, num_cpus = run.config, run.config.cluster.num_cpus
    if run.federation is not None:
        run.clusters.write(WEIGHTS, run.federation.read(WEIGHTS))
    elif FEATURE_COLUMNS[config.cluster.features]:
        gather([fit_clusters.options(num_cpus=num_cpus).remote(config)], stage.check)
    split = split_parts.options(num_cpus=num_cpus)
    jobs = [
        (held_out, index, names)
        for held_out, folder in ((False, run.embeddings), (True, run.held_out))
        for index, names in enumerate(_groups(folder, embeddings.facts["rows"]))
    ]
    gather([split.remote(config, *job) for job in jobs], stage.check)
    for folder in run.held_out_shards().values():
        folder.write(NULL_TEXT, run.encoders.read(NULL_TEXT))
    shards = [run.shard(k) for k in range(run.num_experts)]
    parts = [*shards, run.shared] if config.cluster.shared_share else shards
    published = [_publish_shard(run, stage.config_digest, part) for part in parts]
    sizes = [manifest.facts["rows"] for manifest in published[: len(shards)]]
    logger.info("cluster: sizes %s", sizes)
    _refuse_empty(run, sizes)
    describe = describe_clusters.options(num_cpus=num_cpus)
    gather([describe.remote(config, sizes)], stage.check)
    return stage.publish({"sizes": sizes}, files=_digests(run.clusters, parts, published))


def _refuse_empty(run: Run, sizes: Sequence[int]) -> None:
    """Raise ConfigError if an expert would have nothing to be trained on."""
    empty = [k for k in run.trained_experts if not sizes[k]]
    if not empty:
        return
    if run.federation is None:
        raise ConfigError(
            f"cluster.num_clusters={run.num_experts} leaves empty clusters (sizes {sizes}): "
            "choose fewer"
        )
    raise ConfigError(
        f"federation.experts={run.config.federation.experts} is not allowed: no row of this corpus "
        f"is in cluster {', '.join(map(str, empty))} (sizes {sizes})"
    )


def _groups(folder: Folder, num_rows: int) -> list[list[str]]:
    """Return the names of the files in groups, each for one task."""
    num_tasks = max(MIN_SPLIT_TASKS, num_rows // SPLIT_TASK_ROWS)
    groups = np.array_split(part_names(folder), num_tasks)
    return [list(map(str, group)) for group in groups if len(group)]


@ray.remote
def fit_clusters(config: Config) -> None:
    """Fit the centres to a sample of the features."""
    run = Run(config)
    seed = derive_seed(config.seed, "cluster")
    fit_clustering(_sample_features(run), config.cluster, seed).save(run.clusters)


def _sample_features(run: Run) -> NDArray[np.float32]:
    """Return what is clustered of MAX_FIT_ROWS random rows, or of all, in corpus order."""
    count = sum(num_rows(run.embeddings, name) for name in part_names(run.embeddings))
    wanted = np.ones(count, bool)
    if count > MAX_FIT_ROWS:
        order = numpy_generator(run.config.seed, "cluster sample").permutation(count)
        wanted[order[MAX_FIT_ROWS:]] = False
    names = FEATURE_COLUMNS[run.config.cluster.features]
    chunks, start = [], 0
    for columns in zip(*(stream_column(run.embeddings, name) for name in names), strict=True):
        rows = wanted[start : start + len(columns[0])]
        chunks.append(unit_length([column[rows] for column in columns]))
        start += len(rows)
    return np.concatenate(chunks)


def clusters_of(run: Run, table: pa.Table) -> NDArray[np.int64]:
    """Return the cluster `(N,)` of rows.

    Args:
        run: Its clusters have been fitted.
        table: The rows, with `key` and the columns that are clustered (`FEATURE_COLUMNS`).
    """
    names = FEATURE_COLUMNS[run.config.cluster.features]
    if not names:
        return random_clusters(table["key"].to_pylist(), run.num_experts, run.config.seed)
    columns = [tensor_column(table, name) for name in names]
    return Clustering.load(run.clusters).assign(unit_length(columns))


@ray.remote
def split_parts(config: Config, held_out: bool, index: int, names: Sequence[str]) -> None:
    """Send the rows of some files, of training or held out, to the shards of their clusters."""
    run, part = Run(config), f"part-{index:06d}.parquet"
    source, target = (run.held_out, run.held_out_shard) if held_out else (run.embeddings, run.shard)
    table = read_parts(source, names, column_names(source))
    clusters = clusters_of(run, table)
    for k in range(run.num_experts):
        rows = table.filter(pa.array(clusters == k))
        if rows.num_rows:
            write_part(target(k), part, rows)
    if config.cluster.shared_share and not held_out:
        _share(run, index, table)


def _share(run: Run, index: int, table: pa.Table) -> None:
    """Write some rows, or all if there are not many, to the rows that every expert has."""
    total = read_manifest(run.embeddings, EMBEDDINGS).facts["rows"]
    generator = numpy_generator(run.config.seed, "shared", index)
    chosen = generator.random(table.num_rows) < MAX_SHARED_ROWS / total
    if chosen.any():
        write_part(run.shared, f"part-{index:06d}.parquet", table.filter(pa.array(chosen)))


def _publish_shard(run: Run, config_digest: str, shard: Folder) -> Manifest:
    """Make a shard an artefact of its own, so that an expert needs to read nothing else."""
    shard.write(NULL_TEXT, run.encoders.read(NULL_TEXT))
    files = list_files(shard)
    rows = sum(num_rows(shard, name) for name in part_names(shard))
    return publish(
        shard, SHARD, config_digest=config_digest, parents={}, facts={"rows": rows}, files=files
    )


def _digests(
    clusters: Folder, parts: Sequence[Folder], published: Sequence[Manifest]
) -> dict[str, str]:
    """Return the digests of all in a folder: of a part that is published, that of its manifest."""
    places = [clusters.place_of(part) for part in parts]
    beside = [
        name
        for name in hashed_names(clusters)
        if not any(name.startswith(f"{place}/") for place in places)
    ]
    digests = {place: manifest.digest for place, manifest in zip(places, published, strict=True)}
    return digests | digests_of(clusters, beside)


@ray.remote
def describe_clusters(config: Config, sizes: Sequence[int]) -> None:
    """Write size, words and a few pictures of every cluster, for bundles."""
    run = Run(config)
    shards = [run.shard(k) for k in range(run.num_experts)]
    words = [
        count_words(read_table(shard, ["caption"])["caption"].to_pylist() if size else [])
        for shard, size in zip(shards, sizes, strict=True)
    ]
    write_clusters(run.clusters, _cluster_facts(shards, sizes, words))


def _cluster_facts(
    shards: Sequence[Folder], sizes: Sequence[int], words: Sequence[Counter[str]]
) -> list[ClusterFacts]:
    told = telling_words(words, sizes, TOLD_WORDS)
    return [
        ClusterFacts(
            rows=sizes[k],
            words=[word[:MAX_WORD_LENGTH] for word in told[k]],
            pictures=[
                base64.b64encode(png).decode()
                for png in _spread_thumbnails(shard, sizes[k], TOLD_PICTURES)
            ],
        )
        for k, shard in enumerate(shards)
    ]


def _spread_thumbnails(shard: Folder, num_pictures: int, count: int) -> list[bytes]:
    """Return evenly spread thumbnails of a shard, read a file at a time."""
    step = max(1, num_pictures // count)
    chosen: list[bytes] = []
    start = 0
    for name in part_names(shard):
        column = read_parts(shard, [name], ["thumbnail"])["thumbnail"]
        chosen += column.to_pylist()[-start % step :: step]
        start += len(column)
    return chosen[:count]
