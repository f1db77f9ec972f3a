"""Calibration: by hand, the number of torchmetrics, and temperatures that are known."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from paris_ray.errors import EvaluationError
from paris_ray.evaluation.calibration import calibration, fit_temperature


def logits_of(*probabilities: float) -> Tensor:
    """Two classes, the first with these probabilities."""
    first = torch.tensor(probabilities, dtype=torch.float64)
    return torch.stack([first, 1 - first], dim=1).log()


def random_logits(seed: int, count: int = 2000, classes: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(count, classes, generator=generator, dtype=torch.float64)


def labels_of(logits: Tensor, seed: int) -> Tensor:
    """Labels drawn from the very probabilities of the logits."""
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]


def test_a_table_by_hand() -> None:
    """Confidences 0.6, 0.7 (one of two right) and 0.9, 0.95 (both right), in two of four bins."""
    result = calibration(logits_of(0.6, 0.7, 0.9, 0.05), torch.tensor([0, 1, 0, 1]), num_bins=4)
    table = result.reliability
    assert table.counts.tolist() == [0, 0, 2, 2]
    assert table.confidence.tolist() == pytest.approx([0, 0, 0.65, 0.925])
    assert table.accuracy.tolist() == [0, 0, 0.5, 1]
    assert result.accuracy == 0.75
    assert result.expected_calibration_error == pytest.approx((2 * 0.15 + 2 * 0.075) / 4)
    expected = -torch.tensor([0.6, 0.3, 0.9, 0.95]).log().mean().item()
    assert result.negative_log_likelihood == pytest.approx(expected)


def test_an_upper_edge_belongs_to_its_bin() -> None:
    result = calibration(torch.zeros(1, 2), torch.tensor([0]), num_bins=2)
    assert result.reliability.counts.tolist() == [1, 0]  # a confidence of exactly 1/2


def test_certainty_is_in_the_last_bin() -> None:
    result = calibration(torch.tensor([[1e4, 0.0]]), torch.tensor([0]))
    assert result.reliability.counts.tolist() == [0] * 14 + [1]
    assert result.expected_calibration_error == 0
    assert result.negative_log_likelihood == 0


def test_chance_is_known() -> None:
    """Equal logits of K classes: confidence 1 / K, log K nats."""
    result = calibration(torch.zeros(8, 4), torch.arange(8) % 4)
    assert result.accuracy == 0.25
    assert result.expected_calibration_error == pytest.approx(0)
    assert result.negative_log_likelihood == pytest.approx(torch.tensor(4.0).log().item())


def test_true_probabilities_are_calibrated_and_sharper_ones_are_not() -> None:
    logits = random_logits(0, count=20_000)
    labels = labels_of(logits, 1)
    right, sharp = calibration(logits, labels), calibration(3 * logits, labels)
    assert right.expected_calibration_error < 0.02
    assert sharp.expected_calibration_error > 0.1
    assert sharp.negative_log_likelihood > right.negative_log_likelihood
    assert sharp.accuracy == right.accuracy


@pytest.mark.parametrize("scale", [0.2, 1.0, 5.0])
def test_a_known_temperature_is_found(scale: float) -> None:
    logits = random_logits(0, count=20_000)
    labels = labels_of(logits, 1)
    assert fit_temperature(scale * logits, labels) == pytest.approx(scale, rel=0.05)


def test_two_classes_have_a_closed_form() -> None:
    """Three of four are right at a logit of 1: 1 / (1 + exp(-1 / T)) = 3/4."""
    logits = torch.tensor([[1.0, 0.0]] * 4)
    temperature = fit_temperature(logits, torch.tensor([0, 0, 0, 1]))
    assert temperature == pytest.approx(1 / torch.tensor(3.0, dtype=torch.float64).log().item())


@given(st.integers(0, 2**32), st.floats(0.1, 10))
def test_the_fit_scales_and_is_a_minimum(seed: int, scale: float) -> None:
    logits, labels = random_logits(seed, count=50), labels_of(random_logits(seed, count=50), seed)
    temperature = fit_temperature(logits, labels)
    assert fit_temperature(scale * logits, labels) == pytest.approx(scale * temperature, rel=1e-6)
    best, *others = (
        calibration(logits / (temperature * factor), labels).negative_log_likelihood
        for factor in (1, 0.9, 1.1)
    )
    assert best <= min(others)


def test_the_ends_of_the_range() -> None:
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert fit_temperature(logits, torch.tensor([0, 1])) == pytest.approx(1e-3)
    assert fit_temperature(logits, torch.tensor([1, 0])) == pytest.approx(1e3)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (
            torch.zeros(2, 3),
            torch.zeros(3),
            "logits of shape (2, 3) and labels of shape (3,) are not allowed: "
            "(N, K) and (N,) with N, K >= 1",
        ),
        (
            torch.zeros(0, 3),
            torch.zeros(0),
            "logits of shape (0, 3) and labels of shape (0,) are not allowed: "
            "(N, K) and (N,) with N, K >= 1",
        ),
        (
            torch.full((1, 2), torch.inf),
            torch.zeros(1),
            "logits has values that are not finite: none are allowed",
        ),
        (torch.zeros(2, 3), torch.tensor([0, 3]), "labels from 0 to 3 are not allowed: 0 to 2"),
        (torch.zeros(2, 3), torch.tensor([-1, 2]), "labels from -1 to 2 are not allowed: 0 to 2"),
    ],
)
def test_what_is_refused(logits: Tensor, labels: Tensor, message: str) -> None:
    for measure in (calibration, fit_temperature):
        with pytest.raises(EvaluationError, match=f"^{re.escape(message)}$"):
            measure(logits, labels)


def test_bins_that_are_refused() -> None:
    with pytest.raises(EvaluationError, match=r"^num_bins=0 is not allowed: 1 or more$"):
        calibration(torch.zeros(1, 2), torch.tensor([0]), num_bins=0)
