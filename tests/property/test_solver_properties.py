"""Properties of solvers, of whatever name, on whatever grid."""

from typing import get_args

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from paris_ray.config import SolverName, TimeGrid
from paris_ray.diffusion import sampling_times
from paris_ray.sampling.solvers import Solver, euler_step, integrate, proceed, solve

NAMES = st.sampled_from(get_args(SolverName))
GRIDS = st.sampled_from(get_args(TimeGrid))
STEPS = st.integers(1, 40)
SEEDS = st.integers(0, 2**32)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype)


def uneven_times(draw: st.DrawFn) -> list[float]:
    # Steps of rounding size would divide rounding errors by each other.
    inside = draw(st.lists(st.integers(1, 999), max_size=8, unique=True))
    return [1.0, *(time / 1000 for time in sorted(inside, reverse=True)), 0.0]


TIMES = st.composite(uneven_times)()


@given(NAMES, TIMES, SEEDS)
@settings(deadline=None)
def test_a_straight_line_is_followed_exactly(
    name: SolverName, times: list[float], seed: int
) -> None:
    """Velocity is the same everywhere, or points from everywhere to one picture."""
    noise, velocity, picture = normal(seed, 3, 2, 3, 4, 4, dtype=torch.float64)
    constant = integrate(solve(name, noise, times), lambda x, t: velocity)
    torch.testing.assert_close(constant, noise - velocity)
    found = integrate(solve(name, noise, times), lambda x, t: (x - picture) / t)
    torch.testing.assert_close(found, picture)


@given(NAMES, GRIDS, SEEDS)
@settings(deadline=None)
def test_one_step_is_eulers(name: SolverName, grid: TimeGrid, seed: int) -> None:
    noise = normal(seed, 2, 3, 4, 4)
    found = integrate(solve(name, noise, sampling_times(1, grid).tolist()), bent)
    assert torch.equal(found, euler_step(noise, bent(noise, 1.0), 1.0, 0.0))


def bent(x: Tensor, t: float) -> Tensor:
    """A velocity whose rows do not know of each other, to the bit."""
    return x * x.abs() * 0.1 - t * x + 0.5


@given(NAMES, GRIDS, STEPS, st.lists(SEEDS, min_size=2, max_size=5))
@settings(deadline=None)
def test_a_rows_bytes_do_not_depend_on_its_batch(
    name: SolverName, grid: TimeGrid, steps: int, seeds: list[int]
) -> None:
    noise, times = torch.stack([normal(s, 3, 5, 5) for s in seeds]), sampling_times(steps, grid)
    together = integrate(solve(name, noise, times.tolist()), bent)
    for row, alone in zip(together, noise.split(1), strict=True):
        assert torch.equal(row, integrate(solve(name, alone, times.tolist()), bent)[0])


@given(st.lists(st.tuples(NAMES, GRIDS, STEPS, SEEDS), min_size=2, max_size=4), st.data())
@settings(deadline=None)
def test_solvers_that_take_turns_do_not_know_of_each_other(
    mixed: list[tuple[SolverName, TimeGrid, int, int]], data: st.DataObject
) -> None:
    def start(name: SolverName, grid: TimeGrid, steps: int, seed: int) -> Solver:
        return solve(name, normal(seed, 1, 2, 3, 3), sampling_times(steps, grid).tolist())

    solvers = [start(*each) for each in mixed]
    state: list[tuple[Tensor, float] | Tensor] = [next(solver) for solver in solvers]
    while waiting := [i for i, step in enumerate(state) if isinstance(step, tuple)]:
        i = data.draw(st.sampled_from(waiting))
        step = state[i]
        assert isinstance(step, tuple)
        state[i] = proceed(solvers[i], bent(*step))
    for found, each in zip(state, mixed, strict=True):
        assert isinstance(found, Tensor)
        assert torch.equal(found, integrate(start(*each), bent))


@given(NAMES, GRIDS, STEPS, SEEDS)
@settings(deadline=None)
def test_the_ends_of_time_give_finite_numbers(
    name: SolverName, grid: TimeGrid, steps: int, seed: int
) -> None:
    asked = []

    def velocity(x: Tensor, t: float) -> Tensor:
        asked.append(t)
        return x - 1

    latents = integrate(
        solve(name, normal(seed, 2, 3, 4, 4), sampling_times(steps, grid).tolist()), velocity
    )
    assert latents.isfinite().all()
    assert all(0 < t <= 1 for t in asked)
    assert asked == sorted(asked, reverse=True)
