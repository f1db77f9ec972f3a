"""The straight path between data and noise; the only file that knows the time convention.

t = 0 is data, t = 1 is noise: `x_t = (1 - t) x_0 + t eps`, `velocity = eps - x_0`, and sampling
integrates from 1 to 0. Networks are fed `1000 t`.

An expert with `prediction="epsilon"` is a DDPM of the variance-preserving path with the cosine
schedule, `x_s = a(s) x_0 + sqrt(1 - a(s)^2) eps`. Both paths hold the same points up to scale:
x_t / sqrt((1 - t)^2 + t^2) is x_s for the s of equal signal-to-noise ratio, so such an expert
trains on, and predicts the velocity of, the very path of the others.

Source: flow matching, Lipman et al. 2022 (arXiv:2210.02747), whose time is 1 - t; unlike experts,
HDDM (arXiv:2603.06741); the cosine schedule, Nichol and Dhariwal 2021 (arXiv:2102.09672).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from paris_ray.config import ExpertConfig, TimeGrid, TrainingConfig
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


def sample_times(
    count: int,
    config: TrainingConfig,
    generator: torch.Generator,
    expert: ExpertConfig | None = None,
) -> Tensor:
    """Draw `(count,)` training times; the first `t_one_share` of them are exactly 1.

    Pure noise is where every picture starts, and where only text can help: a share of its own
    keeps it from being a set of measure zero.

    Args:
        count: How many.
        config: The distribution.
        generator: Source of randomness.
        expert: An expert that predicts epsilon has the distribution in its own time s.
    """
    if config.t_distribution == "uniform":
        t = torch.rand(count, generator=generator)
    else:
        normal = torch.randn(count, generator=generator)
        t = torch.sigmoid(config.t_logit_mean + config.t_logit_std * normal)
    if expert is not None and expert.prediction == "epsilon":
        t = _from_cosine_time(t, expert.cosine_offset)
    t[: round(config.t_one_share * count)] = 1.0
    return t


def signal_to_noise(t: Tensor) -> Tensor:
    """Return `((1 - t) / t)^2`, the ratio of signal to noise in x_t, infinite at t = 0."""
    return ((1 - t) / t) ** 2


def shift_times(t: Tensor, shift: float) -> Tensor:
    """Return times whose ratio of signal to noise is less by `shift` squared; both ends stay.

    Source: Esser et al. 2024 (arXiv:2403.03206), equation 23.
    """
    return shift * t / (1 + (shift - 1) * t)


def sampling_times(num_inference_steps: int, grid: TimeGrid = "linspace") -> Tensor:
    """Return the `(num_inference_steps + 1,)` times of a sample, from 1 down to 0.

    Args:
        num_inference_steps: At least 1.
        grid: `linspace`, in equal steps; `half-last`, of which the last is half as long;
            `flow-match-euler`, to 1/1000 and then to 0, as diffusers' scheduler
            FlowMatchEulerDiscreteScheduler has them without a shift.
    """
    if grid == "linspace":
        return torch.linspace(1.0, 0.0, num_inference_steps + 1)
    last = 1 / TIME_SCALE if grid == "flow-match-euler" else 1 / (2 * num_inference_steps - 1)
    return torch.cat([torch.linspace(1.0, last, num_inference_steps), torch.zeros(1)])


def _path_variance(t: Tensor) -> Tensor:
    """Variance of x_t for unit-variance data."""
    return (1 - t) ** 2 + t**2


def _cosine_time(t: Tensor, offset: float) -> Tensor:
    """Return the time s of the cosine schedule with the signal-to-noise ratio of t.

    With alpha = (1 - t) / sqrt((1 - t)^2 + t^2) it solves cos(pi/2 (s + o) / (1 + o)) =
    alpha cos(pi/2 o / (1 + o)); for offset o = 0 this is tan(pi s / 2) = t / (1 - t).
    """
    start = math.cos(math.pi / 2 * offset / (1 + offset))
    if offset == 0:
        angle = torch.atan2(t, 1 - t)  # exact at both ends, where arccos loses digits
    else:
        angle = torch.acos(start * (1 - t) / _path_variance(t).sqrt())
    return ((1 + offset) * 2 / math.pi * angle - offset).clamp(0, 1)


def _from_cosine_time(s: Tensor, offset: float) -> Tensor:
    """Return the time t of the straight path with the signal-to-noise ratio of s."""
    start = math.cos(math.pi / 2 * offset / (1 + offset))
    angle = math.pi / 2 * (s.double() + offset) / (1 + offset)  # 1 - alpha^2 cancels near s = 0
    alpha = (torch.cos(angle) / start).clamp(0, 1)
    sigma = (1 - alpha**2).sqrt()
    return (sigma / (alpha + sigma)).to(s.dtype)


def predict_velocity(
    expert: Expert,
    latents: Tensor,
    t: Tensor,
    text: TextConditioning | EncodedText,
    hidden: list[Tensor] | None = None,
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
        hidden: Receives the tokens after every block, as from `Expert.forward`.
    """
    time = _per_sample(t, latents)
    if expert.config.prediction == "epsilon":
        noise = _predict_noise(expert, latents, t, text, hidden)
        return velocity_of_noise(noise, latents, time, expert.config)
    if expert.config.prediction == "velocity":
        return expert(latents, TIME_SCALE * t, text, hidden).to(latents.dtype)
    variance = _path_variance(time)
    output = expert(latents / variance.sqrt(), TIME_SCALE * t, text, hidden).to(latents.dtype)
    return (2 * time - 1) / variance * latents - output / variance.sqrt()


