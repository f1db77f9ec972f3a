"""Training data in a deterministic order: batch i depends on (seed, i) and on nothing else.

Latents and text are read from mapped memory (`paris_ray.training.columns`), never a whole shard at
once. That takes room in the temporary folder: for pictures of 256 pixels 8 KiB a row, twice that
with mirror images, and for CLIP 154 bytes a caption variant.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from paris_ray.config import ExpertConfig, TrainingConfig
from paris_ray.diffusion import sample_times
from paris_ray.embeddings import (
    FEATURES,
    LATENTS,
    LATENTS_FLIPPED,
    TEXT_EMBEDDING,
    TOKEN_IDS,
    column_names,
    num_rows,
    part_names,
    read_null_text,
)
from paris_ray.errors import ConfigError, TrainingError
from paris_ray.folders import Folder
from paris_ray.seeding import derive_seed, numpy_generator, torch_generator
from paris_ray.training.columns import map_column


class Batch(NamedTuple):
    """What one step trains on.

    `latents` and `noise` are `(B, C, H, W)`, `t (B,)` in [0, 1], `clusters (B,)`; `text` is
    `(B, D)` sentence vectors, `(B, 1 + L, D)` with token states, or `(B, L)` token ids. What only
    a recipe reads is None without it: `negatives (B, C, H, W)`, velocities of other rows, and
    `features (B, F)` of the pictures.
    """

    latents: Tensor
    noise: Tensor
    t: Tensor
    text: Tensor
    clusters: Tensor
    negatives: Tensor | None = None
    features: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device; the copy of pinned memory is not waited for."""
        return self._each(lambda part: part.to(device, non_blocking=True))

    def pin(self) -> "Batch":
        """Return the batch in memory that a GPU can copy from while it computes."""
        return self._each(Tensor.pin_memory)

    def split(self, count: int) -> "list[Batch]":
        """Return `count` equal parts of the batch."""
        parts = [[None] * count if part is None else part.chunk(count) for part in self]
        return [Batch._make(each) for each in zip(*parts, strict=True)]

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        return Batch._make(None if part is None else change(part) for part in self)


