"""The page that `prepare` ends with: what became of a corpus, and what it was cut into."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paris_ray.reports import (
    decode_thumbnails,
    definitions,
    inline_image,
    page,
    paragraph,
    picture_grid,
    section,
    table,
)
from paris_ray.survey.distributions import caption_lengths, size_distributions
from paris_ray.survey.map import drawn_map
from paris_ray.survey.rendering import distribution_sections, set_aside_sections, words_of
from paris_ray.survey.sample import SampledRow

PICTURES_PER_CLUSTER, COLUMNS = 60, 12
NEAR = 0.9  # a row belongs as well to another cluster if its own is not nearer than this share


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterSample:
    """Some rows of one cluster.

    Attributes:
        rows: How many it has.
        words: What its captions say more often than all others do.
        captions: Of some rows, N.
        thumbnails: PNG files of those.
        features: `(N, D)` of those: what was clustered; None of a cluster without rows.
        second: The second nearest cluster `(N,)`; None where nothing was clustered.
        nearness: Distance to their own cluster as a share of that to the second `(N,)`; likewise.
    """

    rows: int
    words: Sequence[str]
    captions: Sequence[str]
    thumbnails: Sequence[bytes]
    features: NDArray[np.float32] | None = None
    second: NDArray[np.int64] | None = None
    nearness: NDArray[np.float32] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """What is shown.

    Attributes:
        counts: `rows`, `held_out`, `quarantined` and `filtered` (by reason), as the embeddings'
            manifest has them.
        bad_rows: Some of the quarantined and the filtered rows, by reason.
        sizes: Width and height of some of the corpus' pictures.
        image_size: The side that they were brought to.
        clusters: In their order.
        seconds: How long each part of `prepare` took, by name, over all attempts.
        note: What could not be found out, or nothing.
        attribution: Licence line, or None.
    """

    counts: Mapping[str, Any]
    bad_rows: Mapping[str, Sequence[SampledRow]]
    sizes: Sequence[tuple[int, int]]
    image_size: int
    clusters: Sequence[ClusterSample]
    seconds: Mapping[str, float]
    note: str
    attribution: str | None


def prepared_page(prepared: Prepared) -> bytes:
    """Return the page."""
    total = sum(cluster.rows for cluster in prepared.clusters)
    title = f"{total:,} captioned pictures in {len(prepared.clusters)} clusters"
    sections = [
        _rows(prepared),
        *set_aside_sections(
            prepared.counts["quarantined"], prepared.counts["filtered"], prepared.bad_rows
        ),
        *_distributions(prepared),
        _map(prepared.clusters),
        _overlap(prepared.clusters),
        *(_cluster(k, cluster, total) for k, cluster in enumerate(prepared.clusters)),
        _time(prepared),
    ]
    return page(title, sections, prepared.attribution)


def num_rows(counts: Mapping[str, Any]) -> int:
    """Return how many rows were read, good, bad and filtered."""
    set_aside = (*counts["quarantined"].values(), *counts["filtered"].values())
    return int(counts["rows"] + counts["held_out"] + sum(set_aside))


def _rows(prepared: Prepared) -> str:
    counts, read = prepared.counts, num_rows(prepared.counts)
    sums = {name: sum(counts[name].values()) for name in ("quarantined", "filtered")}
    named = {"for training": counts["rows"], "held out": counts["held_out"], **sums}
    lines = [(name, f"{count:,} ({count / read:.2%})") for name, count in named.items()]
    note = paragraph(prepared.note) if prepared.note else ""
    return section("Rows", definitions([("read", f"{read:,}"), *lines]), note)


def _distributions(prepared: Prepared) -> list[str]:
    captions = [caption for cluster in prepared.clusters for caption in cluster.captions]
    found = [*size_distributions(prepared.sizes, prepared.image_size), caption_lengths(captions)]
    sampled = paragraph(f"Of {len(captions):,} rows from all clusters, as the lengths.")
    return [
        *distribution_sections(found),
        section("Most frequent words", sampled, paragraph(words_of(captions))),
    ]


def _map(clusters: Sequence[ClusterSample]) -> str:
    shown = {k: c.features for k, c in enumerate(clusters) if c.features is not None}
    features = np.concatenate(list(shown.values()))
    members = np.repeat(list(shown), [len(each) for each in shown.values()])
    text = (
        f"What is clustered, of {len(features):,} rows, along its first two principal directions. "
        "Clusters that lie on one another here may be apart in the others."
    )
    return section("Map", paragraph(text), drawn_map(features, members, len(clusters)))


def _overlap(clusters: Sequence[ClusterSample]) -> str:
    lines = [["cluster", "rows", "share", "as near to another", "mostly to"]]
    total = sum(cluster.rows for cluster in clusters)
    for k, cluster in enumerate(clusters):
        if cluster.second is None or cluster.nearness is None:
            continue
        near = cluster.nearness >= NEAR
        most = str(np.bincount(cluster.second[near]).argmax()) if near.any() else ""
        share = f"{cluster.rows / total:.1%}"
        lines.append([str(k), f"{cluster.rows:,}", share, f"{near.mean():.1%}", most])
    if len(lines) == 1:
        return ""
    text = (
        f"Rows that are as near to another cluster: the distance to their own is {NEAR:.0%} of the "
        "distance to the second nearest or more. Experts of two such clusters see like pictures."
    )
    return section("Overlap", paragraph(text), table(lines))


def _cluster(number: int, cluster: ClusterSample, total: int) -> str:
    title = f"Cluster {number}: {cluster.rows:,} pictures, {cluster.rows / total:.1%}"
    if not cluster.rows:
        return section(title, paragraph("Its expert is trained elsewhere."))
    thumbnails = decode_thumbnails(cluster.thumbnails[:PICTURES_PER_CLUSTER])
    grid = picture_grid(thumbnails, columns=min(COLUMNS, len(thumbnails)))
    words = definitions(
        [
            ("more than elsewhere", ", ".join(cluster.words) or "no word"),
            ("most frequent", words_of(cluster.captions)),
        ]
    )
    return section(title, words, inline_image(grid, title, width=min(960, 2 * grid.width)))


def _time(prepared: Prepared) -> str:
    read = num_rows(prepared.counts)
    lines = [["part", "seconds", "rows/s"]]
    for name, seconds in prepared.seconds.items():
        rate = f"{read / seconds:,.1f}" if seconds else ""
        lines.append([name, f"{seconds:,.1f}", rate])
    text = f"Over all attempts, with the start of processes; {read:,} rows."
    return section("Time", paragraph(text), table(lines)) if len(lines) > 1 else ""
