"""The options of training: schedules, parts of a batch, where to start, text, what is logged."""

import itertools
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch._dynamo.utils import counters

from paris_ray.artifacts import CHECKPOINT, EVENTS, METRICS, TIMINGS, VerifiedFolder, publish
from paris_ray.bundle import load_expert
from paris_ray.config import ExpertConfig, Precision, RouterConfig, TrainingConfig
from paris_ray.config.release import write_document
from paris_ray.devices import autocast, peak_flops, peak_flops_of, resolve_precision
from paris_ray.diffusion import denoising_loss, sample_path
from paris_ray.errors import ArtifactError, BundleError, ConfigError, TrainingError
from paris_ray.folders import Folder
from paris_ray.models import Expert, TextConditioning
from paris_ray.models.convert import convert_dit
from paris_ray.models.lora import Adapter, LoRAConfig, attach
from paris_ray.run import EXPERT_WEIGHTS, MODEL_CONFIG
from paris_ray.seeding import build_seeded
from paris_ray.training.data import Batch, batches, load_dataset
from paris_ray.training.loop import (
    Progress,
    ProgressClock,
    TrainingLoop,
)
from paris_ray.training.router import train_router
from paris_ray.training.schedule import learning_rate, with_steps
from paris_ray.training.tensorboard import TENSORBOARD
from paris_ray.training.trainer import set_block_options
from tests.training_shards import (
    CLIP_WIDTH,
    EXPERT,
    GEOMETRY,
    TRAINING,
    WIDTH,
    carry_on,
    train,
    write_clip,
    write_shard,
    write_token_shard,
)

CROSS_ATTENTION = replace(EXPERT, text_injection="cross_attention", prediction="velocity")
READS_CLIP = replace(CROSS_ATTENTION, text_embed_dim=CLIP_WIDTH)


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return write_shard(Folder(tmp_path_factory.mktemp("shard")), 10)


@pytest.fixture(scope="module")
def trained(shard: Folder, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """A finished expert."""
    output = Folder(tmp_path_factory.mktemp("trained"))
    train(shard, output)
    return output


def weights_in(folder: Folder) -> dict[str, Tensor]:
    return safetensors.torch.load(folder.read(EXPERT_WEIGHTS))


def copy_of(expert: Folder, target: Path) -> Folder:
    """A copy of an expert's configuration and weights."""
    folder = Folder(target)
    for name in (MODEL_CONFIG, EXPERT_WEIGHTS):
        folder.write(name, expert.read(name))
    return folder


def rows_of(folder: Folder, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in folder.read(name).splitlines()]


SCHEDULE = TrainingConfig(
    steps=100,
    learning_rate=1.0,
    warmup_steps=10,
    decay_share=0.5,
    final_learning_rate_share=0.1,
)


def rates_of(config: TrainingConfig) -> list[float]:
    return [learning_rate(step, config) for step in range(config.steps)]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_learning_rate_rises_stays_and_falls(schedule: Any) -> None:
    rates = rates_of(replace(SCHEDULE, schedule=schedule))
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10:51] == [1.0] * 41
    assert all(a > b for a, b in itertools.pairwise(rates[50:]))
    assert 0.1 < rates[-1] < 0.13
    assert rates[75] == pytest.approx(0.55)  # half way of both


def test_a_line_is_straight_and_a_cosine_starts_and_ends_gently() -> None:
    steps = {
        schedule: np.diff(rates_of(replace(SCHEDULE, schedule=schedule))[50:])
        for schedule in ("linear", "cosine")
    }
    assert steps["linear"] == pytest.approx(-0.9 / 50)
    assert abs(steps["cosine"][0]) < abs(steps["cosine"][-1]) < 0.1 * abs(steps["cosine"][25])


def test_a_constant_rate_does_not_fall() -> None:
    assert rates_of(replace(SCHEDULE, schedule="constant"))[10:] == [1.0] * 90


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_rate_that_falls_over_all_steps_first_rises(schedule: Any) -> None:
    rates = rates_of(replace(SCHEDULE, schedule=schedule, decay_share=1.0))
    assert max(rates) == rates[9] == rates[10] == 1.0
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    only_warmup = replace(SCHEDULE, schedule=schedule, warmup_steps=200)
    assert rates_of(only_warmup) == sorted(rates_of(only_warmup))


