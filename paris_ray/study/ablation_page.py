"""The page of an ablation: Markdown of nothing but its numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

from paris_ray.study.ablation import CONTROLS, CPU_SECONDS, SAMPLES, Compared, best, compare
from paris_ray.study.numbers import Reached, Spread
from paris_ray.study.page import markdown_table, spelt_range

FEWER = {SAMPLES: 1.5, CPU_SECONDS: 1.3}  # times, what the best recipe is asked for
NAMES = {SAMPLES: "samples", CPU_SECONDS: "CPU-seconds"}
CANNOT_SHOW = """\
One model of everything on a corpus of drawings, by its share of held-out captions of which all
attributes are right. A recipe that wins here may lose where models, pictures and trainings are
larger, and the other way round: the papers' own numbers begin at tens of thousands of steps, and
this ends long before. Values of a recipe (`configs/recipes/`) are its paper's and not tuned here,
but for Muon's rate ([decisions.md](decisions.md), 81). Each training has a whole schedule of its
own, so the points of a curve are trainings of different lengths, with straight lines between them.
CPU-seconds are those of the training processes, held-out losses among them, and depend on the
machine and on what else it does: arms that were taken from an earlier page (`--known`) are of
another hour. Differences smaller than the spread over seeds say nothing; one seed has no spread."""


def ablation_page(ablation: Mapping[str, Any]) -> str:
    """Return the page as Markdown.

    Args:
        ablation: What `ablation.json` holds.
    """
    compared = compare(ablation["arms"])
    parts = [
        "# What training recipes are worth",
        _intro(ablation),
        ablation_table(compared),
        verdict(compared),
        "## What this can and cannot show",
        CANNOT_SHOW,
    ]
    return "\n\n".join(parts) + "\n"


def _intro(ablation: Mapping[str, Any]) -> str:
    arms = ablation["arms"]
    most = max(arm["samples"] for arm in arms)
    split = arms[0]["drawn"][arms[0]["routing"]]["held_out"]
    return (
        f"Written by `{ablation['command']}` on {ablation['machine']}; nothing here is typed. "
        f"{len(arms)} runs, seeds {spelt_range(arm['seed'] for arm in arms)}; up to {most:,} "
        f"samples each, {ablation['image_size']} x {ablation['image_size']} pixels, "
        f"{split['captions']} held-out captions. `base` is the configuration with AdamW and no "
        "recipe, `epsilon` that of a DDPM expert, the control of `min_snr`. *Right*: all of the "
        "caption's attributes ([evaluation.md](evaluation.md)). *To its quality*: until the mean "
        "over seeds has as many right as the control's has at the end; in brackets each seed. A "
        "recipe that never has is `missed`, with the best it had."
    )


def ablation_table(compared: Sequence[Compared]) -> str:
    """Return a row for every recipe, as Markdown."""
    head = [
        "recipe",
        "control",
        "runs",
        "samples",
        "held-out right",
        "at the control's CPU-seconds",
    ]
    head += ["RMSE held-out", "CPU-ms a sample"]
    for name in NAMES.values():
        head += [f"{name} to its quality", f"times fewer {name}"]
    return markdown_table([head, *map(_cells, compared)])


def _cells(row: Compared) -> list[str]:
    cells = [
        f"`{row.recipe}`",
        f"`{row.control}`",
        str(row.seeds),
        f"{row.samples:,}",
        _spread(row.held_out, 3),
        _spread(row.at_equal_cpu, 3),
        _spread(row.held_out_error, 1),
        _spread(row.cpu_ms_per_sample, 2),
    ]
    for axis in NAMES:
        seeds = ", ".join(map(_reached, row.reached_by_seed[axis]))
        cells += [f"{_reached(row.reached[axis])} ({seeds})", _gain(row, axis)]
    return cells


def _spread(found: Spread, digits: int) -> str:
    ends = (
        "" if found.low == found.high else f" ({found.low:.{digits}f} to {found.high:.{digits}f})"
    )
    return f"{found.mean:.{digits}f}{ends}"


def _reached(found: Reached) -> str:
    if found.samples is None:
        return f"missed, {found.best:.3f}"
    return f"{'at most ' if found.at_most else ''}{found.samples:,.0f}"


def _gain(row: Compared, axis: str) -> str:
    gain = row.gain[axis]
    if gain is None:
        return "missed"
    return f"{'at least ' if row.reached[axis].at_most else ''}{gain:.2f}"


def verdict(compared: Sequence[Compared]) -> str:
    """Say whether the best recipe takes as many times fewer samples and CPU-seconds as asked."""
    if all(row.recipe in CONTROLS for row in compared):
        return "No recipe was tried."
    winner = best(compared)
    said = []
    for axis, wanted in FEWER.items():
        gain = winner.gain[axis]
        result = "met" if gain is not None and gain >= wanted else "missed"
        said.append(f"{_gain(winner, axis)} times fewer {NAMES[axis]} (goal {wanted:g}: {result})")
    return f"The best recipe is `{winner.recipe}`: {', '.join(said)}."