def _predict_noise(
    expert: Expert,
    latents: Tensor,
    t: Tensor,
    text: TextConditioning | EncodedText,
    hidden: list[Tensor] | None,
) -> Tensor:
    """Return what a DDPM expert takes for the noise in x_t, `(B, C, H, W)`."""
    scaled = latents / _path_variance(_per_sample(t, latents)).sqrt()
    timesteps = TIME_SCALE * _cosine_time(t, expert.config.cosine_offset)
    return expert(scaled, timesteps, text, hidden).to(latents.dtype)


def velocity_of_noise(noise: Tensor, latents: Tensor, t: Tensor, config: ExpertConfig) -> Tensor:
    """Return the velocity `noise - x_0`, where x_0 = (x_t - t noise) / (1 - t).

    Two guards hold where the division makes much of a small error, near t = 1: `min_alpha` bounds
    the divisor from below, `x0_clamp` bounds x_0. Without them this is (noise - x_t) / (1 - t).

    Args:
        noise: `(B, C, H, W)` estimate of the noise in x_t.
        latents: `(B, C, H, W)` noisy latents x_t.
        t: Broadcastable to them, in [0, 1].
        config: The guards.
    """
    clean = (latents - t * noise) / (1 - t).clamp(min=config.min_alpha)
    if config.x0_clamp is not None:
        clean = clean.clamp(-config.x0_clamp, config.x0_clamp)
    return noise - clean


class Answer(NamedTuple):
    """What an expert answered at points of the path, beside what it is to answer.

    Attributes:
        output: `(B, C, H, W)` velocities, or the noise of a DDPM expert.
        target: The same of the data.
        weights: `(B, 1, 1, 1)` of the squared errors, or None: all alike.
        hidden: `(B, N, d)` tokens after every block; none where nobody asked for them.
    """

    output: Tensor
    target: Tensor
    weights: Tensor | None = None
    hidden: tuple[Tensor, ...] = ()

    def loss(self) -> Tensor:
        """Return the training loss, a scalar: the weighted mean squared error."""
        return self.distance_to(self.target)

    def weighted(self, weights: Tensor | None) -> "Answer":
        """Return the answer with errors that are also multiplied by `weights (B,)`, if given."""
        if weights is None:
            return self
        each = _per_sample(weights, self.output)
        return self._replace(weights=each if self.weights is None else each * self.weights)

    def distance_to(self, target: Tensor) -> Tensor:
        """Return the weighted mean squared distance of the output to a target, a scalar."""
        error = (self.output - target) ** 2
        return (error if self.weights is None else error * self.weights).mean()


def ask(
    expert: Expert, path: PathSample, text: TextConditioning, *, with_hidden: bool = False
) -> Answer:
    """Return what an expert answers at points of the path, as its training loss compares it.

    A preconditioned expert's velocity error is weighted by D = (1 - t)^2 + t^2, which makes its
    network output a unit-variance target at every t. A DDPM expert is compared in its noise.

    Args:
        expert: The network.
        path: The points.
        text: Conditioning of the same batch.
        with_hidden: Whether the answer has the tokens between blocks.
    """
    time = _per_sample(path.t, path.x_t)
    hidden: list[Tensor] | None = [] if with_hidden else None
    if expert.config.prediction == "epsilon":
        noise = path.x_t + (1 - time) * path.velocity
        found = _predict_noise(expert, path.x_t, path.t, text, hidden)
        return Answer(found, noise, None, tuple(hidden or ()))
    found = predict_velocity(expert, path.x_t, path.t, text, hidden)
    weighted = expert.config.prediction == "preconditioned"
    weights = _path_variance(time) if weighted else None
    return Answer(found, path.velocity, weights, tuple(hidden or ()))


def denoising_loss(expert: Expert, path: PathSample, text: TextConditioning) -> Tensor:
    """Return the expert's training loss, a scalar: mean squared error of what it predicts."""
    return ask(expert, path, text).loss()


def router_logits(router: Router, latents: Tensor, t: Tensor, text: TextConditioning) -> Tensor:
    """Return the router's logits `(B, K)` at noisy latents of times `t (B,)` in [0, 1]."""
    return router(latents, TIME_SCALE * t, router_text(router, text)).float()


def router_features(router: Router, latents: Tensor, t: Tensor, text: TextConditioning) -> Tensor:
    """Return what the router's last layer reads `(B, d)`; arguments as `router_logits`."""
    return router.features(latents, TIME_SCALE * t, router_text(router, text)).float()


def router_text(router: Router, text: TextConditioning) -> Tensor | None:
    """Return what of the text a router reads `(B, D)`; None: it reads none."""
    return text.pooled_text if router.config.text_embed_dim else None
