"""How far a number may be off: percentile intervals by resampling items.

It covers the choice of items (captions, pictures), not that of seeds or training runs.

Source: the percentile interval, Efron and Tibshirani 1993, chapter 13.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from paris_ray.errors import EvaluationError
from paris_ray.seeding import numpy_generator


@dataclass(frozen=True, slots=True)
class Interval:
    """A statistic and the percentiles of its resamples.

    Attributes:
        value: Of the items themselves.
        low: Lower end.
        high: Upper end.
        confidence: Share of the resamples between them.
    """

    value: float
    low: float
    high: float
    confidence: float


def bootstrap(
    statistic: Callable[[NDArray[np.int64]], float],
    num_items: int,
    *,
    seed: int,
    num_resamples: int = 2000,
    confidence: float = 0.95,
) -> Interval:
    """Return the interval of any statistic of items.

    Items that belong together (one caption under several seeds, one picture under two models) are
    one item: let the statistic look them up together.

    Args:
        statistic: Given `(num_items,)` item numbers, with repetitions.
        num_items: How many items there are.
        seed: Decides the resamples: resample i is the same whatever the statistic.
        num_resamples: How many.
        confidence: In (0, 1).

    Raises:
        EvaluationError: if a number is not allowed.
    """
    if num_items < 1:
        raise EvaluationError(f"num_items={num_items} is not allowed: 1 or more")
    if num_resamples < 1:
        raise EvaluationError(f"num_resamples={num_resamples} is not allowed: 1 or more")
    if not 0 < confidence < 1:
        raise EvaluationError(f"confidence={confidence} is not allowed: above 0 and below 1")
    generator = numpy_generator(seed, "bootstrap")
    resamples = (generator.integers(num_items, size=num_items) for _ in range(num_resamples))
    values = [statistic(items) for items in resamples]
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    value = statistic(np.arange(num_items))
    return Interval(float(value), float(low), float(high), confidence)


def bootstrap_mean(
    values: ArrayLike, *, seed: int, num_resamples: int = 2000, confidence: float = 0.95
) -> Interval:
    """Return the interval of the mean of values `(N,)`, booleans included.

    Args:
        values: One number an item.
        seed: Decides the resamples.
        num_resamples: How many.
        confidence: In (0, 1).

    Raises:
        EvaluationError: if a number is not allowed, or the values are not `(N,)` and finite.
    """
    items = np.asarray(values, dtype=np.float64)
    if items.ndim != 1 or not np.isfinite(items).all():
        raise EvaluationError(f"values of shape {items.shape} are not allowed: (N,) finite numbers")
    return bootstrap(
        lambda rows: float(items[rows].mean()),
        len(items),
        seed=seed,
        num_resamples=num_resamples,
        confidence=confidence,
    )
