"""Whether an adapter is worth its price, decided after as few pairs of losses as the data allow.

The evidence may be looked at after every pair, and the chance of a wrong decision stays below what
was stated: it is an e-process, so that Ville's inequality bounds its maximum over all times.

Source: Robbins 1970 (Statistical methods related to the law of the iterated logarithm) and Lai 1976
(On confidence sequences), for the mixture; Wang and Ramdas 2025 (Anytime-valid t-tests and
confidence sequences for Gaussian means with unknown variance, arXiv 2310.03722), for the variance.
"""

import math
from collections.abc import Sequence
from enum import StrEnum

from paris_ray.errors import ConfigError

ERROR_RATE = 0.05
MIN_GAIN = 0.02
# A priori, mean over standard deviation is normal with variance 1 / PRECISION.
PRECISION = 0.05


class Verdict(StrEnum):
    """What the pairs so far say."""

    WORTH = "worth it"
    NOT_WORTH = "not worth it"
    UNDECIDED = "undecided"


def evidence(differences: Sequence[float]) -> float:
    """Return the e-value against a mean of zero: a bet on these numbers, at fair odds, pays it.

    Args:
        differences: Normal, independent, of one mean and an unknown variance.

    Returns:
        1 for none, for one, and if all are zero.
    """
    n, total = len(differences), math.fsum(differences)
    squares = math.fsum(d * d for d in differences)
    if n < 2 or squares == 0.0:
        return 1.0
    explained = total * total / ((n + PRECISION) * squares)
    return math.exp(0.5 * math.log(PRECISION / (n + PRECISION)) - 0.5 * n * math.log1p(-explained))


def decide(
    without: Sequence[float],
    with_adapter: Sequence[float],
    *,
    error_rate: float = ERROR_RATE,
    min_gain: float = MIN_GAIN,
) -> Verdict:
    """Return whether an adapter lowers the loss by as much as is wanted, or that more is needed.

    Ratios are compared, so that noise levels with large losses do not drown the others.

    Args:
        without: Loss of the base on one picture at one level, each above zero.
        with_adapter: The same with the adapter.
        error_rate: Chance of WORTH if the true gain is less, and of NOT_WORTH if it is more, each
            at most; however often this is asked as pairs come in.
        min_gain: Relative; what the typical (geometric mean) loss must be lowered by.

    Raises:
        ConfigError: if a rate is not within (0, 0.5), or a gain not within [0, 1).
    """
    if not 0 < error_rate < 0.5:
        raise ConfigError(f"error_rate={error_rate} is not allowed: above 0, below 0.5")
    if not 0 <= min_gain < 1:
        raise ConfigError(f"min_gain={min_gain} is not allowed: at least 0, below 1")
    wanted = -math.log1p(-min_gain)
    gains = [
        math.log(before) - math.log(after) - wanted
        for before, after in zip(without, with_adapter, strict=True)
    ]
    # At a mean of zero either sign is reached first as often: half of 2 * error_rate each.
    if evidence(gains) < 1 / (2 * error_rate):
        return Verdict.UNDECIDED
    return Verdict.WORTH if math.fsum(gains) > 0 else Verdict.NOT_WORTH
