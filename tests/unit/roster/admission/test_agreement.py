"""Velocities at high noise beside those of the others."""

import torch

from paris_ray.bundle import Bundle
from paris_ray.roster.admission.agreement import LEVELS, check_agreement
from paris_ray.roster.admission.limits import Limits
from tests.admission_panels import changed, flagged, panel, specialist


def test_an_honest_expert_is_as_far_from_the_mean_as_the_others(tiny_bundle: Bundle) -> None:
    check = check_agreement(panel(tiny_bundle, specialist(0)), Limits())
    assert check.outcome == "passed"
    assert len(check.readings) == len(LEVELS)
    assert all(0.5 < reading.value < 1.5 for reading in check.readings)


def test_an_expert_far_from_all_others_is_flagged(tiny_bundle: Bundle) -> None:
    far = changed(specialist(0), lambda e: e.final_layer.linear.bias.mul_(-4))
    assert flagged(check_agreement(panel(tiny_bundle, far), Limits())) == {"agreement"}


def test_what_is_not_a_number_is_flagged(tiny_bundle: Bundle) -> None:
    broken = changed(specialist(0), lambda e: e.final_layer.linear.bias.fill_(torch.nan))
    check = check_agreement(panel(tiny_bundle, broken), Limits())
    assert all(reading.is_flagged for reading in check.readings)


def test_one_neighbour_has_no_spread(tiny_bundle: Bundle) -> None:
    alone = panel(tiny_bundle, specialist(0))
    alone.neighbours.pop(1)  # type: ignore[attr-defined]
    check = check_agreement(alone, Limits())
    assert check.outcome == "not checked"
    assert check.note == "1 neighbours, 2 are needed"
