"""Velocities at high noise: there the mean over all that could be drawn is all that can be known.

Experts that were trained on clusters of one corpus, with one text encoder, differ little there, and
none is much farther from the mean of the others than they are from each other.
"""

import torch
from torch import Tensor

from paris_ray.diffusion import sample_path
from paris_ray.roster.admission.limits import Limits
from paris_ray.roster.admission.panel import Panel, velocities
from paris_ray.roster.admission.readings import Check
from paris_ray.seeding import torch_generator

NAME = "agreement with the others"
LEVELS = (1.0, 0.9, 0.75)
MAX_ROWS = 96
FEWEST = 2  # neighbours: of one there is no spread


def check_agreement(panel: Panel, limits: Limits) -> Check:
    """Compare the candidate's distance to the mean of the others with that of each of them."""
    if len(panel.neighbours) < FEWEST:
        return Check(NAME, (), f"{len(panel.neighbours)} neighbours, {FEWEST} are needed")
    rows = panel.held_out.spread(MAX_ROWS)
    latents, text = panel.held_out.latents[rows], panel.text.rows(rows)
    generator = torch_generator(panel.seed, "admission agreement")
    noise = torch.randn(latents.shape, generator=generator)
    readings = []
    for t in LEVELS:
        x_t = sample_path(latents, noise, torch.full((len(rows),), t)).x_t
        candidate, *others = (velocities(expert, x_t, t, text) for expert in panel.experts)
        spread = max(_distance(others, i) for i in range(len(others)))
        value = _rms(candidate - torch.stack(others).mean(dim=0)) / spread
        measure = f"distance to the others' mean velocity over the most distant one's, t = {t}"
        readings.append(limits.reading("agreement", measure, value))
    return Check(NAME, tuple(readings), f"{len(rows)} pictures of all clusters")


def _distance(velocities: list[Tensor], i: int) -> float:
    others = velocities[:i] + velocities[i + 1 :]
    return _rms(velocities[i] - torch.stack(others).mean(dim=0))


def _rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()
