"""Solvers of the sampling equation dx/dt = velocity, from t = 1 down to t = 0.

A solver is a generator that does no I/O: it yields the latents and the time whose velocity it
wants, is sent that velocity, and returns the latents at the last time. What it remembers between
steps is its own, so pictures of different solvers and step counts can be drawn side by side. Every
step is an Euler step with a better velocity; all arithmetic is elementwise with the same numbers
in every row, so a row's bytes do not depend on the batch that it is in.
"""

from collections.abc import Callable, Generator, Sequence
from itertools import pairwise
from math import log

from torch import Tensor

from paris_ray.config import SolverName

Solver = Generator[tuple[Tensor, float], Tensor, Tensor]


def solve(name: SolverName, noise: Tensor, times: Sequence[float]) -> Solver:
    """Return a solver at its beginning.

    Args:
        name: `euler`; `heun`, `ab2` and `dpm++2m` are of second order.
        noise: `(B, C, H, W)` latents at the first time.
        times: Two or more, falling, all in [0, 1]: `diffusion.sampling_times(...).tolist()`.
    """
    return SOLVERS[name](noise, times)


def proceed(solver: Solver, velocity: Tensor) -> tuple[Tensor, float] | Tensor:
    """Send a solver the velocity that it wants; return its next question, or the last latents."""
    try:
        return solver.send(velocity)
    except StopIteration as stop:
        latents: Tensor = stop.value
        return latents


def integrate(solver: Solver, velocity: Callable[[Tensor, float], Tensor]) -> Tensor:
    """Return the last latents `(B, C, H, W)` of a solver whose questions a function answers."""
    step: tuple[Tensor, float] | Tensor = next(solver)
    while isinstance(step, tuple):
        step = proceed(solver, velocity(*step))
    return step


def euler_step(latents: Tensor, velocity: Tensor, t: float, t_next: float) -> Tensor:
    """Return the latents `(B, C, H, W)` at `t_next`, one Euler step away from `t`."""
    return latents + (t_next - t) * velocity


def euler(latents: Tensor, times: Sequence[float]) -> Solver:
    """Keep the velocity of a step's beginning."""
    for t, t_next in pairwise(times):
        velocity = yield latents, t
        latents = euler_step(latents, velocity, t, t_next)
    return latents


def heun(latents: Tensor, times: Sequence[float]) -> Solver:
    """Average the velocities of a step's two ends; the last step is Euler's.

    Source: Karras et al. 2022 (arXiv:2206.00364), algorithm 1 with their sigma as our t.
    """
    for t, t_next in pairwise(times):
        velocity = yield latents, t
        if t_next > times[-1]:
            end = yield euler_step(latents, velocity, t, t_next), t_next
            velocity = (velocity + end) / 2
        latents = euler_step(latents, velocity, t, t_next)
    return latents


def adams_bashforth_2(latents: Tensor, times: Sequence[float]) -> Solver:
    """Extrapolate the velocity to the middle of a step, from its beginning and the step before."""
    before, t_before = None, times[0]
    for t, t_next in pairwise(times):
        velocity = yield latents, t
        middle = velocity
        if before is not None:
            middle = velocity + (t_next - t) / (t - t_before) / 2 * (velocity - before)
        latents = euler_step(latents, middle, t, t_next)
        before, t_before = velocity, t
    return latents


def dpm_solver_2m(latents: Tensor, times: Sequence[float]) -> Solver:
    """Extrapolate the picture that the velocity points to, x_0 = x_t - t velocity, in log-SNR.

    On the straight path (alpha = 1 - t, sigma = t) the update of the paper is an Euler step that
    points to the extrapolated picture. Steps from t = 1 and to t = 0 are endless in log-SNR: the
    limit of the first two steps and of the last is Euler's.

    Source: DPM-Solver++(2M), Lu et al. 2022 (arXiv:2211.01095), algorithm 2.
    """
    before, t_before = None, times[0]
    for t, t_next in pairwise(times):
        velocity = yield latents, t
        clean, better = latents - t * velocity, velocity
        if before is not None:
            extrapolated = _log_snr_ratio(t_before, t, t_next) / 2 * (clean - before)
            better = velocity - extrapolated / t
        latents = euler_step(latents, better, t, t_next)
        before, t_before = clean, t
    return latents


def _log_snr_ratio(t_before: float, t: float, t_next: float) -> float:
    """Return the step from t over the one before it, in log-SNR; 0 if either is endless."""
    if t_before == 1 or t_next == 0:
        return 0.0
    snr_before, snr, snr_next = (log((1 - time) / time) for time in (t_before, t, t_next))
    return (snr_next - snr) / (snr - snr_before)


SOLVERS: dict[SolverName, Callable[[Tensor, Sequence[float]], Solver]] = {
    "euler": euler,
    "heun": heun,
    "ab2": adams_bashforth_2,
    "dpm++2m": dpm_solver_2m,
}
