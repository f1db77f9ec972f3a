"""Hierarchical spherical k-means: many fine centres, then K balanced coarse clusters of them.

Fine centres follow the data; the coarse grouping is balanced, so that no expert gets three times
the data of another. Source: the two-level scheme of DDM and MetaCLIP (Paris, section on data).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from paris_ray.config import ClusterConfig
from paris_ray.embeddings import TEXT_EMBEDDING
from paris_ray.errors import ArtifactError, ConfigError
from paris_ray.folders import Folder
from paris_ray.seeding import derive_seed

WEIGHTS = "centroids.safetensors"
MAX_COARSE_ITERATIONS = 100
FAISS_SEED_RANGE = 2**31 - 1

# What is clustered, by `cluster.features`.
FEATURE_COLUMNS: dict[str, tuple[str, ...]] = {
    "image": ("features",),
    "caption": (TEXT_EMBEDDING,),
    "both": ("features", TEXT_EMBEDDING),
    "random": (),
}

Features = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Clustering:
    """Fitted centres.

    Attributes:
        fine_centroids: `(M, D)` unit vectors.
        coarse_of_fine: `(M,)` the coarse cluster of each fine centre.
        nuisance: What of the features is left out first.
    """

    fine_centroids: Features
    coarse_of_fine: NDArray[np.int64]
    nuisance: "Nuisance"

    def assign(self, features: Features) -> NDArray[np.int64]:
        """Return the coarse cluster `(N,)` of unit-length features `(N, D)`.

        Raises:
            ConfigError: if features of this width were not clustered.
        """
        if features.shape[1:] != self.fine_centroids.shape[1:]:
            width = self.fine_centroids.shape[1]
            raise ConfigError(f"features of {features.shape[1]} numbers, but centres of {width}")
        relevant = self.nuisance.remove(features)
        return self.coarse_of_fine[nearest(relevant, self.fine_centroids)]

    def overlap(self, features: Features) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the second nearest cluster of unit-length features `(N, D)`, and how near it is.

        Returns:
            Its number `(N,)`, and the distance to the nearest cluster as a share of the distance to
            this one `(N,)`: 1 half-way between the two, 0 at a centre. A distance is 1 - cosine.

        Raises:
            ValueError: if there is only one cluster.
        """
        numbers = np.unique(self.coarse_of_fine)
        if len(numbers) < 2:
            raise ValueError("one cluster alone overlaps with nothing")
        cosines = self.nuisance.remove(features) @ self.fine_centroids.T
        best = np.stack([cosines[:, self.coarse_of_fine == k].max(axis=1) for k in numbers], axis=1)
        order = np.argsort(-best, axis=1)[:, :2]
        nearest, second = np.maximum(1 - np.take_along_axis(best, order, axis=1), 0).T
        share: Features = (nearest / np.maximum(second, 1e-12)).astype(np.float32)
        return numbers[order[:, 1]], share

    def save(self, folder: Folder) -> None:
        """Write the centres."""
        tensors: dict[str, NDArray[Any]] = {
            "fine_centroids": self.fine_centroids,
            "coarse_of_fine": self.coarse_of_fine,
            "feature_mean": self.nuisance.mean,
            "removed_directions": self.nuisance.directions,
        }
        folder.write(WEIGHTS, safetensors.numpy.save(tensors))

    @classmethod
    def load(cls, folder: Folder) -> "Clustering":
        """Read the centres.

        Raises:
            ArtifactError: if the file is missing or damaged.
        """
        payload = folder.read(WEIGHTS)
        try:
            tensors = safetensors.numpy.load(payload)
            nuisance = Nuisance(tensors["feature_mean"], tensors["removed_directions"])
            return cls(tensors["fine_centroids"], tensors["coarse_of_fine"], nuisance)
        except (SafetensorError, ValueError, KeyError) as error:
            raise ArtifactError(f"{folder.uri}/{WEIGHTS} is damaged: {error}") from None

    def check(self, num_clusters: int) -> None:
        """Check centres that somebody else fitted.

        Raises:
            ArtifactError: if their types or shapes do not fit each other or the number of clusters.
        """
        fine, directions = self.fine_centroids, self.nuisance.directions
        floats = (fine, self.nuisance.mean, directions)
        fits = (
            all(each.dtype == np.float32 and np.isfinite(each).all() for each in floats)
            and fine.ndim == directions.ndim == 2
            and len(fine) > 0
            and fine.shape[1:] == directions.shape[1:] == self.nuisance.mean.shape
            and self.coarse_of_fine.dtype == np.int64
            and self.coarse_of_fine.shape == fine.shape[:1]
            and ((self.coarse_of_fine >= 0) & (self.coarse_of_fine < num_clusters)).all()
        )
        if not fits:
            raise ArtifactError(f"{WEIGHTS} holds no centres of {num_clusters} clusters")


