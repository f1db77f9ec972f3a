"""Min-SNR: weights of a DDPM expert's loss that keep low noise from outweighing all else.

Source: Hang et al. 2023 (arXiv:2303.09556), section 3.4: `min(SNR, gamma)` of the error in clean
data, which is `min(SNR, gamma) / SNR` of the error in noise.
"""

from torch import Tensor

from paris_ray.diffusion import signal_to_noise
from paris_ray.training.recipes.technique import Technique


class MinSnr(Technique):
    """Weighs the squared error of noise by time.

    Args:
        gamma: The limit.
    """

    def __init__(self, gamma: float) -> None:
        self.gamma = gamma

    def weights(self, t: Tensor) -> Tensor:
        """Return `min(1, gamma / SNR)`, which is 1 at pure noise, where the ratio is 0."""
        return (self.gamma / signal_to_noise(t)).clamp(max=1)
