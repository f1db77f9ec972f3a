"""The encoders in Ray Data actors: each adds its columns to a batch of decoded pictures."""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from hashlib import sha256
from itertools import repeat
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from ray.util.metrics import Counter

from paris_ray.artifacts import VerifiedFolder
from paris_ray.config import Config, PoolConfig
from paris_ray.devices import resolve_device
from paris_ray.embeddings import (
    LATENTS,
    LATENTS_FLIPPED,
    TEXT_EMBEDDING,
    TOKEN_IDS,
    read_null_text,
)
from paris_ray.encoders.codec import load_codec
from paris_ray.encoders.folders import MINILM_FILES, TEXT_ENCODER, TOKENIZER, tokenizer_files
from paris_ray.encoders.scores import RowScores
from paris_ray.encoders.text import MiniLM
from paris_ray.encoders.tokenizers import ClipTokenizer
from paris_ray.pipeline.shards import BUSY, Batch, caption_variants, in_the_first
from paris_ray.run import Run
from paris_ray.seeding import torch_generator


class Encoder(ABC):
    """Computes columns of batches.

    Args:
        config: The run.
    """

    step: ClassVar[str]  # what progress and metrics call it

    @abstractmethod
    def __init__(self, config: Config) -> None: ...

    @abstractmethod
    def columns(self, batch: Batch) -> Batch:
        """Return the columns, of as many rows as the batch."""


class Encoders:
    """An actor: adds to batches the columns of some encoders, and how long each computed.

    They compute at the same time, each in a thread, and share a process since torch and what comes
    with it takes seconds to import: as long as a small corpus takes to encode.

    Args:
        config: The run.
        kinds: The encoders.
    """

    def __init__(self, config: Config, kinds: Sequence[type[Encoder]]) -> None:
        self._most_rows = config.corpus.rows_per_shard
        self._encoders = [kind(config) for kind in kinds]
        self._threads = ThreadPoolExecutor(len(kinds))

    def __call__(self, batch: Batch) -> Iterator[Batch]:
        """Yield the batch with the columns, in pieces of a file: who is next need not wait."""
        for first in range(0, len(batch["row"]), self._most_rows):
            rows = slice(first, first + self._most_rows)
            piece = {name: column[rows] for name, column in batch.items()}
            added: Batch = {}
            for columns in self._threads.map(self._timed, self._encoders, repeat(piece)):
                added |= columns
            yield piece | added

    def _timed(self, encoder: Encoder, piece: Batch) -> Batch:
        """Return the columns of an encoder, and one of `shards.BUSY`."""
        began = time.perf_counter()
        columns = encoder.columns(piece)
        seconds = time.perf_counter() - began
        self._busy.inc(seconds, {"step": encoder.step})
        return columns | {f"{BUSY}{encoder.step}": in_the_first(seconds, len(piece["row"]))}

    @cached_property
    def _busy(self) -> Counter:
        told = "seconds that the actors of an encoder computed"
        return Counter("paris_prepare_busy_seconds", told, ("step",))


class RowScorer(Encoder):
    """Adds the scores `(B,)` that `corpus.filters` ask of models, a column each."""

    step = "scores"

    def __init__(self, config: Config) -> None:
        self.filters = config.corpus.filters
        _use_threads_of(self.filters.pool)

    @cached_property
    def scores(self) -> RowScores:
        """The models: one that is missing has its error here, and a dead actor in `__init__`."""
        pool = self.filters.pool
        device = resolve_device("auto" if pool.num_gpus else "cpu")
        return RowScores(self.filters, device, threads=_threads_of(pool))

    def columns(self, batch: Batch) -> Batch:
        """Return the scores; of several captions the first is looked at."""
        captions = [str(caption) for caption in batch["caption"]]
        parts = []
        for start in range(0, len(captions), self.filters.pool.batch_size):
            rows = slice(start, start + self.filters.pool.batch_size)
            parts.append(self.scores(batch["image"][rows], captions[rows]))
        return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}


class TextEmbedder(Encoder):
    """Adds the text of every caption in every template.

    Either `text_embedding (B, V, D)`, with token states `(B, V, 1 + L, D)`; or, for CLIP, whose
    states are too large to keep, `token_ids (B, V, L)`.
    """

    step = "text"

    def __init__(self, config: Config) -> None:
        self.templates = config.corpus.caption_templates
        _use_threads_of(config.text.pool)
        sentences = config.text.kind == "minilm"
        self.column = TEXT_EMBEDDING if sentences else TOKEN_IDS
        self.encode = _SentenceEncoder(config) if sentences else _tokenizer(config)

    def columns(self, batch: Batch) -> Batch:
        """Return the text."""
        encoded = self.encode(caption_variants(batch, self.templates))
        shape = (len(batch["caption"]), -1, *encoded.shape[1:])
        return {self.column: encoded.reshape(shape)}