@dataclass(frozen=True, slots=True)
class Nuisance:
    """Directions of features in which they differ most, but not in what matters.

    Attributes:
        mean: `(D,)` mean of the features that it was fitted to.
        directions: `(m, D)` orthonormal; m = 0 leaves features as they are.
    """

    mean: Features
    directions: Features

    @classmethod
    def fit(cls, features: Features, count: int) -> "Nuisance":
        """Return the first `count` principal directions of features `(N, D)`.

        Raises:
            ConfigError: if features have no more dimensions than that.
        """
        if count >= features.shape[1]:
            raise ConfigError(
                f"cluster.remove_directions={count} is not allowed: "
                f"features have {features.shape[1]} dimensions"
            )
        mean = features.mean(axis=0)
        _, vectors = np.linalg.eigh(np.cov(features, rowvar=False))
        directions = vectors[:, ::-1][:, :count].T
        return cls(mean, np.ascontiguousarray(directions, dtype=np.float32))

    def remove(self, features: Features) -> Features:
        """Return unit-length features `(N, D)` without these directions."""
        if len(self.directions) == 0:
            return features
        centred = features - self.mean
        rest = centred - centred @ self.directions.T @ self.directions
        relevant: Features = rest / np.maximum(np.linalg.norm(rest, axis=1, keepdims=True), 1e-12)
        return relevant


def unit_length(columns: Sequence[NDArray[np.generic]]) -> Features:
    """Return unit-length features `(N, D)` of columns of features or of caption variants.

    Of several columns each has an equal part; of caption variants the first counts.
    """
    parts = []
    for column in columns:
        while column.ndim > 2:  # (N, V, D), or (N, V, 1 + L, D) with the sentence vector first
            column = column[:, 0]
        part = column.astype(np.float32)
        norms = np.linalg.norm(part, axis=1, keepdims=True)
        parts.append(part / np.maximum(norms * len(columns) ** 0.5, 1e-12))
    return np.concatenate(parts, axis=1)


def random_clusters(keys: Sequence[str], num_clusters: int, seed: int) -> NDArray[np.int64]:
    """Return a cluster `(N,)` of every row that only its key and the seed decide, all as likely."""
    drawn = (derive_seed(seed, f"random cluster of {key}") % num_clusters for key in keys)
    return np.fromiter(drawn, np.int64, len(keys))


def fit_clustering(features: Features, config: ClusterConfig, seed: int) -> Clustering:
    """Fit fine and coarse centres; the same features, config and seed give the same result.

    Args:
        features: `(N, D)` unit-length features.
        config: Number of centres, iterations and the allowed imbalance.
        seed: Seed of faiss' initial centres.

    Raises:
        ConfigError: if there are fewer rows than clusters, or not more dimensions than
            `remove_directions`.
    """
    if len(features) < config.num_clusters:
        raise ConfigError(
            f"cluster.num_clusters={config.num_clusters} is not allowed: "
            f"the corpus has only {len(features)} usable rows"
        )
    nuisance = Nuisance.fit(features, config.remove_directions)
    features = nuisance.remove(features)
    num_fine = min(config.num_fine, len(features))
    fine = fit_centroids(
        features, num_fine, iterations=config.iterations, seed=seed, threads=config.threads
    )
    sizes = np.bincount(nearest(features, fine), minlength=num_fine)
    return Clustering(fine, _group_balanced(fine, sizes, config), nuisance)


