"""What models say of pictures and captions, as numbers: what `corpus.filters` ask for."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from paris_ray.config import FiltersConfig
from paris_ray.encoders.scores.aesthetic import AestheticHead
from paris_ray.encoders.scores.nsfw import NsfwModel

if TYPE_CHECKING:
    from paris_ray.encoders.images import JointEmbedding


class RowScores:
    """The scores that some filters need, and no other.

    Args:
        filters: Which, and the models.
        device: Where CLIP computes.
        threads: With how many threads others do.

    Raises:
        ConfigError: if a model is absent.
        BundleError: if one is damaged, or does not fit the others.
    """

    def __init__(self, filters: FiltersConfig, device: torch.device, threads: int = 1) -> None:
        wanted = filters.scores
        self.compares = "min_clip_score" in wanted
        self.clip = self.head = self.nsfw = None
        if self.compares or "min_aesthetic_score" in wanted:
            self.clip = _load_clip(filters, device)
        if "min_aesthetic_score" in wanted:
            assert filters.aesthetic_model is not None, "the configuration has been checked"
            self.head = AestheticHead.load(filters.aesthetic_model)
        if "max_nsfw_score" in wanted:
            self.nsfw = NsfwModel(filters.nsfw_model, threads)

    def __call__(
        self, images: NDArray[np.uint8], captions: Sequence[str]
    ) -> dict[str, NDArray[np.float32]]:
        """Return scores `(B,)` by name: `clip_score`, `aesthetic_score`, `nsfw_score`.

        Args:
            images: `(B, S, S, 3)`.
            captions: B, one of each.
        """
        scores = {}
        if self.clip is not None:
            embedded = self.clip.encode_images(images)
            if self.compares:
                texts = self.clip.encode_captions(captions)
                scores["clip_score"] = np.einsum("ij,ij->i", embedded, texts)
            if self.head is not None:
                scores["aesthetic_score"] = self.head(embedded)
        if self.nsfw is not None:
            scores["nsfw_score"] = self.nsfw(images)
        return scores


def _load_clip(filters: FiltersConfig, device: torch.device) -> "JointEmbedding":
    # Imported here: its import takes seconds, and not every filter needs it.
    from paris_ray.encoders.images import JointEmbedding

    assert filters.clip.checkpoint is not None, "the configuration has been checked"
    return JointEmbedding.from_checkpoint(
        filters.clip.model,
        filters.clip.checkpoint,
        field="corpus.filters.clip.checkpoint",
        device=device,
    )
