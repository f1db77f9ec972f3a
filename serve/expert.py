"""One expert behind a handle: a stateless function from noisy latents to velocities.

Tensors travel as contiguous numpy arrays by value, which Ray sends without copying.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from paris_ray.models import TextConditioning
from paris_ray.sampling.guidance import KeyedText, TextCache, guided_velocity
from serve.source import BundleSource

Floats = NDArray[np.float32]


class TextArrays(NamedTuple):
    """A `KeyedText` on its way between processes."""

    text_embeddings: Floats
    pooled_text: Floats
    text_mask: NDArray[np.bool_] | None
    keys: tuple[bytes, ...]

    @classmethod
    def pack(cls, keyed: KeyedText) -> "TextArrays":
        """Return the arrays of a conditioning, and its keys."""
        text = keyed.text
        mask = None if text.text_mask is None else text.text_mask.numpy()
        embeddings, pooled = to_array(text.text_embeddings), to_array(text.pooled_text)
        return cls(embeddings, pooled, mask, keyed.keys)

    def unpack(self) -> KeyedText:
        """Return the conditioning of the arrays, under the same keys."""
        mask = None if self.text_mask is None else torch.tensor(self.text_mask)
        embeddings, pooled = torch.tensor(self.text_embeddings), torch.tensor(self.pooled_text)
        return KeyedText(TextConditioning(embeddings, pooled, mask), self.keys)


def to_array(tensor: torch.Tensor) -> Floats:
    """Return a tensor as contiguous float32."""
    array: Floats = tensor.float().contiguous().numpy()
    return array


class ExpertServer:
    """A deployment that holds one expert; any replica can answer any call.

    Args:
        source: Where the bundle is; only this expert and its adapters are read.
        index: Which expert.
        threads: Torch threads of this process.
    """

    def __init__(self, source: BundleSource, index: int, *, threads: int) -> None:
        torch.set_num_threads(threads)
        bundle = source.open()
        names = (None, *(name for name, expert in bundle.loras.items() if expert == index))
        self._experts = {name: bundle.expert(index, name) for name in names}
        self._texts = TextCache()

    @torch.inference_mode()
    def velocity(
        self,
        latents: Floats,
        t: float,
        text: TextArrays,
        null_text: TextArrays,
        guidance_scale: float,
        lora: str | None = None,
    ) -> Floats:
        """Return the guided velocity `(B, C, H, W)`; arguments as in `guided_velocity`.

        Captions are encoded when they come for the first time, and so once per image. `lora` names
        an adapter of this expert.
        """
        expert = self._experts[lora]
        velocity = guided_velocity(
            expert,
            torch.tensor(latents),
            t,
            self._texts.encode(expert, text.unpack(), owner=lora),
            self._texts.encode(expert, null_text.unpack(), owner=lora),
            guidance_scale,
        )
        return to_array(velocity)

    def check_health(self) -> None:
        """Raise if the device has failed: CUDA errors stick, so the process must be replaced."""
        torch.ones((), device=self._experts[None].pos_embed.device).item()
