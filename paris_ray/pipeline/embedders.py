"""The encoders as Ray Data actors: each adds one column to a batch of decoded pictures."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from paris_ray.artifacts import VerifiedFolder
from paris_ray.config import Config, PoolConfig
from paris_ray.devices import resolve_device
from paris_ray.encoders.codec import load_codec
from paris_ray.encoders.text import MODEL_FILES, MiniLM
from paris_ray.pipeline.shards import Batch
from paris_ray.run import Run


class TextEmbedder:
    """Adds `text_embedding (B, V, D)`: every caption in every template."""

    def __init__(self, config: Config) -> None:
        self.templates = config.corpus.caption_templates
        self.batch_size = config.text.pool.batch_size
        _use_threads_of(config.text.pool)
        folder = VerifiedFolder(Run(config).encoders / "text_encoder", None)
        self.encoder = MiniLM(folder.local_path(MODEL_FILES))
        self.encoder.model.to(resolve_device("auto" if config.text.pool.num_gpus else "cpu"))

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch with the column."""
        captions = [t.replace("{}", c) for c in batch["caption"] for t in self.templates]
        # Captions of like length together: padding is most of the work otherwise.
        order = sorted(range(len(captions)), key=lambda i: len(captions[i]))
        embedded = np.empty((len(captions), self.encoder.embed_dim), np.float16)
        for start in range(0, len(order), self.batch_size):
            index = order[start : start + self.batch_size]
            text = self.encoder.encode([captions[i] for i in index])
            embedded[index] = text.pooled_text.cpu().numpy().astype(np.float16)
        shape = (len(batch["caption"]), len(self.templates), self.encoder.embed_dim)
        return batch | {"text_embedding": embedded.reshape(shape)}


class FeatureEmbedder:
    """Adds `features (B, D)`: unit-length image features."""

    def __init__(self, config: Config) -> None:
        # Imported here: the other encoders' actors need no open_clip, whose import takes seconds.
        from paris_ray.encoders.images import OPEN_CLIP_FILES, load_features

        _use_threads_of(config.features.pool)
        trained = None
        if config.features.checkpoint is None:
            folder = VerifiedFolder(Run(config).encoders / "features", None)
            trained = folder.local_path(OPEN_CLIP_FILES)
        device = resolve_device("auto" if config.features.pool.num_gpus else "cpu")
        self.encoder = load_features(config.features, trained).to(device)
        self.batch_size = config.features.pool.batch_size

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch with the column."""
        parts = [self.encoder.encode(images) for images in _split(batch["image"], self.batch_size)]
        return batch | {"features": np.concatenate(parts)}


class LatentEmbedder:
    """Adds `latents (B, C, H, W)`."""

    def __init__(self, config: Config) -> None:
        _use_threads_of(config.codec.pool)
        self.codec = load_codec(VerifiedFolder(Run(config).encoders / "codec", None))
        self.batch_size = config.codec.pool.batch_size

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch with the column."""
        parts = [self.codec.encode(images) for images in _split(batch["image"], self.batch_size)]
        return batch | {"latents": torch.cat(parts).numpy().astype(np.float16)}


def _split(images: NDArray[Any], size: int) -> list[NDArray[Any]]:
    return [images[start : start + size] for start in range(0, len(images), size)]


def _use_threads_of(pool: PoolConfig) -> None:
    torch.set_num_threads(max(1, int(pool.num_cpus)))