@pytest.mark.parametrize(("epochs", "steps"), [(1.0, 3), (1.5, 4), (2.0, 5), (0.01, 1)])
def test_epochs_are_those_of_the_shard(epochs: float, steps: int) -> None:
    assert with_steps(replace(TRAINING, epochs=epochs), num_rows=10).steps == steps
    assert with_steps(TRAINING, num_rows=10) is TRAINING


def test_training_lasts_as_many_epochs_as_wanted(shard: Folder, tmp_path: Path) -> None:
    seen: list[Progress] = []
    train(
        shard,
        Folder(tmp_path),
        config=replace(TRAINING, epochs=1.5, steps=1000),
        on_progress=seen.append,
    )
    assert (seen[-1].num_steps, seen[-1].samples_seen) == (4, 16)
    assert Folder(tmp_path).exists(EXPERT_WEIGHTS)


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_parts_are_one_batch_up_to_rounding(
    shard: Folder, tmp_path: Path, parts: int
) -> None:
    # The gradient of the keys' biases is rounding alone, which Adam must not make a step of.
    config = replace(TRAINING, adam_eps=1e-6)
    whole, output = Folder(tmp_path / "whole"), Folder(tmp_path / "parts")
    train(shard, whole, config=config)
    train(shard, output, config=replace(config, accumulation_steps=parts))
    torch.testing.assert_close(weights_in(output), weights_in(whole), rtol=1e-4, atol=1e-5)
    losses, expected = ([row["loss"] for row in rows_of(f, METRICS)] for f in (output, whole))
    assert losses == pytest.approx(expected, rel=1e-4)
    assert output.read(EXPERT_WEIGHTS) != whole.read(EXPERT_WEIGHTS)  # it was cut


def test_blocks_are_run_again_in_the_backward_pass_if_wanted(shard: Folder) -> None:
    expert, runs = build_seeded(lambda: Expert(EXPERT), 0), []
    expert.layers[0].register_forward_pre_hook(lambda *_: runs.append(1))
    batch = batches(load_dataset([shard]), TRAINING, seed=0, purpose="test")(0)
    for recompute in (False, True):
        set_block_options(expert, replace(TRAINING, gradient_checkpointing=recompute))
        path = sample_path(batch.latents, batch.noise, batch.t)
        denoising_loss(expert, path, TextConditioning.from_pooled(batch.text)).backward()
    assert len(runs) == 1 + 2


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_blocks_are_compiled_once_and_train_the_same_up_to_rounding(
    shard: Folder, tmp_path: Path
) -> None:
    expert, plain, compiled = replace(EXPERT, num_layers=3), tmp_path / "a", tmp_path / "b"
    train(shard, Folder(plain), expert=expert)
    torch.compiler.reset()
    counters.clear()
    train(shard, Folder(compiled), expert=expert, config=replace(TRAINING, compile=True))
    assert counters["stats"]["unique_graphs"] == 1
    first, second = weights_in(Folder(plain)), weights_in(Folder(compiled))
    torch.testing.assert_close(second, first, rtol=1e-3, atol=1e-4)


def test_the_epsilon_of_adam_counts(shard: Folder, trained: Folder, tmp_path: Path) -> None:
    output = Folder(tmp_path)
    train(shard, output, config=replace(TRAINING, adam_eps=1e3))
    first = build_seeded(lambda: Expert(EXPERT), 0).state_dict()
    torch.testing.assert_close(weights_in(output), dict(first), rtol=1e-3, atol=1e-4)


def test_gradients_are_clipped_unless_they_are_not_to_be(shard: Folder, tmp_path: Path) -> None:
    weights = {
        limit: train(
            shard,
            Folder(tmp_path / str(limit)),
            config=replace(TRAINING, max_grad_norm=limit),
        )
        for limit in (None, 1e9, 1e-3)
    }
    assert weights[None] == weights[1e9] != weights[1e-3]


