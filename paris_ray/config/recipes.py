"""Techniques that a training may use beside the plain recipe: all are off by default."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal

from paris_ray.config.models import OFF_IN_MODELS, ExpertConfig

Refusal = tuple[str, object, str]
HiddenOptimizer = Literal["adamw", "muon"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RecipeConfig:
    """What a training does otherwise than the plain recipe; docs/training.md has the sources.

    Blocks are counted from 1. Files in configs/recipes/ have values to begin with.
    """

    # Muon for the matrices of the blocks, AdamW for all else; its updates have the size of AdamW's
    hidden_optimizer: HiddenOptimizer = "adamw"
    muon_rate: float = 1.0  # of those matrices, as a multiple of learning_rate
    contrastive_weight: float = 0.0  # of the distance to other rows' velocities; 0: off
    layersync_weight: float = 0.0  # of the likeness of an early block to a later one; 0: off
    # [the one that learns, the one it learns from]; null: those after a third and two thirds
    layersync_blocks: list[int] | None = None
    alignment_weight: float = 0.0  # of the likeness of a block to the picture's features; 0: off
    alignment_block: int | None = None  # whose tokens; null: that after a third
    alignment_share: float = 0.33  # first share of the steps, after which it stops
    t_shift: float = 1.0  # above 1: drawn times are moved towards noise
    min_snr_gamma: float | None = None  # limit of a DDPM expert's weight by time; null: no weight


# A field that is off says nothing of a result: runs of before it was there stay what they are.
OFF = OFF_IN_MODELS | {field.name: field.default for field in fields(RecipeConfig)}

ONLY_FROM_DATA = (
    "contrastive_weight",
    "layersync_weight",
    "alignment_weight",
    "t_shift",
    "min_snr_gamma",
)


def synced_blocks(recipe: RecipeConfig, num_layers: int) -> tuple[int, int]:
    """Return which block learns from which with LayerSync, counted from 1."""
    if recipe.layersync_blocks is not None:
        early, late = recipe.layersync_blocks
        return early, late
    early = _after_a_third(num_layers)
    return early, max(early + 1, round(2 * num_layers / 3))


def aligned_block(recipe: RecipeConfig, num_layers: int) -> int:
    """Return the block that is aligned to features of pictures, counted from 1."""
    return recipe.alignment_block or _after_a_third(num_layers)


def _after_a_third(num_layers: int) -> int:
    return max(1, round(num_layers / 3))


def refused_recipe(recipe: RecipeConfig, expert: ExpertConfig | None) -> Iterator[Refusal]:
    """Yield name, value and what is allowed of every field that is not.

    Args:
        recipe: The fields.
        expert: What is trained on the velocity of data with it; None: something else, which only
            the optimiser makes no difference to.
    """
    if not 0 < recipe.muon_rate < math.inf:
        yield "muon_rate", recipe.muon_rate, "> 0"
    if not 0 <= recipe.contrastive_weight < 1:
        yield "contrastive_weight", recipe.contrastive_weight, "0 <= x < 1"
    for name in ("layersync_weight", "alignment_weight"):
        if not 0 <= getattr(recipe, name) < math.inf:
            yield name, getattr(recipe, name), "at least 0"
    if not 0 < recipe.alignment_share <= 1:
        yield "alignment_share", recipe.alignment_share, "0 < x <= 1"
    if not 0 < recipe.t_shift < math.inf:
        yield "t_shift", recipe.t_shift, "> 0; 1: not moved"
    gamma = recipe.min_snr_gamma
    if gamma is not None and not 0 < gamma < math.inf:
        yield "min_snr_gamma", gamma, "> 0, or null"
    yield from _refused_elsewhere(recipe) if expert is None else _refused_of(recipe, expert)


def _refused_elsewhere(recipe: RecipeConfig) -> Iterator[Refusal]:
    for name in ONLY_FROM_DATA:
        value, off = getattr(recipe, name), OFF[name]
        if value != off:
            said = "null" if off is None else f"{off:g}"
            yield name, value, f"{said} here: only experts that learn from data have it"


def _refused_of(recipe: RecipeConfig, expert: ExpertConfig) -> Iterator[Refusal]:
    ddpm, weight = expert.prediction == "epsilon", recipe.contrastive_weight
    if weight and ddpm:
        yield "contrastive_weight", weight, "0 for expert.prediction=epsilon, which has no velocity"
    if recipe.min_snr_gamma is not None and not ddpm:
        allowed = f"null for expert.prediction={expert.prediction}: it weighs the loss of epsilon"
        yield "min_snr_gamma", recipe.min_snr_gamma, allowed
    block = recipe.alignment_block
    if block is not None and not 1 <= block <= expert.num_layers:
        yield "alignment_block", block, f"1 to expert.num_layers={expert.num_layers}, or null"
    if recipe.layersync_weight:
        yield from _refused_blocks(recipe, expert.num_layers)


def _refused_blocks(recipe: RecipeConfig, num_layers: int) -> Iterator[Refusal]:
    given = recipe.layersync_blocks
    pair = given is None or len(given) == 2
    early, late = synced_blocks(recipe, num_layers) if pair else (0, 0)
    if not 1 <= early < late <= num_layers:
        allowed = f"two of expert.num_layers={num_layers} blocks from 1, the earlier one first"
        yield "layersync_blocks", given, allowed
