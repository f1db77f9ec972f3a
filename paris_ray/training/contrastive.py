"""Contrastive training of a small open_clip model on the corpus itself.

Only for corpora without a published image encoder at hand: `features.checkpoint` replaces it.
Source: CLIP (arXiv 2103.00020).
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from paris_ray.config import FeaturesConfig
from paris_ray.encoders.images import preprocess, register_packaged_models, save_open_clip
from paris_ray.errors import ConfigError
from paris_ray.folders import Folder
from paris_ray.seeding import build_seeded, torch_generator
from paris_ray.training.data import BatchOrder
from paris_ray.training.loop import OnProgress, ProgressClock

MAX_ROTATION = 0.2  # radians
MAX_SCALE = 0.15  # share
MAX_SHIFT = 0.2  # share of half the picture
PIXEL_NOISE = 0.1  # standard deviation, in units of CLIP's normalised pixels
WARMUP_STEPS = 20


def train_open_clip(
    config: FeaturesConfig,
    images: NDArray[np.uint8],
    captions: Sequence[str],
    *,
    seed: int,
    output: Folder,
    on_progress: OnProgress,
) -> float:
    """Train `config.model` on pictures `(N, S, S, 3)` and captions; return the last loss.

    Raises:
        ConfigError: if open_clip does not know the architecture.
    """
    torch.set_num_threads(config.threads)
    register_packaged_models()
    if config.model not in open_clip.list_models():
        raise ConfigError(f"features.model={config.model!r} is not an open_clip architecture")
    model: Any = build_seeded(
        lambda: open_clip.create_model(config.model, load_weights=False), seed
    ).train()
    tokens = open_clip.get_tokenizer(config.model)(list(captions))
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, fused=True)
    order = BatchOrder(len(images), config.batch_size, seed)
    clock = ProgressClock(config.steps, config.batch_size, on_progress)
    for step in range(config.steps):
        index = order.batch(step)
        size = model.visual.image_size[0]
        pixels = augment(
            preprocess(images[index.numpy()], size), torch_generator(seed, "augment", step)
        )
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * _schedule(step, config.steps)
        loss = contrastive_loss(model, pixels, tokens[index])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        clock.tick(step + 1, loss)
    save_open_clip(model, config.model, output)
    return loss.item()


def _schedule(step: int, steps: int) -> float:
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    return warmup * (0.5 + 0.5 * math.cos(math.pi * step / steps))


def contrastive_loss(model: Any, pixels: Tensor, tokens: Tensor) -> Tensor:
    """Return CLIP's symmetric cross-entropy over the batch, a scalar."""
    image_features, text_features, logit_scale = model(pixels, tokens)
    logits = logit_scale * image_features @ text_features.T
    labels = torch.arange(len(logits))
    both = functional.cross_entropy(logits, labels) + functional.cross_entropy(logits.T, labels)
    return both / 2


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate, scale, shift and noise each picture of `(B, 3, S, S)` by small random amounts."""
    count = len(pixels)
    random = 2 * torch.rand(4, count, generator=generator) - 1
    angle, scale = MAX_ROTATION * random[0], 1 + MAX_SCALE * random[1]
    shift = MAX_SHIFT * random[2:]
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    rows = [torch.stack([cosine, -sine, shift[0]], -1), torch.stack([sine, cosine, shift[1]], -1)]
    grid = functional.affine_grid(torch.stack(rows, 1), list(pixels.shape), align_corners=False)
    moved = functional.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    return moved + PIXEL_NOISE * torch.randn(moved.shape, generator=generator)
