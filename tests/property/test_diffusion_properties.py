"""Properties of the path and of the times."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paris_ray.config import TrainingConfig
from paris_ray.diffusion import sample_path, sample_times, sampling_times
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


@given(st.integers(1, 1000))
def test_sampling_times_fall_from_1_to_0(steps: int) -> None:
    times = sampling_times(steps)
    assert (times[0], times[-1]) == (1, 0)
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
