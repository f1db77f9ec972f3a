"""What a study says of its numbers: closed forms, and verdicts that can be negative."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from paris_ray.config import load, with_overrides
from paris_ray.models.flops import forward_macs, step_macs, text_length
from paris_ray.study.numbers import (
    curves,
    mean_curve,
    rows,
    samples_to_target,
    samples_until,
)
from paris_ray.study.order import paris_order
from paris_ray.study.page import draw_charts, study_page

ROUTED = ("top-2", "top-1", "full", "oracle")
CONTROLS = ["experts", "clusters", "balance", "shared", "seed", "samples", "routing"]


def drawn(accuracy: float, frechet: float | None) -> dict[str, Any]:
    """What was drawn; a tenth fewer captions that were shown are right, every number differs."""
    return {
        "steps": 8,
        "experts_asked": 1 + accuracy,
        "flops_per_picture": 1e9 * accuracy,
        "memorisation": {"0.05": 0.1},
        "held_out": split(accuracy, 1 - accuracy, frechet),
        "shown": split(
            0.9 * accuracy, (1 - accuracy) / 4, None if frechet is None else 2 * frechet
        ),
    }


def split(accuracy: float, error: float, frechet: float | None) -> dict[str, Any]:
    interval = {"mean": accuracy, "low": accuracy - 0.05, "high": accuracy + 0.05}
    found: dict[str, Any] = {"captions": 40, "attributes": {"all": interval}}
    found["squared_error"] = {"mean": error, "low": 0.0, "high": 1.0}
    return found if frechet is None else found | {"frechet": frechet}


def arm(
    name: str,
    seed: int,
    ways: dict[str, tuple[float, float | None]],
    *,
    samples: int = 1000,
    tables: list[str] = CONTROLS,
) -> dict[str, Any]:
    count = 1 if name.startswith("dense") else 4
    return {
        "name": name,
        "recipe": name.partition("-x")[0],
        "tables": tables,
        "seed": seed,
        "num_experts": count,
        "seed_steps": 0,
        "expert_steps": 64 // count,
        "total_steps": 64,
        "routing": next(iter(ways)),
        "samples": samples,
        "training_flops": 2e15,
        "router_temperature": 0.75,
        "drawn": {way: drawn(*numbers) for way, numbers in ways.items()},
    }


def as_published(top_2: float, full: float) -> list[dict[str, Any]]:
    """A dense model and experts, whose errors and distances are in one order."""
    found = []
    for seed in (0, 1):
        found.append(arm("dense", seed, {"one model": (0.6, 0.30)}))
        ways = {"top-2": (1 - top_2, top_2), "top-1": (0.5, 0.5), "full": (1 - full, full)}
        found.append(arm("scratch", seed, ways | {"oracle": (0.55, None)}))
    half = [
        arm(name, seed, {way: (0.2, None)}, samples=500, tables=["samples"])
        for seed in (0, 1)
        for name, way in (("dense-x0.5", "one model"), ("scratch-x0.5", "top-2"))
    ]
    return found + half


def study(arms: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "command": "python -m jobs.study --small",
        "form": "small",
        "features": "caption",
        "max_imbalance": 1.25,
        "image_size": 32,
        "samples": 1000,
        "arms": arms,
        "samples_to_target": samples_to_target(arms),
        "paris_order": paris_order(arms),
    }


def page(arms: list[dict[str, Any]]) -> str:
    # As a reader of study.json has it.
    return study_page(json.loads(json.dumps(study(arms))), {"samples": "images/x.png"})


# --- curves --------------------------------------------------------------------------------------


def test_samples_to_quality_are_read_off_straight_lines() -> None:
    points = [(300.0, 0.9), (100.0, 0.5), (200.0, 0.7)]
    reached = samples_until(points, 0.8)
    assert reached.samples == pytest.approx(250)
    assert (reached.at_most, reached.best) == (False, 0.9)
    assert samples_until(points, 0.7).samples == pytest.approx(200)
    assert samples_until([(1.0, 0.2), (2.0, 0.9), (3.0, 0.1), (4.0, 0.9)], 0.2).at_most


def test_a_target_is_missed_or_reached_before_the_first_point() -> None:
    missed = samples_until([(100.0, 0.3), (200.0, 0.79)], 0.8)
    assert (missed.samples, missed.best) == (None, 0.79)
    early = samples_until([(100.0, 0.85), (200.0, 0.9)], 0.8)
    assert (early.samples, early.at_most) == (100, True)


def test_a_curve_leaves_out_seeds_without_all_of_its_points() -> None:
    arms = as_published(top_2=0.2, full=0.7)
    arms.append(arm("dense", 2, {"one model": (0.9, None)}))
    assert curves(arms)["dense"] == {seed: [(500, 0.2), (1000, 0.6)] for seed in (0, 1)}


def test_curves_are_averaged_point_by_point() -> None:
    seeds = {0: [(1.0, 0.2), (2.0, 0.4)], 1: [(1.0, 0.4), (2.0, 0.8)]}
    assert mean_curve(seeds) == [(1.0, pytest.approx(0.3)), (2.0, pytest.approx(0.6))]


# --- rows and costs ------------------------------------------------------------------------------


def test_rows_have_the_mean_and_the_ends_of_the_seeds() -> None:
    arms = [arm("dense", s, {"one model": (a, a / 2)}) for s, a in ((0, 0.5), (1, 0.7), (2, 0.9))]
    (row,) = rows(arms, "experts")
    assert (row.held_out.mean, row.held_out.low, row.held_out.high) == pytest.approx(
        (0.7, 0.5, 0.9)
    )
    assert row.held_out_interval == pytest.approx((0.65, 0.75))
    assert row.seeds == 3
    assert row.shown_frechet is not None
    assert row.shown_frechet.mean == pytest.approx(0.7)


def test_a_picture_costs_the_experts_that_were_asked_and_the_router_once_a_step() -> None:
    config = load("quickstart")
    expert, router = forward_macs(config.expert, text_length(config)), forward_macs(config.router)
    assert step_macs(config, 1.5) == 1.5 * expert + router
    guided = with_overrides(config, ["sampling.guidance_scale=2"])
    assert step_macs(guided, 1) == 2 * expert + router
    oracle = with_overrides(config, ["evaluation.oracle=true", "evaluation.name=oracle"])
    assert step_macs(oracle, 1) == expert


# --- the published order -------------------------------------------------------------------------


def verdicts(arms: list[dict[str, Any]], measure: str) -> dict[str, str]:
    (order,) = [each for each in paris_order(arms) if each["measure"] == measure]
    return {f"{r['better']} < {r['worse']}": r["verdict"] for r in order["relations"]}


def test_the_published_order_is_found_where_it_is() -> None:
    found = verdicts(as_published(top_2=0.2, full=0.7), "held-out Frechet")
    assert len(found) == 6
    assert set(found.values()) == {"reproduced"}
    assert "the whole order is reproduced" in page(as_published(top_2=0.2, full=0.7))


def test_the_page_says_what_is_not_reproduced_and_what_is_missed() -> None:
    arms = as_published(top_2=0.2, full=0.1)
    assert verdicts(arms, "held-out error")["top-1 < full"] == "not reproduced"
    text = page(arms)
    assert "not reproduced (0, 2 of 2)" in text
    assert "not reproduced: " in text
    assert "missed (0.600)" in text  # dense ends at 0.6
    assert "ndecided" not in text.split("## The published order")[1].split("| arm |")[1]


def test_seeds_that_disagree_decide_nothing() -> None:
    arms = as_published(top_2=0.2, full=0.7)
    arms[3]["drawn"]["top-2"] = drawn(0.1, 0.9)
    assert verdicts(arms, "shown Frechet")["top-2 < one model"] == "undecided"


def test_ways_that_draw_the_same_are_no_disagreement() -> None:
    arms = as_published(top_2=0.2, full=0.2)
    assert verdicts(arms, "held-out error")["top-2 < full"] == "the same"
    assert "the same (0, 0 of 2)" in page(arms)


def test_a_measure_that_was_not_taken_has_no_verdict() -> None:
    arms = as_published(top_2=0.2, full=0.7)
    for each in arms:
        for way in each["drawn"].values():
            way["held_out"].pop("frechet", None)
            way["shown"].pop("frechet", None)
    assert set(verdicts(arms, "shown Frechet").values()) == {"not measured"}
    assert set(verdicts(arms, "held-out error").values()) == {"reproduced"}


# --- the page ------------------------------------------------------------------------------------


def test_the_table_has_the_numbers_of_the_results() -> None:
    arms = as_published(top_2=0.2, full=0.7)
    text = page(arms)
    routing = text.split("## Routing")[1].split("## ")[0]
    lines = [line for line in routing.splitlines() if line.startswith("| `")]
    cells = {
        (row[1].strip("`"), row[2]): row
        for row in ([cell.strip() for cell in line.split("|")] for line in lines)
    }
    assert set(cells) == {("dense", "one model"), *(("scratch", way) for way in ROUTED)}
    top_2 = cells["scratch", "top-2"]
    assert top_2[3:] == [
        *("4", "0%", "1,000", "2", "0.800", "0.800 to 0.800", "0.750 to 0.850", "0.720"),
        *("57.0", "28.5", "0.2000", "0.4000"),  # 127.5 of the root of 0.2, and of 0.05
        *("1.80", "800", "2,000", ""),
    ]
    assert cells["scratch", "oracle"][13] == "-"
    assert "dense 0.600, experts from scratch 0.800" in text
    assert "the lowest run above the dense model's highest: `scratch`" in text
    assert "trained on: dense 40.3, experts from scratch 28.5" in text
    assert "farthest run nearer than the dense model's nearest: `scratch`" in text


def test_only_experts_are_compared_with_the_dense_model() -> None:
    arms = as_published(top_2=0.2, full=0.7)
    arms.append(arm("dense-x3", 0, {"one model": (0.99, 0.1)}, tables=["samples", "experts"]))
    text = page(arms)
    assert "the best arm with experts `scratch` 0.800" in text
    assert "`dense-x3`" in text.split("## Samples to quality")[1]
    assert "best arm" not in text.split("## Samples to quality")[1]


def test_charts_are_drawn_of_the_curves(tmp_path: Path) -> None:
    paths = draw_charts(study(as_published(top_2=0.2, full=0.7)), tmp_path / "images", "study")
    assert set(paths) == {"samples", "experts"}
    for path in paths.values():
        assert Image.open(path).size == (760, 520)
