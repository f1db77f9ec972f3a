"""Training one expert on its shard, alone: nothing here knows that other experts exist.

The seed, from which experts may start, is an expert of all shards.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paris_ray.config import ExpertConfig, TrainingConfig
from paris_ray.devices import resolve_device
from paris_ray.diffusion import denoising_loss, sample_path
from paris_ray.folders import Folder
from paris_ray.models import Expert, TextConditioning
from paris_ray.seeding import build_seeded
from paris_ray.training.data import Batch, LatentDataset, MixedOrder, batches, load_dataset
from paris_ray.training.loop import OnProgress
from paris_ray.training.recipes import recipe_of
from paris_ray.training.schedule import with_steps
from paris_ray.training.text import text_reader
from paris_ray.training.trainer import DrawSamples, train_model
from paris_ray.training.validation import held_out_validation


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertData:
    """What an expert reads.

    Attributes:
        shards: Folders with the latents and text that it is trained on: of one cluster, or of all.
        digests: Digests of everything that it is trained on, by name; a checkpoint made on
            something else is refused.
        shared: Folder with rows of the whole corpus, of which batches have `shared_share`, or None.
        shared_share: Share of every batch.
        held_out: Folders with held-out rows of its clusters; it is measured on them, not trained.
        held_out_others: Those of the other clusters.
    """

    shards: Sequence[Folder]
    digests: Mapping[str, str]
    shared: Folder | None = None
    shared_share: float = 0.0
    held_out: Sequence[Folder] = ()
    held_out_others: Sequence[Folder] = ()

    def load(self, *, with_features: bool) -> LatentDataset:
        """Return all rows, its own clusters' first."""
        shared = () if self.shared is None else (self.shared,)
        return load_dataset([*self.shards, *shared], with_features=with_features)

    def num_own(self, dataset: LatentDataset) -> int:
        """Return how many of these rows are of its own clusters."""
        return int((dataset.clusters < len(self.shards)).sum())

    def order(self, dataset: LatentDataset, batch_size: int, seed: int) -> MixedOrder | None:
        """Return the order in which batches mix both kinds of rows; None: there is one kind."""
        if self.shared is None:
            return None
        own = self.num_own(dataset)
        return MixedOrder(own, len(dataset) - own, batch_size, self.shared_share, seed)

    def inputs(self) -> dict[str, Any]:
        """Return what of it decides the result."""
        shared = {} if self.shared is None else {"shared_share": self.shared_share}
        return {**self.digests, **shared}


@dataclass(frozen=True, kw_only=True, slots=True)
class Lesson:
    """What an expert learns in place of the velocity of the data.

    Attributes:
        prepare: From the share of the training that is done, in [0, 1), and the batch drawn to the
            batch that is learnt from.
        target: From the expert as it is and a batch's noisy latents, times, text and clusters to
            the velocities to learn; no gradient flows through it.
        identity: What tells this lesson from others; a checkpoint made in another one is refused.
    """

    prepare: Callable[[float, Batch], Batch]
    target: Callable[[Expert, Tensor, Tensor, TextConditioning, Tensor], Tensor]
    identity: Mapping[str, Any]


def train_expert(
    expert_config: ExpertConfig,
    config: TrainingConfig,
    *,
    data: ExpertData,
    seed: int,
    output: Folder,
    on_progress: OnProgress,
    text_encoder: Folder | None = None,
    draw_samples: DrawSamples[Expert] | None = None,
    lesson: Lesson | None = None,
) -> None:
    """Train an expert and write its averaged weights, in the released layout.

    Args:
        expert_config: Architecture.
        config: Hyper-parameters.
        data: What it is trained on, and what it is measured on while it is trained.
        seed: Decides the initial weights, the order of data, times and noise.
        output: The expert's own folder; the loop continues from a checkpoint in it.
        on_progress: Called with the progress from time to time.
        text_encoder: Folder with the run's encoders; needed if the shard holds token ids.
        draw_samples: Called every `config.sample_every` steps but the last, with the averaged
            expert in evaluation mode, which is good only during the call, and the steps done.
        lesson: What it learns; None: the velocity of the data, by the recipe of `config`.

    Raises:
        TrainingError: if the shard is empty or the loss stops being finite.
        ConfigError: if the configuration does not fit the shard or what it starts from.
    """
    dataset = data.load(with_features=lesson is None and config.alignment_weight > 0)
    config = with_steps(config, data.num_own(dataset))
    expert = build_seeded(lambda: Expert(expert_config), seed)
    encode = text_reader(dataset, text_encoder, resolve_device(config.device))
    order = data.order(dataset, config.batch_size, seed)
    batch = batches(dataset, config, seed=seed, purpose="batch", expert=expert_config, order=order)
    recipe = recipe_of(config, expert_config, dataset.num_features, seed)

    def draw(step: int) -> Batch:
        return (lesson or recipe).prepare(step / config.steps, batch(step))

    def loss(batch: Batch) -> Tensor:
        text = encode(batch.text)
        if lesson is not None:
            return lesson_loss(expert, batch, text, lesson)
        return recipe.loss(expert, batch, text)

    train_model(
        expert,
        draw,
        loss,
        config,
        heads=recipe.heads,
        inputs={**data.inputs(), **(lesson.identity if lesson else {}), "seed": seed},
        text_length=dataset.text_length,
        output=output,
        on_progress=on_progress,
        draw_samples=draw_samples,
        validate=held_out_validation(data.held_out, data.held_out_others, encode, seed),
    )


def lesson_loss(expert: Expert, batch: Batch, text: TextConditioning, lesson: Lesson) -> Tensor:
    """Return the loss of a batch, a scalar; 0 for an expert that answers what the lesson says.

    Args:
        expert: The network.
        batch: What `lesson.prepare` returned.
        text: Its conditioning.
        lesson: What is learnt.
    """
    path = sample_path(batch.latents, batch.noise, batch.t)
    with torch.no_grad():
        velocity = lesson.target(expert, path.x_t, path.t, text, batch.clusters)
    # torch 2.9 would use casts of the weights that were made here, without gradient, below.
    torch.clear_autocast_cache()
    return denoising_loss(expert, path._replace(velocity=velocity), text)