class _SentenceEncoder:
    """Returns sentence vectors `(N, D)` float16, with token states `(N, 1 + L, D)`."""

    def __init__(self, config: Config) -> None:
        folder = VerifiedFolder(Run(config).encoders / TEXT_ENCODER, None)
        device = resolve_device("auto" if config.text.pool.num_gpus else "cpu")
        self.encoder = MiniLM(folder.local_path(MINILM_FILES)).to(device)
        self.batch_size = config.text.pool.batch_size

    def __call__(self, captions: Sequence[str]) -> NDArray[np.generic]:
        # Captions of like length together: padding is most of the work otherwise.
        order = sorted(range(len(captions)), key=lambda i: len(captions[i]))
        states, width = self.encoder.token_states, self.encoder.embed_dim
        shape = (len(captions), 1 + states, width) if states else (len(captions), width)
        embedded = np.empty(shape, np.float16)
        for start in range(0, len(order), self.batch_size):
            index = order[start : start + self.batch_size]
            text = self.encoder.encode([captions[i] for i in index])
            embedded[index] = text.vectors().cpu().numpy().astype(np.float16)
        return embedded


def _tokenizer(config: Config) -> ClipTokenizer:
    """Return CLIP's tokenizer; the model itself is not needed before training."""
    encoders = Run(config).encoders
    folder = encoders / TOKENIZER
    path = VerifiedFolder(folder, None).local_path(tokenizer_files(folder))
    return ClipTokenizer(path, max_length=len(read_null_text(encoders)))


class FeatureEmbedder(Encoder):
    """Adds `features (B, D)`: unit-length image features."""

    step = "features"

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

    def columns(self, batch: Batch) -> Batch:
        """Return the features."""
        parts = [self.encoder.encode(images) for images in _split(batch["image"], self.batch_size)]
        return {"features": np.concatenate(parts)}


class LatentEmbedder(Encoder):
    """Adds `latents (B, C, H, W)` and, if training mirrors pictures, `latents_flipped`."""

    step = "latents"

    def __init__(self, config: Config) -> None:
        _use_threads_of(config.codec.pool)
        device = resolve_device("auto" if config.codec.pool.num_gpus else "cpu")
        folder = VerifiedFolder(Run(config).codec, None)
        self.codec = load_codec(folder, config.corpus.image_size).to(device)
        self.batch_size = config.codec.pool.batch_size
        self.flip = config.corpus.horizontal_flip
        self.seed = config.seed if config.codec.posterior == "sample" else None

    def columns(self, batch: Batch) -> Batch:
        """Return the latents."""
        images, keys = batch["image"], batch["key"]
        columns = {LATENTS: self._encode(images, keys, "vae sample")}
        if self.flip:
            mirrored = images[:, :, ::-1]
            columns[LATENTS_FLIPPED] = self._encode(mirrored, keys, "vae sample, flipped")
        return columns

    def _encode(
        self, images: NDArray[Any], keys: NDArray[Any], purpose: str
    ) -> NDArray[np.float16]:
        parts = []
        for start in range(0, len(images), self.batch_size):
            rows = slice(start, start + self.batch_size)
            parts.append(self.codec.encode(images[rows], self._generators(keys[rows], purpose)))
        return torch.cat(parts).numpy().astype(np.float16)

    def _generators(self, keys: NDArray[Any], purpose: str) -> list[torch.Generator] | None:
        """Return a generator a row, which depends on its key alone: batches may be cut anyhow."""
        if self.seed is None:
            return None
        return [torch_generator(self.seed, purpose, _hash(str(key))) for key in keys]


def _hash(key: str) -> int:
    return int.from_bytes(sha256(key.encode()).digest()[:8], "big")


def _split(images: NDArray[Any], size: int) -> list[NDArray[Any]]:
    return [images[start : start + size] for start in range(0, len(images), size)]


def _use_threads_of(pool: PoolConfig) -> None:
    torch.set_num_threads(_threads_of(pool))


def _threads_of(pool: PoolConfig) -> int:
    return max(1, int(pool.num_cpus))
