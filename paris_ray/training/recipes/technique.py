"""What a technique may change of a training."""

from torch import Tensor, nn

from paris_ray.diffusion import Answer
from paris_ray.training.data import Batch


class Technique:
    """One technique; as it stands here it changes nothing.

    It has no state that a step changes but its `heads`: what a training needs to go on is in the
    checkpoint, and the same batch always has the same loss.

    Attributes:
        heads: Trained and checkpointed beside the expert, and no part of it; None: it has none.
        reads_hidden: Whether its term needs the tokens between blocks.
    """

    heads: nn.Module | None = None
    reads_hidden = False

    def prepare(self, done: float, batch: Batch) -> Batch:
        """Return the batch to learn from.

        It is whole here, where `term` may get a part of it (`accumulation_steps`).

        Args:
            done: Share of the training that is done, in [0, 1).
            batch: As it was drawn.
        """
        return batch

    def weights(self, t: Tensor) -> Tensor | None:
        """Return what the squared errors of rows at times `t (B,)` are multiplied by, or None."""
        return None

    def term(self, answer: Answer, batch: Batch) -> Tensor | None:
        """Return what is added to the loss, a mean over rows, or None."""
        return None
