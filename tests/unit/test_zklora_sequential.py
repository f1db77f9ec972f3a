"""The buyer's sequential test: how often it errs, and how early it ends."""

import math

import numpy as np
import pytest

from paris_ray.errors import ConfigError
from paris_ray.zklora.sequential import Verdict, Wanted, evidence


def verdict(gains: list[float], **options: float) -> Verdict:
    """Decide on examples whose log ratios, at their one level, are these."""
    ratios = np.array([gains])
    return Wanted(**options).verdict(np.exp(ratios), np.ones_like(ratios))


def test_evidence_is_the_mixture_of_likelihood_ratios() -> None:
    # Bayes by quadrature, over effect (normal, of precision c) and scale (1 / sigma).
    from paris_ray.zklora.sequential import PRECISION

    d = np.array([0.9, 1.4, 0.3])
    sigma = np.exp(np.linspace(-6, 6, 1201))[:, None, None]
    effect = np.linspace(-40, 40, 4001)[None, :, None]

    def likelihood(mean: np.ndarray) -> np.ndarray:
        return np.prod(np.exp(-0.5 * ((d - mean) / sigma) ** 2) / sigma, axis=2)

    prior = np.exp(-0.5 * PRECISION * effect[..., 0] ** 2) * math.sqrt(PRECISION / 2 / math.pi)
    mixed = (likelihood(effect * sigma) * prior).sum(1) * (effect[0, 1, 0] - effect[0, 0, 0])
    assert evidence(d) == pytest.approx(
        float(mixed.sum() / likelihood(np.zeros((1, 1, 1))).sum()), rel=1e-3
    )


def test_nothing_is_evidence_of_nothing() -> None:
    for values in ([], [3.0], [0.0, 0.0, 0.0]):
        assert evidence(np.array(values)) == 1.0
    assert verdict([]) is Verdict.UNDECIDED


def test_evidence_does_not_depend_on_the_unit() -> None:
    values = np.array([0.3, 0.1, 0.4])
    for other in (1e-6 * values, -values, values.reshape(1, 3)):
        assert evidence(other) == pytest.approx(evidence(values))


@pytest.mark.parametrize("sign", [1, -1])
def test_a_wrong_decision_is_as_rare_as_stated_however_often_one_looks(sign: int) -> None:
    rng = np.random.default_rng(0)
    wrong = Verdict.WORTH if sign > 0 else Verdict.NOT_WORTH
    errors, runs = 0, 400
    for _ in range(runs):
        # The hardest case: the gain is just what is wanted.
        gains = -math.log1p(-0.02) + rng.normal(0.0, 0.1, 60)
        for n in range(2, 61):
            if (found := verdict(list(gains[:n]), error_rate=0.1)) is not Verdict.UNDECIDED:
                errors += found is wrong
                break
    assert errors / runs < 0.1


def test_levels_that_gain_unlike_make_no_example_doubtful() -> None:
    ratios = np.array([[0.95, 0.96, 0.94], [0.05, 0.06, 0.04]])
    assert Wanted().verdict(np.exp(ratios), np.ones_like(ratios)) is Verdict.WORTH
    assert verdict(list(ratios.flatten())) is Verdict.UNDECIDED


def test_two_examples_that_agree_are_enough() -> None:
    assert verdict([2.3, 2.4]) is Verdict.WORTH
    assert verdict([2.3, 1.2]) is Verdict.UNDECIDED


def test_a_clear_gain_and_a_clear_loss_are_seen_early() -> None:
    gains = [0.21, 0.24, 0.19, 0.23]
    assert verdict(gains) is Verdict.WORTH
    assert verdict([-gain for gain in gains]) is Verdict.NOT_WORTH
    # An adapter that does nothing lowers no loss by 2 %.
    assert verdict([1e-4, -2e-4, 1e-4, 0.0]) is Verdict.NOT_WORTH
    assert verdict([1e-4, -2e-4, 3e-4, 0.0], min_gain=0.0) is Verdict.UNDECIDED


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"error_rate": 0.0}, "error_rate=0.0"),
        ({"error_rate": 0.5}, "error_rate=0.5"),
        ({"min_gain": 1.0}, "min_gain=1.0"),
        ({"min_gain": -math.inf}, "min_gain=-inf"),
        ({"min_gain": math.nan}, "min_gain=nan"),
    ],
)
def test_a_rate_that_is_none_is_named(options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        verdict([0.1, 0.2], **options)
