"""The page of a study: Markdown and pictures of nothing but its numbers."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from paris_ray.charts import line_chart
from paris_ray.study.numbers import TARGET, Row, Spread, curves, mean_curve, rows
from paris_ray.study.order import PUBLISHED, REPRODUCED
from paris_ray.study.plan import DENSE, PAPER, SCRATCH, SEEDED

NONE = "-"
TABLES = {
    "experts": (
        "How many experts",
        "Equal samples in all: K experts share what the dense model sees alone.",
    ),
    "clusters": (
        "What is clustered",
        "`image`, `caption` and `both` are what k-means sees; `minus` leaves principal directions "
        "of the pictures out; `random` is the control: the hash of a row's key decides. Arms "
        "without a word for it cluster what the configuration says: {features}.",
    ),
    "balance": (
        "The balance of clusters",
        "How many times the mean size a cluster may have, after a seed; that of the other arms is "
        "the configuration's, {max_imbalance:g}.",
    ),
    "shared": (
        "Rows of the whole corpus",
        "Share of every expert's batches that is drawn from all clusters, from scratch.",
    ),
    "seed": (
        "The seed",
        "Share of the samples that one model of everything has before experts branch; then the "
        "experts' learning rate, as a multiple of that of the other arms, and the decay of their "
        "moving average (`ema`; the others' is the configuration's, but no average decays slower "
        "than by (1 + E) / (10 + E) in step E).",
    ),
    "routing": (
        "Routing, and equal FLOPs a picture",
        "The same experts, drawn in other ways. The dense model is also drawn in so many steps "
        "that a picture costs as much as 1, 2 and all of K experts and the router, if a step asks "
        "them; how many it asked is in the column. `agree:x` asks two, and mixes them where they "
        "differ by no more than x times the likelier one's velocity. `oracle` asks the expert of "
        "the caption's own cluster, without the router. `at x` divides the router's logits by x in "
        "place of the fitted temperature.",
    ),
    "samples": (
        "Samples to quality",
        "Shorter and longer trainings, each with a whole schedule of its own.",
    ),
}
CAN_SHOW = """\
It can show, on this corpus and at this size, whether isolated experts follow captions as well as
one model of the same samples does; what a seed, shared rows, clusters and routing change; and
which of the paper's relations hold.