# --- where to start ---


def standing_still(init_from: Folder) -> TrainingConfig:
    """A training that keeps the weights it starts from."""
    config = replace(TRAINING, steps=1, learning_rate=1e-12, warmup_steps=0, text_dropout=0.5)
    return replace(config, init_from=init_from.uri)


def test_training_starts_from_given_weights(shard: Folder, trained: Folder, tmp_path: Path) -> None:
    output = Folder(tmp_path)
    expert = replace(EXPERT, prediction="velocity", layer_norm_eps=1e-5)
    train(shard, output, expert=expert, config=standing_still(trained), seed=7)
    torch.testing.assert_close(weights_in(output), weights_in(trained), rtol=1e-6, atol=1e-7)
    assert load_expert(VerifiedFolder(output, None)).config == expert


def test_half_precision_weights_are_trained_in_float32(
    shard: Folder, trained: Folder, tmp_path: Path
) -> None:
    start, output = copy_of(trained, tmp_path / "start"), Folder(tmp_path / "output")
    half = {name: value.half() for name, value in weights_in(trained).items()}
    start.write(EXPERT_WEIGHTS, safetensors.torch.save(half))
    train(shard, output, config=standing_still(start))
    found = weights_in(output)
    assert {value.dtype for value in found.values()} == {torch.float32}
    expected = {name: value.float() for name, value in half.items()}
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_a_converted_dit_is_a_start(tmp_path: Path) -> None:
    grid, width = 2, 16
    config = ExpertConfig(
        input_size=2 * grid,
        hidden_size=width,
        num_layers=1,
        num_heads=2,
        text_embed_dim=4,
    )
    conversion = convert_dit(random_dit(width, grid), num_heads=2, num_classes=3, text_embed_dim=4)
    assert conversion.expert.config == config
    start, output = Folder(tmp_path / "dit"), Folder(tmp_path / "output")
    start.write_json(MODEL_CONFIG, write_document(config))
    start.write(EXPERT_WEIGHTS, safetensors.torch.save(conversion.expert.state_dict()))
    latents = np.random.default_rng(0).standard_normal((6, 4, 4, 4)).astype(np.float16)
    shard = write_shard(Folder(tmp_path / "shard"), 6, latents=latents)
    train(shard, output, expert=config, config=standing_still(start))
    expected = dict(conversion.expert.state_dict())
    torch.testing.assert_close(weights_in(output), expected, rtol=1e-6, atol=1e-7)


def random_dit(width: int, grid: int) -> dict[str, Tensor]:
    """The state dict of a DiT of one block, of random weights."""
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, grid**2, width),
        "x_embedder.proj.weight": (width, 4, 2, 2),
        "x_embedder.proj.bias": (width,),
        "y_embedder.embedding_table.weight": (4, width),
    }
    linears = {
        "t_embedder.mlp.0": (width, 256),
        "t_embedder.mlp.2": (width, width),
        "blocks.0.attn.qkv": (3 * width, width),
        "blocks.0.attn.proj": (width, width),
        "blocks.0.mlp.fc1": (4 * width, width),
        "blocks.0.mlp.fc2": (width, 4 * width),
        "blocks.0.adaLN_modulation.1": (6 * width, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
        "final_layer.linear": (32, width),
    }
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    generator = torch.Generator().manual_seed(0)
    return {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"hidden_size": 32}, "hidden_size is 16, of the model to train 32"),
        ({"num_heads": 4}, "num_heads is 2, of the model to train 4"),
        ({"text_injection": "cross_attention"}, "text_injection is 'spatial'"),
    ],
)
def test_a_start_of_another_architecture_is_refused(
    shard: Folder, trained: Folder, tmp_path: Path, changes: dict[str, Any], fragment: str
) -> None:
    with pytest.raises(ConfigError, match=f"init_from=.* is not allowed: its {fragment}"):
        train(
            shard,
            Folder(tmp_path),
            expert=replace(EXPERT, **changes),
            config=standing_still(trained),
        )