def fit_centroids(
    features: Features, count: int, *, iterations: int, seed: int, threads: int
) -> Features:
    """Return `(count, D)` unit vectors: spherical k-means of unit-length features `(N, D)`.

    Args:
        features: At least `count`; of more than 256 times as many faiss takes a sample.
        count: How many centres.
        iterations: How often they move.
        seed: Seed of faiss' initial centres.
        threads: How many fit, and are used by `nearest` from now on.
    """
    faiss.omp_set_num_threads(threads)
    kmeans = faiss.Kmeans(
        features.shape[1],
        count,
        niter=iterations,
        spherical=True,
        seed=seed % FAISS_SEED_RANGE,
        min_points_per_centroid=1,
    )
    kmeans.train(np.ascontiguousarray(features, dtype=np.float32))
    return np.asarray(kmeans.centroids, dtype=np.float32)


def nearest(features: Features, centroids: Features) -> NDArray[np.int64]:
    """Return the number `(N,)` of the centre `(M, D)` that each feature `(N, D)` is nearest to."""
    index = faiss.IndexFlatIP(centroids.shape[1])
    index.add(np.ascontiguousarray(centroids))
    _, found = index.search(np.ascontiguousarray(features, dtype=np.float32), 1)
    flat: NDArray[np.int64] = found[:, 0]
    return flat


def _group_balanced(
    fine: Features, sizes: NDArray[np.int64], config: ClusterConfig
) -> NDArray[np.int64]:
    """Group fine centres into clusters of at most `max_imbalance` times the mean size."""
    capacity = config.max_imbalance * sizes.sum() / config.num_clusters
    coarse = _spread_centres(fine, sizes, config.num_clusters)
    groups = np.zeros(len(fine), dtype=np.int64)
    for _ in range(MAX_COARSE_ITERATIONS):
        previous, groups = groups, _assign_with_capacity(fine @ coarse.T, sizes, capacity)
        coarse = _group_means(fine, sizes, groups, coarse)
        if np.array_equal(previous, groups):
            break
    return groups


def _spread_centres(fine: Features, sizes: NDArray[np.int64], count: int) -> Features:
    """Choose start centres far apart: the heaviest, then always the least covered."""
    chosen = [int(sizes.argmax())]
    while len(chosen) < count:
        coverage = (fine @ fine[chosen].T).max(axis=1)
        coverage[chosen] = np.inf
        chosen.append(int(coverage.argmin()))
    return fine[chosen]


def _assign_with_capacity(
    similarity: Features, sizes: NDArray[np.int64], capacity: float
) -> NDArray[np.int64]:
    """Give each fine centre its best cluster with room; who would lose most chooses first.

    A centre that fits nowhere joins the emptiest cluster, so that every centre has one.
    """
    best_two = np.sort(similarity, axis=1)[:, -2:]
    regret = best_two[:, -1] - best_two[:, 0]
    load = np.zeros(similarity.shape[1])
    groups = np.empty(len(similarity), dtype=np.int64)
    for centre in np.argsort(-regret, kind="stable"):
        fits = load + sizes[centre] <= capacity
        choice = (
            np.where(fits, similarity[centre], -np.inf).argmax() if fits.any() else load.argmin()
        )
        groups[centre] = choice
        load[choice] += sizes[centre]
    return groups


def _group_means(
    fine: Features, sizes: NDArray[np.int64], groups: NDArray[np.int64], previous: Features
) -> Features:
    """Return the unit-length weighted mean of every group; an empty group keeps its centre."""
    sums = np.zeros_like(previous)
    np.add.at(sums, groups, fine * sizes[:, None])
    norms = np.linalg.norm(sums, axis=1, keepdims=True)
    means: Features = np.where(norms > 0, sums / np.maximum(norms, 1e-12), previous)
    return means.astype(np.float32)
