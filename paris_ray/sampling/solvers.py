"""Solvers of the sampling equation dx/dt = velocity, from t = 1 to t = 0."""

from torch import Tensor


def euler_step(latents: Tensor, velocity: Tensor, t: float, t_next: float) -> Tensor:
    """Return the latents `(B, C, H, W)` at `t_next`, one Euler step away from `t`."""
    return latents + (t_next - t) * velocity