def without_one(state: dict[str, Tensor]) -> bytes:
    return safetensors.torch.save({k: v for k, v in state.items() if k != "pos_embed"})


def in_two_spellings(state: dict[str, Tensor]) -> bytes:
    name = "layers.0.attn.in_proj"
    return safetensors.torch.save(state | {f"{name}.weight": state[f"{name}_weight"].clone()})


def as_type(dtype: torch.dtype, state: dict[str, Tensor]) -> bytes:
    return safetensors.torch.save(state | {"pos_embed": state["pos_embed"].to(dtype)})


@pytest.mark.parametrize(
    ("damage", "error", "fragment"),
    [
        (lambda state: b"nothing", BundleError, "is not a safetensors file"),
        (
            lambda state: safetensors.torch.save(state)[:-9],
            BundleError,
            "is not a safetensors file",
        ),
        (without_one, BundleError, "'pos_embed' has shape none, of the model to train .1, 4, 16"),
        (
            lambda state: safetensors.torch.save(state | {"pos_embed": torch.zeros(1, 4, 8)}),
            BundleError,
            "'pos_embed' has shape .1, 4, 8., of the model to train .1, 4, 16",
        ),
        (in_two_spellings, BundleError, "in_proj.weight' has shape .48, 16., .* to train none"),
        *(
            (partial(as_type, dtype), BundleError, f"'pos_embed' has dtype {dtype}, allowed: ")
            for dtype in (torch.float64, torch.int32, torch.float8_e4m3fn)
        ),
        (None, ArtifactError, f"{EXPERT_WEIGHTS} does not exist"),
    ],
)
def test_damaged_starts_are_refused(
    shard: Folder,
    trained: Folder,
    tmp_path: Path,
    damage: Callable[[dict[str, Tensor]], bytes] | None,
    error: type[Exception],
    fragment: str,
) -> None:
    start = copy_of(trained, tmp_path / "start")
    if damage is None:
        start.delete(EXPERT_WEIGHTS)
    else:
        start.write(EXPERT_WEIGHTS, damage(weights_in(trained)))
    with pytest.raises(error, match=fragment):
        train(shard, Folder(tmp_path / "out"), config=standing_still(start))


def test_a_checkpoint_belongs_to_the_weights_that_it_started_from(
    shard: Folder, trained: Folder, tmp_path: Path
) -> None:
    output, here, there = (
        Folder(tmp_path / "output"),
        copy_of(trained, tmp_path / "here"),
        copy_of(trained, tmp_path / "there"),
    )
    first = train(shard, output, config=replace(TRAINING, init_from=here.uri))
    moved = replace(TRAINING, init_from=there.uri)
    assert train(shard, output, config=moved) == first
    changed = weights_in(trained) | {"pos_embed": torch.zeros(1, 4, 16)}
    there.write(EXPERT_WEIGHTS, safetensors.torch.save(changed))
    with pytest.raises(ArtifactError, match=f"{CHECKPOINT} belongs to another configuration"):
        train(shard, output, config=moved)


# --- text of token ids ---


