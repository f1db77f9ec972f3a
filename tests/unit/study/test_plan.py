"""The plan of a study: equal samples to the last one, own names, one model that is dense."""

from dataclasses import replace
from fractions import Fraction

import pytest

from paris_ray.config import load, with_overrides
from paris_ray.errors import ConfigError
from paris_ray.models.flops import forward_macs, step_macs, text_length
from paris_ray.study.arms import Arm
from paris_ray.study.forms import FULL_FORM, SMALL_FORM, Form
from paris_ray.study.plan import CONTROLS, equal_flops_drawings, study_arms, study_config

FORMS = [FULL_FORM, SMALL_FORM]


def of_first_seed(arms: list[Arm]) -> list[Arm]:
    """Return the arms of one seed: those of the others differ in it alone."""
    return [arm for arm in arms if arm.seed == arms[0].seed]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_all_arms_but_the_curves_see_exactly_as_many_samples(form: Form) -> None:
    config = study_config(load("quickstart", form.overrides))
    for arm in of_first_seed(study_arms(config, form)):
        own = with_overrides(config, arm.overrides)
        seed, training = own.seed_training, own.training
        steps = seed.steps + own.cluster.num_clusters * training.steps
        assert seed.batch_size == training.batch_size
        assert (seed.epochs, training.epochs) == (None, None)
        assert steps == arm.total_steps
        if arm.tables != ("samples",):
            assert steps == form.total_steps, arm.name
        else:
            assert Fraction(steps, form.total_steps) in form.totals


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_names_are_unique_and_every_configuration_is_allowed(form: Form) -> None:
    config = study_config(load("quickstart", form.overrides))
    arms = study_arms(config, form)
    assert len({arm.folder for arm in arms}) == len(arms)
    assert len({(arm.overrides, arm.seed) for arm in arms}) == len(arms), "two arms are the same"
    for arm in of_first_seed(arms):
        own = with_overrides(config, arm.overrides)
        names = [with_overrides(own, each.overrides).evaluation.name for each in arm.drawings]
        assert None not in names
        assert len(set(names)) == len(names)


def test_one_expert_is_the_dense_model_and_it_and_scratch_are_in_every_table() -> None:
    config = study_config(load("quickstart"))
    arms = study_arms(config, FULL_FORM)
    dense = [arm for arm in arms if arm.num_experts == 1]
    assert {arm.recipe for arm in dense} == {"dense"}
    assert {arm.seed_steps for arm in dense} == {0}
    assert {arm.routing for arm in dense} == {"one model"}
    for name in ("dense", "scratch"):
        (first, *_) = [arm for arm in arms if arm.name == name]
        assert set(first.tables) == {*CONTROLS, "routing"}
    counts = {arm.num_experts for arm in arms if "experts" in arm.tables}
    assert counts == {1, 2, 4, 8, 16}
    own = [with_overrides(config, arm.overrides) for arm in of_first_seed(arms)]
    assert {each.cluster.shared_share for each in own} == {0, 0.05, 0.1, 0.25}
    assert {each.cluster.max_imbalance for each in own} == {1.0, 1.25, 4.0}


def test_every_arm_has_every_seed() -> None:
    arms = study_arms(study_config(load("quickstart", ["seed=5"])), FULL_FORM)
    for name in {arm.name for arm in arms}:
        assert [arm.seed for arm in arms if arm.name == name] == [5, 6, 7], name


def test_learning_rate_and_average_vary_after_a_seed() -> None:
    config = study_config(load("quickstart"))
    arms = study_arms(config, FULL_FORM)
    own = {arm.name: with_overrides(config, arm.overrides) for arm in arms if arm.seed == 0}
    rate, usual = config.training.learning_rate, own["seeded"]
    assert own["seeded-rate-x0.5"].training.learning_rate == rate / 2
    assert own["seeded-ema-0.9"].training.ema_decay == 0.9
    assert own["seeded-ema-0"].training.ema_decay == 0
    for name in ("seeded-rate-x0.5", "seeded-ema-0.9", "seeded-ema-0"):
        assert own[name].seed_training == usual.seed_training, "the seed is the same"


def test_steps_that_experts_cannot_share_are_refused() -> None:
    form = replace(FULL_FORM, total_steps=2561)
    with pytest.raises(ConfigError, match=r"arm scratch: 320\.125 steps are not a whole number"):
        study_arms(study_config(load("quickstart")), form)


def test_a_study_needs_like_experts_and_something_to_measure_with() -> None:
    with pytest.raises(ConfigError, match="compares like experts"):
        study_config(load("quickstart", ["experts.1.training.steps=7"]))
    with pytest.raises(ConfigError, match=r"corpus.attributes=None"):
        study_config(load("quickstart", ["corpus.kind=openmoji"]))
    with pytest.raises(ConfigError, match=r"corpus.held_out_share=0"):
        study_config(load("quickstart", ["corpus.held_out_share=0"]))


@pytest.mark.parametrize(
    "override",
    [
        "prepared_from=/data/other",
        "training.init_from=/data/expert",
        "seed_training.init_from=/data/expert",
        "evaluation.name=mine",
        "cluster.features=random",
    ],
)
def test_what_arms_decide_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=f"{override.partition('=')[0]}=.* is not allowed"):
        study_config(load("quickstart", [override]))


def test_one_model_in_more_steps_costs_what_routed_experts_cost() -> None:
    config = study_config(load("quickstart"))
    dense = with_overrides(config, ["cluster.num_clusters=1", "router.num_experts=1"])
    drawings = equal_flops_drawings(config, 8)
    for asked, drawing in zip((1, 2, 8), drawings, strict=True):
        more = with_overrides(dense, drawing.overrides)
        wanted = config.sampling.num_inference_steps * step_macs(config, asked)
        one_step = forward_macs(config.expert, text_length(config))
        assert abs(more.sampling.num_inference_steps * step_macs(more, 1) - wanted) <= one_step / 2
