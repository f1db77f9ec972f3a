"""Frechet distance: closed forms, clean-fid's number, batches, and the limit of many pictures."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paris_ray.errors import EvaluationError
from paris_ray.evaluation.frechet import (
    Gaussian,
    Moments,
    fit_gaussian,
    frechet_distance,
    frechet_distance_infinity,
)
from tests.reference_features import CLEAN_FID, DRAWN, REAL

MANY = 10**6


def diagonal(mean: list[float], variances: list[float], count: int = MANY) -> Gaussian:
    return Gaussian(np.array(mean), np.diag(np.array(variances)), count)


def test_commuting_covariances_have_a_closed_form() -> None:
    """|m_1 - m_2|^2 and the squared differences of the standard deviations."""
    first, second = diagonal([0.0, 1.0], [1.0, 4.0]), diagonal([3.0, 1.0], [9.0, 0.25])
    result = frechet_distance(first, second)
    assert result.distance == pytest.approx(3.0**2 + (1 - 3) ** 2 + (2 - 0.5) ** 2)


def test_covariances_that_do_not_commute() -> None:
    """In two dimensions tr (AB)^(1/2) = (tr AB + 2 (det A det B)^(1/2))^(1/2)."""
    a, b = np.array([[2.0, 1.0], [1.0, 3.0]]), np.array([[1.0, -0.5], [-0.5, 4.0]])
    root = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a) * np.linalg.det(b)))
    expected = np.trace(a) + np.trace(b) - 2 * root
    zero = np.zeros(2)
    result = frechet_distance(Gaussian(zero, a, MANY), Gaussian(zero, b, MANY))
    assert result.distance == pytest.approx(expected, rel=1e-12)


def test_the_number_of_clean_fid() -> None:
    result = frechet_distance(fit_gaussian(DRAWN), fit_gaussian(REAL))
    assert result.distance == pytest.approx(CLEAN_FID, rel=1e-10)


def test_singular_covariances() -> None:
    """Fewer rows than features: a set has no distance to itself, and a known one when moved."""
    rows = np.random.default_rng(0).standard_normal((5, 20))
    fit = fit_gaussian(rows)
    assert frechet_distance(fit, fit).distance == pytest.approx(0, abs=1e-10)
    moved = fit_gaussian(rows + 2)
    assert frechet_distance(fit, moved).distance == pytest.approx(20 * 4, rel=1e-10)


def test_covariances_without_a_common_direction() -> None:
    """Their product is 0, so the traces add up; roots of rounding errors would be 1e-8."""
    axes, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((20, 20)))
    first, second = (Gaussian(np.zeros(20), a @ a.T, MANY) for a in (axes[:, :10], axes[:, 10:]))
    assert frechet_distance(first, second).distance == pytest.approx(20, abs=1e-10)


@given(st.integers(0, 2**32), st.integers(1, 6))
def test_symmetric_and_blind_to_rotation(seed: int, dim: int) -> None:
    generator = np.random.default_rng(seed)
    first, second = generator.standard_normal((2, 30, dim))
    second = second @ generator.standard_normal((dim, dim)) + 1
    rotation, _ = np.linalg.qr(generator.standard_normal((dim, dim)))
    plain = frechet_distance(fit_gaussian(first), fit_gaussian(second)).distance
    swapped = frechet_distance(fit_gaussian(second), fit_gaussian(first)).distance
    turned = frechet_distance(fit_gaussian(first @ rotation), fit_gaussian(second @ rotation))
    assert plain >= 0
    assert swapped == pytest.approx(plain, rel=1e-8, abs=1e-8)
    assert turned.distance == pytest.approx(plain, rel=1e-8, abs=1e-8)


@given(st.lists(st.integers(1, 20), min_size=2, max_size=6), st.floats(-1e4, 1e4))
def test_batches_change_nothing(sizes: list[int], offset: float) -> None:
    rows = offset + np.random.default_rng(0).standard_normal((sum(sizes), 3))
    moments = Moments(3)
    for batch in np.split(rows, np.cumsum(sizes)[:-1]):
        moments.update(batch.astype(np.float64))
    fit = moments.gaussian()
    assert fit.count == len(rows)
    np.testing.assert_allclose(fit.mean, rows.mean(axis=0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(fit.covariance, np.cov(rows, rowvar=False), rtol=1e-8, atol=1e-8)


def test_a_fit_does_not_change_when_more_rows_come() -> None:
    moments = Moments(8)
    moments.update(REAL)
    fit = moments.gaussian()
    before = fit.mean.copy(), fit.covariance.copy()
    moments.update(DRAWN)
    assert np.array_equal(fit.mean, before[0])
    assert np.array_equal(fit.covariance, before[1])


def test_few_rows_are_told_of() -> None:
    few, many = diagonal([0.0], [1.0], 9), diagonal([0.0], [1.0], 10)
    assert frechet_distance(many, many).bias_note is None
    for pair in ((few, many), (many, few)):
        assert frechet_distance(*pair).bias_note == (
            "9 rows of 1 features are fewer than 10 a feature: the distance is too large; "
            "compare it only at equal counts, or extrapolate it"
        )


def test_the_limit_takes_the_bias_away() -> None:
    """Rows of the very Gaussian they are compared with: the true distance is 0."""
    dim = 16
    rows = np.random.default_rng(1).standard_normal((4000, dim))
    truth = Gaussian(np.zeros(dim), np.eye(dim), MANY)
    limit = frechet_distance_infinity(rows, truth, seed=0, min_count=200)
    plain = frechet_distance(fit_gaussian(rows), truth).distance
    assert limit.counts[0] == 200
    assert limit.counts[-1] == 4000
    assert len(limit.counts) == 15
    assert limit.distances[-1] == pytest.approx(plain, rel=1e-10)
    assert abs(limit.distance) < plain / 4
    assert limit.slope > 0


def test_the_line_goes_through_the_points() -> None:
    limit = frechet_distance_infinity(
        DRAWN, fit_gaussian(REAL), seed=0, min_count=100, num_points=2
    )
    np.testing.assert_allclose(limit.distance + limit.slope / limit.counts, limit.distances)


def test_the_seed_decides_the_subsets() -> None:
    real = fit_gaussian(REAL)
    first, again, other = (
        frechet_distance_infinity(DRAWN, real, seed=seed, min_count=50).distances
        for seed in (0, 0, 1)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_count": 200}, "min_count=200 is not allowed: 2 <= min_count < 200 drawn rows"),
        ({"min_count": 1}, "min_count=1 is not allowed: 2 <= min_count < 200 drawn rows"),
        (
            {"min_count": 50, "num_points": 1},
            "num_points=1 is not allowed: a line needs 2 or more",
        ),
    ],
)
def test_options_that_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(EvaluationError, match=f"^{re.escape(message)}$"):
        frechet_distance_infinity(DRAWN, fit_gaussian(REAL), seed=0, **options)


def test_features_that_are_refused() -> None:
    message = "real has 2 features a row: drawn has 1, and both must have the same"
    with pytest.raises(EvaluationError, match=f"^{message}$"):
        frechet_distance(diagonal([0.0], [1.0]), diagonal([0.0, 0.0], [1.0, 1.0]))
    message = "features has 7 features a row: moments has 8, and both must have the same"
    with pytest.raises(EvaluationError, match=f"^{message}$"):
        Moments(8).update(REAL[:, :7])
    moments = Moments(8)
    moments.update(REAL[:1])
    message = "1 rows of features: a covariance needs 2 or more"
    with pytest.raises(EvaluationError, match=f"^{message}$"):
        moments.gaussian()
