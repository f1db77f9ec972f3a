"""One expert behind a handle: a stateless function from noisy latents to velocities.

Tensors travel as contiguous numpy arrays by value, which Ray sends without copying.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from paris_ray.devices import resolve_device
from paris_ray.models import TextConditioning
from paris_ray.sampling.sampler import guided_velocity
from serve.source import BundleSource

Floats = NDArray[np.float32]


class TextArrays(NamedTuple):
    """A `TextConditioning` on its way between processes."""

    text_embeddings: Floats
    pooled_text: Floats

    @classmethod
    def pack(cls, text: TextConditioning) -> "TextArrays":
        """Return the arrays of a conditioning."""
        return cls(to_array(text.text_embeddings), to_array(text.pooled_text))

    def unpack(self) -> TextConditioning:
        """Return the conditioning of the arrays."""
        return TextConditioning(torch.tensor(self.text_embeddings), torch.tensor(self.pooled_text))


def to_array(tensor: torch.Tensor) -> Floats:
    """Return a tensor as contiguous float32."""
    array: Floats = tensor.float().contiguous().numpy()
    return array


class ExpertServer:
    """A deployment that holds one expert; any replica can answer any call.

    Args:
        source: Where the bundle is; only this expert's folder is read.
        index: Which expert.
        threads: Torch threads of this process.
    """

    def __init__(self, source: BundleSource, index: int, *, threads: int) -> None:
        torch.set_num_threads(threads)
        self._expert = source.open().expert(index).to(resolve_device("auto"))

    @torch.inference_mode()
    def velocity(
        self,
        latents: Floats,
        t: float,
        text: TextArrays,
        null_text: TextArrays,
        guidance_scale: float,
    ) -> Floats:
        """Return the guided velocity `(B, C, H, W)`; arguments as in `guided_velocity`."""
        velocity = guided_velocity(
            self._expert,
            torch.tensor(latents),
            t,
            text.unpack(),
            null_text.unpack(),
            guidance_scale,
        )
        return to_array(velocity)

    def check_health(self) -> None:
        """Raise if the device has failed: CUDA errors stick, so the process must be replaced."""
        torch.ones((), device=self._expert.pos_embed.device).item()
