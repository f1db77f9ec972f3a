"""Shifted times: the ratio of signal to noise falls by the square of the shift."""

import torch

from paris_ray.config import TrainingConfig
from paris_ray.diffusion import sample_times, signal_to_noise
from paris_ray.seeding import torch_generator
from paris_ray.training.data import Batch
from paris_ray.training.recipes.shifted_time import ShiftedTime

NOTHING = torch.empty(0)


def shifted(t: torch.Tensor, shift: float) -> torch.Tensor:
    return ShiftedTime(shift).prepare(0.0, Batch(NOTHING, NOTHING, t, NOTHING, NOTHING)).t


def test_the_ratio_of_signal_to_noise_falls_by_the_square() -> None:
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    torch.testing.assert_close(signal_to_noise(shifted(t, 3.0)), signal_to_noise(t) / 9)
    assert (shifted(t, 3.0) > t).all()


def test_both_ends_stay_and_shifts_undo_each_other() -> None:
    ends = torch.tensor([0.0, 1.0])
    assert torch.equal(shifted(ends, 7.0), ends)
    t = torch.rand(50, dtype=torch.float64)
    torch.testing.assert_close(shifted(shifted(t, 4.0), 0.25), t)


def test_shifted_uniform_times_have_their_distribution() -> None:
    """Of uniform times, P(t' <= x) is the unshifted x, x / (s - (s - 1) x)."""
    config = TrainingConfig(t_distribution="uniform", t_one_share=0.0)
    t = shifted(sample_times(40_000, config, torch_generator(0, "t")), 3.0)
    for x in (0.25, 0.5, 0.75, 0.9):
        assert abs((t <= x).double().mean() - x / (3 - 2 * x)) < 0.01