@dataclass(frozen=True, slots=True)
class LatentDataset:
    """Latents and text of one or more shards, in mapped memory.

    Attributes:
        latents: `(N, C, H, W)`, floats.
        latents_flipped: Those of the mirror images, or None.
        text: `(N, V, D)` sentence vectors, `(N, V, 1 + L, D)` with token states, or `(N, V, L)`
            token ids of V caption variants.
        null_text: `(D,)`, `(1 + L, D)` or `(L,)`, the same of the empty string.
        clusters: `(N,)` int64, the cluster that each row is of.
        features: `(N, F)` of the pictures, or None where nobody asked for them.
    """

    latents: NDArray[np.generic]
    latents_flipped: NDArray[np.generic] | None
    text: NDArray[np.generic]
    null_text: Tensor
    clusters: Tensor
    features: NDArray[np.generic] | None = None

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def has_token_ids(self) -> bool:
        """Whether text is token ids, which a text encoder has yet to read."""
        return not self.null_text.is_floating_point()

    @property
    def text_length(self) -> int:
        """Text tokens a caption, as cross-attention sees them."""
        if self.has_token_ids:
            return len(self.null_text)
        return len(self.null_text) - 1 if self.null_text.dim() == 2 else 1

    @property
    def num_features(self) -> int:
        """Width of the features; 0 where nobody asked for them."""
        return 0 if self.features is None else self.features.shape[1]

    def read_latents(self, index: Tensor) -> Tensor:
        """Return the latents of rows `index (B,)`: `(B, C, H, W)` float32."""
        return torch.from_numpy(self.latents[index.numpy()].astype(np.float32))

    def read_text(self, index: Tensor, variant: Tensor | int) -> Tensor:
        """Return the text of rows `index (B,)` as in a batch: float32, or int32 token ids."""
        text = self.text[index.numpy(), np.asarray(variant)]
        return torch.from_numpy(text.astype(np.int32 if self.has_token_ids else np.float32))

    def draw_batch(
        self,
        index: Tensor,
        config: TrainingConfig,
        generator: torch.Generator,
        expert: ExpertConfig | None = None,
    ) -> Batch:
        """Draw times, noise and text for rows `index (B,)`, and which of them are mirrored.

        Args:
            index: Which rows.
            config: The distributions.
            generator: Source of all randomness.
            expert: Times of an expert that predicts epsilon are drawn as it counts them.
        """
        t = sample_times(len(index), config, generator, expert)
        noise = torch.randn(len(index), *self.latents.shape[1:], generator=generator)
        text = self.draw_text(index, config, generator)
        latents = self.read_latents(index)
        if self.latents_flipped is not None:
            mirrored = torch.rand(len(index), generator=generator) < 0.5
            flipped = self.latents_flipped[index[mirrored].numpy()].astype(np.float32)
            latents[mirrored] = torch.from_numpy(flipped)
        batch = Batch(latents, noise, t, text, self.clusters[index])
        if self.features is None:
            return batch
        features = self.features[index.numpy()].astype(np.float32)
        return batch._replace(features=torch.from_numpy(features))

    def draw_text(
        self, index: Tensor, config: TrainingConfig, generator: torch.Generator
    ) -> Tensor:
        """Return the text of rows `index (B,)`: a random variant, noised, sometimes dropped."""
        count = len(index)
        text = self.read_text(index, self._draw_variants(count, config.caption_weights, generator))
        if config.text_noise:  # but not at padding, which is told by its zeros
            noise = config.text_noise * torch.randn(text.shape, generator=generator)
            text += noise * (text != 0)
        keep = torch.rand(count, generator=generator) >= config.text_dropout
        return torch.where(keep.view(-1, *[1] * (text.dim() - 1)), text, self.null_text)

    def _draw_variants(
        self, count: int, caption_weights: Sequence[float] | None, generator: torch.Generator
    ) -> Tensor:
        num_variants = self.text.shape[1]
        if caption_weights is None:
            return torch.randint(num_variants, (count,), generator=generator)
        weights = torch.tensor(caption_weights)  # each of a caption in all of its templates
        weights = weights.repeat_interleave(num_variants // len(weights))
        return torch.multinomial(weights, count, replacement=True, generator=generator)


def load_dataset(shards: Sequence[Folder], *, with_features: bool = False) -> LatentDataset:
    """Open shards; the position of a shard in the sequence is its cluster.

    Args:
        shards: Their folders.
        with_features: Whether batches have the pictures' features.

    Raises:
        TrainingError: if a shard is empty or unlike the first, has no text, or no features where
            they are wanted, or does not fit into the temporary folder.
        ArtifactError: if a shard has no files.
    """
    columns = column_names(shards[0])
    text = next((name for name in (TEXT_EMBEDDING, TOKEN_IDS) if name in columns), None)
    if text is None:
        raise TrainingError(f"shard {shards[0].uri} has neither {TEXT_EMBEDDING} nor {TOKEN_IDS}")
    if with_features and FEATURES not in columns:
        raise TrainingError(f"shard {shards[0].uri} has no {FEATURES}: alignment_weight needs them")
    counts = [_count_rows(shard) for shard in shards]
    flipped = map_column(shards, LATENTS_FLIPPED) if LATENTS_FLIPPED in columns else None
    return LatentDataset(
        latents=map_column(shards, LATENTS),
        latents_flipped=flipped,
        text=map_column(shards, text),
        null_text=torch.from_numpy(read_null_text(shards[0])),
        clusters=torch.from_numpy(np.repeat(np.arange(len(shards)), counts)),
        features=map_column(shards, FEATURES) if with_features else None,
    )


def _count_rows(shard: Folder) -> int:
    count = sum(num_rows(shard, name) for name in part_names(shard))
    if count == 0:
        raise TrainingError(f"shard {shard.uri} is empty: there is nothing to train on")
    return count


class BatchOrder:
    """Which rows make up each batch: a fresh permutation every epoch, batches crossing epochs.

    Args:
        num_rows: Rows of the dataset.
        batch_size: Rows of a batch.
        seed: Seed of the permutations.
    """

    def __init__(self, num_rows: int, batch_size: int, seed: int) -> None:
        self.num_rows = num_rows
        self.batch_size = batch_size
        self._permutation = lru_cache(maxsize=2)(
            lambda epoch: numpy_generator(seed, "order", epoch).permutation(num_rows)
        )

    def batch(self, step: int) -> Tensor:
        """Return the row numbers `(batch_size,)` of batch `step`."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, offsets = np.divmod(positions, self.num_rows)
        rows = [
            self._permutation(int(epoch))[offsets[epochs == epoch]] for epoch in np.unique(epochs)
        ]
        return torch.from_numpy(np.concatenate(rows))


class MixedOrder:
    """Which rows make up each batch if a share of it is of rows that all experts have.

    Args:
        num_own: The first rows of the dataset are the expert's own.
        num_shared: The rest are shared.
        batch_size: Rows of a batch.
        shared_share: Share of them that is shared, rounded to whole rows, at least one.
        seed: Seed of the permutations.
    """

    def __init__(
        self, num_own: int, num_shared: int, batch_size: int, shared_share: float, seed: int
    ) -> None:
        count = max(1, round(shared_share * batch_size))
        self.num_own, self.seed = num_own, seed
        self.own = BatchOrder(num_own, batch_size - count, seed)
        self.shared = BatchOrder(num_shared, count, derive_seed(seed, "shared"))

    def batch(self, step: int) -> Tensor:
        """Return the row numbers `(batch_size,)` of batch `step`, both kinds shuffled together.

        They must be: what is drawn for a row depends on its place, as pure noise on the first.
        """
        rows = torch.cat([self.own.batch(step), self.num_own + self.shared.batch(step)])
        generator = torch_generator(self.seed, "mixed order", step)
        return rows[torch.randperm(len(rows), generator=generator)]


def batches(
    dataset: LatentDataset,
    config: TrainingConfig,
    *,
    seed: int,
    purpose: str,
    expert: ExpertConfig | None = None,
    order: BatchOrder | MixedOrder | None = None,
) -> Callable[[int], Batch]:
    """Return the function that draws the batch of a step, always the same one for a step.

    Args:
        dataset: The rows.
        config: Size of a batch and distributions.
        seed: Decides the order of rows and, with the purpose, all that is drawn.
        purpose: Keeps the draws of trainings of one seed apart.
        expert: The expert to train; None draws times of the straight path.
        order: Which rows make up each batch; None takes all rows alike.

    Raises:
        ConfigError: if `text_noise` is set for text that is token ids.
    """
    if dataset.has_token_ids and config.text_noise:
        raise ConfigError(f"text_noise={config.text_noise} is not allowed: 0 for token ids")
    rows = order or BatchOrder(len(dataset), config.batch_size, seed)

    def draw(step: int) -> Batch:
        generator = torch_generator(seed, purpose, step)
        return dataset.draw_batch(rows.batch(step), config, generator, expert)

    return draw
