"""From evaluations of arms to what a study says of them: rows of tables, and curves."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from paris_ray.config import Config
from paris_ray.models.flops import step_macs, text_length, training_flops_per_image
from paris_ray.sampling_options import num_evaluations
from paris_ray.study.arms import Arm

TARGET = 0.8  # attribute accuracy of the headline
KEPT = (
    "captions",
    "attributes",
    "squared_error",
    "frechet",
    "kid",
    "coverage",
    "caption_recall",
)


def arm_numbers(
    arm: Arm,
    config: Config,
    router: Mapping[str, Any],
    drawn: Mapping[str, tuple[Config, Mapping[str, Any]]],
) -> dict[str, Any]:
    """Return what a study keeps of an arm.

    Args:
        arm: The arm.
        config: Its configuration.
        router: Facts of its router's manifest.
        drawn: Of every way to draw, the configuration and the facts of its evaluation.
    """
    batch, router_training = config.training.batch_size, config.router_training
    samples = arm.total_steps * batch
    length = text_length(config)
    flops = samples * training_flops_per_image(config.expert, length)
    routed = 0 if arm.num_experts == 1 else router_training.steps * router_training.batch_size
    return {
        **asdict(arm),
        "total_steps": arm.total_steps,
        "samples": samples,
        "router_samples": routed,
        "training_flops": flops + routed * training_flops_per_image(config.router),
        "router_temperature": router.get("held_out", {}).get("temperature"),
        "router_accuracy": router["right_cluster"],
        "drawn": {name: _evaluation_numbers(*evaluated) for name, evaluated in drawn.items()},
    }


def _evaluation_numbers(config: Config, facts: Mapping[str, Any]) -> dict[str, Any]:
    splits = {split: facts[split] for split in ("shown", "held_out")}
    return {
        "steps": config.sampling.num_inference_steps,
        "experts_asked": facts["experts_asked"],
        "flops_per_picture": 2
        * step_macs(config, facts["experts_asked"])
        * num_evaluations(config.sampling.solver, config.sampling.num_inference_steps),
        "memorisation": facts["memorisation"],
        **{split: {k: v[k] for k in KEPT if k in v} for split, v in splits.items()},
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """A number over the seeds of an arm.

    Attributes:
        mean: Over seeds.
        low: The lowest.
        high: The highest.
    """

    mean: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One way to draw with one arm, over its seeds.

    Attributes:
        arm: Its name.
        drawing: How it is drawn.
        num_experts: K.
        seed_share: Share of the samples that the seed had.
        samples: That the arm was trained on.
        seeds: How many runs.
        held_out: Share of held-out captions of which everything is right.
        held_out_interval: Over captions, 95 %: the ends, each averaged over seeds.
        shown: The same share of captions that were trained on.
        held_out_error: Root of the mean squared error to the captions' own pictures, in levels
            of 255.
        shown_error: The same of captions that were trained on.
        held_out_frechet: Frechet distance to the held-out pictures; None of too few.
        shown_frechet: To pictures that were trained on.
        experts_asked: A step.
        flops_per_picture: Of drawing.
        training_flops: Of the arm, router included.
    """

    arm: str
    drawing: str
    num_experts: int
    seed_share: float
    samples: int
    seeds: int
    held_out: Spread
    held_out_interval: tuple[float, float]
    shown: Spread
    held_out_error: Spread
    shown_error: Spread
    held_out_frechet: Spread | None
    shown_frechet: Spread | None
    experts_asked: float
    flops_per_picture: float
    training_flops: float


def mean(values: Iterable[float]) -> float:
    """Return the mean of one number or more."""
    numbers = list(values)
    return sum(numbers) / len(numbers)


def spread(values: Sequence[float]) -> Spread:
    """Return the spread of one number or more."""
    return Spread(mean=mean(values), low=min(values), high=max(values))


def _spread_if_known(values: Sequence[float | None]) -> Spread | None:
    """Return the spread of numbers; None if one was not measured."""
    known = [value for value in values if value is not None]
    return spread(known) if len(known) == len(values) else None


def mean_if_known(values: Sequence[float | None]) -> float | None:
    """Return the mean of numbers; None if one was not measured."""
    found = _spread_if_known(values)
    return None if found is None else found.mean


def accuracy(drawn: Mapping[str, Any], split: str) -> float:
    """Return the share of a split's captions of which everything is right."""
    return float(drawn[split]["attributes"]["all"]["mean"])


def pixel_error(drawn: Mapping[str, Any], split: str) -> float:
    """Return the root mean squared error in levels of 255; pixels were in [-1, 1]."""
    return float(drawn[split]["squared_error"]["mean"]) ** 0.5 * 127.5


