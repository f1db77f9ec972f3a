"""Shifted times: training sees more of the noisy end of the path.

Source: Esser et al. 2024 (arXiv:2403.03206), section 5.3.2, where it is the sampler's times that
are shifted with the size of pictures.
"""

from paris_ray.diffusion import shift_times
from paris_ray.training.data import Batch
from paris_ray.training.recipes.technique import Technique


class ShiftedTime(Technique):
    """Moves drawn times, whatever distribution they are from; those at 1 stay there.

    Args:
        shift: By its square the ratio of signal to noise falls.
    """

    def __init__(self, shift: float) -> None:
        self.shift = shift

    def prepare(self, done: float, batch: Batch) -> Batch:
        """Shift the batch's times."""
        return batch._replace(t=shift_times(batch.t, self.shift))
