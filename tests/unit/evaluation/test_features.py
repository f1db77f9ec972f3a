"""Rows of features: what is refused, blocks, and neighbours."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paris_ray.errors import EvaluationError
from paris_ray.evaluation import features
from paris_ray.evaluation.features import check_features, nearest_neighbours, row_blocks

GOOD = np.zeros((3, 2))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            np.zeros(3),
            "drawn of shape (3,) is not allowed: features are (N, D) with N >= 2",
        ),
        (
            np.zeros((1, 2)),
            "drawn of shape (1, 2) is not allowed: features are (N, D) with N >= 2",
        ),
        (
            np.zeros((3, 4)),
            "drawn has 4 features a row: real has 2, and both must have the same",
        ),
        (
            np.array([[0.0, 1.0], [np.nan, 0.0]]),
            "drawn has values that are not finite: none are allowed",
        ),
    ],
)
def test_what_is_refused(bad: np.ndarray, message: str) -> None:
    with pytest.raises(EvaluationError, match=f"^{re.escape(message)}$"):
        check_features({"real": GOOD, "drawn": bad}, min_rows=2)


def test_good_features_pass() -> None:
    check_features({"real": GOOD, "drawn": np.zeros((2, 2))}, min_rows=2)


@given(st.integers(0, 200), st.integers(0, 50), st.integers(1, 100))
def test_blocks_are_all_rows_once_and_small(rows: int, elements: int, limit: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "BLOCK_ELEMENTS", limit)
        blocks = list(row_blocks(rows, elements))
    assert [i for block in blocks for i in range(rows)[block]] == list(range(rows))
    assert all(block.stop - block.start in range(1, max(2, limit + 1)) for block in blocks)
    assert all((b.stop - b.start) * elements <= max(limit, elements) for b in blocks)


def test_neighbours_are_those_of_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "BLOCK_ELEMENTS", 50)  # several blocks
    generator = np.random.default_rng(0)
    queries, gallery = generator.standard_normal((30, 4)), generator.standard_normal((40, 4))
    distances, rows = nearest_neighbours(queries, gallery, 3)
    brute = np.linalg.norm(queries[:, None] - gallery, axis=2)
    assert np.array_equal(rows, brute.argsort(axis=1)[:, :3])
    np.testing.assert_allclose(distances, np.sort(brute, axis=1)[:, :3], rtol=1e-12)


def test_a_copy_is_at_distance_zero_however_far_from_the_origin() -> None:
    rows = 1000 + np.random.default_rng(0).standard_normal((50, 16))
    distances, _ = nearest_neighbours(rows, rows, 1)
    assert not distances.any()
