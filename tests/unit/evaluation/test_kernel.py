"""KID and CMMD: torch-fidelity's numbers, closed forms, no bias, and blocks."""

import re

import numpy as np
import pytest

from paris_ray.errors import EvaluationError
from paris_ray.evaluation import features
from paris_ray.evaluation.kernel import cmmd, kid
from tests.reference_features import CMMD_OF_200, DRAWN, KID_OF_200, REAL


def test_the_numbers_of_torch_fidelity() -> None:
    result = kid(DRAWN, REAL[:200], seed=0, num_subsets=1, subset_size=200)
    assert result.mean == pytest.approx(KID_OF_200, rel=1e-12)
    assert result.standard_deviation == 0
    assert cmmd(DRAWN, REAL[:200]) == pytest.approx(CMMD_OF_200, rel=1e-5)


def test_kid_by_hand() -> None:
    """D = 1: k(1, 1) = 8 twice, k(0, anything) = 1, so 8 + 1 - 2."""
    ones, zeros = np.ones((2, 1)), np.zeros((2, 1))
    assert kid(ones, zeros, seed=0, num_subsets=3, subset_size=2).mean == 7


def test_cmmd_by_hand() -> None:
    """Points at distance 10 have k = exp(-1/2), points at the same place k = 1."""
    first, second = np.zeros((2, 3)), np.array([[10.0, 0, 0], [10.0, 0, 0]])
    assert cmmd(first, second) == pytest.approx(1000 * (2 - 2 * np.exp(-0.5)), rel=1e-6)


def test_small_distances_keep_their_digits() -> None:
    """Unit vectors, whose kernels are all within 2 % of 1."""
    rows = np.random.default_rng(0).standard_normal((150, 32)) + 1
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    x, y = rows[:70], rows[70:]

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.exp(-((a[:, None] - b) ** 2).sum(axis=2) / 200)

    within = sum((k.sum() - len(k)) / (len(k) * (len(k) - 1)) for k in (kernel(x, x), kernel(y, y)))
    expected = 1000 * (within - 2 * kernel(x, y).mean())
    assert cmmd(x.astype(np.float32), y.astype(np.float32)) == pytest.approx(expected, abs=1e-6)


def test_equal_distributions_give_zero_on_average() -> None:
    """An estimate that counted a row with itself would be 2 / 50 of its spread above zero."""
    generator = np.random.default_rng(0)
    pairs = [generator.standard_normal((2, 50, 4)) for _ in range(200)]
    for values in (
        [cmmd(x, y) for x, y in pairs],
        [kid(x, y, seed=0, num_subsets=1, subset_size=50).mean for x, y in pairs],
    ):
        error = np.std(values) / np.sqrt(len(values))
        assert abs(np.mean(values)) < 3 * error
        assert min(values) < 0


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = cmmd(DRAWN, REAL), kid(DRAWN, REAL, seed=0, subset_size=50)
    monkeypatch.setattr(features, "BLOCK_ELEMENTS", 700)
    assert cmmd(DRAWN, REAL) == pytest.approx(whole[0], rel=1e-6)
    assert kid(DRAWN, REAL, seed=0, subset_size=50).mean == pytest.approx(whole[1].mean)


def test_cmmd_is_symmetric_and_moves_along() -> None:
    assert cmmd(REAL, DRAWN) == pytest.approx(cmmd(DRAWN, REAL), rel=1e-5)
    assert cmmd(DRAWN + 100, REAL + 100) == pytest.approx(cmmd(DRAWN, REAL), rel=1e-5)


def test_the_seed_decides_the_subsets() -> None:
    first, again, other = (kid(DRAWN, REAL, seed=seed, subset_size=50) for seed in (0, 0, 1))
    assert first == again
    assert first.mean != other.mean
    assert first.standard_deviation > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "subset_size=1000 is not allowed: 2 <= subset_size <= 200 rows"),
        ({"subset_size": 1}, "subset_size=1 is not allowed: 2 <= subset_size <= 200 rows"),
        ({"subset_size": 2, "num_subsets": 0}, "num_subsets=0 is not allowed: 1 or more"),
    ],
)
def test_options_that_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(EvaluationError, match=f"^{re.escape(message)}$"):
        kid(DRAWN, REAL, seed=0, **options)


def test_features_that_are_refused() -> None:
    message = "real has 7 features a row: drawn has 8, and both must have the same"
    with pytest.raises(EvaluationError, match=f"^{message}$"):
        cmmd(DRAWN, REAL[:, :7])
