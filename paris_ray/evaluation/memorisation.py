"""Are drawn pictures closer to the training pictures than other real pictures are?

Held-out pictures say how close a picture comes by chance. A share of drawn pictures far above the
quantile is a sign of copying; whether a close picture is a copy, only looking at the pair tells.

Source: three-sample test of data copying, Meehan et al. 2020 (arXiv:2004.05675), whose statistic
is a rank test of the same two sets of distances.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paris_ray.errors import EvaluationError
from paris_ray.evaluation.features import Features, check_features, nearest_neighbours

QUANTILES = (0.05, 0.5)


@dataclass(frozen=True, slots=True)
class Memorisation:
    """Distances to the nearest training picture, and what follows from them.

    Attributes:
        nearest: `(N,)` the training row nearest to every drawn picture.
        distances: `(N,)` L2 distances to it.
        held_out_distances: `(H,)` the same of held-out pictures.
        thresholds: `(Q,)` quantiles of the held-out distances.
        shares: `(Q,)` shares of drawn pictures at most that far: about the quantile itself, if
            drawn and held-out pictures are alike.
    """

    nearest: NDArray[np.int64]
    distances: NDArray[np.float64]
    held_out_distances: NDArray[np.float64]
    thresholds: NDArray[np.float64]
    shares: NDArray[np.float64]


def memorisation(
    drawn: Features,
    held_out: Features,
    training: Features,
    *,
    quantiles: Sequence[float] = QUANTILES,
) -> Memorisation:
    """Compare drawn with held-out pictures in their distance to the training pictures.

    Args:
        drawn: `(N, D)` features, or flat pixels, of drawn pictures.
        held_out: `(H, D)` of real pictures that were not trained on.
        training: `(M, D)` of the pictures that were.
        quantiles: Of the held-out distances, in [0, 1].

    Raises:
        EvaluationError: if shapes differ, or a quantile is not in [0, 1].
    """
    check_features({"drawn": drawn, "held_out": held_out, "training": training})
    if not all(0 <= quantile <= 1 for quantile in quantiles):
        raise EvaluationError(f"quantiles={tuple(quantiles)} is not allowed: each is in [0, 1]")
    distances, nearest = nearest_neighbours(drawn, training, 1)
    held_out_distances, _ = nearest_neighbours(held_out, training, 1)
    thresholds = np.quantile(held_out_distances, quantiles)
    shares = (distances <= thresholds).mean(axis=0)
    return Memorisation(
        nearest[:, 0], distances[:, 0], held_out_distances[:, 0], thresholds, shares
    )
