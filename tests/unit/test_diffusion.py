"""The path and the preconditioning, against their closed forms."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from paris_ray.diffusion import (
    denoising_loss,
    predict_velocity,
    router_logits,
    sample_path,
    sampling_times,
)
from paris_ray.models import Expert, ExpertConfig, Router, RouterConfig, TextConditioning

SMALL = {
    "input_size": 4,
    "patch_size": 1,
    "in_channels": 3,
    "hidden_size": 16,
    "num_layers": 1,
    "num_heads": 2,
    "text_embed_dim": 8,
}
TIMES = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0])


@pytest.fixture
def expert(randomised: Callable[[nn.Module, int], nn.Module]) -> nn.Module:
    return randomised(Expert(ExpertConfig(prediction="preconditioned", **SMALL)), 0)


def gaussian(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


LATENTS, NOISE = gaussian(1, 5, 3, 4, 4), gaussian(2, 5, 3, 4, 4)
TEXT = TextConditioning.from_pooled(gaussian(3, 5, 8))


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="differ"):
        sample_path(LATENTS, NOISE[:1], TIMES)


def test_velocity_experts_are_fed_thousandths(
    randomised: Callable[[nn.Module, int], nn.Module],
) -> None:
    expert = randomised(Expert(ExpertConfig(**SMALL)), 0)
    expected = expert(LATENTS, 1000 * TIMES, TEXT)
    assert torch.equal(predict_velocity(expert, LATENTS, TIMES, TEXT), expected)
    router = randomised(Router(RouterConfig(num_experts=3, **SMALL)), 0)
    expected = router(LATENTS, 1000 * TIMES, TEXT.pooled_text)
    assert torch.equal(router_logits(router, LATENTS, TIMES, TEXT), expected)


def test_preconditioned_velocity_is_its_closed_form(expert: Expert) -> None:
    velocity = predict_velocity(expert, LATENTS, TIMES, TEXT)
    assert velocity.isfinite().all()
    for i, t in enumerate(TIMES.tolist()):
        variance = (1 - t) ** 2 + t**2
        x_t, text = LATENTS[i : i + 1], TEXT.rows(slice(i, i + 1))
        output = expert(x_t / variance**0.5, torch.tensor([1000 * t]), text)
        expected = (2 * t - 1) / variance * x_t - output / variance**0.5
        torch.testing.assert_close(velocity[i : i + 1], expected, rtol=1e-5, atol=1e-5)


def test_a_preconditioned_expert_is_right_at_both_ends_before_training() -> None:
    """Its output is zero then: v = -x at t = 0 and v = x at t = 1, the best linear guess."""
    expert = Expert(ExpertConfig(prediction="preconditioned", **SMALL))
    velocity = predict_velocity(expert, LATENTS, TIMES, TEXT)
    assert torch.equal(velocity[0], -LATENTS[0])
    assert torch.equal(velocity[-1], LATENTS[-1])


def test_the_network_of_a_preconditioned_expert_learns_a_unit_variance_target(
    expert: Expert,
) -> None:
    """The loss is the mean squared error of the network output F against (t x0 - (1 - t) eps) / s.

    With s^2 = D = (1 - t)^2 + t^2, setting v = (2t - 1) / D x_t - F / s equal to eps - x0 gives
    s F = (2t - 1) x_t - D (eps - x0). The factor of x0 is (2t - 1)(1 - t) + D = t, that of eps is
    (2t - 1) t - D = t - 1. So F has unit variance for unit-variance data at every t, and
    D (v - v')^2 = (F - F')^2.
    """
    path = sample_path(LATENTS, NOISE, TIMES)
    t = TIMES.view(-1, 1, 1, 1)
    scale = ((1 - t) ** 2 + t**2).sqrt()
    target = (t * LATENTS - (1 - t) * NOISE) / scale
    output = expert(path.x_t / scale, 1000 * TIMES, TEXT)
    expected = ((output - target) ** 2).mean()
    torch.testing.assert_close(denoising_loss(expert, path, TEXT), expected, rtol=1e-5, atol=1e-6)
    many_latents, many_noise = gaussian(4, 100_000), gaussian(5, 100_000)
    for time in TIMES.tolist():
        size = ((1 - time) ** 2 + time**2) ** 0.5
        spread = ((time * many_latents - (1 - time) * many_noise) / size).std()
        assert abs(spread - 1) < 0.02


def test_the_loss_of_a_velocity_expert_is_plain_mean_squared_error() -> None:
    path = sample_path(LATENTS, NOISE, TIMES)
    silent = Expert(ExpertConfig(**SMALL))  # predicts zero
    expected = ((NOISE - LATENTS) ** 2).mean()
    torch.testing.assert_close(denoising_loss(silent, path, TEXT), expected)


@pytest.mark.parametrize("steps", [1, 8, 50])
def test_sampling_goes_from_noise_to_data_in_equal_steps(steps: int) -> None:
    times = sampling_times(steps)
    assert (times[0], times[-1], len(times)) == (1, 0, steps + 1)
    torch.testing.assert_close(times.diff(), torch.full((steps,), -1 / steps))


@pytest.mark.parametrize("steps", [1, 2, 8, 50])
def test_the_last_step_may_be_half_as_long(steps: int) -> None:
    sizes = -sampling_times(steps, "half-last").diff()
    torch.testing.assert_close(sizes[:-1], torch.full((steps - 1,), 1 / (steps - 0.5)))
    torch.testing.assert_close(sizes[-1], torch.tensor(0.5 / (steps - 0.5)))
