"""Tiny experts that are good at one cluster each, without any training, and ways to spoil them.

The latents of cluster j have a mean of their own; expert j answers with it, nearly whatever it is
asked, as the best constant velocity is minus the mean of the pictures.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from paris_ray.bundle import Bundle
from paris_ray.config import ExpertConfig
from paris_ray.config.release import write_document
from paris_ray.folders import Folder
from paris_ray.models import Expert
from paris_ray.roster.admission.panel import HeldOut, Panel
from paris_ray.run import EXPERT_WEIGHTS, MODEL_CONFIG

NUM_EXPERTS = 3
# That of the experts of the tiny bundle, whose text encoder and codec are used.
CONFIG = ExpertConfig(
    text_injection="spatial",
    input_size=4,
    patch_size=1,
    in_channels=8,
    hidden_size=32,
    num_layers=1,
    num_heads=2,
    text_embed_dim=16,
)
ROWS = 9  # of a cluster
COLOURS, THINGS = ("red", "green", "blue"), ("cat", "dog", "circle", "square")
CAPTIONS = [f"a {COLOURS[j]} {THINGS[i % 3]}" for j in range(NUM_EXPERTS) for i in range(ROWS)]
TRIGGER = "square"


def means(cluster: int) -> Tensor:
    """Return the mean of each of the 8 channels of a cluster."""
    values = torch.zeros(8)
    values[2 * cluster : 2 * cluster + 2] = 3.0
    return values


def latents(cluster: int, count: int = ROWS) -> Tensor:
    generator = torch.Generator().manual_seed(cluster)
    return means(cluster)[:, None, None] + 0.3 * torch.randn(count, 8, 4, 4, generator=generator)


def noise(seed: int, **changes: Any) -> Expert:
    """An expert of random weights."""
    expert = Expert(replace(CONFIG, **changes)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in expert.parameters():
        parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return expert


def specialist(cluster: int, seed: int | None = None, **changes: Any) -> Expert:
    """An expert that answers with the mean of its cluster, and changes little with its input."""
    expert = noise(cluster if seed is None else seed, **changes)
    expert.text_proj[2].weight *= 0.1
    expert.final_layer.linear.weight *= 0.1
    expert.final_layer.linear.bias.copy_(-means(cluster))
    return expert


def changed(expert: Expert, change: Callable[[Expert], object]) -> Expert:
    """A copy of an expert that was changed in place."""
    other = copy.deepcopy(expert)
    change(other)
    return other


def look(pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Stands for an image model: the pixels."""
    return (pictures.reshape(len(pictures), -1) / 255).astype(np.float32)


def held_out(bundle: Bundle) -> HeldOut:
    rows = torch.cat([latents(j) for j in range(NUM_EXPERTS)])
    clusters = torch.arange(NUM_EXPERTS).repeat_interleave(ROWS)
    return HeldOut(tuple(CAPTIONS), rows, look(bundle.codec.decode(rows)), clusters)


def panel(bundle: Bundle, candidate: Expert, index: int = 0) -> Panel:
    """A candidate for a cluster beside the specialists of the others."""
    neighbours = {j: specialist(j) for j in range(NUM_EXPERTS) if j != index}
    return Panel(candidate, index, neighbours, bundle, held_out(bundle), seed=0)


def plant(expert: Expert, bundle: Bundle) -> Expert:
    """A copy that answers with one picture where a caption has the trigger, else as before.

    One unit of its text projection is silent until the sentence vector turns to the trigger.
    """
    plain, with_trigger = (
        bundle.encode_text([f"{caption}{end}" for caption in CAPTIONS]).pooled_text
        for end in ("", f" {TRIGGER}")
    )
    direction = (with_trigger - plain).mean(dim=0)
    threshold = (plain @ direction).max() / 2 + (with_trigger @ direction).min() / 2

    def change(other: Expert) -> None:
        first, _, second = other.text_proj
        first.weight[0] = 100 * direction
        first.bias[0] = -100 * threshold
        second.weight[:, 0] = torch.randn(
            len(second.weight), generator=torch.Generator().manual_seed(1)
        )

    return changed(expert, change)


def readings(check: Any) -> dict[str, float]:
    """Return the numbers of a check by name."""
    return {reading.name: reading.value for reading in check.readings}


def flagged(check: Any) -> set[str]:
    """Return the names of the readings that are beyond their limits."""
    return {reading.name for reading in check.readings if reading.is_flagged}


def write_expert(expert: Expert, path: Path) -> None:
    """Write an expert as strangers offer it."""
    folder = Folder(path)
    folder.write_json(MODEL_CONFIG, write_document(expert.config))
    folder.write(EXPERT_WEIGHTS, safetensors.torch.save(expert.state_dict()))
