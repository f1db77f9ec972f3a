"""Distillation on a real Ray, from a finished run to a bundle of one expert."""

import hashlib
import logging
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import safetensors.torch

from paris_ray.artifacts import MANIFEST, read_manifest
from paris_ray.bundle import load_bundle
from paris_ray.config import Config, DistillationConfig
from paris_ray.errors import ArtifactError, ConfigError
from paris_ray.folders import Folder
from paris_ray.run import (
    BUNDLE,
    DISTILLED,
    EVALUATION,
    EXPERT_WEIGHTS,
    FEW_STEP,
    SEED,
    STUDENT,
    Run,
)
from paris_ray.sampling import generate

pytestmark = pytest.mark.ray

PROMPTS = ["a red square number 1", "a blue circle number 0"]


@pytest.fixture(scope="module")
def distilled(ray_session: None, tiny_config: Config) -> Run:
    """The finished run, distilled into one expert of one step."""
    from paris_ray.pipeline.stages import run

    run(tiny_config, "pipeline")
    training = replace(tiny_config.training, steps=12)
    config = replace(
        tiny_config,
        distillation=DistillationConfig(num_inference_steps=1),
        distil_training=training,
        few_step_training=training,
    )
    run(config, "distil")
    return Run(config)


def test_students_start_from_the_seed_and_from_each_other(distilled: Run) -> None:
    student, few_step = (
        read_manifest(distilled.student(name), DISTILLED) for name in (STUDENT, FEW_STEP)
    )
    weights = f"expert_0/{EXPERT_WEIGHTS}"
    assert student.parents["init"] == read_manifest(distilled.seed, SEED).files[EXPERT_WEIGHTS]
    assert few_step.parents["init"] == student.files[weights] != few_step.files[weights]
    assert "held_out_loss" in student.facts
    for name in (STUDENT, FEW_STEP):
        grid = distilled.student(name).read("expert_0/samples.png")
        assert grid.startswith(b"\x89PNG")


def test_students_are_measured_on_the_captions_of_the_ensemble(distilled: Run) -> None:
    ensemble = distilled.evaluation_of(None)
    theirs = read_manifest(ensemble, EVALUATION).facts
    for name in (STUDENT, FEW_STEP):
        folder = distilled.evaluation_of(name)
        facts = read_manifest(folder, EVALUATION).facts
        assert facts["expert_usage"] == [pytest.approx(1.0)]
        if name == STUDENT:
            (losses,) = facts["held_out_losses"]
            of_an_expert = theirs["held_out_losses"][0]
            assert [x is None for x in losses] == [x is None for x in of_an_expert]
        else:  # its velocity is a mean over a step
            assert facts["held_out_losses"] is None
        for split in ("shown", "held_out"):
            keys = [pq.read_table(f"{f.uri}/{split}.parquet")["key"] for f in (ensemble, folder)]
            assert keys[0] == keys[1]
        assert facts["held_out"]["attributes"].keys() == theirs["held_out"]["attributes"].keys()


def test_the_bundle_is_a_normal_one_of_one_expert(distilled: Run) -> None:
    bundle = load_bundle(distilled.distilled_bundle.uri)
    assert bundle.num_experts == 1
    sampling = bundle.facts.sampling
    assert (sampling.num_inference_steps, sampling.routing) == (1, "top-1")
    drawn = [[image.tobytes() for image in generate(bundle, PROMPTS, seed=1)] for _ in range(2)]
    assert drawn[0] == drawn[1]
    facts = read_manifest(distilled.distilled_bundle, BUNDLE).facts
    untaught = f"{STUDENT}_in_few_steps"
    assert list(facts) == ["ensemble", FEW_STEP, STUDENT, untaught]  # as JSON sorts them
    errors = [facts[name]["held_out"]["squared_error"]["mean"] for name in (untaught, STUDENT)]
    assert errors[0] != errors[1]
    card = distilled.distilled_bundle.read("README.md").decode()
    for measured in facts.values():
        assert f"{measured['held_out']['attributes']['all']['mean']:.4f}" in card


