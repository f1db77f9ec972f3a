"""Alignment: early in training a block learns to say what an image model says of the picture.

What embeddings hold of the image model is one vector a picture, not one a patch: so tokens are
projected by a convolution, as in iREPA, and averaged, and where iREPA takes the mean over patches
out of the target, here that over the rows of a batch is taken out.

Source: REPA, Yu et al. 2024 (arXiv:2410.06940); iREPA, Singh et al. 2025 (arXiv:2512.10794); that
it is to stop early, HASTE, Wang et al. 2025 (arXiv:2505.16792).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from paris_ray.diffusion import Answer
from paris_ray.training.data import Batch
from paris_ray.training.recipes.technique import Technique


class Alignment(Technique):
    """Adds the cosine of projected tokens and features to what is maximised, until it stops.

    Args:
        weight: Of the cosine.
        block: Whose tokens, counted from 1.
        share: First share of the steps.
        projector: From tokens as `(B, d, H, W)` to features `(B, F, H, W)`.
    """

    reads_hidden = True

    def __init__(self, weight: float, block: int, share: float, projector: nn.Conv2d) -> None:
        self.weight, self.block, self.share = weight, block, share
        self.heads = self.projector = projector

    def prepare(self, done: float, batch: Batch) -> Batch:
        """Centre the features, which are gone once it has stopped."""
        if batch.features is None or done >= self.share:
            return batch._replace(features=None)
        return batch._replace(features=batch.features - batch.features.mean(dim=0))

    def term(self, answer: Answer, batch: Batch) -> Tensor | None:
        """Return the weighted mean cosine, negative; None once it has stopped."""
        if batch.features is None:
            return None
        tokens = answer.hidden[self.block - 1].mT  # (B, d, N)
        grid = round(tokens.shape[2] ** 0.5)
        found = self.projector(tokens.unflatten(2, (grid, grid))).mean(dim=(2, 3))
        cosine = functional.cosine_similarity(found.float(), batch.features, dim=-1)
        return -self.weight * cosine.mean()


def new_projector(hidden_size: int, num_features: int) -> nn.Conv2d:
    """Return a projector of tokens to features, with weights of torch's own choice."""
    return nn.Conv2d(hidden_size, num_features, kernel_size=3, padding=1)


def projector_parameters(hidden_size: int, num_features: int) -> int:
    """Return the number of parameters of such a projector; nothing is allocated."""
    if not num_features:
        return 0
    with torch.device("meta"):
        return sum(p.numel() for p in new_projector(hidden_size, num_features).parameters())
