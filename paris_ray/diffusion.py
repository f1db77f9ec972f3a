"""The straight path between data and noise; the only file that knows the time convention.

t = 0 is data, t = 1 is noise: `x_t = (1 - t) x_0 + t eps`, `velocity = eps - x_0`, and sampling
integrates from 1 to 0. Networks are fed `1000 t`.

Source: flow matching, Lipman et al. 2022 (arXiv:2210.02747), whose time is 1 - t.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from paris_ray.config import TrainingConfig
from paris_ray.models import EncodedText, Expert, Router, TextConditioning

TIME_SCALE = 1000.0


class PathSample(NamedTuple):
    """A point of the path: `x_t` and `velocity` `(B, C, H, W)`, `t (B,)`."""

    t: Tensor
    x_t: Tensor
    velocity: Tensor


def _per_sample(t: Tensor, like: Tensor) -> Tensor:
    return t.to(like.dtype).view(-1, *[1] * (like.dim() - 1))


def sample_path(latents: Tensor, noise: Tensor, t: Tensor) -> PathSample:
    """Return the point of the straight path from `latents` (t = 0) to `noise` (t = 1).

    Args:
        latents: `(B, C, H, W)`, scaled to a standard deviation of about 1.
        noise: Unit Gaussian of the same shape.
        t: `(B,)` in [0, 1].

    Raises:
        ValueError: if the shapes differ.
    """
    if latents.shape != noise.shape:
        raise ValueError(f"latents {tuple(latents.shape)} and noise {tuple(noise.shape)} differ")
    time = _per_sample(t, latents)
    return PathSample(t, (1 - time) * latents + time * noise, noise - latents)


def sample_times(count: int, config: TrainingConfig, generator: torch.Generator) -> Tensor:
    """Draw `(count,)` training times; the first `t_one_share` of them are exactly 1.

    Pure noise is where every picture starts, and where only text can help: a share of its own
    keeps it from being a set of measure zero.
    """
    if config.t_distribution == "uniform":
        t = torch.rand(count, generator=generator)
    else:
        normal = torch.randn(count, generator=generator)
        t = torch.sigmoid(config.t_logit_mean + config.t_logit_std * normal)
    t[: round(config.t_one_share * count)] = 1.0
    return t


def sampling_times(num_inference_steps: int) -> Tensor:
    """Return the `(num_inference_steps + 1,)` times of a sample, from 1 down to 0."""
    return torch.linspace(1.0, 0.0, num_inference_steps + 1)


def _path_variance(t: Tensor) -> Tensor:
    """Variance of x_t for unit-variance data."""
    return (1 - t) ** 2 + t**2


def predict_velocity(
    expert: Expert, latents: Tensor, t: Tensor, text: TextConditioning | EncodedText
) -> Tensor:
    """Return the expert's velocity `(B, C, H, W)` at `latents`, whatever the network predicts.

    With `prediction="preconditioned"` the network sees x_t / sqrt(D), D = (1 - t)^2 + t^2, and
    its output F means velocity = (2t - 1) / D x_t - F / sqrt(D). This is EDM's choice of unit
    variance in and out (Karras et al. 2022, arXiv:2206.00364, table 1) on the straight path.

    Args:
        expert: The network.
        latents: `(B, C, H, W)` noisy latents x_t.
        t: `(B,)` in [0, 1].
        text: Conditioning of the same batch, or what `Expert.encode_text` made of it.
    """
    timesteps = TIME_SCALE * t
    if expert.config.prediction == "velocity":
        return expert(latents, timesteps, text).float()
    time = _per_sample(t, latents)
    variance = _path_variance(time)
    output = expert(latents / variance.sqrt(), timesteps, text).float()
    return (2 * time - 1) / variance * latents - output / variance.sqrt()


def velocity_loss(expert: Expert, path: PathSample, text: TextConditioning) -> Tensor:
    """Return the flow-matching loss, a scalar: mean squared error of the velocity.

    A preconditioned expert's error is weighted by D = (1 - t)^2 + t^2, which makes its network
    output a unit-variance target at every t.
    """
    error = (predict_velocity(expert, path.x_t, path.t, text) - path.velocity) ** 2
    if expert.config.prediction == "preconditioned":
        error = error * _path_variance(_per_sample(path.t, error))
    return error.mean()


def router_logits(router: Router, latents: Tensor, t: Tensor, text: TextConditioning) -> Tensor:
    """Return the router's logits `(B, K)` at noisy latents of times `t (B,)` in [0, 1]."""
    pooled_text = text.pooled_text if router.config.text_embed_dim else None
    return router(latents, TIME_SCALE * t, pooled_text).float()
