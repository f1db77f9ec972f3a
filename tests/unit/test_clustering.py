"""Clustering: deterministic, roughly balanced, and right where there is a right answer."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from paris_ray.clustering import Clustering, Nuisance, fit_clustering, random_clusters
from paris_ray.config import ClusterConfig
from paris_ray.errors import ConfigError
from paris_ray.folders import Folder

CONFIG = ClusterConfig(num_clusters=4, num_fine=32, iterations=20, max_imbalance=1.25)


def unit_vectors(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def blobs(sizes: list[int], spread: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors around orthogonal centres, shuffled, and the blob of each."""
    generator = np.random.default_rng(seed)
    labels = generator.permutation(np.repeat(np.arange(len(sizes)), sizes))
    rows = np.eye(8)[labels] + spread * generator.standard_normal((len(labels), 8))
    return unit_vectors(rows), labels


@pytest.mark.parametrize("seed", range(5))
def test_well_separated_blobs_are_recovered(seed: int) -> None:
    features, labels = blobs([50, 50, 50, 50], spread=0.05, seed=seed)
    clusters = fit_clustering(features, CONFIG, seed).assign(features)
    assert len(set(zip(clusters.tolist(), labels.tolist(), strict=True))) == 4
    assert set(clusters) == {0, 1, 2, 3}


def test_the_same_arguments_give_the_same_clusters() -> None:
    features, _ = blobs([60, 50, 40, 30], spread=0.4)
    first, again = (fit_clustering(features, CONFIG, seed=3) for _ in range(2))
    assert np.array_equal(first.fine_centroids, again.fine_centroids)
    assert np.array_equal(first.coarse_of_fine, again.coarse_of_fine)
    other = fit_clustering(features, CONFIG, seed=4)
    assert not np.array_equal(first.fine_centroids, other.fine_centroids)


@pytest.mark.parametrize("seed", range(5))
def test_clusters_are_balanced_up_to_one_fine_cluster(seed: int) -> None:
    """Fine clusters are moved whole: one that fits nowhere joins the emptiest coarse cluster.

    So the largest coarse cluster has at most max_imbalance times the mean, or at most the mean
    and one fine cluster.
    """
    features, _ = blobs([400, 40, 30, 30], spread=0.3, seed=seed)
    clustering = fit_clustering(features, CONFIG, seed)
    sizes = np.bincount(clustering.assign(features), minlength=4)
    nearest_fine = (features @ clustering.fine_centroids.T).argmax(axis=1)
    mean, largest_fine = len(features) / 4, np.bincount(nearest_fine).max()
    assert sizes.sum() == len(features)
    assert sizes.min() > 0
    assert sizes.max() <= max(CONFIG.max_imbalance * mean, mean + largest_fine)


def test_a_loose_limit_follows_the_data() -> None:
    features, labels = blobs([300, 40, 30, 30], spread=0.05)
    loose = replace(CONFIG, max_imbalance=4.0)
    sizes = np.bincount(fit_clustering(features, loose, 0).assign(features))
    assert sorted(sizes.tolist()) == sorted(np.bincount(labels).tolist())


def test_every_cluster_gets_rows_even_of_as_many_rows_as_clusters() -> None:
    features, _ = blobs([1, 1, 1, 1], spread=0.05)
    clusters = fit_clustering(features, CONFIG, 0).assign(features)
    assert sorted(clusters.tolist()) == [0, 1, 2, 3]


def test_too_few_rows_are_refused() -> None:
    features, _ = blobs([1, 1, 1], spread=0.05)
    with pytest.raises(ConfigError, match=r"cluster.num_clusters=4 .* only 3 usable rows"):
        fit_clustering(features, CONFIG, 0)


def test_centres_are_saved_and_loaded(tmp_path: Path) -> None:
    features, _ = blobs([50, 50, 50, 50], spread=0.4)
    clustering = fit_clustering(features, CONFIG, 0)
    clustering.save(Folder(tmp_path))
    loaded = Clustering.load(Folder(tmp_path))
    assert np.array_equal(loaded.assign(features), clustering.assign(features))
    assert loaded.fine_centroids.dtype == np.float32


def test_random_clusters_depend_on_key_and_seed_and_are_about_as_large() -> None:
    keys = [f"row {i}" for i in range(4000)]
    clusters = random_clusters(keys, 4, seed=1)
    assert np.array_equal(clusters[::-1], random_clusters(keys[::-1], 4, seed=1))
    assert (np.abs(np.bincount(clusters, minlength=4) - 1000) < 5 * 750**0.5).all()
    assert (clusters != random_clusters(keys, 4, seed=2)).mean() > 0.6


