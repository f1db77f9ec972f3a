"""Are drawn pictures like real ones, and are all kinds of real ones drawn?

Each set is a union of balls: about every picture, as wide as its k-th nearest neighbour is far.
The balls are closed, so that copies of a picture that is in the set k times count as in it.
Everything is relative to the features' metric, and to both counts: compare at equal ones only.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paris_ray.errors import EvaluationError
from paris_ray.evaluation.features import Features, check_features, nearest_neighbours, row_blocks

RESOLUTION = 1e-6  # of a squared distance, relative to the squared lengths: float32 products


@dataclass(frozen=True, slots=True)
class Coverage:
    """Shares of pictures in balls of the other set.

    Attributes:
        precision: Share of drawn pictures in any real ball, in [0, 1].
        recall: Share of real pictures in any drawn ball, in [0, 1].
        density: Mean number of real balls that a drawn picture is in, over k. It is 1 on average
            for equal distributions, and can be more.
        coverage: Share of real balls that hold a drawn picture, in [0, 1].
    """

    precision: float
    recall: float
    density: float
    coverage: float


def coverage(drawn: Features, real: Features, *, k: int = 5) -> Coverage:
    """Return precision, recall, density and coverage.

    Time grows with N M, N^2 and M^2, memory with N + M.

    Args:
        drawn: `(N, D)` features of drawn pictures.
        real: `(M, D)` features of real ones.
        k: Which neighbour's distance is the radius; the papers have 3 for precision and recall, 5
            for density and coverage.

    Raises:
        EvaluationError: if shapes differ, or k is not allowed.

    Source: Kynkaanniemi et al. 2019 (arXiv:1904.06991), equations 1 and 2; density and coverage,
    Naeem et al. 2020 (arXiv:2002.09797).
    """
    check_features({"drawn": drawn, "real": real})
    largest = min(len(drawn), len(real)) - 1
    if not 1 <= k <= largest:
        raise EvaluationError(f"k={k} is not allowed: 1 <= k <= {largest}, a row less than the set")
    centre = real.mean(axis=0, dtype=np.float64)  # distances stay, products lose fewer digits
    x, y = ((f - centre).astype(np.float32) for f in (drawn, real))
    return _count(x, y, _squared_radii(x, k), _squared_radii(y, k), k)


def _count(
    x: Features, y: Features, x_radii: NDArray[np.float32], y_radii: NDArray[np.float32], k: int
) -> Coverage:
    """Count who is in whose ball; the radii are squared."""
    num_balls = np.empty(len(x), dtype=np.int64)
    covered, recalled = np.zeros(len(y), dtype=bool), np.zeros(len(y), dtype=bool)
    x_norms, y_norms = (np.einsum("nd,nd->n", f, f) * (1 - RESOLUTION) for f in (x, y))
    for block in row_blocks(len(x), len(y)):
        distances = x[block] @ y.T
        distances *= -2
        distances += x_norms[block, None]
        distances += y_norms
        inside = distances <= y_radii
        num_balls[block] = inside.sum(axis=1)
        covered |= inside.any(axis=0)
        recalled |= (distances <= x_radii[block, None]).any(axis=0)
    precision, density = float((num_balls > 0).mean()), float(num_balls.mean() / k)
    return Coverage(precision, float(recalled.mean()), density, float(covered.mean()))


def _squared_radii(x: Features, k: int) -> NDArray[np.float32]:
    """Return `(N,)` the squared distance of each row's k-th neighbour; the row is its 0th."""
    distances, _ = nearest_neighbours(x, x, k + 1)
    radii: NDArray[np.float32] = distances.max(axis=1).astype(np.float32) ** 2
    return radii
