"""LayerSync: an early block learns to say what a later one says, without any outside encoder.

Source: Haghighi et al. 2025 (arXiv:2510.12581).
"""

from torch import Tensor
from torch.nn import functional

from paris_ray.diffusion import Answer
from paris_ray.training.data import Batch
from paris_ray.training.recipes.technique import Technique


class LayerSync(Technique):
    """Adds the mean cosine of both blocks' tokens to what is maximised.

    Args:
        weight: Of the cosine.
        early: The block that learns, counted from 1.
        late: The block it learns from, to which no gradient flows.
    """

    reads_hidden = True

    def __init__(self, weight: float, early: int, late: int) -> None:
        self.weight, self.early, self.late = weight, early, late

    def term(self, answer: Answer, batch: Batch) -> Tensor:
        """Return the weighted mean cosine over tokens, negative."""
        early, late = answer.hidden[self.early - 1], answer.hidden[self.late - 1].detach()
        return -self.weight * functional.cosine_similarity(early.float(), late.float(), -1).mean()
