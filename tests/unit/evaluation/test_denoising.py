"""Denoising losses of experts, a row a level, and a row a cluster."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paris_ray.diffusion import predict_velocity, sample_path
from paris_ray.errors import EvaluationError
from paris_ray.evaluation.denoising import cluster_losses, denoising_losses
from paris_ray.models import Expert, ExpertConfig, TextConditioning
from paris_ray.seeding import torch_generator

SMALL = {
    "input_size": 4,
    "patch_size": 1,
    "in_channels": 3,
    "hidden_size": 16,
    "num_layers": 1,
    "num_heads": 2,
    "text_embed_dim": 8,
}
TIMES = (0.1, 0.5, 0.9)


def gaussian(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


LATENTS, TEXT = gaussian(1, 7, 3, 4, 4), TextConditioning.from_pooled(gaussian(2, 7, 8))
CLUSTERS = torch.tensor([0, 1, 2, 0, 1, 0, 2])


@pytest.fixture
def expert(randomised: Callable[[nn.Module, int], nn.Module]) -> nn.Module:
    return randomised(Expert(ExpertConfig(**SMALL)), 0)


def row(expert: nn.Module, **change: Any) -> Tensor:
    arguments = {"num_clusters": 3, "seed": 0, "batch_size": 7} | change
    clusters = arguments.pop("clusters", CLUSTERS)
    return cluster_losses(expert, LATENTS, TEXT, clusters, TIMES, **arguments)


def test_losses_are_those_of_one_pair_at_a_time(expert: Expert) -> None:
    losses = denoising_losses(expert, LATENTS, TEXT, TIMES, seed=0)
    noise = torch.randn(21, 3, 4, 4, generator=torch_generator(0, "denoising losses"))
    assert losses.shape == (3, 7)
    for i, t in enumerate(TIMES):
        for j in range(7):
            one = slice(j, j + 1)
            path = sample_path(LATENTS[one], noise[7 * i + j][None], torch.tensor([t]))
            velocity = predict_velocity(expert, path.x_t, path.t, TEXT.rows(one))
            error = ((velocity - path.velocity) ** 2).mean()
            torch.testing.assert_close(losses[i, j], error, rtol=1e-4, atol=1e-5)


def test_a_silent_expert_has_the_mean_square_of_the_velocity() -> None:
    """An untrained velocity expert predicts 0, so its loss is 1 + 1 for unit-variance latents."""
    many, text = gaussian(3, 600, 3, 4, 4), TextConditioning.from_pooled(gaussian(4, 600, 8))
    clusters = torch.arange(600) % 2
    scaled = many * torch.where(clusters == 0, 1.0, 2.0).view(-1, 1, 1, 1)
    losses = cluster_losses(
        Expert(ExpertConfig(**SMALL)),
        scaled,
        text,
        clusters,
        TIMES,
        num_clusters=2,
        seed=0,
        batch_size=200,
    )
    assert losses.tolist() == pytest.approx([1 + 1, 4 + 1], rel=0.03)


def test_a_cluster_has_the_mean_of_its_pictures(expert: Expert) -> None:
    alone = row(expert, clusters=torch.arange(7), num_clusters=7)
    for k, loss in enumerate(row(expert)):
        torch.testing.assert_close(loss, alone[CLUSTERS.eq(k)].mean())


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_batch_size_changes_rounding_only(expert: Expert, batch_size: int) -> None:
    torch.testing.assert_close(
        row(expert, batch_size=batch_size), row(expert), rtol=1e-5, atol=1e-6
    )


def test_the_seed_decides_the_noise_for_all_experts(
    expert: Expert, randomised: Callable[[nn.Module, int], nn.Module]
) -> None:
    assert torch.equal(row(expert), row(expert))
    assert not torch.equal(row(expert), row(expert, seed=1))
    other = randomised(Expert(ExpertConfig(**SMALL)), 1)
    assert not torch.equal(row(expert), row(other))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"clusters": CLUSTERS[:3]},
            "clusters of shape (3,) is not allowed: there are 7 latents",
        ),
        (
            {"num_clusters": 4},
            "clusters [0, 1, 2] are not allowed: each of 0 to 3 needs a picture",
        ),
        (
            {"num_clusters": 2},
            "clusters [0, 1, 2] are not allowed: each of 0 to 1 needs a picture",
        ),
        ({"batch_size": 0}, "batch_size=0 is not allowed: 1 or more"),
    ],
)
def test_what_is_refused(expert: Expert, change: dict[str, Any], message: str) -> None:
    with pytest.raises(EvaluationError, match=f"^{re.escape(message)}$"):
        row(expert, **change)
