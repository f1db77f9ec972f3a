"""Techniques beside the plain recipe, one a file; the configuration names those that are on.

`muon` decides which optimiser parameters have, the others are a `Technique` each.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from paris_ray.config import ExpertConfig, TrainingConfig, aligned_block, synced_blocks
from paris_ray.diffusion import ask, sample_path
from paris_ray.models import Expert, TextConditioning
from paris_ray.seeding import build_seeded, derive_seed
from paris_ray.training.data import Batch
from paris_ray.training.recipes.alignment import Alignment, new_projector
from paris_ray.training.recipes.contrastive_flow import ContrastiveFlow
from paris_ray.training.recipes.layersync import LayerSync
from paris_ray.training.recipes.min_snr import MinSnr
from paris_ray.training.recipes.shifted_time import ShiftedTime
from paris_ray.training.recipes.technique import Technique


class Recipe:
    """The techniques of one training together; without any, the plain recipe.

    Args:
        techniques: In the order in which they change a batch.

    Attributes:
        heads: What they train and checkpoint beside the expert, which is no part of it.
    """

    def __init__(self, techniques: Sequence[Technique]) -> None:
        self.techniques = tuple(techniques)
        self.heads = nn.ModuleList(t.heads for t in techniques if t.heads is not None)

    def prepare(self, done: float, batch: Batch) -> Batch:
        """Return the batch to learn from, as every `Technique.prepare` changes it."""
        for technique in self.techniques:
            batch = technique.prepare(done, batch)
        return batch

    def loss(self, expert: Expert, batch: Batch, text: TextConditioning) -> Tensor:
        """Return the loss of a prepared batch or a part of one, a scalar."""
        path = sample_path(batch.latents, batch.noise, batch.t)
        with_hidden = any(technique.reads_hidden for technique in self.techniques)
        answer = ask(expert, path, text, with_hidden=with_hidden)
        for technique in self.techniques:
            answer = answer.weighted(technique.weights(path.t))
        terms = [technique.term(answer, batch) for technique in self.techniques]
        return sum((term for term in terms if term is not None), answer.loss())


def recipe_of(
    config: TrainingConfig, expert: ExpertConfig, num_features: int = 0, seed: int = 0
) -> Recipe:
    """Return the techniques that a configuration names, for an expert.

    Args:
        config: Names them.
        expert: The expert's architecture.
        num_features: Width of the image features that batches have; 0: they have none, and so
            nothing is aligned to them.
        seed: Decides the first weights of what is trained beside the expert.
    """
    techniques: list[Technique] = []
    if config.t_shift != 1:
        techniques.append(ShiftedTime(config.t_shift))
    if config.min_snr_gamma is not None:
        techniques.append(MinSnr(config.min_snr_gamma))
    if config.contrastive_weight:
        techniques.append(ContrastiveFlow(config.contrastive_weight))
    if config.layersync_weight:
        blocks = synced_blocks(config, expert.num_layers)
        techniques.append(LayerSync(config.layersync_weight, *blocks))
    if config.alignment_weight and num_features:
        block = aligned_block(config, expert.num_layers)
        width, heads_seed = expert.hidden_size, derive_seed(seed, "projector")
        projector = build_seeded(lambda: new_projector(width, num_features), heads_seed)
        techniques.append(
            Alignment(config.alignment_weight, block, config.alignment_share, projector)
        )
    return Recipe(techniques)
