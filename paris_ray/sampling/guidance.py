"""Classifier-free guidance, with every caption encoded once per image and expert."""

import hashlib
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from paris_ray.diffusion import predict_velocity
from paris_ray.models import EncodedText, Expert, TextConditioning

# Of one expert: keys and values of 100 captions of 77 tokens in XL/2 in float32, so that those of
# the 64 pictures that an engine draws at a time fit.
MAX_CACHE_BYTES = 2 * 2**30


@dataclass(frozen=True, slots=True)
class KeyedText:
    """A conditioning on the CPU, with a digest of each row that names it in a `TextCache`.

    Attributes:
        text: The conditioning.
        keys: One digest a row.
    """

    text: TextConditioning
    keys: tuple[bytes, ...]

    @classmethod
    def of(cls, text: TextConditioning) -> "KeyedText":
        """Return a conditioning with its digests."""
        text = text.to("cpu")
        return cls(text, tuple(_digest(text.rows(slice(i, i + 1))) for i in range(len(text))))

    def rows(self, index: Tensor) -> "KeyedText":
        """Return some of the rows, chosen by an index tensor."""
        index = index.cpu()
        return KeyedText(self.text.rows(index), tuple(self.keys[i] for i in index.tolist()))


def _digest(row: TextConditioning) -> bytes:
    """Return a digest of what an expert reads of a caption."""
    digest = hashlib.sha256(_bytes(row.text_embeddings))
    digest.update(_bytes(row.pooled_text))
    if row.text_mask is not None:
        digest.update(_bytes(row.text_mask))
    return digest.digest()


def _bytes(tensor: Tensor) -> Any:
    return tensor.contiguous().view(torch.uint8).numpy()


class TextCache:
    """What experts have computed of captions; the least recently used is forgotten first.

    An expert's cross-attention keys and values do not change from step to step. Each row is
    encoded alone, so that the batch that it comes in does not change its last bits.

    Args:
        max_bytes: Memory of all rows, on the device of the expert.
    """

    def __init__(self, max_bytes: int = MAX_CACHE_BYTES) -> None:
        self._max_bytes, self._num_bytes = max_bytes, 0
        self._rows: OrderedDict[Hashable, EncodedText] = OrderedDict()
        self._lock = Lock()

    def encode(self, expert: Expert, text: KeyedText, *, owner: Hashable = None) -> EncodedText:
        """Return what `Expert.encode_text` makes of a conditioning.

        Args:
            expert: Computes the rows that are not known.
            text: The conditioning.
            owner: What tells the expert from others, and from itself with an adapter, where
                several share the cache.
        """
        rows = []
        for i, key in enumerate(text.keys):
            name = (owner, key)
            row = self._find(name)
            if row is None:  # two threads may both compute it, and get the same
                row = _encode_row(expert, text.text, i)
                self._remember(name, row)
            rows.append(row)
        return EncodedText.concatenate(rows)

    def _find(self, name: Hashable) -> EncodedText | None:
        with self._lock:
            if name in self._rows:
                self._rows.move_to_end(name)
            return self._rows.get(name)

    def _remember(self, name: Hashable, row: EncodedText) -> None:
        with self._lock:
            if name not in self._rows:
                self._rows[name] = row
                self._num_bytes += _num_bytes(row)
            while self._num_bytes > self._max_bytes:
                _, oldest = self._rows.popitem(last=False)
                self._num_bytes -= _num_bytes(oldest)


def _encode_row(expert: Expert, text: TextConditioning, row: int) -> EncodedText:
    return expert.encode_text(text.rows(slice(row, row + 1)).to(expert.pos_embed.device))


def _num_bytes(row: EncodedText) -> int:
    tensors = [*row.keys_values, *(part for part in (row.mask, row.spatial) if part is not None)]
    return sum(tensor.nbytes for tensor in tensors)


def guided_velocity(
    expert: Expert,
    latents: Tensor,
    t: Tensor,
    text: EncodedText,
    null_text: EncodedText | None,
    guidance_scale: Tensor,
    guided: Tensor,
) -> Tensor:
    """Return the guided velocity `(B, C, H, W)`, with and without the text in one forward pass.

    Latents move to the expert's device, and the answer back to theirs; it has their data type.

    Args:
        expert: The network.
        latents: `(B, C, H, W)` noisy latents.
        t: `(B,)` in [0, 1].
        text: Its encoding of the B captions.
        null_text: Its encoding of the null text of each of the G guided rows, in order; None if
            there are none.
        guidance_scale: `(B,)`.
        guided: `(G,)` the rows that have guidance; the others get the conditional velocity alone.
    """
    home, device = latents.device, expert.pos_embed.device
    latents, t, guided = latents.to(device), t.to(device), guided.to(device)
    if null_text is None:
        return predict_velocity(expert, latents, t, text).to(home)
    both = EncodedText.concatenate([text, null_text])
    every, times = torch.cat([latents, latents[guided]]), torch.cat([t, t[guided]])
    velocity, unconditional = predict_velocity(expert, every, times, both).tensor_split([len(t)])
    scale = guidance_scale.to(device)[guided, None, None, None]
    return velocity.index_copy(0, guided, guide(velocity[guided], unconditional, scale)).to(home)


def guide(conditional: Tensor, unconditional: Tensor, guidance_scale: float | Tensor) -> Tensor:
    """Return unconditional + guidance_scale * (conditional - unconditional), `(B, C, H, W)`.

    Source: classifier-free guidance, Ho and Salimans 2022 (arXiv:2207.12598).
    """
    return unconditional + guidance_scale * (conditional - unconditional)
