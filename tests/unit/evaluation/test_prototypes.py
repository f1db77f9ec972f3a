"""The router without training: by hand, on blobs, and with calibration."""

import re
from typing import Any

import pytest
import torch

from paris_ray.errors import EvaluationError
from paris_ray.evaluation.calibration import calibration, fit_temperature
from paris_ray.evaluation.prototypes import fit_prototypes

ROWS = torch.tensor([[2.0, 0.0], [0.0, 5.0], [0.0, -3.0]])


def blobs(seed: int, spread: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows `(300, 2, 4)` around three directions, and the direction of each."""
    generator = torch.Generator().manual_seed(seed)
    clusters = torch.arange(300) % 3
    rows = 4 * torch.eye(8)[clusters] + spread * torch.randn(300, 8, generator=generator)
    return rows.view(300, 2, 4), clusters


def test_prototypes_are_mean_directions() -> None:
    """Rows count equally, however long they are."""
    router = fit_prototypes(ROWS, torch.tensor([0, 0, 1]), num_clusters=2)
    expected = torch.tensor([[0.5**0.5, 0.5**0.5], [0.0, -1.0]])
    torch.testing.assert_close(router.prototypes, expected)


def test_logits_are_cosines_over_the_temperature() -> None:
    router = fit_prototypes(ROWS, torch.tensor([0, 1, 2]), num_clusters=3, temperature=0.5)
    logits = router.logits(torch.tensor([[6.0, 8.0]]))
    torch.testing.assert_close(logits, torch.tensor([[0.6, 0.8, -0.8]]) / 0.5)


def test_blobs_are_told_apart_and_calibrated() -> None:
    router = fit_prototypes(*blobs(0), num_clusters=3)
    rows, clusters = blobs(1)
    logits = router.logits(rows)
    before = calibration(logits, clusters)
    assert before.accuracy > 0.99
    after = calibration(logits / fit_temperature(logits, clusters), clusters)
    assert after.negative_log_likelihood < before.negative_log_likelihood / 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"clusters": torch.tensor([0, 1])},
            "clusters of shape (2,) is not allowed: there are 3 rows",
        ),
        (
            {"clusters": torch.tensor([0, 1, 3])},
            "clusters from 0 to 3 are not allowed: 0 to 2",
        ),
        (
            {"clusters": torch.tensor([0, -1, 2])},
            "clusters from -1 to 2 are not allowed: 0 to 2",
        ),
        (
            {"num_clusters": 5},
            "clusters [3, 4] have no mean direction: each needs a row or more",
        ),
        (
            {"clusters": torch.tensor([0, 1, 1]), "num_clusters": 2},
            "clusters [1] have no mean direction: each needs a row or more",
        ),
        ({"temperature": 0.0}, "temperature=0.0 is not allowed: it must be positive"),
    ],
)
def test_what_is_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "rows": ROWS,
        "clusters": torch.tensor([0, 1, 2]),
        "num_clusters": 3,
    }
    with pytest.raises(EvaluationError, match=f"^{re.escape(message)}$"):
        fit_prototypes(**(arguments | change))


def test_rows_of_another_width_are_refused() -> None:
    router = fit_prototypes(ROWS, torch.tensor([0, 1, 2]), num_clusters=3)
    message = "rows has 3 values a row: the prototypes have 2"
    with pytest.raises(EvaluationError, match=f"^{message}$"):
        router.logits(torch.zeros(1, 3))