def test_an_expert_is_trained_on_token_ids(tmp_path: Path) -> None:
    encoders, output = tmp_path / "encoders", Folder(tmp_path / "output")
    shard = write_token_shard(Folder(tmp_path / "shard"), write_clip(encoders))
    config = replace(TRAINING, learning_rate=5e-2)
    train(shard, output, expert=READS_CLIP, config=config, text_encoder=Folder(encoders))
    first = build_seeded(lambda: Expert(READS_CLIP), 0).state_dict()["text_proj.weight"]
    assert not torch.allclose(weights_in(output)["text_proj.weight"], first)
    assert not any("text_model" in name for name in weights_in(output))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_token_ids_mean_the_states_of_the_text_encoder(
    tmp_path: Path,
    randomised: Callable[[torch.nn.Module, int], torch.nn.Module],
    precision: Precision,
) -> None:
    """One step on token ids is one step on the states that the encoder makes of them.

    It makes the same of them, in float32, whatever the precision of the training.
    """
    clip = write_clip(tmp_path / "encoders")
    shard = write_token_shard(Folder(tmp_path / "shard"), clip)
    losses: list[Progress] = []
    expert = randomised(Expert(READS_CLIP), 0)  # a fresh one does not look at its text
    start = Folder(tmp_path / "start")
    start.write_json(MODEL_CONFIG, write_document(READS_CLIP))
    start.write(EXPERT_WEIGHTS, safetensors.torch.save(expert.state_dict()))
    config = replace(TRAINING, steps=1, log_every=1, precision=precision, init_from=start.uri)
    train(
        shard,
        Folder(tmp_path / "output"),
        expert=READS_CLIP,
        config=config,
        text_encoder=Folder(tmp_path / "encoders"),
        on_progress=losses.append,
    )
    batch = batches(load_dataset([shard]), config, seed=0, purpose="batch", expert=READS_CLIP)(0)
    text = clip.encode_tokens(batch.text)
    assert text.text_embeddings.shape == (4, 5, CLIP_WIDTH)
    cpu = torch.device("cpu")
    with autocast(cpu, resolve_precision(precision, cpu)):
        expected = denoising_loss(expert, sample_path(batch.latents, batch.noise, batch.t), text)
    assert losses[0].loss == expected.item()


def test_token_ids_without_a_text_encoder_are_refused(tmp_path: Path) -> None:
    shard = write_token_shard(Folder(tmp_path / "shard"), write_clip(tmp_path / "encoders"))
    with pytest.raises(TrainingError, match="no folder with a text encoder"):
        train(shard, Folder(tmp_path / "output"), expert=READS_CLIP)


def test_token_ids_with_an_encoder_of_sentences_are_refused(
    tmp_path: Path, tiny_parts: Path
) -> None:
    shard = write_token_shard(Folder(tmp_path / "shard"), write_clip(tmp_path / "encoders"))
    with pytest.raises(TrainingError, match="an encoder of sentences"):
        train(
            shard, Folder(tmp_path / "output"), expert=READS_CLIP, text_encoder=Folder(tiny_parts)
        )


@pytest.mark.parametrize("text_embed_dim", [0, CLIP_WIDTH])
def test_a_router_needs_an_encoder_for_token_ids_only_if_it_reads_text(
    tmp_path: Path, text_embed_dim: int
) -> None:
    encoders = tmp_path / "encoders"
    shard = write_token_shard(Folder(tmp_path / "shard"), write_clip(encoders))
    config = RouterConfig(num_experts=2, **GEOMETRY, **(WIDTH | {"text_embed_dim": text_embed_dim}))
    facts = train_router(
        config,
        TRAINING,
        shards=[shard, shard],
        shards_digest="shards",
        seed=0,
        output=Folder(tmp_path / "router"),
        on_progress=carry_on,
        text_encoder=Folder(encoders) if text_embed_dim else None,
    )
    assert facts["right_cluster"]["0.5"] == 0.5  # the same rows twice


# --- what is logged and shown ---


def test_samples_are_drawn_with_the_average_and_change_nothing(
    shard: Folder, trained: Folder, tmp_path: Path
) -> None:
    shown: dict[int, dict[str, Tensor]] = {}

    def draw_samples(expert: Expert, step: int) -> None:
        assert not expert.training
        assert not any(parameter.requires_grad for parameter in expert.parameters())
        torch.manual_seed(step)
        expert(torch.ones(1, 3, 2, 2), torch.ones(1), torch.ones(1, 1, 4))
        shown[step] = {name: value.clone() for name, value in expert.state_dict().items()}

    output = Folder(tmp_path / "long")
    config = replace(TRAINING, sample_every=4)
    train(shard, output, config=config, draw_samples=draw_samples)
    assert list(shown) == [4, 8]  # the last one is drawn by whoever asked for the training
    assert output.read(EXPERT_WEIGHTS) == trained.read(EXPERT_WEIGHTS)
    constant = replace(TRAINING, schedule="constant")
    train(shard, Folder(tmp_path / "short"), config=replace(constant, steps=4))
    train(
        shard,
        Folder(tmp_path / "more"),
        config=replace(constant, sample_every=4),
        draw_samples=draw_samples,
    )
    torch.testing.assert_close(shown[4], weights_in(Folder(tmp_path / "short")), rtol=0, atol=0)


