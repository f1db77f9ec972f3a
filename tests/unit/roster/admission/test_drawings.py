"""What a candidate draws alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from paris_ray.bundle import Bundle
from paris_ray.models import Expert
from paris_ray.roster.admission import drawings
from paris_ray.roster.admission.drawings import (
    NUM_SEEDS,
    Drawings,
    check_drawings,
    draw,
    one_coloured,
)
from paris_ray.roster.admission.limits import Limits
from tests.admission_panels import ROWS, changed, flagged, look, panel, readings, specialist


def test_an_honest_expert_draws_its_cluster(tiny_bundle: Bundle) -> None:
    check, pictures = check_drawings(panel(tiny_bundle, specialist(0)), look, Limits())
    assert check.outcome == "passed"
    assert set(readings(check)) == {"not_finite", "plain", "faithful", "variety"}
    assert readings(check)["faithful"] < 1
    assert pictures.shape == (NUM_SEEDS * ROWS, 32, 32, 3)


def test_an_expert_of_another_cluster_draws_something_else(tiny_bundle: Bundle) -> None:
    check, _ = check_drawings(panel(tiny_bundle, specialist(1, seed=7)), look, Limits())
    honest, _ = check_drawings(panel(tiny_bundle, specialist(0)), look, Limits())
    assert readings(check)["faithful"] > readings(honest)["faithful"] * 1.1


def test_an_expert_that_draws_one_picture_from_all_noise_is_flagged(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = replace(tiny_bundle.facts.sampling, num_inference_steps=1)
    monkeypatch.setattr(tiny_bundle, "facts", replace(tiny_bundle.facts, sampling=once))
    # Its velocity at t = 1 is the noise less what it answers: one step leads to the answer alone.
    constant = specialist(0, prediction="preconditioned")
    constant = changed(constant, lambda e: e.final_layer.linear.weight.zero_())
    check, pictures = check_drawings(panel(tiny_bundle, constant), look, Limits())
    assert readings(check)["variety"] > 100
    assert "variety" in flagged(check)
    assert (pictures == pictures[0]).all()


def test_what_is_not_finite_is_counted_and_not_decoded(tiny_bundle: Bundle) -> None:
    broken = changed(specialist(0), lambda e: e.final_layer.linear.bias.fill_(torch.inf))
    check, pictures = check_drawings(panel(tiny_bundle, broken), look, Limits())
    assert readings(check)["not_finite"] == NUM_SEEDS * ROWS
    assert flagged(check) == {"not_finite"}
    assert len(pictures) == 0


def test_pictures_of_one_colour_are_counted() -> None:
    varied = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    varied[1] = (10, 200, 30)
    assert one_coloured(varied) == 1
    assert one_coloured(varied[:0]) == 0


def test_captions_are_spread_over_all_rows_of_the_cluster(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn_for = []

    def told(bundle: Bundle, expert: Expert, captions: list[str], seed: int) -> Drawings:
        drawn_for.append(captions[: len(captions) // NUM_SEEDS])
        return draw(bundle, expert, captions, seed)

    monkeypatch.setattr(drawings, "draw", told)
    honest = panel(tiny_bundle, specialist(0))
    numbered = tuple(f"{i}" for i in range(len(honest.held_out.captions)))
    honest = replace(honest, held_out=replace(honest.held_out, captions=numbered))
    check_drawings(honest, look, Limits())
    assert drawn_for[0] == [f"{i}" for i in range(ROWS)]


@pytest.mark.parametrize("count", [1, 2])
def test_neighbours_whose_drawings_are_not_finite_are_left_out(
    tiny_bundle: Bundle, count: int
) -> None:
    whole = panel(tiny_bundle, specialist(0))
    broken = changed(specialist(1), lambda e: e.final_layer.linear.bias.fill_(torch.inf))
    neighbours = {1: broken, 2: specialist(2)} if count == 1 else {1: broken, 2: broken}
    check, _ = check_drawings(replace(whole, neighbours=neighbours), look, Limits())
    assert check.outcome == "passed"
    assert ("faithful" in readings(check)) == (count == 1)
    assert f"beside {2 - count} of 2 neighbours" in check.note
