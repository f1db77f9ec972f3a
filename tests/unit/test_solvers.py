"""Solvers on data whose velocity is known, and beside diffusers' implementation."""

from collections.abc import Sequence
from typing import get_args

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from paris_ray.config import SolverName
from paris_ray.diffusion import sampling_times
from paris_ray.sampling.solvers import SOLVERS, integrate, proceed, solve
from paris_ray.sampling_options import num_evaluations

NAMES: tuple[SolverName, ...] = get_args(SolverName)
MEAN, STD = 0.7, 0.4
NOISE = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def spread(t: float) -> float:
    """Standard deviation of x_t for data N(MEAN, STD^2)."""
    return float(((1 - t) ** 2 * STD**2 + t**2) ** 0.5)


def gaussian_velocity(x: Tensor, t: float) -> Tensor:
    slope = (t - (1 - t) * STD**2) / spread(t) ** 2
    return slope * (x - (1 - t) * MEAN) - MEAN


def gaussian_path(noise: Tensor, t: float) -> Tensor:
    """Where the exact solution that starts from `noise` is at time t."""
    return (1 - t) * MEAN + spread(t) * noise


def error(name: SolverName, times: Sequence[float]) -> float:
    start, end = gaussian_path(NOISE, times[0]), gaussian_path(NOISE, times[-1])
    found = integrate(solve(name, start, times), gaussian_velocity)
    return float((found - end).abs().max())


def falls(name: SolverName, first: float, last: float, steps: int) -> float:
    """By how much the error falls when the steps double."""
    few, many = (
        torch.linspace(first, last, n + 1, dtype=torch.float64).tolist() for n in (steps, 2 * steps)
    )
    return error(name, few) / error(name, many)


def test_every_name_has_a_solver() -> None:
    assert tuple(SOLVERS) == NAMES


@pytest.mark.parametrize(
    ("name", "expected"), [("euler", 2), ("heun", 4), ("ab2", 4), ("dpm++2m", 4)]
)
def test_the_order_of_convergence(name: SolverName, expected: float) -> None:
    assert falls(name, 0.9, 0.1, steps=80) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(
    ("name", "expected"), [("euler", 2), ("heun", 4), ("ab2", 4), ("dpm++2m", 3.4)]
)
def test_the_order_from_pure_noise_to_data(name: SolverName, expected: float) -> None:
    """Equal steps of t are endless in log-SNR at both ends: h^2 log(1/h) is left of dpm++2m's h^2.

    In no time does it converge as slowly as a solver of first order.
    """
    assert falls(name, 1.0, 0.0, steps=160) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_every_evaluation_counts(name: SolverName, steps: int) -> None:
    asked: list[float] = []

    def velocity(x: Tensor, t: float) -> Tensor:
        asked.append(t)
        return torch.zeros_like(x)

    integrate(solve(name, NOISE, sampling_times(steps).tolist()), velocity)
    assert len(asked) == num_evaluations(name, steps)
    assert (asked[0], min(asked) > 0) == (1, True)
    expected = steps + (steps - 1 if name == "heun" else 0)
    assert num_evaluations(name, steps) == expected


def test_dpm_solver_is_the_published_one() -> None:
    """diffusers' is another implementation, with alpha, sigma and log-SNR written out."""
    scheduler = DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++",
        solver_order=2,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=1.0,
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(6)
    expected = NOISE
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas.tolist(), strict=False):
        velocity = gaussian_velocity(expected, sigma)
        expected = scheduler.step(velocity, t, expected).prev_sample
    solver = solve("dpm++2m", NOISE, scheduler.sigmas.tolist())
    torch.testing.assert_close(integrate(solver, gaussian_velocity), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 50])
def test_flow_match_euler_has_the_times_of_diffusers(steps: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(steps)
    times = sampling_times(steps, "flow-match-euler")
    torch.testing.assert_close(times, scheduler.sigmas, rtol=0, atol=1e-7)
    assert (times[0], times[-1], len(times)) == (1, 0, steps + 1)


def test_euler_on_that_grid_is_their_scheduler() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(8)
    expected = NOISE
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas.tolist(), strict=False):
        expected = scheduler.step(gaussian_velocity(expected, sigma), t, expected).prev_sample
    times = sampling_times(8, "flow-match-euler").tolist()
    found = integrate(solve("euler", NOISE, times), gaussian_velocity)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_solver_does_not_change_what_it_is_given() -> None:
    for name in NAMES:
        noise, velocity = NOISE.clone(), torch.ones_like(NOISE)
        step: tuple[Tensor, float] | Tensor = next(solver := solve(name, noise, [1.0, 0.5, 0.0]))
        while isinstance(step, tuple):
            step = proceed(solver, velocity)
        assert torch.equal(noise, NOISE)
        assert torch.equal(velocity, torch.ones_like(NOISE))
