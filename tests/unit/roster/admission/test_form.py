"""Weights: finite, and of norms like the others'."""

import torch

from paris_ray.models import Expert
from paris_ray.roster.admission.form import check_form
from paris_ray.roster.admission.limits import Limits
from tests.admission_panels import changed, flagged, readings, specialist

OTHERS = [specialist(k) for k in range(4)]


def check(candidate: Expert, others: list[Expert] = OTHERS) -> set[str]:
    return flagged(check_form(candidate, others, Limits()))


def test_an_expert_like_the_others_passes() -> None:
    found = check_form(specialist(0, seed=9), OTHERS, Limits())
    assert found.outcome == "passed"
    assert found.note == "compared with 4 experts"
    assert 0 < readings(found)["tensor_norm"] < 6


def test_values_that_are_not_finite_are_counted() -> None:
    def break_two(expert: Expert) -> None:
        expert.final_layer.linear.bias[0] = torch.inf
        expert.pos_embed[..., 0, 0] = torch.nan

    found = check_form(changed(specialist(0), break_two), OTHERS, Limits())
    assert readings(found)["not_finite"] == 2
    assert flagged(found) == {"not_finite", "tensor_norm"}


def test_one_tensor_that_is_empty_or_ten_times_as_large_is_found() -> None:
    for factor in (0.0, 10.0):
        candidate = changed(specialist(0), lambda e, by=factor: e.layers[0].mlp[0].weight.mul_(by))
        found = check_form(candidate, OTHERS, Limits())
        assert flagged(found) == {"tensor_norm"}
        assert found.readings[1].detail == "layers.0.mlp.0.weight"


def test_a_sign_has_no_norm() -> None:
    assert check(changed(specialist(0), lambda e: e.layers[0].mlp[0].weight.neg_())) == set()


def test_experts_of_another_architecture_are_not_compared_with() -> None:
    wide = specialist(0, mlp_ratio=2.0)
    found = check_form(wide, OTHERS, Limits())
    assert [reading.name for reading in found.readings] == ["not_finite"]
    assert "0 experts of this architecture, 3 needed" in found.note
