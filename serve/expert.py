"""One expert behind a handle: a stateless function from noisy latents to velocities.

Tensors travel as contiguous numpy arrays by value, which Ray sends without copying.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from paris_ray.models import EncodedText, TextConditioning
from paris_ray.sampling.guidance import KeyedText, TextCache, guided_velocity
from serve.source import BundleSource

Floats = NDArray[np.float32]


class TextArrays(NamedTuple):
    """A `KeyedText` on its way between processes: each distinct caption once.

    Attributes:
        text_embeddings: `(d, L, D)` of the d distinct captions, like the next three.
        pooled_text: `(d, D)`.
        text_mask: `(d, L)`, or None.
        keys: Their keys.
        rows: Which of them each row of the batch has.
    """

    text_embeddings: Floats
    pooled_text: Floats
    text_mask: NDArray[np.bool_] | None
    keys: tuple[bytes, ...]
    rows: tuple[int, ...]

    @classmethod
    def pack(cls, keyed: KeyedText) -> "TextArrays":
        """Return the arrays of a conditioning, and its keys."""
        keys = tuple(dict.fromkeys(keyed.keys))
        text = keyed.rows(torch.tensor([keyed.keys.index(key) for key in keys])).text
        mask = None if text.text_mask is None else text.text_mask.numpy()
        embeddings, pooled = to_array(text.text_embeddings), to_array(text.pooled_text)
        return cls(embeddings, pooled, mask, keys, tuple(map(keys.index, keyed.keys)))

    def unpack(self) -> KeyedText:
        """Return the conditioning of the arrays, under the same keys."""
        mask = None if self.text_mask is None else torch.tensor(self.text_mask)
        embeddings, pooled = torch.tensor(self.text_embeddings), torch.tensor(self.pooled_text)
        distinct = KeyedText(TextConditioning(embeddings, pooled, mask), self.keys)
        return distinct.rows(torch.tensor(self.rows))


def to_array(tensor: torch.Tensor) -> Floats:
    """Return a tensor as contiguous float32."""
    array: Floats = tensor.float().contiguous().numpy()
    return array


class ExpertUnavailableError(RuntimeError):
    """An expert is being replaced; the request may be sent again."""


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
        null_text: TextArrays | None,
        guidance_scale: float,
        lora: str | None = None,
    ) -> Floats:
        """Return the guided velocity `(B, C, H, W)`; arguments as in `guided_velocity`.

        Captions are encoded when they come for the first time, and so once per image. `lora` names
        an adapter of this expert.

        Raises:
            ExpertUnavailableError: if it is not known here, while Serve replaces the replicas.
        """
        if lora not in self._experts:
            raise ExpertUnavailableError(f"lora={lora!r} is not known to all replicas yet")
        velocity = guided_velocity(
            self._experts[lora],
            torch.tensor(latents),
            t,
            self._encode(text, lora),
            None if null_text is None else self._encode(null_text, lora),
            guidance_scale,
        )
        return to_array(velocity)

    def check_health(self) -> None:
        """Raise if the device has failed: CUDA errors stick, so the process must be replaced."""
        torch.ones((), device=self._experts[None].pos_embed.device).item()

    def _encode(self, text: TextArrays, lora: str | None) -> EncodedText:
        return self._texts.encode(self._experts[lora], text.unpack(), owner=lora)
