"""Experts that differ in objective, size and training, from pictures to a bundle."""

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from paris_ray.artifacts import read_manifest
from paris_ray.bundle import load_bundle
from paris_ray.config import load, load_lora
from paris_ray.errors import ArtifactError
from paris_ray.folders import Folder
from paris_ray.run import EVALUATION, EXPERT, EXPERT_WEIGHTS, Run
from paris_ray.sampling import generate

pytestmark = pytest.mark.ray

ROSTER = [
    "corpus.limit=72",
    "seed_training.steps=0",  # experts that differ cannot start from one
    "cluster.num_clusters=3",
    "cluster.num_fine=12",
    "codec.num_components=16",
    "features.steps=2",
    "features.batch_size=16",
    "features.num_cpus=1",
    "features.threads=1",
    "expert.hidden_size=32",
    "expert.num_layers=2",
    "training.steps=8",
    "training.batch_size=8",
    "training.num_cpus=0.5",
    "experts.1.expert.prediction=epsilon",
    "experts.1.training.t_distribution=uniform",
    "experts.2.expert.hidden_size=48",
    "experts.2.expert.num_layers=3",
    "experts.2.expert.blocks=modern",
    "experts.2.expert.text_adapter=true",
    "experts.2.training.sample_every=4",
    "experts.2.training.batch_size=4",
    "router.hidden_size=32",
    "router_training.steps=4",
    "router_training.threads=1",
    "sampling.num_inference_steps=3",
    "sampling.routing=full",
    "evaluation.num_tasks=1",
    "evaluation.max_captions=4",
    "evaluation.max_gallery=8",
]


