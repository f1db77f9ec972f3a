"""LayerSync: the mean cosine of two blocks' tokens, of which only the early one learns."""

import torch

from paris_ray.config import ExpertConfig, TrainingConfig, synced_blocks
from paris_ray.diffusion import Answer, ask, sample_path
from paris_ray.models import Expert, TextConditioning
from paris_ray.training.data import Batch
from paris_ray.training.recipes import recipe_of
from paris_ray.training.recipes.layersync import LayerSync

NOTHING = Batch(*(torch.empty(0) for _ in range(5)))


def test_the_term_is_the_mean_cosine_over_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    early, middle, late = torch.randn(3, 2, 4, 6, generator=generator)
    answer = Answer(early, early, None, (early, middle, late))
    cosines = [
        (a @ b / (a.norm() * b.norm())).item()
        for a, b in zip(early.flatten(0, 1), late.flatten(0, 1), strict=True)
    ]
    found = LayerSync(0.2, 1, 3).term(answer, NOTHING)
    torch.testing.assert_close(found.item(), -0.2 * sum(cosines) / len(cosines))


def test_no_gradient_flows_to_the_later_block() -> None:
    """A sum of blocks is the state here, so only what comes before the early one may learn."""
    config = ExpertConfig(
        input_size=2, patch_size=1, hidden_size=8, num_layers=3, num_heads=2, text_embed_dim=4
    )
    torch.manual_seed(0)
    expert, generator = Expert(config), torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 3, 4, 2, 2, generator=generator)
    path = sample_path(latents, noise, torch.rand(3, generator=generator))
    text = TextConditioning.from_vectors(torch.randn(3, 4, generator=generator))
    answer = ask(expert, path, text, with_hidden=True)
    assert len(answer.hidden) == 3
    LayerSync(1.0, 1, 3).term(answer, NOTHING).backward()
    learns = [any(p.grad is not None for p in block.parameters()) for block in expert.layers]
    assert learns == [True, False, False]


def test_hidden_tokens_are_kept_for_those_who_ask_alone() -> None:
    config = ExpertConfig(num_layers=4)
    plain, synced = TrainingConfig(), TrainingConfig(layersync_weight=0.2)
    assert not any(t.reads_hidden for t in recipe_of(plain, config).techniques)
    assert [t.reads_hidden for t in recipe_of(synced, config).techniques] == [True]


def test_blocks_are_a_third_and_two_thirds_unless_named() -> None:
    off = TrainingConfig()
    assert [synced_blocks(off, depth) for depth in (2, 3, 4, 12, 24)] == [
        (1, 2),
        (1, 2),
        (1, 3),
        (4, 8),
        (8, 16),
    ]
    assert synced_blocks(TrainingConfig(layersync_blocks=[2, 4]), 12) == (2, 4)
