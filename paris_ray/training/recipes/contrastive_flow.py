"""Contrastive flow matching: velocities are also kept away from those of other rows.

Source: Stoica et al. 2025 (arXiv:2506.05350), equation 4. What it is minimal at has a closed form:
`(E[v | x_t] - w E[v]) / (1 - w)`, so what all rows have in common is taken out of the velocity.
"""

from torch import Tensor

from paris_ray.diffusion import Answer
from paris_ray.training.data import Batch
from paris_ray.training.recipes.technique import Technique


class ContrastiveFlow(Technique):
    """Subtracts the distance to another row's velocity from the loss.

    Args:
        weight: Of that distance, in [0, 1).
    """

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def prepare(self, done: float, batch: Batch) -> Batch:
        """Give every row the velocity of the one before it: rows stand in a random order."""
        return batch._replace(negatives=(batch.noise - batch.latents).roll(1, dims=0))

    def term(self, answer: Answer, batch: Batch) -> Tensor:
        """Return the weighted distance, negative."""
        assert batch.negatives is not None
        return -self.weight * answer.distance_to(batch.negatives)
