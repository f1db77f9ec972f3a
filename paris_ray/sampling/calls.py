"""The questions that sampling asks of the router and the experts, and batches of them."""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from paris_ray.sampling.guidance import KeyedText

ROUTER = -1  # where an expert has its number


@dataclass(frozen=True, kw_only=True, slots=True)
class _PictureCall:
    """What every call has: some pictures at one time.

    Attributes:
        latents: `(b, C, H, W)` noisy latents.
        t: The time, in [0, 1].
        text: Their text.
    """

    latents: Tensor
    t: float
    text: KeyedText

    def row(self, index: int) -> Self:
        """Return the question about one of the pictures."""
        latents = self.latents[index : index + 1]
        return replace(self, latents=latents, text=self.text.rows(torch.tensor([index])))


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterCall(_PictureCall):
    """A question to the router: its logits `(b, K)` for the pictures."""

    @property
    def model(self) -> int:
        """Which model is asked: `ROUTER`."""
        return ROUTER

    @property
    def num_rows(self) -> int:
        """How many samples the model computes."""
        return len(self.latents)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertCall(_PictureCall):
    """A question to one expert: the velocities `(b, C, H, W)` of the pictures.

    Attributes:
        expert: Which expert.
        lora: Name of its adapter, or None.
        null_text: What guidance subtracts, one row; None asks for the conditional velocity alone.
        guidance_scale: By how much; not read without `null_text`.
    """

    expert: int
    lora: str | None
    null_text: KeyedText | None
    guidance_scale: float

    @property
    def model(self) -> int:
        """Which model is asked: the number of the expert."""
        return self.expert

    @property
    def num_rows(self) -> int:
        """How many samples the model computes."""
        return len(self.latents) * (1 if self.null_text is None else 2)


Call = RouterCall | ExpertCall
