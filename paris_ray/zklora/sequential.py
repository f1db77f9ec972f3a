"""Whether an adapter is worth its price, decided after as few examples as the data allow.

The evidence may be looked at after every example, and the chance of a wrong decision stays below
what was stated: it is an e-process, so that Ville's inequality bounds its maximum over all times.

Source: Robbins 1970 (Statistical methods related to the law of the iterated logarithm) and Lai 1976
(On confidence sequences), for the mixture; Wang and Ramdas 2025 (Anytime-valid t-tests and
confidence sequences for Gaussian means with unknown variance, arXiv 2310.03722), for the variance.
"""

import math
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from paris_ray.errors import ConfigError

ERROR_RATE = 0.05
MIN_GAIN = 0.02
# A priori, mean over standard deviation is normal with variance 1 / PRECISION: a value above 0.02
# would never let two examples decide, whatever they say, at ERROR_RATE.
PRECISION = 0.01

Losses = NDArray[np.floating]


class Verdict(StrEnum):
    """What the examples so far say."""

    WORTH = "worth it"
    NOT_WORTH = "not worth it"
    UNDECIDED = "undecided"

    @property
    def is_clear(self) -> bool:
        """Whether no more examples are needed."""
        return self is not Verdict.UNDECIDED


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What a buyer wants of an adapter, and how sure it wants to be.

    Attributes:
        min_gain: Relative; what the typical (geometric mean) loss must be lowered by.
        error_rate: Chance of WORTH if the true gain is less, and of NOT_WORTH if it is more, each
            at most; however often one asks as examples come in.

    Raises:
        ConfigError: if the rate is not within (0, 0.5), or the gain not below 1.
    """

    min_gain: float = MIN_GAIN
    error_rate: float = ERROR_RATE

    def __post_init__(self) -> None:
        if not 0 < self.error_rate < 0.5:
            raise ConfigError(f"error_rate={self.error_rate} is not allowed: above 0, below 0.5")
        if not -math.inf < self.min_gain < 1:
            raise ConfigError(f"min_gain={self.min_gain} is not allowed: a number below 1")

    def verdict(self, without: Losses, with_adapter: Losses) -> Verdict:
        """Return whether an adapter lowers the loss by as much as is wanted, or is to be tried on.

        Ratios are compared, so that noise levels with large losses do not drown the others. An
        example counts once, whatever its levels: they gain unlike, and are not independent.

        Args:
            without: Losses of the base `(levels, examples)`, each above zero.
            with_adapter: Losses with the adapter, of the same shape.
        """
        ratios = np.log(without) - np.log(with_adapter)
        gains = ratios.mean(axis=0, dtype=np.float64) + math.log1p(-self.min_gain)
        # At a mean of zero either sign is reached first as often: half of 2 * error_rate each.
        if evidence(gains) < 1 / (2 * self.error_rate):
            return Verdict.UNDECIDED
        return Verdict.WORTH if gains.sum() > 0 else Verdict.NOT_WORTH


def evidence(differences: Losses) -> float:
    """Return the e-value against a mean of zero: a bet on these numbers, at fair odds, pays it.

    Args:
        differences: Normal, independent, of one mean and an unknown variance.

    Returns:
        1 for none, for one, and if all are zero.
    """
    n, total = differences.size, float(differences.sum(dtype=np.float64))
    squares = float(np.square(differences, dtype=np.float64).sum())
    if n < 2 or squares == 0.0:
        return 1.0
    explained = total * total / ((n + PRECISION) * squares)
    return math.exp(0.5 * math.log(PRECISION / (n + PRECISION)) - 0.5 * n * math.log1p(-explained))
