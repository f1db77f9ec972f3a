"""Losses by cluster, level and word: honest experts pass, each fault shows where it should."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from paris_ray.bundle import Bundle
from paris_ray.models import Expert
from paris_ray.roster.admission.limits import Limits
from paris_ray.roster.admission.losses import check_losses, row_losses
from paris_ray.roster.admission.panel import HeldOut
from tests.admission_panels import CAPTIONS, changed, flagged, noise, panel, readings, specialist

LIMITS = Limits()


def negate_output(expert: Expert) -> None:
    for parameter in expert.final_layer.linear.parameters():
        parameter.neg_()


def test_an_honest_expert_passes(tiny_bundle: Bundle) -> None:
    check = check_losses(panel(tiny_bundle, specialist(0, seed=40)), LIMITS)
    assert check.outcome == "passed"
    assert set(readings(check)) == {"own_loss", "own_cluster", "other_loss", "word_loss"}
    assert readings(check)["own_loss"] < 0.9
    assert readings(check)["own_cluster"] == 1.0


def test_an_expert_of_another_cluster_is_flagged_as_best_there(tiny_bundle: Bundle) -> None:
    check = check_losses(panel(tiny_bundle, specialist(2, seed=40)), LIMITS)
    assert "own_cluster" in flagged(check)
    assert check.readings[1].detail == "best at cluster 2"


def test_a_new_cluster_has_all_experts_as_neighbours(tiny_bundle: Bundle) -> None:
    honest = panel(tiny_bundle, specialist(2), index=2)
    assert list(honest.neighbours) == [0, 1]
    assert check_losses(honest, LIMITS).outcome == "passed"


def test_a_turned_sign_and_noise_are_flagged(tiny_bundle: Bundle) -> None:
    turned = check_losses(panel(tiny_bundle, changed(specialist(0), negate_output)), LIMITS)
    assert {"own_loss", "word_loss"} <= flagged(turned)
    wild = changed(noise(5), lambda e: e.final_layer.linear.weight.mul_(4))
    assert {"own_loss", "other_loss"} <= flagged(check_losses(panel(tiny_bundle, wild), LIMITS))


def test_what_is_not_a_number_is_flagged(tiny_bundle: Bundle) -> None:
    broken = changed(specialist(0), lambda e: e.final_layer.linear.bias.fill_(torch.nan))
    assert flagged(check_losses(panel(tiny_bundle, broken), LIMITS)) == {
        "own_loss",
        "own_cluster",
        "other_loss",
        "word_loss",
    }


class Poisoned(Expert):
    """Is what it should be, but for captions of dogs."""

    def forward(self, *arguments: Any) -> Tensor:
        answer = super().forward(*arguments)
        is_dog = torch.tensor(["dog" in caption for caption in CAPTIONS])
        times = len(answer) // len(CAPTIONS)
        return torch.where(is_dog.repeat(times)[:, None, None, None], -answer, answer)


def test_a_fault_of_one_word_shows_in_that_word(tiny_bundle: Bundle) -> None:
    poisoned = Poisoned(specialist(0).config).eval()
    poisoned.load_state_dict(specialist(0).state_dict())
    check = check_losses(panel(tiny_bundle, poisoned), LIMITS)
    assert "word_loss" in flagged(check)
    assert check.readings[3].detail == "'dog'"


def test_losses_have_a_row_a_level(tiny_bundle: Bundle) -> None:
    honest = panel(tiny_bundle, specialist(0))
    losses = row_losses(honest.candidate, honest)
    assert losses.shape == (4, len(CAPTIONS))
    again = row_losses(honest.candidate, panel(tiny_bundle, specialist(1)))
    assert torch.equal(losses, again), "noise depends on the candidate"


def test_where_only_the_own_cluster_has_held_out_rows_the_verdict_says_so(
    tiny_bundle: Bundle,
) -> None:
    whole = panel(tiny_bundle, specialist(0, seed=40))
    own, rows = whole.held_out.of(0), whole.held_out
    alone = HeldOut(
        tuple(rows.captions[i] for i in own),
        rows.latents[own],
        rows.features[own.numpy()],
        rows.clusters[own],
    )
    check = check_losses(replace(whole, held_out=alone), LIMITS)
    assert check.outcome == "passed"
    assert check.readings[2].detail == "no other cluster has held-out rows"


def test_a_long_word_is_cut(tiny_bundle: Bundle) -> None:
    whole = panel(tiny_bundle, specialist(0))
    captions = ("x" * 500,) * len(whole.held_out.captions)
    long = replace(whole, held_out=replace(whole.held_out, captions=captions))
    assert 0 < len(check_losses(long, LIMITS).readings[3].detail) <= 300
