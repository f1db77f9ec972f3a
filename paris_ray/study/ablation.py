"""What recipes are worth: one model with each, beside the plain recipe, on the same samples.

A recipe is compared by when it comes to the quality that its control has at the end: in samples,
and in CPU-seconds, since some recipes make a step dearer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

from paris_ray.config import Config, recipe_overrides, with_overrides
from paris_ray.study.arms import Arm, ArmMaker
from paris_ray.study.numbers import (
    Reached,
    Spread,
    accuracy,
    curves,
    mean_curve,
    pixel_error,
    samples_until,
    spread,
)
from paris_ray.study.plan import study_config

BASE, EPSILON = "base", "epsilon"
# What the plain recipe has, whatever the configuration took over since: gains are told against it.
PLAIN = tuple(
    f"{training}.{field}"
    for training in ("seed_training", "training")
    for field in ("hidden_optimizer=adamw", "muon_rate=1.0")
)
# A recipe that changes what is predicted is compared with nothing but that.
CONTROLS = {BASE: (), EPSILON: ("expert.prediction=epsilon",)}
NEEDS_EPSILON = "min_snr"
SAMPLES, CPU_SECONDS = "samples", "cpu_seconds"


@dataclass(frozen=True, kw_only=True, slots=True)
class AblationForm:
    """How large an ablation is.

    Attributes:
        total_steps: Optimiser steps of the longest trainings.
        seeds: Runs of every arm.
        totals: Multiples of `total_steps` that the curves have.
        num_experts: One model, that is trained on everything.
    """

    total_steps: int = 2048
    seeds: int = 3
    # The second is just beyond the goal of 1.5 times fewer samples.
    totals: tuple[Fraction, ...] = (Fraction(1, 2), Fraction(5, 8), Fraction(1))
    num_experts: int = 1


def ablation_config(config: Config) -> Config:
    """Return what all arms of an ablation have in common: the plain recipe, with AdamW.

    Raises:
        ConfigError: as `study_config` does.
    """
    num_cpus = config.training.num_cpus  # a share of one, where trainings are to run side by side
    trainings = ("seed_training", "training", "router_training")
    own = [f"{training}.num_cpus={num_cpus}" for training in trainings]
    return with_overrides(study_config(config), [*own, *PLAIN])


def control_of(recipe: str) -> str:
    """Return what a recipe is compared with."""
    return EPSILON if NEEDS_EPSILON in recipe.split("+") else BASE


def ablation_arms(config: Config, form: AblationForm, recipes: Sequence[str]) -> list[Arm]:
    """Return the arms of an ablation, the controls first.

    Args:
        config: What `ablation_config` returned.
        form: How large it is.
        recipes: Names of packaged ones, several joined by `+`.

    Raises:
        ConfigError: if there is no such recipe, or steps cannot be divided.
    """
    controls = {control_of(recipe) for recipe in recipes} | {BASE}
    changes: dict[str, Sequence[str]] = {n: o for n, o in CONTROLS.items() if n in controls}
    changes |= {recipe: recipe_overrides(recipe) for recipe in recipes}
    maker = ArmMaker(config, form)
    return [
        arm
        for recipe, overrides in changes.items()
        for total in form.totals
        for arm in maker.arms(recipe, [SAMPLES], total=total, overrides=overrides)
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """A recipe beside its control.

    Attributes:
        recipe: Its name.
        control: What it is compared with.
        seeds: How many runs.
        samples: Of the longest trainings.
        held_out: Share of held-out captions of which everything is right, of these.
        held_out_error: Root of the mean squared error to the captions' pictures, in levels of 255.
        at_equal_cpu: The share after as many CPU-seconds as the control's took, by seed.
        cpu_ms_per_sample: CPU-milliseconds of training.
        reached: When the mean over seeds comes to the control's quality, in samples and in
            CPU-seconds.
        reached_by_seed: When each seed comes to that.
        gain: How many times fewer it takes than the control; None where it never comes there.
    """

    recipe: str
    control: str
    seeds: int
    samples: int
    held_out: Spread
    held_out_error: Spread
    at_equal_cpu: Spread
    cpu_ms_per_sample: Spread
    reached: Mapping[str, Reached]
    reached_by_seed: Mapping[str, Sequence[Reached]]
    gain: Mapping[str, float | None]


def compare(arms: Sequence[Mapping[str, Any]]) -> list[Compared]:
    """Return every recipe of an ablation beside its control, in the order of the arms.

    Args:
        arms: Their numbers, as `study.numbers.arm_numbers` has them, with `cpu_seconds`.
    """
    recipes = dict.fromkeys(arm["recipe"] for arm in arms)
    by_axis = {axis: curves(arms, axis) for axis in (SAMPLES, CPU_SECONDS)}
    return [_compared(recipe, arms, by_axis) for recipe in recipes]


Curves = Mapping[str, Mapping[int, Sequence[tuple[float, float]]]]


def _compared(
    recipe: str, arms: Sequence[Mapping[str, Any]], by_axis: Mapping[str, Curves]
) -> Compared:
    control = recipe if recipe in CONTROLS else control_of(recipe)
    longest = _longest(arms, recipe)
    drawn = [arm["drawn"][arm["routing"]] for arm in longest]
    ends = {axis: mean_curve(found[control])[-1] for axis, found in by_axis.items()}
    reached, by_seed, gain = {}, {}, {}
    for axis, found in by_axis.items():
        most, quality = ends[axis]
        reached[axis] = samples_until(mean_curve(found[recipe]), quality)
        by_seed[axis] = [samples_until(points, quality) for points in found[recipe].values()]
        needed = reached[axis].samples
        gain[axis] = None if needed is None else most / needed
    budget, _ = ends[CPU_SECONDS]
    return Compared(
        recipe=recipe,
        control=control,
        seeds=len(longest),
        samples=longest[0]["samples"],
        held_out=spread([accuracy(each, "held_out") for each in drawn]),
        held_out_error=spread([pixel_error(each, "held_out") for each in drawn]),
        at_equal_cpu=spread(
            [value_at(points, budget) for points in by_axis[CPU_SECONDS][recipe].values()]
        ),
        cpu_ms_per_sample=spread([1000 * arm["cpu_seconds"] / arm["samples"] for arm in longest]),
        reached=reached,
        reached_by_seed=by_seed,
        gain=gain,
    )


def _longest(arms: Sequence[Mapping[str, Any]], recipe: str) -> list[Mapping[str, Any]]:
    """Return the longest training of a recipe, of each seed."""
    own = [arm for arm in arms if arm["recipe"] == recipe]
    most = max(arm["samples"] for arm in own)
    return [arm for arm in own if arm["samples"] == most]


def value_at(points: Sequence[tuple[float, float]], place: float) -> float:
    """Return the value of a curve at a place, on straight lines; beyond its ends, their value."""
    ordered = sorted(points)
    if place <= ordered[0][0]:
        return ordered[0][1]
    for (x, value), (x_next, value_next) in pairwise(ordered):
        if place <= x_next:
            return value + (place - x) / (x_next - x) * (value_next - value)
    return ordered[-1][1]


def best(compared: Sequence[Compared]) -> Compared:
    """Return the recipe that is furthest ahead of its control in samples, or else nearest to it."""
    others = [each for each in compared if each.recipe not in CONTROLS]
    return max(others, key=lambda each: (each.gain[SAMPLES] or 0.0, each.held_out.mean))
