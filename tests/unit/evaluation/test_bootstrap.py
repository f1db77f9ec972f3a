"""Bootstrap: the normal interval, coverage, pairing, and determinism."""

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paris_ray.errors import EvaluationError
from paris_ray.evaluation.bootstrap import Interval, bootstrap, bootstrap_mean

VALUES = np.random.default_rng(0).standard_normal(400)


def test_a_mean_has_about_its_normal_interval() -> None:
    interval = bootstrap_mean(VALUES, seed=0)
    half = 1.96 * VALUES.std() / np.sqrt(len(VALUES))
    assert interval.value == VALUES.mean()
    assert interval.low == pytest.approx(VALUES.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(VALUES.mean() + half, abs=0.1 * half)
    assert interval.confidence == 0.95


def test_it_holds_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for seed in range(300):
        rows = generator.random(100) < 0.3
        interval = bootstrap_mean(rows, seed=seed, num_resamples=200, confidence=0.8)
        hits += interval.low <= 0.3 <= interval.high
    assert 0.7 < hits / 300 < 0.9


def test_constant_values_have_no_spread() -> None:
    assert bootstrap_mean([0.25] * 10, seed=0) == Interval(0.25, 0.25, 0.25, 0.95)


def test_any_statistic_and_pairs_stay_pairs() -> None:
    """Two models that differ by exactly 1 on every item: no doubt about the difference."""
    other = VALUES + 1
    paired = bootstrap(lambda i: other[i].mean() - VALUES[i].mean(), len(VALUES), seed=0)
    assert (paired.low, paired.high) == (pytest.approx(1), pytest.approx(1))
    largest = bootstrap(lambda i: VALUES[i].max(), len(VALUES), seed=0)
    assert largest.value == largest.high == VALUES.max()
    assert largest.low < largest.high


@settings(max_examples=20)
@given(st.integers(0, 2**32), st.floats(0.1, 0.8))
def test_the_seed_decides_and_more_confidence_is_wider(seed: int, confidence: float) -> None:
    arguments: dict[str, Any] = {"seed": seed, "num_resamples": 100}
    narrow = bootstrap_mean(VALUES, confidence=confidence, **arguments)
    assert narrow == bootstrap_mean(VALUES, confidence=confidence, **arguments)
    assert narrow != bootstrap_mean(VALUES, confidence=confidence, seed=seed + 1, num_resamples=100)
    wide = bootstrap_mean(VALUES, confidence=0.95, **arguments)
    assert wide.low <= narrow.low <= narrow.high <= wide.high


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_items": 0}, "num_items=0 is not allowed: 1 or more"),
        ({"num_resamples": 0}, "num_resamples=0 is not allowed: 1 or more"),
        ({"confidence": 1.0}, "confidence=1.0 is not allowed: above 0 and below 1"),
        ({"confidence": 0.0}, "confidence=0.0 is not allowed: above 0 and below 1"),
    ],
)
def test_numbers_that_are_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"num_items": 3, "seed": 0}
    with pytest.raises(EvaluationError, match=f"^{re.escape(message)}$"):
        bootstrap(np.mean, **(arguments | change))


@pytest.mark.parametrize("values", [np.zeros((2, 3)), np.array([0.0, np.nan])])
def test_values_that_are_refused(values: np.ndarray) -> None:
    message = f"values of shape {values.shape} are not allowed: (N,) finite numbers"
    with pytest.raises(EvaluationError, match=f"^{re.escape(message)}$"):
        bootstrap_mean(values, seed=0)
