"""The measures of an evaluation on one page, with pictures: held-out ones first."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from paris_ray.charts import line_chart
from paris_ray.reports import inline_image, page, paragraph, picture_grid, section, table

PAIRS_OF_A_KIND = 16  # nearest, farthest and random ones
TITLES = {"held_out": "Captions that were never shown", "shown": "Captions that were trained on"}
DISTRIBUTION = {
    "frechet": "Frechet distance of the run's image features (0: alike)",
    "frechet_infinity": "Frechet distance, extrapolated to endless pictures",
    "kid": "kernel distance, KID (0: alike)",
    "cmmd": "kernel distance, CMMD (0: alike)",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "image_to_text_r1": "retrieval R@1, picture to caption",
    "text_to_image_r1": "retrieval R@1, caption to picture",
}
ROUTER = ("accuracy", "prototype_accuracy", "ece", "ece_calibrated")
MEANS = {
    "caption_recall": "caption recall: the nearest training picture has the caption",
    "squared_error": "mean squared error to the caption's own picture, pixels in [-1, 1]",
    "clip_score": "CLIP score by the run's image model, 0 to 100",
}


def evaluation_page(
    facts: Mapping[str, Any],
    pairs: Mapping[str, NDArray[np.uint8]],
    attribution: str | None,
    router: Mapping[str, Any] | None = None,
) -> tuple[bytes, Image.Image]:
    """Return the page, and a grid of pictures of the first split on it.

    Args:
        facts: What `pipeline.measuring.measure` returns.
        pairs: Of every split, `(N, 2, S, S, 3)` corpus pictures and drawn ones, best pair first.
        attribution: Licence line of the corpus, or None.
        router: What `training.router_quality.held_out_quality` returned, or None.
    """
    splits = [split for split in TITLES if split in pairs]
    grids = {split: _grid(pairs[split]) for split in splits}
    sections = [_split_section(split, facts[split], grids[split]) for split in splits]
    if facts.get("held_out_losses"):
        sections.append(_losses(facts["held_out_losses"]))
    if "memorisation" in facts:
        sections.append(_memorisation(facts["memorisation"]))
    if router is not None:
        sections.append(_router(router))
    usage = ", ".join(f"{share:.1%}" for share in facts["expert_usage"])
    sections.append(section("Experts", paragraph(f"Mean weight of each expert: {usage}.")))
    return page("Evaluation", sections, attribution), grids[splits[0]]


def _split_section(split: str, facts: Mapping[str, Any], grid: Image.Image) -> str:
    intro = (
        f"{facts['captions']} captions. Pairs of corpus picture and drawn picture: the nearest "
        "pairs, the farthest ones, and some at random."
    )
    parts = [paragraph(intro), inline_image(grid, TITLES[split]), _measures(facts)]
    if note := facts.get("frechet_note"):
        parts.append(paragraph(f"Frechet distance: {note}"))
    return section(TITLES[split], *parts, _by_cluster(facts["by_cluster"]))


def _measures(facts: Mapping[str, Any]) -> str:
    rows = [["measure", "value", "95 % interval over captions"]]
    for name, value in facts.get("attributes", {}).items():
        rows.append([f"attribute right: {name}", *_with_interval(value)])
    rows += [[words, *_with_interval(facts[n])] for n, words in MEANS.items() if n in facts]
    rows += [[words, f"{facts[n]:.4f}", ""] for n, words in DISTRIBUTION.items() if n in facts]
    return table(rows)


def _with_interval(value: Mapping[str, float]) -> tuple[str, str]:
    return f"{value['mean']:.4f}", f"{value['low']:.4f} to {value['high']:.4f}"


def _by_cluster(rows: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [["cluster", *(name.replace("_", " ") for name in names)]]
    for k, row in enumerate(rows):
        cells.append([str(k), *(f"{row[name]:.4g}" if name in row else "" for name in names)])
    return table(cells)


def _losses(matrix: Sequence[Sequence[float | None]]) -> str:
    text = "Mean velocity error of every expert on held-out rows of every cluster."
    if len(matrix) > 1:
        text += " The diagonal is what it was trained for; the rest is what it has not forgotten."
    head = ["expert", *(f"cluster {k}" for k in range(len(matrix[0])))]
    rows = [
        [str(k), *("" if loss is None else f"{loss:.4f}" for loss in losses)]
        for k, losses in enumerate(matrix)
    ]
    return section("Held-out loss, expert by cluster", paragraph(text), table([head, *rows]))


def _router(quality: Mapping[str, Any]) -> str:
    levels = quality["levels"]
    text = (
        f"Of {quality['rows']} held-out rows at noise level t: how often the most likely cluster "
        "is right, beside a router without training, and the expected calibration error before "
        f"and after dividing by the fitted temperature, {quality['temperature']:.2f}."
    )
    rows = [["t", *(name.replace("_", " ") for name in ROUTER)]]
    rows += [[t, *(f"{level[name]:.4f}" for name in ROUTER)] for t, level in levels.items()]
    diagonal = [(x, x) for x in (0.0, 0.25, 0.5, 0.75, 1.0)]
    lines = {"as sure as right": diagonal}
    lines |= {f"t = {t}": _reliability(levels[t]["reliability"]) for t in list(levels)[-2:]}
    chart = line_chart("confidence after temperature", "right", lines, logarithmic=False)
    return section("Router", paragraph(text), table(rows), inline_image(chart, "reliability", 380))


def _reliability(table: Mapping[str, Sequence[float]]) -> list[tuple[float, float]]:
    """Return confidence and accuracy of the bins that are not empty."""
    bins = zip(table["counts"], table["confidence"], table["accuracy"], strict=True)
    return [(confidence, accuracy) for count, confidence, accuracy in bins if count]


def _memorisation(shares: Mapping[str, float]) -> str:
    text = "; ".join(
        f"{share:.1%} are at most as far from their nearest training picture as {float(q):.0%} of "
        "the held-out pictures are"
        for q, share in shares.items()
    )
    return section("Copies", paragraph(f"Of the pictures drawn from held-out captions {text}."))


def _grid(pairs: NDArray[np.uint8]) -> Image.Image:
    """Return the nearest pairs, the farthest ones, and evenly spread ones, a kind a row pair."""
    count = min(PAIRS_OF_A_KIND, len(pairs))
    spread = np.linspace(0, len(pairs) - 1, count).astype(int)
    chosen = np.concatenate([np.arange(count), np.arange(len(pairs) - count, len(pairs)), spread])
    flat = pairs[chosen].reshape(-1, *pairs.shape[2:])
    return picture_grid(flat, columns=16, scale=2)
