"""The measures of one set of drawn pictures, as numbers for a manifest."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paris_ray.evaluation.attributes import AttributeAccuracy
from paris_ray.evaluation.bootstrap import bootstrap_mean
from paris_ray.evaluation.coverage import coverage
from paris_ray.evaluation.features import Features
from paris_ray.evaluation.frechet import (
    MIN_SUBSET,
    fit_gaussian,
    frechet_distance,
    frechet_distance_infinity,
)
from paris_ray.evaluation.kernel import cmmd, kid
from paris_ray.evaluation.retrieval import clip_scores, retrieval

MIN_ROWS = 8  # fewer say nothing of a distribution
KID_SUBSET = 1000
NEIGHBOUR = 5  # of coverage


def mean_with_interval(values: Sequence[float] | NDArray[Any], seed: int) -> dict[str, float]:
    """Return a mean and its 95 % percentile interval over the items."""
    interval = bootstrap_mean(values, seed=seed)
    return {"mean": interval.value, "low": interval.low, "high": interval.high}


def attribute_summary(accuracy: AttributeAccuracy, seed: int) -> dict[str, dict[str, float]]:
    """Return the share that is right, with its interval, by attribute and of `all` together."""
    columns = dict(zip(accuracy.names, accuracy.right.T, strict=True))
    columns["all"] = accuracy.all_right
    return {name: mean_with_interval(right, seed) for name, right in columns.items()}


def distribution_summary(drawn: Features, real: Features, seed: int) -> dict[str, Any]:
    """Compare drawn pictures with the real ones of the same captions, as two distributions.

    Args:
        drawn: `(N, D)` features of the drawn pictures.
        real: `(M, D)` those of the real ones.
        seed: Decides subsets.

    Returns:
        Empty if there are too few; with `frechet_infinity` if there are enough to extrapolate.
    """
    fewest = min(len(drawn), len(real))
    if fewest < MIN_ROWS:
        return {}
    reference = fit_gaussian(real)
    frechet = frechet_distance(fit_gaussian(drawn), reference)
    limit = {}
    if len(drawn) >= 2 * MIN_SUBSET:  # subsets of nearly one size say nothing of endless ones
        endless = frechet_distance_infinity(drawn, reference, seed=seed, min_count=MIN_SUBSET)
        limit["frechet_infinity"] = endless.distance
    kernel = kid(drawn, real, seed=seed, subset_size=min(KID_SUBSET, fewest))
    covered = coverage(drawn, real, k=NEIGHBOUR)
    return {
        "frechet": frechet.distance,
        "frechet_note": frechet.bias_note,
        **limit,
        "kid": kernel.mean,
        "cmmd": cmmd(drawn, real),
        "precision": covered.precision,
        "recall": covered.recall,
        "density": covered.density,
        "coverage": covered.coverage,
    }


def retrieval_summary(
    images: Features, texts: Features, captions: Sequence[str], seed: int
) -> dict[str, Any]:
    """Return CLIP score and recall at 1 of drawn pictures and the captions asked for."""
    ranks = retrieval(images, texts, captions)
    return {
        "clip_score": mean_with_interval(clip_scores(images, texts), seed),
        "image_to_text_r1": ranks.image_to_text(),
        "text_to_image_r1": ranks.text_to_image(),
    }


def by_cluster(
    clusters: NDArray[np.int64], values: Mapping[str, NDArray[Any]], num_clusters: int
) -> list[dict[str, Any]]:
    """Return the mean of every per-picture measure in every cluster; of an empty one, the count.

    Args:
        clusters: `(N,)` cluster of each picture's caption.
        values: Measures `(N,)` by name.
        num_clusters: K.
    """
    rows: list[dict[str, Any]] = []
    for k in range(num_clusters):
        inside = clusters == k
        row: dict[str, Any] = {"captions": int(inside.sum())}
        if inside.any():
            row |= {name: float(value[inside].mean()) for name, value in values.items()}
        rows.append(row)
    return rows


MUCH_BY_CHANCE = 0.05


def headline(facts: Mapping[str, Any]) -> list[str]:
    """Return what an evaluation says, in a few lines: trained on and never shown apart."""
    shown = facts["shown"]
    lines = [
        f"caption recall {shown['caption_recall']['mean']:.4f} ({shown['captions']} trained on)"
    ]
    by_chance = shown.get("recall_by_chance", 0.0)  # evaluations of earlier versions lack it
    if by_chance > MUCH_BY_CHANCE:
        lines.append(f"of it {by_chance:.4f} by chance: many pictures share their caption")
    for split, name in (("shown", "trained on"), ("held_out", "never shown")):
        attributes = facts.get(split, {}).get("attributes", {})
        shares = ", ".join(f"{key} {value['mean']:.3f}" for key, value in attributes.items())
        if shares:
            lines.append(f"right of {facts[split]['captions']} captions {name}: {shares}")
    return lines


def comparison(measured: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the measures of several models beside each other, a line a measure.

    Args:
        measured: Facts of their evaluations, by name.
    """
    lines = []
    for split, name in (("shown", "trained on"), ("held_out", "never shown")):
        shares = {n: f.get(split, {}).get("attributes", {}).get("all") for n, f in measured.items()}
        if all(shares.values()):
            found = ", ".join(f"{n} {share['mean']:.4f}" for n, share in shares.items() if share)
            lines.append(f"all right of captions {name}: {found}")
    losses = {n: own_cluster_loss(f) for n, f in measured.items() if f.get("held_out_losses")}
    if losses:
        found = ", ".join(f"{n} {loss:.4f}" for n, loss in losses.items())
        lines.append(f"held-out velocity error, each cluster's own expert: {found}")
    return lines


def own_cluster_loss(facts: Mapping[str, Any]) -> float:
    """Return the mean held-out velocity error over clusters, of the expert that each belongs to.

    Args:
        facts: Of an evaluation; a model of one expert has all clusters.
    """
    matrix = facts["held_out_losses"]
    own = [matrix[k % len(matrix)][k] for k in range(len(matrix[0]))]
    return float(np.mean([loss for loss in own if loss is not None]))
