"""Frechet distance between Gaussians fitted to features, and its limit for endless pictures.

With Inception features it is FID. A finite number of pictures makes it too large, by about c / N
with a c that differs from model to model (Chong and Forsyth 2020, arXiv:1911.07023).

Source: Heusel et al. 2017 (arXiv:1706.08500), equation 6; for Gaussians, Dowson and Landau 1982.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paris_ray.errors import EvaluationError
from paris_ray.evaluation.features import Features, check_features, row_blocks
from paris_ray.seeding import numpy_generator

MIN_SUBSET = 5000  # of an extrapolation
MIN_ROWS_PER_FEATURE = 10  # below it the bias is too large to be passed over in silence


@dataclass(frozen=True, slots=True)
class Gaussian:
    """The fit to some features.

    Attributes:
        mean: `(D,)` float64.
        covariance: `(D, D)` float64, unbiased.
        count: Number of rows that it was fitted to.
    """

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]
    count: int


@dataclass(frozen=True, slots=True)
class FrechetDistance:
    """The distance of two fits.

    Attributes:
        distance: Squared 2-Wasserstein distance, >= 0, in squared units of the features.
        bias_note: What a reader must know if there were few rows, otherwise None.
    """

    distance: float
    bias_note: str | None


@dataclass(frozen=True, slots=True)
class FrechetInfinity:
    """The line `distance + slope / N` through distances of subsets.

    Attributes:
        distance: Its value at 1 / N = 0; noise can make it slightly negative.
        slope: The bias of one row.
        counts: `(P,)` sizes N of the subsets.
        distances: `(P,)` their Frechet distances.
    """

    distance: float
    slope: float
    counts: NDArray[np.int64]
    distances: NDArray[np.float64]


class Moments:
    """Mean and covariance of features that come in batches, none of which is kept.

    Batches are merged about their own means, so that a large common offset costs no digits.
    Source: pairwise updating, Chan, Golub and LeVeque 1983 (The American Statistician 37).

    Args:
        num_features: D.
    """

    def __init__(self, num_features: int) -> None:
        self._count = 0
        self._mean = np.zeros(num_features)
        self._scatter = np.zeros((num_features, num_features))

    def update(self, features: Features) -> None:
        """Add a batch `(N, D)`.

        Raises:
            EvaluationError: if it has another shape, or values that are not finite.
        """
        check_features({"moments": self._mean[None], "features": features})
        batch = features.astype(np.float64)
        shift = batch.mean(axis=0) - self._mean
        batch -= batch.mean(axis=0)
        total = self._count + len(batch)
        between = self._count * len(batch) / total
        self._scatter += batch.T @ batch + between * np.outer(shift, shift)
        self._mean += shift * (len(batch) / total)
        self._count = total

    def gaussian(self) -> Gaussian:
        """Return the fit to all rows so far.

        Raises:
            EvaluationError: if there are fewer than two.
        """
        if self._count < 2:
            raise EvaluationError(f"{self._count} rows of features: a covariance needs 2 or more")
        return Gaussian(self._mean.copy(), self._scatter / (self._count - 1), self._count)


def fit_gaussian(features: Features) -> Gaussian:
    """Return the fit to features `(N, D)`, N >= 2.

    Raises:
        EvaluationError: if they are not such.
    """
    check_features({"features": features}, min_rows=2)
    moments = Moments(features.shape[1])
    for block in row_blocks(len(features), features.shape[1]):
        moments.update(features[block])
    return moments.gaussian()


def frechet_distance(drawn: Gaussian, real: Gaussian) -> FrechetDistance:
    """Return |m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2)).

    It is symmetric. The work is three decompositions of D x D matrices.

    Args:
        drawn: Fit to the features of drawn pictures.
        real: Fit to those of real ones.

    Raises:
        EvaluationError: if they have different D.
    """
    check_features({"drawn": drawn.mean[None], "real": real.mean[None]})
    return FrechetDistance(_distance(drawn, real, _factor(real.covariance)), _note(drawn, real))


def frechet_distance_infinity(
    drawn: Features, real: Gaussian, *, seed: int, min_count: int = MIN_SUBSET, num_points: int = 15
) -> FrechetInfinity:
    """Return the Frechet distance that endless drawn pictures would have, by extrapolation.

    Distances of random subsets of evenly spaced sizes are fitted by a line in 1 / N. The fit to
    the real pictures stays as it is, with whatever bias its own count gives.

    Args:
        drawn: `(N, D)` features of drawn pictures.
        real: Fit to the features of real ones.
        seed: Decides the subsets.
        min_count: Size of the smallest subset; the largest is all of `drawn`.
        num_points: Number of subsets.

    Raises:
        EvaluationError: if shapes differ, or a count is not allowed.

    Source: Chong and Forsyth 2020 (arXiv:1911.07023); both defaults are those of their code.
    """
    check_features({"drawn": drawn, "real": real.mean[None]})
    if not 2 <= min_count < len(drawn):
        raise EvaluationError(
            f"min_count={min_count} is not allowed: 2 <= min_count < {len(drawn)} drawn rows"
        )
    if num_points < 2:
        raise EvaluationError(f"num_points={num_points} is not allowed: a line needs 2 or more")
    counts = np.linspace(min_count, len(drawn), num_points).astype(np.int64)
    factor, distances = _factor(real.covariance), np.empty(num_points)
    for i, count in enumerate(counts):
        rows = numpy_generator(seed, "frechet subset", i).permutation(len(drawn))[:count]
        distances[i] = _distance(fit_gaussian(drawn[rows]), real, factor)
    slope, intercept = np.polyfit(1 / counts, distances, 1)
    return FrechetInfinity(float(intercept), float(slope), counts, distances)


def _distance(drawn: Gaussian, real: Gaussian, real_factor: NDArray[np.float64]) -> float:
    """Return the distance, given F of the real covariance C_2 = F F^T.

    With C_1 = G G^T the eigenvalues of C_1 C_2 are the squared singular values of G^T F: their
    sum is the trace of the root, and no digit is lost to a root of a rounding error.
    """
    singular = np.linalg.svd(_factor(drawn.covariance).T @ real_factor, compute_uv=False)
    traces = np.trace(drawn.covariance) + np.trace(real.covariance)
    shift = ((drawn.mean - real.mean) ** 2).sum()
    return max(0.0, float(shift + traces - 2 * singular.sum()))


def _factor(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return `(D, D)` F with F F^T = covariance, which may be singular."""
    values, vectors = np.linalg.eigh(covariance)
    resolution = len(values) * np.finfo(np.float64).eps * values[-1]
    values[values < resolution] = 0
    factor: NDArray[np.float64] = vectors * np.sqrt(values)
    return factor


def _note(drawn: Gaussian, real: Gaussian) -> str | None:
    count, num_features = min(drawn.count, real.count), len(drawn.mean)
    if count >= MIN_ROWS_PER_FEATURE * num_features:
        return None
    return (
        f"{count} rows of {num_features} features are fewer than {MIN_ROWS_PER_FEATURE} a feature: "
        "the distance is too large; compare it only at equal counts, or extrapolate it"
    )
