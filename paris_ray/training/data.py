"""Training data in a deterministic order: batch i depends on (seed, i) and on nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from paris_ray.artifacts import Folder
from paris_ray.config import TrainingConfig
from paris_ray.diffusion import PathSample, sample_path, sample_times
from paris_ray.embeddings import read_null_text, read_table, tensor_column
from paris_ray.errors import TrainingError
from paris_ray.models import TextConditioning
from paris_ray.seeding import numpy_generator


@dataclass(frozen=True, slots=True)
class LatentDataset:
    """Latents and text of one or more shards.

    Attributes:
        latents: `(N, C, H, W)` float32.
        text_embedding: `(N, V, D)` float32, one of V caption variants is drawn a sample.
        null_text: `(D,)` the encoded empty string.
        clusters: `(N,)` int64, the cluster that each row is of.
    """

    latents: Tensor
    text_embedding: Tensor
    null_text: Tensor
    clusters: Tensor

    def __len__(self) -> int:
        return len(self.latents)

    def draw(
        self,
        index: Tensor,
        config: TrainingConfig,
        generator: torch.Generator,
        device: torch.device,
    ) -> tuple[PathSample, TextConditioning]:
        """Draw times, noise and text for rows `index (B,)` and place them on the path."""
        latents = self.latents[index]
        t = sample_times(len(index), config, generator)
        noise = torch.randn(latents.shape, generator=generator)
        text = self.draw_text(index, config, generator).to(device)
        return sample_path(latents.to(device), noise.to(device), t.to(device)), text

    def draw_text(
        self, index: Tensor, config: TrainingConfig, generator: torch.Generator
    ) -> TextConditioning:
        """Return the text of rows `index (B,)`: a random variant, noised, sometimes dropped."""
        count = len(index)
        num_variants, dim = self.text_embedding.shape[1:]
        variant = torch.randint(num_variants, (count,), generator=generator)
        noise = torch.randn(count, dim, generator=generator)
        keep = torch.rand(count, 1, generator=generator) >= config.text_dropout
        pooled_text = self.text_embedding[index, variant] + config.text_noise * noise
        return TextConditioning.from_pooled(torch.where(keep, pooled_text, self.null_text))


def load_dataset(shards: Sequence[Folder]) -> LatentDataset:
    """Read shards into memory; the position of a shard in the sequence is its cluster.

    Raises:
        TrainingError: if a shard is empty.
    """
    tables = [read_table(shard, ["latents", "text_embedding"]) for shard in shards]
    for shard, table in zip(shards, tables, strict=True):
        if table.num_rows == 0:
            raise TrainingError(f"shard {shard.uri} is empty: there is nothing to train on")
    clusters = np.repeat(np.arange(len(tables)), [table.num_rows for table in tables])
    return LatentDataset(
        latents=_float_tensor([tensor_column(table, "latents") for table in tables]),
        text_embedding=_float_tensor([tensor_column(table, "text_embedding") for table in tables]),
        null_text=torch.from_numpy(read_null_text(shards[0])),
        clusters=torch.from_numpy(clusters),
    )


def _float_tensor(arrays: list[NDArray[np.generic]]) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays).astype(np.float32))


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
