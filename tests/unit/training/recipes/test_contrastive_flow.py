"""Contrastive flow matching against the equation of the paper."""

import pytest
import torch

from paris_ray.config import ExpertConfig
from paris_ray.diffusion import Answer, predict_velocity
from paris_ray.models import Expert, TextConditioning
from paris_ray.training.data import Batch
from paris_ray.training.recipes import Recipe
from paris_ray.training.recipes.contrastive_flow import ContrastiveFlow

SHAPE = (5, 3, 2, 2)


def drawn() -> Batch:
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, *SHAPE, generator=generator)
    t = torch.rand(5, generator=generator)
    return Batch(latents, noise, t, torch.randn(5, 4, generator=generator), torch.zeros(5))


@pytest.mark.parametrize("prediction", ["velocity", "preconditioned"])
def test_the_loss_is_the_papers(prediction: str) -> None:
    """|v - (eps - x)|^2 - w |v - (eps' - x')|^2, of which a preconditioned one weighs both by D."""
    torch.manual_seed(0)
    size = {"input_size": 2, "patch_size": 1, "in_channels": 3, "hidden_size": 8}
    expert = Expert(
        ExpertConfig(**size, num_layers=1, num_heads=2, text_embed_dim=4, prediction=prediction)
    )
    torch.nn.init.normal_(expert.final_layer.linear.weight)
    batch, text = drawn(), TextConditioning.from_vectors(drawn().text)
    recipe = Recipe([ContrastiveFlow(0.3)])
    found = recipe.loss(expert, recipe.prepare(0.0, batch), text)
    t = batch.t.view(-1, 1, 1, 1)
    velocity = predict_velocity(expert, (1 - t) * batch.latents + t * batch.noise, batch.t, text)
    own = batch.noise - batch.latents
    other = torch.stack([own[(i - 1) % 5] for i in range(5)])
    weight = (1 - t) ** 2 + t**2 if prediction == "preconditioned" else torch.ones(())
    expected = (weight * ((velocity - own) ** 2 - 0.3 * (velocity - other) ** 2)).mean()
    torch.testing.assert_close(found, expected)


def test_its_minimum_takes_out_what_all_velocities_share() -> None:
    """One velocity for all rows: the minimum is (mean - w mean') / (1 - w) of both targets."""
    targets = torch.randn(6, 1, 1, 1, generator=torch.Generator().manual_seed(0)) + 2
    negatives, weight = targets.roll(2, dims=0) * 0.5, 0.2
    free = torch.zeros(1, 1, 1, 1, requires_grad=True)
    answer = Answer(free.expand(6, 1, 1, 1), targets)
    nothing = torch.zeros(6)
    batch = Batch(targets, targets, nothing, nothing, nothing, negatives)
    term = ContrastiveFlow(weight).term(answer, batch)
    (answer.loss() + term).backward()
    assert free.grad is not None
    minimum = (targets.mean() - weight * negatives.mean()) / (1 - weight)
    torch.testing.assert_close(free.grad.squeeze(), 2 * (1 - weight) * (0 - minimum))


def test_negatives_are_of_other_rows_and_split_with_them() -> None:
    batch = ContrastiveFlow(0.1).prepare(0.0, drawn()._replace(clusters=torch.arange(5)))
    halves = Batch(*(None if p is None else p[:4] for p in batch)).split(2)
    assert halves[1].negatives is not None
    torch.testing.assert_close(halves[1].negatives[0], batch.noise[1] - batch.latents[1])
    assert halves[1].clusters.tolist() == [2, 3]
