"""An ablation: what is compared with what, and what it says of made-up numbers."""

import json
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest

from paris_ray.config import load, packaged_recipes, with_overrides
from paris_ray.errors import ConfigError
from paris_ray.study.ablation import (
    AblationForm,
    ablation_arms,
    ablation_config,
    best,
    compare,
    value_at,
)
from paris_ray.study.ablation_page import ablation_page, ablation_table, verdict

FORM = AblationForm(total_steps=64, seeds=2)


def run_of(
    recipe: str, seed: int, samples: int, right: float, cpu_seconds: float
) -> dict[str, Any]:
    attributes = {"all": {"mean": right, "low": right, "high": right}}
    split = {"captions": 40, "attributes": attributes, "squared_error": {"mean": 1 - right}}
    return {
        "recipe": recipe,
        "seed": seed,
        "tables": ["samples"],
        "samples": samples,
        "cpu_seconds": cpu_seconds,
        "routing": "one model",
        "drawn": {"one model": {"held_out": split}},
    }


def both_seeds(recipe: str, half: float, whole: float, cpu_per_sample: float) -> list[dict]:
    """Two seeds, of which the second has 0.1 more right, after 500 and 1,000 samples."""
    return [
        run_of(recipe, seed, samples, right + seed / 10, samples * cpu_per_sample)
        for seed in (0, 1)
        for samples, right in ((500, half), (1000, whole))
    ]


ARMS = [
    *both_seeds("base", 0.2, 0.6, 0.01),
    *both_seeds("muon", 0.4, 0.8, 0.02),
    *both_seeds("layersync", 0.1, 0.5, 0.01),
]


# --- the arms ------------------------------------------------------------------------------------


def test_every_recipe_has_every_seed_length_and_its_control() -> None:
    config = ablation_config(load("quickstart", ["seed=4", "training.num_cpus=0.5"]))
    arms = ablation_arms(config, FORM, ["muon+layersync", "min_snr"])
    own = {arm.folder: with_overrides(config, arm.overrides) for arm in arms}
    assert sorted(own) == sorted(
        f"{recipe}{length}.{seed}"
        for recipe in ("base", "epsilon", "muon+layersync", "min_snr")
        for length in ("-x0.5", "-x0.625", "")
        for seed in (4, 5)
    )
    assert {each.cluster.num_clusters for each in own.values()} == {1}
    assert {each.training.num_cpus for each in own.values()} == {0.5}
    both = own["muon+layersync-x0.5.5"]
    assert (both.training.hidden_optimizer, both.training.layersync_weight) == ("muon", 0.2)
    assert (both.training.steps, both.seed_training.steps, both.seed) == (32, 0, 5)
    base, epsilon, weighed = own["base.4"], own["epsilon.4"], own["min_snr.4"]
    assert {base.training.hidden_optimizer, base.seed_training.hidden_optimizer} == {"adamw"}
    assert base.training == epsilon.training == replace(weighed.training, min_snr_gamma=None)
    assert epsilon.expert == weighed.expert == replace(base.expert, prediction="epsilon")


def test_epsilon_is_a_control_only_where_it_is_needed() -> None:
    config = ablation_config(load("quickstart"))
    assert {arm.recipe for arm in ablation_arms(config, FORM, ["muon"])} == {"base", "muon"}


def test_unknown_recipes_and_broken_steps_are_refused() -> None:
    config = ablation_config(load("quickstart"))
    with pytest.raises(ConfigError) as caught:
        ablation_arms(config, FORM, ["muon+mu"])
    allowed = ", ".join(packaged_recipes())
    assert str(caught.value) == f"recipe='mu' is not allowed: one of {allowed}"
    with pytest.raises(ConfigError, match=r"arm base-x0\.5: 0\.5 steps are not a whole number"):
        ablation_arms(config, replace(FORM, total_steps=1), ["muon"])
    assert AblationForm().totals == (Fraction(1, 2), Fraction(5, 8), Fraction(1))


# --- the numbers ---------------------------------------------------------------------------------


def test_a_recipe_is_compared_by_when_it_comes_to_its_controls_quality() -> None:
    base, muon, layersync = compare(ARMS)
    assert (base.recipe, base.gain) == ("base", {"samples": 1, "cpu_seconds": 1})
    # Means over seeds: base ends at 0.65; muon has 0.45 after 500 and 0.85 after 1,000.
    assert muon.reached["samples"].samples == pytest.approx(750)
    assert muon.gain["samples"] == pytest.approx(1000 / 750)
    # A sample of it takes twice the time: 750 of them take 15 s, where base took 10.
    assert muon.reached["cpu_seconds"].samples == pytest.approx(15)
    assert muon.gain["cpu_seconds"] == pytest.approx(10 / 15)
    by_seed = [each.samples for each in muon.reached_by_seed["samples"]]
    assert by_seed == pytest.approx([812.5, 687.5])
    # After base's 10 s it has seen 500 samples.
    assert (muon.at_equal_cpu.low, muon.at_equal_cpu.high) == pytest.approx((0.4, 0.5))
    assert (muon.held_out.mean, muon.samples, muon.seeds) == (pytest.approx(0.85), 1000, 2)
    assert muon.cpu_ms_per_sample.mean == pytest.approx(20)
    assert layersync.gain == {"samples": None, "cpu_seconds": None}
    assert layersync.reached["samples"].best == pytest.approx(0.55)
    assert best([base, muon, layersync]) == muon


def test_the_value_of_a_curve_beyond_its_ends_is_theirs() -> None:
    points = [(2.0, 0.4), (1.0, 0.2)]
    assert [value_at(points, x) for x in (0.5, 1.0, 1.5, 2.0, 3.0)] == pytest.approx(
        [0.2, 0.2, 0.3, 0.4, 0.4]
    )


def test_the_page_prints_losers_and_missed_goals() -> None:
    ablation = {"command": "a test", "machine": "this", "image_size": 32, "arms": ARMS}
    page = ablation_page(json.loads(json.dumps(ablation)))
    assert "Written by `a test` on this; nothing here is typed. 12 runs, seeds 0 to 1" in page
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert rows[1] == (
        "| `muon` | `base` | 2 | 1,000 | 0.850 (0.800 to 0.900) | 0.450 (0.400 to 0.500) | "
        "48.7 (40.3 to 57.0) | 20.00 | 750 (812, 687) | 1.33 | 15 (16, 14) | 0.67 |"
    )
    assert rows[2].endswith(
        "| missed, 0.550 (missed, 0.500, missed, 0.600) | missed | "
        "missed, 0.550 (missed, 0.500, missed, 0.600) | missed |"
    )
    assert (
        "The best recipe is `muon`: 1.33 times fewer samples (goal 1.5: missed), "
        "0.67 times fewer CPU-seconds (goal 1.3: missed)."
    ) in page


def test_goals_can_be_met_and_early_points_are_said() -> None:
    compared = compare([*ARMS, *both_seeds("muon+layersync", 0.7, 0.9, 0.011)])
    assert verdict(compared) == (
        "The best recipe is `muon+layersync`: at least 2.00 times fewer samples (goal 1.5: met), "
        "at least 1.82 times fewer CPU-seconds (goal 1.3: met)."
    )
    assert "| at most 500 (at most 500, at most 500) |" in ablation_table(compared)
    assert verdict(compare(ARMS[:4])) == "No recipe was tried."