def test_a_drawing_that_ends_the_process_does_not_end_the_next(
    shard: Folder, trained: Folder, tmp_path: Path
) -> None:
    drawn: list[int] = []

    def draw_samples(_expert: Expert, step: int) -> None:
        drawn.append(step)
        if step == 4:
            raise MemoryError

    output = Folder(tmp_path)
    config = replace(TRAINING, sample_every=4, checkpoint_every=2)
    with pytest.raises(MemoryError):
        train(shard, output, config=config, draw_samples=draw_samples)
    train(shard, output, config=config, draw_samples=draw_samples)
    assert drawn == [4, 8]
    assert output.read(EXPERT_WEIGHTS) == trained.read(EXPERT_WEIGHTS)


def scalars_of(folder: Folder) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str((folder / "tensorboard").local_path)).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


@pytest.mark.parametrize("killed", [False, True])
def test_tensorboard_shows_the_metrics_once(shard: Folder, tmp_path: Path, killed: bool) -> None:
    class Killed(Exception):
        pass

    def kill(progress: Progress) -> None:
        if progress.step == 6:
            raise Killed

    output, config = Folder(tmp_path), replace(TRAINING, tensorboard=True)
    if killed:
        with pytest.raises(Killed):
            train(shard, output, config=config, on_progress=kill)
        assert len(scalars_of(output)["loss"]) == 2
    _, metrics = train(shard, output, config=config)
    scalars, rows = scalars_of(output), [json.loads(line) for line in metrics.splitlines()]
    measured = {"samples_per_second", "memory_bytes", "resumes"}
    assert scalars.keys() == {"loss", "learning_rate", *measured}
    for name in ("loss", "learning_rate"):
        assert scalars[name] == [(r["samples_seen"], pytest.approx(r[name])) for r in rows]


def test_event_files_are_no_part_of_the_result(shard: Folder, tmp_path: Path) -> None:
    with_events, without = Folder(tmp_path / "with"), Folder(tmp_path / "without")
    train(shard, with_events, config=replace(TRAINING, tensorboard=True))
    train(shard, without)
    assert with_events.exists(TENSORBOARD) and TENSORBOARD.endswith(EVENTS)
    assert not without.exists("tensorboard")
    first, second = (
        publish(folder, "expert", config_digest="", parents={}, facts={})
        for folder in (with_events, without)
    )
    assert first.digest == second.digest


def test_tensorboard_without_its_package_is_refused(
    shard: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ConfigError, match=r"tensorboard=true.*paris_ray\[paris\]"):
        train(shard, Folder(tmp_path), config=replace(TRAINING, tensorboard=True))


def test_rates_are_kept_apart_from_what_is_reproducible(trained: Folder) -> None:
    rows = rows_of(trained, TIMINGS)
    assert [row["samples_seen"] for row in rows] == [8, 16, 24, 32, 40, 48]
    assert all(row["samples_per_second"] > 0 for row in rows)
    assert [row["mfu"] for row in rows] == [None] * 6  # no peak is known of a CPU
    assert peak_flops(torch.device("cpu")) is None


def test_mfu_is_the_share_of_the_rate_at_the_peak() -> None:
    clock = ProgressClock(4, 8, carry_on, log_every=1, peak_samples_per_second=1e6)
    progress = clock.tick(1, torch.tensor(1.0))
    assert progress is not None
    assert progress.mfu == progress.samples_per_second / 1e6


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A40", 149.7),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA RTX 6000 Ada Generation", 364),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA RTX A4000", None),
        ("Quadro RTX 6000", None),
        ("Tesla V100-SXM2-16GB", None),
        ("Tesla T4", None),
    ],
)
def test_the_peak_of_a_gpu_is_known_by_its_name(name: str, tflops: float | None) -> None:
    assert peak_flops_of(name) == (None if tflops is None else tflops * 1e12)


