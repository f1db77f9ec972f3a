"""Prepare, at its end: a page of what became of the corpus, gathered from samples by one task."""

import json
import logging
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray

from paris_ray.artifacts import REPORT, TIMINGS, VerifiedFolder, read_manifest
from paris_ray.cluster_facts import read_clusters
from paris_ray.clustering import FEATURE_COLUMNS, Clustering, unit_length
from paris_ray.config import Config
from paris_ray.corpora import QuarantinedRow, Shard, open_corpus
from paris_ray.embeddings import part_names, read_parts, tensor_column
from paris_ray.errors import CorpusError
from paris_ray.folders import Folder
from paris_ray.pipeline.accounts import shard_of
from paris_ray.pipeline.stage import PART
from paris_ray.run import CLUSTERS, EMBEDDINGS, Run
from paris_ray.survey.listing import Listing
from paris_ray.survey.prepared import (
    PICTURES_PER_CLUSTER,
    ClusterSample,
    Prepared,
    prepared_page,
)
from paris_ray.survey.rendering import rows_shown
from paris_ray.survey.sample import (
    SampledRow,
    picture_of,
    picture_size,
    some_rows,
    spread,
)

logger = logging.getLogger("paris_ray")

SAMPLED_ROWS = 2000  # of all clusters together, about
FILES_PER_CLUSTER = 16  # at most so many are read
QUARANTINE_FILES = 256  # likewise
ROWS, CORPUS_S = 256, 2.0  # of the corpus, for sizes; as long for bad pictures

BadRows = Mapping[str, Sequence[tuple[str, QuarantinedRow]]]  # with names of shards, by reason
Pictures = dict[tuple[str, str], NDArray[np.uint8] | None]  # by shard and key


def report_preparation(config: Config, shards: Sequence[Shard]) -> None:
    """Write `report.html` of finished clusters, unless it is there already.

    Args:
        config: The run.
        shards: All shards of the corpus; none if another run has encoded it.
    """
    run = Run(config)
    if run.clusters.exists(REPORT):
        return
    ray.get(write_report.options(num_cpus=config.cluster.num_cpus).remote(config, shards))
    logger.info("prepare: see %s/%s", run.clusters.uri, REPORT)


@ray.remote
def write_report(config: Config, shards: Sequence[Shard]) -> None:
    """Gather what is shown, and write the page."""
    run = Run(config)
    # Embeddings of another run may be older than filters.
    facts = {"filtered": {}, **read_manifest(run.embeddings, EMBEDDINGS).facts}
    bad = _bad_rows(run.quarantine, {**facts["quarantined"], **facts["filtered"]})
    sizes, pictures, note = _from_corpus(config, shards, bad)
    page = prepared_page(
        Prepared(
            counts=facts,
            bad_rows={
                reason: [_shown(row, pictures.get((shard, row.key))) for shard, row in rows]
                for reason, rows in bad.items()
            },
            sizes=sizes,
            image_size=config.corpus.image_size,
            clusters=_cluster_samples(run),
            seconds=_seconds(run.folder),
            note=note,
            attribution=facts["attribution"],
        )
    )
    run.clusters.write(REPORT, page)


def _from_corpus(
    config: Config, shards: Sequence[Shard], bad: BadRows
) -> tuple[list[tuple[int, int]], Pictures, str]:
    """Return sizes of some pictures, and those of bad rows; or none, and why."""
    if config.prepared_from is not None:
        return [], {}, f"Sizes of pictures are in the report of {config.prepared_from}."
    try:
        listing = Listing(config, open_corpus(config.corpus), shards)
        found = (picture_size(r.image) for _, r in some_rows(listing, rows=ROWS, seconds=CORPUS_S))
        sizes = [size for size in found if size is not None]
        return sizes, _bad_pictures(listing, bad), ""
    except (CorpusError, OSError) as error:
        return [], {}, f"The corpus cannot be read again, for sizes of pictures: {error}"


def _bad_rows(quarantine: Folder, counts: Mapping[str, int]) -> BadRows:
    """Return some rows set aside for every reason that is among some of the files."""
    found: dict[str, list[tuple[str, QuarantinedRow]]] = defaultdict(list)
    missing = {reason: min(count, rows_shown(reason)) for reason, count in counts.items()}
    for name in spread(part_names(quarantine), QUARANTINE_FILES):
        if all(len(found[reason]) >= count for reason, count in missing.items()):
            break
        for row in read_parts(quarantine, [name], ["key", "reason", "detail"]).to_pylist():
            reason = row["reason"]
            if len(found[reason]) < rows_shown(reason):
                found[reason].append((shard_of(name), QuarantinedRow(**row)))
    return found


def _bad_pictures(listing: Listing, bad: BadRows) -> Pictures:
    """Return the pictures of bad rows that have one all the same."""
    wanted = {(shard, row.key) for rows in bad.values() for shard, row in rows}
    names = {name for name, _ in wanted}
    deadline = time.monotonic() + CORPUS_S
    found: Pictures = {}
    for shard in listing.shards:
        if shard.name not in names or time.monotonic() > deadline:
            continue
        for raw in listing.corpus.read(shard):
            if (shard.name, raw.key) in wanted:
                found[shard.name, raw.key] = picture_of(raw, listing.config.corpus)
            if time.monotonic() > deadline:
                break
    return found


def _shown(row: QuarantinedRow, picture: NDArray[np.uint8] | None) -> SampledRow:
    return SampledRow(row.key, "", row.reason, row.detail, False, None, picture)


def _cluster_samples(run: Run) -> list[ClusterSample]:
    sizes = read_manifest(run.clusters, CLUSTERS).facts["sizes"]
    told = read_clusters(VerifiedFolder(run.clusters, None), run.num_experts)
    names = FEATURE_COLUMNS[run.config.cluster.features]
    clustering = Clustering.load(run.clusters) if names and run.num_experts > 1 else None
    samples = []
    for k, size in enumerate(sizes):
        if not size:  # a site of a federation may have no row of a cluster
            samples.append(ClusterSample(rows=0, words=[], captions=[], thumbnails=[]))
            continue
        count = max(PICTURES_PER_CLUSTER, SAMPLED_ROWS * size // sum(sizes))
        # Of random clusters the map shows how alike they are.
        rows = _sample(run.shard(k), ["caption", "thumbnail", *(names or ("features",))], count)
        features = unit_length([tensor_column(rows, name) for name in names or ("features",)])
        second, nearness = clustering.overlap(features) if clustering else (None, None)
        samples.append(
            ClusterSample(
                rows=size,
                words=told[k].words,
                captions=rows["caption"].to_pylist(),
                thumbnails=spread(rows["thumbnail"].to_pylist(), PICTURES_PER_CLUSTER),
                features=features,
                second=second,
                nearness=nearness,
            )
        )
    return samples


def _sample(shard: Folder, columns: Sequence[str], count: int) -> pa.Table:
    """Return about so many rows, evenly spread over some files."""
    names = spread(part_names(shard), FILES_PER_CLUSTER)
    parts = []
    for name in names:
        rows = read_parts(shard, [name], columns)
        parts.append(rows.take(spread(range(rows.num_rows), -(-count // len(names)))))
    return pa.concat_tables(parts)


def _seconds(folder: Folder) -> dict[str, float]:
    """Return how long each part of `prepare` took, over all attempts."""
    seconds: dict[str, float] = defaultdict(float)
    rows = folder.read(TIMINGS).splitlines() if folder.exists(TIMINGS) else []
    for row in map(json.loads, rows):
        if row["stage"].startswith(PART):
            seconds[row["stage"].removeprefix(PART)] += row["seconds"]
    return seconds
