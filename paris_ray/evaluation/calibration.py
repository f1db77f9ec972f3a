"""Is a router as sure as it is right? Accuracy, calibration error, likelihood, temperature."""

from dataclasses import dataclass

import torch
from torch import Tensor

from paris_ray.errors import EvaluationError

MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-3, 1e3
BISECTIONS = 60  # of the logarithm of that range: beyond the digits of float64


@dataclass(frozen=True, slots=True)
class Reliability:
    """Predictions by their confidence, the probability of the most likely class.

    Bin m of B has the confidences in (m / B, (m + 1) / B]. Means of an empty bin are 0.

    Attributes:
        counts: `(B,)` predictions in the bin.
        confidence: `(B,)` their mean confidence.
        accuracy: `(B,)` the share of them that is right.
    """

    counts: Tensor
    confidence: Tensor
    accuracy: Tensor


@dataclass(frozen=True, slots=True)
class Calibration:
    """How good probabilities are.

    Attributes:
        accuracy: Share of items whose most likely class is theirs, in [0, 1].
        expected_calibration_error: Mean of |accuracy - confidence| of the bins, weighted by their
            counts, in [0, 1].
        negative_log_likelihood: Mean over the items, in nats, >= 0.
        reliability: The bins.
    """

    accuracy: float
    expected_calibration_error: float
    negative_log_likelihood: float
    reliability: Reliability


def calibration(logits: Tensor, labels: Tensor, *, num_bins: int = 15) -> Calibration:
    """Return how well softmax(logits) predicts the labels.

    Args:
        logits: `(N, K)`.
        labels: `(N,)` integers, 0 to K - 1.
        num_bins: Number B of equal-width bins.

    Raises:
        EvaluationError: if shapes or values do not fit.

    Source: Guo et al. 2017 (arXiv:1706.04599), section 2; 15 bins are theirs.
    """
    logits, labels = _checked(logits, labels)
    if num_bins < 1:
        raise EvaluationError(f"num_bins={num_bins} is not allowed: 1 or more")
    log_probabilities = logits.log_softmax(dim=1)
    confidence, predicted = log_probabilities.exp().max(dim=1)
    right = (predicted == labels).double()
    table = _reliability(confidence, right, num_bins)
    gaps = (table.accuracy - table.confidence).abs() * table.counts
    likelihood = log_probabilities.gather(1, labels[:, None]).mean()
    return Calibration(
        right.mean().item(), (gaps.sum() / len(labels)).item(), -likelihood.item(), table
    )


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the T for which softmax(logits / T) has the least negative log likelihood.

    The likelihood is convex in 1 / T, so its slope has one zero, which is bisected. Where all
    predictions are right, or worse than chance, it lies beyond the range and an end is returned.

    Args:
        logits: `(N, K)` of held-out items.
        labels: `(N,)` integers, 0 to K - 1.

    Returns:
        T in [0.001, 1000]; above 1 if the logits were too sure of themselves.

    Raises:
        EvaluationError: if shapes or values do not fit.

    Source: temperature scaling, Guo et al. 2017 (arXiv:1706.04599), section 4.2.
    """
    logits, labels = _checked(logits, labels)
    own = logits.gather(1, labels[:, None]).mean()
    low, high = MIN_TEMPERATURE, MAX_TEMPERATURE
    for _ in range(BISECTIONS):
        middle = (low * high) ** 0.5
        expected = ((logits / middle).softmax(dim=1) * logits).sum(dim=1).mean()
        low, high = (low, middle) if expected <= own else (middle, high)
    return (low * high) ** 0.5


def _reliability(confidence: Tensor, right: Tensor, num_bins: int) -> Reliability:
    edges = torch.linspace(0, 1, num_bins + 1, dtype=torch.float64)
    bins = torch.bucketize(confidence, edges[1:-1])  # the upper edge belongs to the bin
    counts = torch.bincount(bins, minlength=num_bins)
    shares = (
        torch.bincount(bins, each, num_bins) / counts.clamp(min=1) for each in (confidence, right)
    )
    return Reliability(counts, *shares)


def _checked(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return both on the CPU, the logits in float64."""
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or not logits.numel():
        raise EvaluationError(
            f"logits of shape {tuple(logits.shape)} and labels of shape {tuple(labels.shape)} are "
            "not allowed: (N, K) and (N,) with N, K >= 1"
        )
    if not logits.isfinite().all():
        raise EvaluationError("logits has values that are not finite: none are allowed")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= logits.shape[1]:
        raise EvaluationError(
            f"labels from {low} to {high} are not allowed: 0 to {logits.shape[1] - 1}"
        )
    return logits.detach().cpu().double(), labels.cpu().long()
