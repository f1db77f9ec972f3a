"""Properties of the path and of the times."""

import math
from typing import get_args

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paris_ray.config import ExpertConfig, TimeGrid, TrainingConfig
from paris_ray.diffusion import predict_velocity, sample_path, sample_times, sampling_times
from paris_ray.seeding import derive_seed, torch_generator

SEEDS = st.integers(0, 2**32)
SHAPES = st.lists(st.integers(1, 4), min_size=3, max_size=3)


def ends(seed: int, count: int, shape: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch_generator(seed, "test")
    latents, noise = torch.randn(2, count, *shape, generator=generator, dtype=torch.float64)
    return latents, noise


@given(SEEDS, st.integers(1, 3), SHAPES)
@settings(deadline=None)
def test_the_path_is_data_at_0_and_noise_at_1(seed: int, count: int, shape: list[int]) -> None:
    latents, noise = ends(seed, count, shape)
    assert torch.equal(sample_path(latents, noise, torch.zeros(count)).x_t, latents)
    assert torch.equal(sample_path(latents, noise, torch.ones(count)).x_t, noise)


@given(SEEDS, st.lists(st.floats(0.01, 0.99), min_size=1, max_size=4), SHAPES)
@settings(deadline=None)
def test_velocity_is_the_derivative_of_the_path(
    seed: int, times: list[float], shape: list[int]
) -> None:
    latents, noise = ends(seed, len(times), shape)
    t, h = torch.tensor(times, dtype=torch.float64), 1e-3
    later, earlier = sample_path(latents, noise, t + h), sample_path(latents, noise, t - h)
    difference = (later.x_t - earlier.x_t) / (2 * h)
    torch.testing.assert_close(difference, sample_path(latents, noise, t).velocity)


@given(
    SEEDS,
    st.integers(1, 64),
    st.sampled_from(["uniform", "logit_normal"]),
    st.floats(0, 1),
    st.floats(-3, 3),
)
@settings(deadline=None)
def test_training_times_start_with_their_share_of_pure_noise(
    seed: int, count: int, distribution: str, share: float, mean: float
) -> None:
    config = TrainingConfig(t_distribution=distribution, t_one_share=share, t_logit_mean=mean)
    t = sample_times(count, config, torch_generator(seed, "times"))
    pure = round(share * count)
    assert t.shape == (count,)
    assert ((t >= 0) & (t <= 1)).all()
    assert (t[:pure] == 1).all()
    assert (t[pure:] < 1).all()


@given(st.integers(1, 1000), st.sampled_from(get_args(TimeGrid)))
def test_sampling_times_fall_from_1_to_0(steps: int, grid: TimeGrid) -> None:
    times = sampling_times(steps, grid)
    assert (times[0], times[-1], len(times)) == (1, 0, steps + 1)
    assert (times.diff() < 0).all()


@given(SEEDS, st.text("ab/", max_size=3), st.lists(st.integers(0, 99), max_size=2), SEEDS)
def test_seeds_depend_on_every_argument(
    seed: int, purpose: str, indices: list[int], other: int
) -> None:
    derived = derive_seed(seed, purpose, *indices)
    assert derived == derive_seed(seed, purpose, *indices)
    assert 0 <= derived < 2**63
    assert derived != derive_seed(seed, purpose + "x", *indices)
    assert derived != derive_seed(seed, purpose, *indices, 0)
    assert (derived == derive_seed(other, purpose, *indices)) == (other == seed)


class GaussianExpert:
    """The exact network for data N(mean, std^2): a DDPM or flow expert with nothing to learn."""

    def __init__(self, config: ExpertConfig, mean: float, std: float) -> None:
        self.config, self.mean, self.std = config, mean, std

    def __call__(
        self, x: torch.Tensor, timesteps: torch.Tensor, text: object = None, hidden: object = None
    ) -> torch.Tensor:
        time = (timesteps / 1000).view(-1, 1, 1, 1)
        if self.config.prediction == "velocity":
            signal, noise = 1 - time, time
        else:
            offset = self.config.cosine_offset
            start = math.cos(math.pi / 2 * offset / (1 + offset))
            signal = torch.cos(math.pi / 2 * (time + offset) / (1 + offset)) / start
            noise = (1 - signal**2).sqrt()
        spread = (x - signal * self.mean) / (signal**2 * self.std**2 + noise**2)
        epsilon = noise * spread
        clean = self.mean + signal * self.std**2 * spread
        return epsilon - clean if self.config.prediction == "velocity" else epsilon


@given(
    st.floats(0.01, 0.99), st.floats(-2, 2), st.floats(0.2, 2), SEEDS, st.sampled_from([0, 0.008])
)
@settings(deadline=None)
def test_a_converted_ddpm_expert_equals_the_flow_expert(
    time: float, mean: float, std: float, seed: int, offset: float
) -> None:
    data, noise = ends(seed, 2, [1, 2, 2])
    t = torch.full((2,), time, dtype=torch.float64)
    x_t = sample_path(mean + std * data, noise, t).x_t
    unguarded = {"min_alpha": 0.0, "x0_clamp": None, "cosine_offset": offset}
    flow = GaussianExpert(ExpertConfig(prediction="velocity"), mean, std)
    ddpm = GaussianExpert(ExpertConfig(prediction="epsilon", **unguarded), mean, std)
    converted, exact = (predict_velocity(expert, x_t, t, None) for expert in (ddpm, flow))
    torch.testing.assert_close(converted, exact, rtol=1e-4, atol=1e-4)


@given(st.floats(0, 1), st.floats(-2, 2), SEEDS)
@settings(deadline=None)
def test_the_guards_keep_converted_velocities_finite(time: float, mean: float, seed: int) -> None:
    data, noise = ends(seed, 2, [1, 2, 2])
    t = torch.full((2,), time, dtype=torch.float64)
    x_t = sample_path(mean + data, noise, t).x_t
    config = ExpertConfig(prediction="epsilon", x0_clamp=3.0)
    # An expert that is wrong by a constant, which the division by 1 - t would blow up.
    wrong = GaussianExpert(config, mean + 5, 1.0)
    velocity = predict_velocity(wrong, x_t, t, None)
    assert velocity.isfinite().all()
    bound = 3.0 + (x_t.abs() + 7).max()
    assert velocity.abs().max() <= bound


def test_epsilon_experts_are_trained_uniformly_in_their_own_time() -> None:
    config = TrainingConfig(t_distribution="uniform", t_one_share=0.0)
    t = sample_times(20_000, config, torch_generator(0, "t"), ExpertConfig(prediction="epsilon"))
    s = torch.atan2(t, 1 - t) * 2 / math.pi
    histogram = torch.histc(s, bins=10, min=0, max=1) / len(s)
    torch.testing.assert_close(histogram, torch.full((10,), 0.1), rtol=0.1, atol=0)