# --- the loop by itself ---


def run_loop(
    model: torch.nn.Module,
    folder: Folder,
    loss: Callable[[Batch], Tensor],
    shard: Folder,
    config: TrainingConfig = TRAINING,
) -> dict[str, Tensor]:
    draw = batches(load_dataset([shard]), config, seed=0, purpose="test", expert=EXPERT)
    loop = TrainingLoop(model, draw, loss, config, folder, identity="this", on_progress=carry_on)
    return loop.run()


class TwoNumbers(torch.nn.Module):
    """The second one counts in one step alone, in which its gradient is not a number."""

    def __init__(self, bad_step: int) -> None:
        super().__init__()
        self.first, self.second = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
        self.bad_step, self.step = bad_step, 0

    def loss(self, batch: Batch) -> Tensor:
        self.step += 1
        loss = ((self.first - 1) ** 2).sum()
        return loss + (0 * self.second).sqrt().sum() if self.step == self.bad_step else loss


@pytest.mark.parametrize(
    ("bad_step", "max_grad_norm", "what"),
    [
        (7, 1.0, "loss"),  # clipping spreads it
        (8, 1.0, "norm of the gradients"),
        (8, None, "norm of the gradients"),
        (7, None, "norm of the weights"),
    ],
)
def test_a_state_that_is_not_finite_replaces_no_checkpoint(
    shard: Folder, tmp_path: Path, bad_step: int, max_grad_norm: float | None, what: str
) -> None:
    config = replace(TRAINING, log_every=100, max_grad_norm=max_grad_norm)
    folder = Folder(tmp_path)
    good = TwoNumbers(bad_step=0)
    run_loop(good, folder, good.loss, shard, replace(config, steps=4))
    kept = {name: folder.read(name) for name in (CHECKPOINT, METRICS, TIMINGS)}
    bad = TwoNumbers(bad_step - 4)  # it counts from where it goes on
    with pytest.raises(TrainingError, match=f"^the {what} is nan at step 8: lower the learning"):
        run_loop(bad, folder, bad.loss, shard, config)
    assert {name: folder.read(name) for name in kept} == kept


def test_a_part_of_what_is_run_can_be_trained_alone(
    shard: Folder, trained: Folder, tmp_path: Path
) -> None:
    expert = load_expert(VerifiedFolder(trained, None))
    before = {name: value.clone() for name, value in expert.state_dict().items()}
    adapter = Adapter.create(expert, LoRAConfig(r=2), seed=0)
    adapted = attach(expert, adapter)

    def loss(batch: Batch) -> Tensor:
        path = sample_path(batch.latents, batch.noise, batch.t)
        return denoising_loss(adapted, path, TextConditioning.from_pooled(batch.text))

    average = run_loop(adapter, Folder(tmp_path), loss, shard)
    assert average.keys() == adapter.state_dict().keys()
    assert all(value.any() for value in average.values())  # B starts at zero
    torch.testing.assert_close(dict(expert.state_dict()), before, rtol=0, atol=0)
    stored = safetensors.torch.load(Folder(tmp_path).read(CHECKPOINT))
    assert {name.split("/")[0] for name in stored} == {"model", "ema", "optimizer"}
    again = run_loop(adapter, Folder(tmp_path), loss, shard)  # restored, and finished
    torch.testing.assert_close(again, average, rtol=0, atol=0)


def test_an_error_in_drawing_ends_the_training(shard: Folder, tmp_path: Path) -> None:
    def draw(step: int) -> Batch:
        raise OSError("the disk is gone")

    loop = TrainingLoop(
        torch.nn.Linear(1, 1),
        draw,
        lambda batch: batch.t.sum(),
        TRAINING,
        Folder(tmp_path),
        identity="this",
        on_progress=carry_on,
    )
    with pytest.raises(OSError, match="the disk is gone"):
        loop.run()
