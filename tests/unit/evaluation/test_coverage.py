"""Precision, recall, density, coverage: prdc's numbers, and sets whose answer is plain."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paris_ray.errors import EvaluationError
from paris_ray.evaluation import features
from paris_ray.evaluation.coverage import Coverage, coverage
from tests.reference_features import DRAWN, PRDC, REAL


@pytest.mark.parametrize("k", [3, 5])
def test_the_numbers_of_prdc(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "BLOCK_ELEMENTS", 2000)  # several blocks
    result = coverage(DRAWN, REAL, k=k)
    numbers = (result.precision, result.recall, result.density, result.coverage)
    assert numbers == pytest.approx(PRDC[k], abs=1e-12)


def test_disjoint_sets_share_nothing() -> None:
    assert coverage(DRAWN + 100, REAL) == Coverage(0, 0, 0, 0)


def test_a_set_covers_itself() -> None:
    result = coverage(REAL, REAL, k=5)
    assert (result.precision, result.recall, result.coverage) == (1, 1, 1)


def test_lines_by_hand() -> None:
    """Real balls of radius 1 at 0, 1, 2, 3; drawn balls 0.5 and 0.5 wide at 0.5, 1, and 9 wide."""
    real, drawn = np.array([[0.0], [1], [2], [3]]), np.array([[0.5], [1], [10]])
    result = coverage(drawn, real, k=1)
    assert result.precision == pytest.approx(2 / 3)  # all but 10
    assert result.density == pytest.approx((2 + 3) / 3)  # 0.5 is in two balls, 1 in three
    assert result.coverage == pytest.approx(3 / 4)  # all but the ball of 3
    assert result.recall == 1  # 0 and 1 are near 0.5; 2 and 3 are within 9 of 10


def test_one_drawn_kind_is_precise_and_covers_little() -> None:
    generator = np.random.default_rng(0)
    kinds = np.repeat(20 * np.eye(4), 50, axis=0)
    real = kinds + generator.standard_normal(kinds.shape)
    drawn = kinds[:1] + generator.standard_normal((200, 4))
    result = coverage(drawn, real)
    assert result.precision > 0.9
    assert result.recall < 0.3
    assert result.coverage <= 0.25


def test_copies_of_copies_count_as_inside() -> None:
    """Radii of 0, far from the origin, where products round."""
    real = np.repeat(100 + np.random.default_rng(0).standard_normal((5, 64)), 4, axis=0)
    assert coverage(real[::2], real, k=3).precision == 1


@given(st.integers(0, 2**32), st.integers(1, 4))
def test_precision_and_recall_change_places_with_the_sets(seed: int, k: int) -> None:
    drawn, real = np.random.default_rng(seed).standard_normal((2, 12, 3))
    result, swapped = coverage(drawn, real, k=k), coverage(real, drawn, k=k)
    assert (result.precision, result.recall) == (swapped.recall, swapped.precision)
    assert 0 <= result.coverage <= 1
    assert result.density <= 12 / k


@pytest.mark.parametrize("k", [0, 200])
def test_neighbours_that_are_refused(k: int) -> None:
    message = f"k={k} is not allowed: 1 <= k <= 199, a row less than the set"
    with pytest.raises(EvaluationError, match=f"^{re.escape(message)}$"):
        coverage(DRAWN, REAL, k=k)
