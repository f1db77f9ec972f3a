"""The loss on held-out rows while training: over-fitting is seen while it can be stopped."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from paris_ray.evaluation.denoising import denoising_losses
from paris_ray.folders import Folder
from paris_ray.models import Expert, TextConditioning
from paris_ray.training.data import LatentDataset, load_dataset

NOISE_LEVELS = (0.25, 0.5, 0.75, 1.0)
MAX_ROWS = 64  # of the own clusters, and as many of the others: a few batches, forward alone

Validate = Callable[[Expert], Mapping[str, float]]


def held_out_validation(
    own: Sequence[Folder],
    others: Sequence[Folder],
    encode: Callable[[Tensor], TextConditioning],
    seed: int,
) -> Validate | None:
    """Return the function from an expert to its mean velocity errors on held-out rows.

    `held_out_loss` is of the clusters that it is trained on, `held_out_loss_others` of the others;
    both are over the same rows, noise and levels each time, and comparable between experts.

    Args:
        own: Folders with held-out rows of its clusters.
        others: Folders with those of the others.
        encode: What `training.text.text_reader` returned.
        seed: Decides the noise.

    Returns:
        None if no row is held out.
    """
    groups = {"held_out_loss": own, "held_out_loss_others": others}
    datasets = {name: load_dataset(folders) for name, folders in groups.items() if folders}
    if not datasets:
        return None

    def validate(expert: Expert) -> Mapping[str, float]:
        return {name: _loss(expert, data, encode, seed) for name, data in datasets.items()}

    return validate


@torch.no_grad()
def _loss(
    expert: Expert, data: LatentDataset, encode: Callable[[Tensor], TextConditioning], seed: int
) -> float:
    """Return the mean over at most MAX_ROWS evenly spread rows."""
    count = min(len(data), MAX_ROWS)
    rows = torch.arange(count) * len(data) // count
    text = encode(data.read_text(rows, 0).to(expert.pos_embed.device))
    losses = denoising_losses(expert, data.read_latents(rows), text, NOISE_LEVELS, seed=seed)
    return losses.mean().item()
