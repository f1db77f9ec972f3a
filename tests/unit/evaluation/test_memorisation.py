"""Memorisation: distances by hand, copies, and no alarm where there is nothing to find."""

import re
from collections.abc import Sequence

import numpy as np
import pytest

from paris_ray.errors import EvaluationError
from paris_ray.evaluation.memorisation import memorisation


def column(*values: float) -> np.ndarray:
    return np.array(values)[:, None]


def test_distances_and_shares_by_hand() -> None:
    """Held-out distances are 1, 2, 3, 4, 5, so the quantiles 0, 1/2, 1 are 1, 3, 5."""
    result = memorisation(
        column(0.5, 103, 94),
        column(1, 2, 3, 96, 95),
        column(0, 100),
        quantiles=(0, 0.5, 1),
    )
    assert result.nearest.tolist() == [0, 1, 1]
    assert result.distances.tolist() == [0.5, 3, 6]
    assert result.held_out_distances.tolist() == [1, 2, 3, 4, 5]
    assert result.thresholds.tolist() == [1, 3, 5]
    np.testing.assert_allclose(result.shares, [1 / 3, 2 / 3, 2 / 3])


def test_copies_are_closer_than_anything() -> None:
    training, held_out = np.random.default_rng(0).standard_normal((2, 200, 8))
    result = memorisation(training[::-1], held_out, training)
    assert result.nearest.tolist() == list(range(200))[::-1]
    assert not result.distances.any()
    assert result.shares.tolist() == [1, 1]


def test_new_pictures_of_the_same_kind_raise_no_alarm() -> None:
    training, held_out, drawn = np.random.default_rng(0).standard_normal((3, 4000, 4))
    result = memorisation(drawn, held_out, training)
    np.testing.assert_allclose(result.shares, [0.05, 0.5], atol=0.03)


def test_far_pictures_are_none_of_the_closest() -> None:
    training, held_out = np.random.default_rng(0).standard_normal((2, 50, 4))
    assert memorisation(held_out + 100, held_out, training).shares.tolist() == [0, 0]


@pytest.mark.parametrize("quantiles", [(0.5, 1.5), (-0.1,)])
def test_quantiles_that_are_refused(quantiles: Sequence[float]) -> None:
    message = f"quantiles={quantiles} is not allowed: each is in [0, 1]"
    rows = column(0, 1)
    with pytest.raises(EvaluationError, match=f"^{re.escape(message)}$"):
        memorisation(rows, rows, rows, quantiles=quantiles)


def test_features_that_are_refused() -> None:
    message = "training has 2 features a row: drawn has 1, and both must have the same"
    with pytest.raises(EvaluationError, match=f"^{message}$"):
        memorisation(column(0), column(0), np.zeros((3, 2)))
