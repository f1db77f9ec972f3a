"""What a text encoder hands to experts and router."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TextConditioning:
    """A batch of encoded captions.

    Attributes:
        text_embeddings: `(B, L, D)` token states, for cross-attention.
        pooled_text: `(B, D)` one vector a caption, for the router.
        text_mask: `(B, L)` boolean, False at padding; None where there is none.
    """

    text_embeddings: Tensor
    pooled_text: Tensor
    text_mask: Tensor | None = None

    @classmethod
    def from_pooled(cls, pooled_text: Tensor) -> "TextConditioning":
        """Return the conditioning of an encoder with one vector a caption, `(B, D)`."""
        return cls(pooled_text[:, None], pooled_text)

    @classmethod
    def from_vectors(cls, vectors: Tensor) -> "TextConditioning":
        """Return the conditioning of what `vectors` returned, or of sentence vectors `(B, D)`."""
        if vectors.dim() == 2:
            return cls.from_pooled(vectors)
        states = vectors[:, 1:]
        return cls(states, vectors[:, 0], (states != 0).any(dim=-1))

    def vectors(self) -> Tensor:
        """Return the text as one tensor, to be stored: `(B, D)` of one vector a caption.

        With token states it is `(B, 1 + L, D)`, the pooled text first, and zero at padding.
        """
        if self.text_mask is None:
            return self.pooled_text
        states = self.text_embeddings * self.text_mask[..., None]
        return torch.cat([self.pooled_text[:, None], states], dim=1)

    def __len__(self) -> int:
        return self.pooled_text.shape[0]

    def rows(self, index: Tensor | slice) -> "TextConditioning":
        """Return some of the captions, chosen by an index tensor or a slice."""
        mask = None if self.text_mask is None else self.text_mask[index]
        return TextConditioning(self.text_embeddings[index], self.pooled_text[index], mask)

    def to(self, device: torch.device | str) -> "TextConditioning":
        """Return the conditioning on a device."""
        mask = None if self.text_mask is None else self.text_mask.to(device)
        return TextConditioning(self.text_embeddings.to(device), self.pooled_text.to(device), mask)

    @staticmethod
    def concatenate(parts: "list[TextConditioning]") -> "TextConditioning":
        """Join batches of one text encoder along the first axis."""
        masks = [part.text_mask for part in parts if part.text_mask is not None]
        if len(masks) not in (0, len(parts)):
            raise ValueError(f"{len(masks)} of {len(parts)} parts have a mask: all or none must")
        return TextConditioning(
            torch.cat([part.text_embeddings for part in parts]),
            torch.cat([part.pooled_text for part in parts]),
            torch.cat(masks) if masks else None,
        )