def swamped(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two groups that differ by a little along one axis, and all rows by far more along another.

    Returns the unit vectors, their group, and on which side of the other axis each is.
    """
    generator = np.random.default_rng(seed)
    groups = generator.integers(0, 2, count)
    side = np.where(generator.random(count) < 0.5, -1.0, 1.0)
    rows = np.zeros((count, 4))
    rows[:, 0] = side * generator.uniform(0.8, 1.0, count)
    rows[:, 1] = np.where(groups, 0.2, -0.2)
    rows[:, 2:] = 0.01 * generator.standard_normal((count, 2))
    return unit_vectors(rows), groups, (side > 0).astype(int)


def agreement(clusters: np.ndarray, labels: np.ndarray) -> float:
    """Share of rows on which two partitions into two agree, whatever they are called."""
    same = float((clusters == labels).mean())
    return max(same, 1 - same)


TWO = replace(CONFIG, num_clusters=2, num_fine=2, max_imbalance=2.0)


@pytest.mark.parametrize("seed", range(3))
def test_clusters_follow_what_is_left_without_the_first_direction(seed: int) -> None:
    features, groups, side = swamped(200, seed)
    plain = fit_clustering(features, TWO, seed).assign(features)
    assert agreement(plain, side) == 1.0 and agreement(plain, groups) < 0.7
    clustering = fit_clustering(features, replace(TWO, remove_directions=1), seed)
    assert agreement(clustering.assign(features), groups) == 1.0
    unseen, their_groups, _ = swamped(50, seed + 100)
    assert agreement(clustering.assign(unseen), their_groups) == 1.0


def test_removed_directions_are_the_first_principal_ones() -> None:
    features, _, _ = swamped(400)
    nuisance = Nuisance.fit(features, 2)
    assert nuisance.directions.shape == (2, 4) and nuisance.directions.dtype == np.float32
    np.testing.assert_allclose(np.abs(nuisance.directions[:, :2]), np.eye(2), atol=0.05)
    np.testing.assert_allclose(nuisance.mean, features.mean(axis=0), atol=1e-6)
    first = Nuisance.fit(features, 1)
    rest = first.remove(features)
    np.testing.assert_allclose(np.linalg.norm(rest, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(rest @ first.directions.T, 0, atol=1e-4)


def test_no_direction_leaves_features_as_they_are() -> None:
    features, _, _ = swamped(20)
    assert np.array_equal(Nuisance.fit(features, 0).remove(features), features)


def test_as_many_directions_as_dimensions_are_refused() -> None:
    features, _, _ = swamped(20)
    with pytest.raises(ConfigError) as caught:
        fit_clustering(features, replace(TWO, remove_directions=4), 0)
    expected = "cluster.remove_directions=4 is not allowed: features have 4 dimensions"
    assert str(caught.value) == expected


def test_what_is_removed_is_saved_and_loaded(tmp_path: Path) -> None:
    features, groups, _ = swamped(200)
    clustering = fit_clustering(features, replace(TWO, remove_directions=1), 0)
    clustering.save(Folder(tmp_path))
    loaded = Clustering.load(Folder(tmp_path))
    assert np.array_equal(loaded.nuisance.mean, clustering.nuisance.mean)
    assert np.array_equal(loaded.nuisance.directions, clustering.nuisance.directions)
    assert agreement(loaded.assign(features), groups) == 1.0


def test_rows_between_two_clusters_are_told_from_those_at_a_centre() -> None:
    features, labels = blobs([50, 50, 50, 50], spread=0.05)
    clustering = fit_clustering(features, CONFIG, seed=0)
    second, nearness = clustering.overlap(features)
    assert (second != clustering.assign(features)).all()
    assert nearness.max() < 0.2
    between = unit_vectors(features[labels == 0][:20] + features[labels == 1][:20])
    second, nearness = clustering.overlap(between)
    pair = set(clustering.assign(features[np.isin(labels, (0, 1))]).tolist())
    assert nearness.min() > 0.5 and nearness.max() <= 1
    assert set(second.tolist()) <= pair


def test_one_cluster_overlaps_with_nothing() -> None:
    features, _ = blobs([20], spread=0.05)
    alone = fit_clustering(features, replace(CONFIG, num_clusters=1), seed=0)
    with pytest.raises(ValueError, match="one cluster alone"):
        alone.overlap(features)
