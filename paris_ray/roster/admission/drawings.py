"""What the candidate draws alone for held-out captions of its own cluster."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from paris_ray.bundle import Bundle
from paris_ray.models import Expert
from paris_ray.roster.admission.limits import Limits
from paris_ray.roster.admission.panel import Panel
from paris_ray.roster.admission.readings import Check
from paris_ray.sampling.generation import sample_one_expert
from paris_ray.seeding import derive_seed

NAME = "drawings"
NUM_CAPTIONS, NUM_SEEDS = 12, 2
LEAST_CONTRAST = 1.0  # standard deviation over a picture's pixels, of 255 levels
BATCH_SIZE = 32

Pictures = NDArray[np.uint8]
Look = Callable[[Pictures], NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Drawings:
    """Pictures, or none where latents were not finite.

    Attributes:
        pictures: `(N, S, S, 3)`, without those that could not be decoded.
        not_finite: How many these are.
    """

    pictures: Pictures
    not_finite: int


def check_drawings(panel: Panel, look: Look, limits: Limits) -> tuple[Check, Pictures]:
    """Compare drawn pictures with the captions' own ones, and one seed with another.

    Args:
        panel: The candidate and its neighbours.
        look: The run's image model: pictures `(N, S, S, 3)` to features `(N, D)`.
        limits: What is allowed.

    Returns:
        The check, and the candidate's pictures, for people.
    """
    own = panel.held_out.of(panel.index)
    count = min(NUM_CAPTIONS, len(own))
    rows = own[torch.arange(count) * len(own) // count]
    captions = [panel.held_out.captions[i] for i in rows.tolist()] * NUM_SEEDS
    drawn = draw(panel.bundle, panel.candidate, captions, panel.seed)
    pictures = drawn.pictures
    readings = [
        limits.reading("not_finite", "drawings that are not finite", drawn.not_finite),
        limits.reading("plain", "pictures of one colour", one_coloured(pictures)),
    ]
    note = f"{len(captions)} pictures of {count} captions"
    if drawn.not_finite:
        return Check(NAME, tuple(readings), note), pictures
    real = np.concatenate([panel.held_out.features[rows.numpy()]] * NUM_SEEDS)
    beside = [
        draw(panel.bundle, expert, captions, panel.seed) for expert in panel.neighbours.values()
    ]
    others = [each.pictures for each in beside if not each.not_finite]
    note += f", beside {len(others)} of {len(beside)} neighbours: those with finite drawings"
    if not others:
        return Check(NAME, tuple(readings), note), pictures
    distances = [_distance(look(p), real) for p in (pictures, *others)]
    varieties = [_variety(p) for p in (pictures, *others)]
    usual = float(np.median(varieties[1:]))
    measure = "distance to the captions' own pictures, over the best neighbour's"
    readings += [
        limits.reading("faithful", measure, distances[0] / min(distances[1:])),
        limits.reading(
            "variety",
            "difference between two seeds: the middle neighbour's over its own",
            usual / varieties[0] if varieties[0] else math.inf,
        ),
    ]
    return Check(NAME, tuple(readings), note), pictures


def draw(bundle: Bundle, expert: Expert, captions: Sequence[str], seed: int) -> Drawings:
    """Return what one expert draws alone, in the bundle's usual way."""
    options, latents = bundle.facts.sampling, []
    for start in range(0, len(captions), BATCH_SIZE):
        batch = captions[start : start + BATCH_SIZE]
        latents.append(
            sample_one_expert(
                expert,
                bundle.texts.encode(batch, exact=False),
                bundle.null_text,
                seeds=[derive_seed(seed, "admission", start + i) for i in range(len(batch))],
                num_inference_steps=options.num_inference_steps,
                guidance_scale=options.guidance_scale,
                solver=options.solver,
                time_grid=options.time_grid,
            )
        )
    drawn = torch.cat(latents)
    is_finite = drawn.isfinite().flatten(1).all(dim=1)
    size = bundle.facts.picture_size
    pictures = np.empty((0, size, size, 3), np.uint8)
    if is_finite.any():
        pictures = bundle.codec.decode(drawn[is_finite])
    return Drawings(pictures, int((~is_finite).sum()))


def one_coloured(pictures: Pictures) -> int:
    """Return how many of the pictures `(N, S, S, 3)` hardly differ from pixel to pixel."""
    return int((pictures.std(axis=(1, 2)).max(axis=1, initial=0) < LEAST_CONTRAST).sum())


def _distance(features: NDArray[np.float32], real: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(features - real, axis=1).mean())


def _variety(pictures: Pictures) -> float:
    """Return the mean difference between the pictures of one caption."""
    one, other = np.split(pictures.astype(np.float32), NUM_SEEDS)
    return float(np.sqrt(((one - other) ** 2).mean(axis=(1, 2, 3))).mean())