It cannot show the paper's numbers: corpus, size, image model and number of pictures are others,
and a Frechet distance of so few pictures is too large for all alike. K experts have K times the
parameters of the dense model. Samples in training are equal; FLOPs a picture are in the column, and
equal only in the rows of the dense model that say so. They are those of experts and router, without
text encoder and codec, with the text projected anew in every step. A picture of
{size} pixels is learnt from few samples, so experts here may lack samples where larger ones would
lack capacity. The router's samples are not counted with the experts', its FLOPs are. Seeds change
clusters, first weights, order, noise and which captions are drawn; held-out rows and encoders are
the same in all. An
interval is over captions and does not know of seeds; a row of one seed has no spread. Differences
smaller than the spread of the arms with several seeds say nothing."""


def study_page(study: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    """Return the page as Markdown.

    Args:
        study: What `study.json` holds.
        pictures: Links of the charts, by name.
    """
    arms = study["arms"]
    parts = [
        "# One dense model against isolated experts",
        _intro(study),
        "## In short",
        _headline(study["samples_to_target"], arms),
        *(_chart(link, name) for name, link in pictures.items()),
        *(_table_part(study, name) for name in TABLES),
        "## The published order",
        _paris(study["paris_order"]),
        "## What this corpus can and cannot show",
        CAN_SHOW.format(size=study["image_size"]),
    ]
    return "\n\n".join(parts) + "\n"


def draw_charts(study: Mapping[str, Any], folder: Path, stem: str) -> dict[str, Path]:
    """Draw the charts of a study into a folder; return their files by what they show."""
    arms = study["arms"]
    by_samples = {
        recipe: [(samples / 1000, value) for samples, value in mean_curve(seeds)]
        for recipe, seeds in curves(arms).items()
    }
    charts = {
        "samples": ("samples, thousands", by_samples),
        "experts": ("experts", _by_count(rows(arms, "experts"))),
    }
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, (label, series) in charts.items():
        paths[name] = folder / f"{stem}_{name}.png"
        line_chart(label, "held-out, all right", series).save(paths[name], optimize=True)
    return paths


def _by_count(found: Sequence[Row]) -> dict[str, list[tuple[float, float]]]:
    """Return accuracy by K, from scratch and from a seed; one model begins both lines."""
    lines = {}
    for recipe in (SCRATCH, SEEDED):
        members = [row for row in found if row.arm == DENSE or row.arm.startswith(recipe)]
        lines[recipe] = sorted((float(row.num_experts), row.held_out.mean) for row in members)
    return lines


def _chart(link: str, name: str) -> str:
    return f'<img src="{link}" width="380" alt="held-out accuracy against {name}">'


def _intro(study: Mapping[str, Any]) -> str:
    arms = study["arms"]
    drawn = arms[0]["drawn"][arms[0]["routing"]]
    paper = f"; `{PAPER}` also clusters what the paper clusters"
    return (
        f"Written by `{study['command']}`, the {study['form']} form; nothing here is typed. "
        f"{len(arms)} runs, seeds {spelt_range(arm['seed'] for arm in arms)}; {study['samples']:,} "
        "samples in every arm, but for those of the curve. "
        f"Drawn: {drawn['held_out']['captions']} captions that were held out and "
        f"{drawn['shown']['captions']} that were trained on. *Right*: all attributes of the "
        "caption, as [evaluation.md](evaluation.md) has it; *RMSE*: of pixels, to the "
        "caption's own picture, in levels of 255. `scratch` is the paper's way, the "
        f"control of every table{paper if any(arm['name'] == PAPER for arm in arms) else ''}."
    )


def spelt_range(numbers: Iterable[int]) -> str:
    """Return the least and the greatest of numbers in words."""
    found = sorted(set(numbers))
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"


def _headline(reached: Mapping[str, Any], arms: Sequence[Mapping[str, Any]]) -> str:
    head = ["recipe", f"samples until held-out accuracy {TARGET:g}", "by seed", "best"]
    cells = [
        [
            f"`{recipe}`",
            _reached(found["mean"]),
            ", ".join(map(_reached, found["seeds"].values())),
            f"{found['mean']['best']:.3f}",
        ]
        for recipe, found in reached.items()
    ]
    return f"{markdown_table([head, *cells])}\n\n{_comparison(rows(arms, 'experts'))}"


def _reached(found: Mapping[str, Any]) -> str:
    if found["samples"] is None:
        return f"missed ({found['best']:.3f})"
    return f"{'at most ' if found['at_most'] else ''}{found['samples']:,.0f}"


def _comparison(found: Sequence[Row]) -> str:
    """Say which arms draw better than the dense model, and which control is where."""
    dense, scratch = (next(row for row in found if row.arm == name) for name in (DENSE, SCRATCH))
    others = [row for row in found if row.num_experts > 1]
    ahead = [f"`{row.arm}`" for row in others if row.held_out.low > dense.held_out.high]
    best = max(others, key=lambda row: row.held_out.mean)
    nearer = [f"`{row.arm}`" for row in others if row.shown_error.high < dense.shown_error.low]
    nearest = min(others, key=lambda row: row.shown_error.mean)
    return (
        f"Held-out, all right: dense {dense.held_out.mean:.3f}, experts from scratch "
        f"{scratch.held_out.mean:.3f}, the best arm with experts `{best.arm}` "
        f"{best.held_out.mean:.3f}. With the lowest run above the dense model's highest: "
        f"{', '.join(ahead) or 'none'}. RMSE to pictures that were trained on: dense "
        f"{dense.shown_error.mean:.1f}, experts from scratch {scratch.shown_error.mean:.1f}, the "
        f"nearest arm with experts `{nearest.arm}` {nearest.shown_error.mean:.1f}. With the "
        f"farthest run nearer than the dense model's nearest: {', '.join(nearer) or 'none'}."
    )


def _table_part(study: Mapping[str, Any], name: str) -> str:
    (title, text), arms = TABLES[name], study["arms"]
    found = rows(arms, name)
    parts = [f"## {title}", text.format(**study), _table(found, name)]
    if name == "routing":
        parts.append(_certainty(arms))
    elif name != "samples":
        parts.append(_comparison(found))
    return "\n\n".join(parts)


def _certainty(arms: Sequence[Mapping[str, Any]]) -> str:
    """Say how sure routers were, which decides what routings differ in."""
    routed = [arm for arm in arms if "routing" in arm["tables"] and arm["num_experts"] > 1]
    said = [
        f"`{arm['name']}`, seed {arm['seed']}: {_number(arm['router_temperature'], 2)}"
        for arm in routed
    ]
    return (
        f"Temperatures fitted to the routers on held-out rows: {'; '.join(said)}. A surer router "
        "has a lower one; where every way asked one expert, all draw the same pictures."
    )


def _table(found: Sequence[Row], name: str) -> str:
    head = ["arm", "drawn", "K", "seed", "samples", "runs", "held-out right", "lowest to highest"]
    head += ["95 % over captions", "trained-on right", "RMSE held-out", "RMSE trained-on"]
    head += ["Frechet held-out", "Frechet trained-on"]
    head += ["experts a step", "MFLOP a picture", "training TFLOP"]
    return markdown_table([head, *map(_cells, found)])


def _cells(row: Row) -> list[str]:
    low, high = row.held_out_interval
    return [
        f"`{row.arm}`",
        row.drawing,
        str(row.num_experts),
        f"{row.seed_share:.0%}",
        f"{row.samples:,}",
        str(row.seeds),
        f"{row.held_out.mean:.3f}",
        f"{row.held_out.low:.3f} to {row.held_out.high:.3f}" if row.seeds > 1 else NONE,
        f"{low:.3f} to {high:.3f}",
        f"{row.shown.mean:.3f}",
        f"{row.held_out_error.mean:.1f}",
        f"{row.shown_error.mean:.1f}",
        _number(_mean(row.held_out_frechet), 4),
        _number(_mean(row.shown_frechet), 4),
        f"{row.experts_asked:.2f}",
        f"{row.flops_per_picture / 1e6:,.0f}",
        f"{row.training_flops / 1e12:,.0f}",
    ]


def _mean(spread: Spread | None) -> float | None:
    return None if spread is None else spread.mean


def _number(value: float | None, digits: int) -> str:
    return NONE if value is None else f"{value:.{digits}f}"


def _paris(orders: Sequence[Mapping[str, Any]]) -> str:
    published = ", ".join(f"{way} {value:.2f}" for way, value in PUBLISHED.items())
    intro = (
        f"Paris (arXiv 2510.03434) has, as FID of its B/2 study: {published}; lower is better. "
        "Here *error* is the share of captions of which something is wrong. A relation is "
        "reproduced if it holds in every seed, not reproduced if it is the other way round in "
        "every seed, the same if both ways are equal in every seed, undecided otherwise; in "
        "brackets: seeds in which it holds, in which the opposite does, and all."
    )
    if not orders:
        return intro
    relations = orders[0]["relations"]
    head = ["arm", "measure", *PUBLISHED]
    head += [f"{each['better']} < {each['worse']}" for each in relations]
    cells = [
        [
            f"`{order['arm']}`",
            order["measure"],
            *(_number(order["means"][way], 4) for way in PUBLISHED),
            *(
                f"{each['verdict']} ({each['holds']}, {each['opposite']} of {each['seeds']})"
                for each in order["relations"]
            ),
        ]
        for order in orders
    ]
    summary = [_paris_summary(order) for order in orders]
    return "\n\n".join([intro, markdown_table([head, *cells]), "\n".join(summary)])


def _paris_summary(order: Mapping[str, Any]) -> str:
    relations = order["relations"]
    by_verdict: dict[str, list[str]] = {}
    for each in relations:
        by_verdict.setdefault(each["verdict"], []).append(f"{each['better']} < {each['worse']}")
    whole = "the whole order is reproduced" if set(by_verdict) == {REPRODUCED} else None
    said = "; ".join(f"{verdict}: {', '.join(pairs)}" for verdict, pairs in by_verdict.items())
    return f"- `{order['arm']}`, {order['measure']}: {whole or said}."


def markdown_table(cells: Sequence[Sequence[str]]) -> str:
    """Return rows of cells, of which the first is the head, as Markdown."""
    head, *body = cells
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