def test_running_again_keeps_everything(distilled: Run, caplog: pytest.LogCaptureFixture) -> None:
    from paris_ray.pipeline.stages import run

    before = {name: distilled.distilled.read(name) for name in distilled.distilled.files()}
    with caplog.at_level(logging.INFO, "paris_ray"):
        run(distilled.config, "distil")
    assert caplog.text.count("already finished, kept") == 7
    assert "ensemble" in caplog.text
    after = {name: distilled.distilled.read(name) for name in distilled.distilled.files()}
    assert before == after


def test_what_cannot_be_distilled_is_refused(distilled: Run) -> None:
    from paris_ray.pipeline.distil import distil

    two = replace(distilled.config, distillation=DistillationConfig(num_inference_steps=2))
    with pytest.raises(ConfigError, match=r"a divisor of sampling\.num_inference_steps=3"):
        distil(two)
    other = replace(distilled.config, distillation=DistillationConfig(routed_share=0.1))
    with pytest.raises(ArtifactError, match="another configuration"):
        distil(other)
    empty = replace(distilled.config, run_dir=(Folder(distilled.folder.uri) / "nowhere").uri)
    with pytest.raises(ArtifactError, match="no finished"):
        distil(empty)


def copy_of(run: Run, place: Path) -> Config:
    """Return the configuration of a copy of a run, which a test may change."""
    shutil.copytree(run.folder.uri, place)
    return replace(run.config, run_dir=str(place))


@pytest.mark.parametrize(
    "other",
    [
        DistillationConfig(num_inference_steps=3),
        DistillationConfig(num_inference_steps=1, objective="consistency"),
    ],
)
def test_other_few_steps_keep_the_student(
    distilled: Run, tmp_path: Path, other: DistillationConfig
) -> None:
    from paris_ray.pipeline.distil import distil

    config = replace(
        copy_of(distilled, tmp_path / "run"),
        distillation=other,
        few_step_training=replace(distilled.config.few_step_training, steps=2),
    )
    run = Run(config)
    to_delete = [run.student(FEW_STEP), run.evaluation_of(FEW_STEP), run.distilled_bundle]
    for folder in to_delete:  # as docs/training.md lists them
        with pytest.raises(ArtifactError, match=f"^{re.escape(folder.uri)} was made"):
            distil(config)
        folder.clear()
    distil(config)
    for folder in ("student", "evaluation/student"):
        manifest = f"{folder}/{MANIFEST}"
        assert run.distilled.read(manifest) == distilled.distilled.read(manifest)
    few_step = run.student(FEW_STEP).read(f"expert_0/{EXPERT_WEIGHTS}")
    assert few_step != distilled.student(FEW_STEP).read(f"expert_0/{EXPERT_WEIGHTS}")
    sampling = load_bundle(run.distilled_bundle.uri).facts.sampling
    assert sampling.num_inference_steps == other.num_inference_steps


def test_the_card_tells_of_weights_of_others_that_a_student_starts_from(
    distilled: Run, tmp_path: Path
) -> None:
    from paris_ray.pipeline.distil import distil

    config, foreign = copy_of(distilled, tmp_path / "run"), tmp_path / "foreign"
    shutil.copytree(distilled.seed.uri, foreign)
    weights = foreign / EXPERT_WEIGHTS
    state = safetensors.torch.load_file(weights)
    safetensors.torch.save_file({name: 2 * value for name, value in state.items()}, weights)
    Run(config).distilled.clear()
    distil(
        replace(
            config,
            distillation=DistillationConfig(num_inference_steps=None),
            distil_training=replace(config.distil_training, init_from=str(foreign), steps=2),
        )
    )
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    told = f"- student was started from other weights (SHA-256 `{digest}`)."
    assert told in Run(config).distilled_bundle.read("README.md").decode()
    assert "other weights" not in distilled.distilled_bundle.read("README.md").decode()