@pytest.fixture(scope="module")
def finished(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of a preconditioned, an epsilon and a larger expert of modern blocks."""
    from paris_ray.pipeline.stages import run

    config = load("quickstart", [f"run_dir={tmp_path_factory.mktemp('mixed') / 'run'}", *ROSTER])
    run(config, "pipeline")
    return Run(config)


@pytest.fixture
def copy_of(finished: Run, tmp_path: Path) -> Callable[..., Run]:
    """Return a copy of the finished run without some of its experts."""

    def copy(*without: int) -> Run:
        shutil.copytree(finished.folder.uri, tmp_path / "copy")
        run = Run(replace(finished.config, run_dir=str(tmp_path / "copy")))
        for k in without:
            shutil.rmtree(run.expert(k).uri)
        return run

    return copy


def test_a_mixed_roster_becomes_a_bundle_that_draws(finished: Run) -> None:
    bundle = load_bundle(finished.bundle.uri)
    assert [c.prediction for c in bundle.expert_configs] == [
        "preconditioned",
        "epsilon",
        "preconditioned",
    ]
    shapes = [(config.hidden_size, config.num_layers) for config in bundle.expert_configs]
    assert shapes == [(32, 2), (32, 2), (48, 3)]
    newer = [(config.blocks, config.text_adapter) for config in bundle.expert_configs]
    assert newer == [("released", False), ("released", False), ("modern", True)]
    card = Folder(finished.bundle.uri).read("README.md").decode()
    assert "| 2 | 48 wide, 3 layers, modern blocks, a text adapter | preconditioned |" in card
    usage = read_manifest(finished.evaluation, EVALUATION).facts["expert_usage"]
    assert len(usage) == 3 and min(usage) > 0
    images = generate(bundle, ["a red heart", "a blue fish"], seed=1)
    assert all(image.size == (64, 64) for image in images)
    assert all(np.asarray(image).std() > 0 for image in images)


@pytest.mark.parametrize("routing", ["top-1", "full"])
def test_every_expert_of_the_roster_gives_finite_latents(finished: Run, routing: str) -> None:
    from paris_ray.sampling.generation import sample
    from paris_ray.sampling_options import sampling_options

    bundle = load_bundle(finished.bundle.uri)
    text = bundle.encode_text([f"a picture number {i}" for i in range(6)])
    options = sampling_options(bundle, routing=routing, guidance_scale=3.0)
    assert torch.isfinite(sample(bundle, text, range(6), options).latents).all()


def test_a_lora_of_the_newer_expert_is_drawn_with(finished: Run, tmp_path: Path) -> None:
    from paris_ray.pipeline.lora import train_lora

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(4):
        Image.new("RGB", (64, 64), (255, 60 * i, 0)).save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text("a red square")
    training = ["training.steps=6", "training.batch_size=4", "training.learning_rate=0.05"]
    config = load_lora(overrides=[*training, "lora.r=2", "training.num_cpus=0.5"])
    place, output = finished.bundle.uri, str(tmp_path / "lora")
    manifest = train_lora(config, bundle=place, expert=2, data=str(pictures), output=output)
    assert manifest.facts["rows"] == 4
    bundle = load_bundle(place)
    bundle.add_lora("mine", output)
    assert bundle.loras == {"mine": 2}
    with_lora, without = (
        generate(bundle, ["a red heart"], seed=1, lora=lora)[0].tobytes() for lora in ("mine", None)
    )
    assert with_lora != without


def test_sample_grids_on_the_way_are_no_part_of_the_result(finished: Run) -> None:
    # 8 steps, one grid every 4: that of step 8 is samples.png.
    assert finished.expert(2).read("samples/step-000004.png").startswith(b"\x89PNG")
    assert not finished.expert(2).exists("samples/step-000008.png")
    assert not finished.expert(0).exists("samples")
    files = read_manifest(finished.expert(2), EXPERT).files
    assert set(files) == {"config.json", EXPERT_WEIGHTS, "samples.png"}


@pytest.mark.parametrize("expert", [1, 2])
def test_an_unlike_expert_alone_is_identical_to_one_in_the_roster(
    finished: Run, copy_of: Callable[..., Run], expert: int
) -> None:
    from paris_ray.pipeline.experts import train_experts

    alone = copy_of(0, 1, 2)
    train_experts(alone.config, only=[expert])
    apart = read_manifest(alone.expert(expert), EXPERT)
    assert apart.digest == read_manifest(finished.expert(expert), EXPERT).digest
    assert [alone.expert(k).exists() for k in range(3)] == [k == expert for k in range(3)]


def test_changing_one_expert_leaves_the_others_finished(
    copy_of: Callable[..., Run], caplog: pytest.LogCaptureFixture
) -> None:
    from paris_ray.pipeline.experts import train_experts

    run = copy_of()
    overrides = {**run.config.experts, "2": {"training": {"steps": 2}}}
    changed = replace(run.config, experts=overrides)
    with pytest.raises(ArtifactError, match=r"expert_2 was made with another configuration"):
        train_experts(changed)
    shutil.rmtree(run.expert(2).uri)
    with caplog.at_level(logging.INFO, "paris_ray"):
        train_experts(changed)
    assert caplog.text.count("already finished, kept") == 2
    assert load_bundle(run.bundle.uri).expert_configs[2].hidden_size == 48
    assert b"hidden_size: 32" in run.expert(2).read("resolved_config.yaml")


def test_other_weights_to_start_from_make_another_expert(
    finished: Run, copy_of: Callable[..., Run], tmp_path: Path
) -> None:
    from paris_ray.pipeline.experts import train_experts

    run, source = copy_of(0), tmp_path / "source"
    shutil.copytree(finished.expert(0).uri, source)
    training = {"init_from": str(source), "steps": 2}
    config = replace(run.config, experts={"0": {"training": training}})
    train_experts(config, only=[0])
    started = read_manifest(run.expert(0), EXPERT)
    assert set(started.parents) == {"shard", "init"}
    train_experts(config, only=[0])  # kept
    weights = source / EXPERT_WEIGHTS
    state = safetensors.torch.load_file(weights)
    safetensors.torch.save_file({name: value + 1 for name, value in state.items()}, weights)
    with pytest.raises(ArtifactError, match="made from another init"):
        train_experts(config, only=[0])
    weights.unlink()
    with pytest.raises(ArtifactError, match="does not exist"):
        train_experts(config, only=[0])