def rows(arms: Sequence[Mapping[str, Any]], table: str) -> list[Row]:
    """Return the rows of a table: of `routing` every way to draw, of others the default alone."""
    of_table: dict[str, list[Mapping[str, Any]]] = {}
    for arm in arms:
        if table in arm["tables"]:
            of_table.setdefault(arm["name"], []).append(arm)
    return [
        _row(seeds, drawing)
        for seeds in of_table.values()
        for drawing in (seeds[0]["drawn"] if table == "routing" else [seeds[0]["routing"]])
    ]


def _row(seeds: Sequence[Mapping[str, Any]], drawing: str) -> Row:
    arm, drawn = seeds[0], [arm["drawn"][drawing] for arm in seeds]
    held_out = [each["held_out"]["attributes"]["all"] for each in drawn]
    return Row(
        arm=arm["name"],
        drawing=drawing,
        num_experts=arm["num_experts"],
        seed_share=arm["seed_steps"] / arm["total_steps"],
        samples=arm["samples"],
        seeds=len(seeds),
        held_out=spread([accuracy(each, "held_out") for each in drawn]),
        held_out_interval=(mean(x["low"] for x in held_out), mean(x["high"] for x in held_out)),
        shown=spread([accuracy(each, "shown") for each in drawn]),
        held_out_error=spread([pixel_error(each, "held_out") for each in drawn]),
        shown_error=spread([pixel_error(each, "shown") for each in drawn]),
        held_out_frechet=_spread_if_known([each["held_out"].get("frechet") for each in drawn]),
        shown_frechet=_spread_if_known([each["shown"].get("frechet") for each in drawn]),
        experts_asked=mean(each["experts_asked"] for each in drawn),
        flops_per_picture=mean(each["flops_per_picture"] for each in drawn),
        training_flops=arm["training_flops"],
    )


# --- samples to quality --------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Reached:
    """When a curve reaches a target.

    Attributes:
        samples: Between two measured points as on a straight line, in what the curve runs over;
            None if it never does.
        at_most: Whether the first point is above already, so that fewer may do.
        best: The highest value of the curve.
    """

    samples: float | None
    at_most: bool
    best: float


def samples_until(points: Sequence[tuple[float, float]], target: float) -> Reached:
    """Return after how many samples a curve first reaches a target.

    Args:
        points: `(samples, value)`, one or more.
        target: The value.
    """
    ordered = sorted(points)
    best = max(value for _, value in ordered)
    if ordered[0][1] >= target:
        return Reached(samples=ordered[0][0], at_most=True, best=best)
    for (x, low), (x_next, high) in pairwise(ordered):
        if high >= target:
            samples = x + (target - low) / (high - low) * (x_next - x)
            return Reached(samples=samples, at_most=False, best=best)
    return Reached(samples=None, at_most=False, best=best)


def curves(
    arms: Sequence[Mapping[str, Any]], axis: str = "samples"
) -> dict[str, dict[int, list[tuple[float, float]]]]:
    """Return of every recipe and seed the points `(samples, held-out accuracy)`, in order.

    Seeds of which a shorter or a longer training is missing are left out.

    Args:
        arms: With `samples` among their tables, or not.
        axis: What curves run over: `samples`, or another number of the arms.
    """
    found: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for arm in arms:
        if "samples" in arm["tables"]:
            right = accuracy(arm["drawn"][arm["routing"]], "held_out")
            of_seed = found.setdefault(arm["recipe"], {}).setdefault(arm["seed"], [])
            of_seed.append((arm[axis], right))
    return {recipe: _whole_curves(seeds) for recipe, seeds in found.items()}


def _whole_curves(
    seeds: Mapping[int, Sequence[tuple[float, float]]],
) -> dict[int, list[tuple[float, float]]]:
    longest = max(map(len, seeds.values()))
    return {seed: sorted(points) for seed, points in seeds.items() if len(points) == longest}


def mean_curve(seeds: Mapping[int, Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """Return the mean over seeds of curves, point by point."""
    return [
        (mean(x for x, _ in points), mean(value for _, value in points))
        for points in zip(*seeds.values(), strict=True)
    ]


def samples_to_target(arms: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return of every recipe when it reaches TARGET: of the mean curve, and of every seed."""
    return {
        recipe: {
            "mean": asdict(samples_until(mean_curve(seeds), TARGET)),
            "seeds": {
                str(seed): asdict(samples_until(points, TARGET)) for seed, points in seeds.items()
            },
        }
        for recipe, seeds in curves(arms).items()
    }
