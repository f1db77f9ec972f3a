"""Training to the bit: seeds, resuming, isolation from global state, and clear refusals."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from pyarrow import fs
from safetensors import safe_open

from paris_ray.artifacts import CHECKPOINT, METRICS, TIMINGS, VerifiedFolder
from paris_ray.bundle import load_expert
from paris_ray.config import ExpertConfig, RouterConfig
from paris_ray.config.release import read_document
from paris_ray.devices import resolve_precision
from paris_ray.embeddings import to_table, write_part
from paris_ray.errors import ArtifactError, TrainingError
from paris_ray.folders import Folder
from paris_ray.run import EXPERT_WEIGHTS, MODEL_CONFIG
from paris_ray.training.data import BatchOrder
from paris_ray.training.expert import ExpertData, train_expert
from paris_ray.training.loop import Progress
from paris_ray.training.router import train_router
from paris_ray.training.schedule import learning_rate
from tests.training_shards import (
    EXPERT,
    GEOMETRY,
    TRAINING,
    WIDTH,
    Stop,
    carry_on,
    stop_at,
    train,
    write_shard,
)


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return write_shard(Folder(tmp_path_factory.mktemp("shard")), 10)


@pytest.fixture(scope="module")
def uninterrupted(shard: Folder, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    return train(shard, Folder(tmp_path_factory.mktemp("uninterrupted")))


@pytest.fixture
def half_done(shard: Folder, tmp_path: Path) -> Folder:
    """A run that was killed at step 6, with a checkpoint of step 4."""
    output = Folder(tmp_path / "half done")
    with pytest.raises(Stop):
        train(shard, output, on_progress=stop_at(6))
    assert output.exists(CHECKPOINT)
    assert not output.exists(EXPERT_WEIGHTS)
    return output


@pytest.mark.parametrize("killed_at", [[2], [6], [6, 10]])
def test_resumed_equals_uninterrupted_to_the_bit(
    shard: Folder, tmp_path: Path, uninterrupted: tuple[bytes, bytes], killed_at: list[int]
) -> None:
    output = Folder(tmp_path)
    for step in killed_at:
        with pytest.raises(Stop):
            train(shard, output, on_progress=stop_at(step))
    assert train(shard, output) == uninterrupted


def test_metrics_written_after_the_checkpoint_are_cut(
    shard: Folder, half_done: Folder, uninterrupted: tuple[bytes, bytes]
) -> None:
    """Killed after the metrics of step 8 were written, and before the checkpoint was."""
    checkpoint = half_done.read(CHECKPOINT)
    with pytest.raises(Stop):
        train(shard, half_done, on_progress=stop_at(10))
    assert len(half_done.read(METRICS).splitlines()) == 4
    half_done.write(CHECKPOINT, checkpoint)
    assert train(shard, half_done) == uninterrupted
    rows = [json.loads(line) for line in half_done.read(TIMINGS).splitlines()]
    assert [row["samples_seen"] for row in rows] == [8, 16, 24, 32, 40, 48]


@pytest.mark.parametrize("name", [METRICS, TIMINGS])
def test_damaged_metrics_are_refused(shard: Folder, half_done: Folder, name: str) -> None:
    half_done.write(name, half_done.read(name)[:-3])
    with pytest.raises(ArtifactError, match=f"{name} is not JSON"):
        train(shard, half_done)
    half_done.delete(name)
    with pytest.raises(ArtifactError, match=f"{name} does not exist"):
        train(shard, half_done)


def test_the_header_of_a_checkpoint_does_not_grow(shard: Folder, half_done: Folder) -> None:
    with half_done.reading(CHECKPOINT) as path, safe_open(path, framework="pt") as file:
        assert file.metadata().keys() == {"identity", "samples_seen", "crc32"}
        assert file.metadata()["samples_seen"] == "16"


def test_resuming_does_not_repeat_finished_steps(shard: Folder, half_done: Folder) -> None:
    steps: list[int] = []
    train(shard, half_done, on_progress=lambda progress: steps.append(progress.step))
    assert steps == [6, 8, 10, 12]


def test_a_finished_run_trains_no_more(shard: Folder, tmp_path: Path) -> None:
    first = train(shard, Folder(tmp_path))
    assert train(shard, Folder(tmp_path), on_progress=stop_at(12)) == first


def test_metrics_hold_samples_loss_and_rate(uninterrupted: tuple[bytes, bytes]) -> None:
    rows = [json.loads(line) for line in uninterrupted[1].splitlines()]
    assert [row["samples_seen"] for row in rows] == [8, 16, 24, 32, 40, 48]
    assert [row["learning_rate"] for row in rows] == [
        learning_rate(step, TRAINING) for step in (1, 3, 5, 7, 9, 11)
    ]


def test_another_seed_gives_other_weights(
    shard: Folder, tmp_path: Path, uninterrupted: tuple[bytes, bytes]
) -> None:
    weights, metrics = train(shard, Folder(tmp_path), seed=1)
    assert weights != uninterrupted[0]
    assert metrics != uninterrupted[1]


def test_global_random_state_is_untouched_and_irrelevant(
    shard: Folder, tmp_path: Path, uninterrupted: tuple[bytes, bytes]
) -> None:
    torch.manual_seed(123)
    np.random.seed(123)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    assert train(shard, Folder(tmp_path)) == uninterrupted
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002


@pytest.mark.parametrize(
    "changes",
    [
        {"config": replace(TRAINING, learning_rate=1e-3)},
        {"expert": replace(EXPERT, layer_norm_eps=1e-5)},
        {"digest": "another shard"},
        {"seed": 1},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_checkpoint_of_another_run_is_refused(
    shard: Folder, half_done: Folder, changes: dict[str, object]
) -> None:
    with pytest.raises(ArtifactError, match=f"{CHECKPOINT} belongs to another configuration"):
        train(shard, half_done, **changes)


def test_a_run_may_continue_with_other_resources(
    shard: Folder, half_done: Folder, uninterrupted: tuple[bytes, bytes]
) -> None:
    config = replace(
        TRAINING,
        checkpoint_every=3,
        num_cpus=2.0,
        max_retries=0,
        prefetch=0,
        gradient_checkpointing=True,
        ema_device="cpu",
    )
    assert train(shard, half_done, config=config) == uninterrupted


def test_a_run_continues_in_the_precision_that_it_was_begun_with(
    shard: Folder, tmp_path: Path
) -> None:
    output, auto = Folder(tmp_path / "output"), replace(TRAINING, precision="auto")
    with pytest.raises(Stop):
        train(shard, output, config=auto, on_progress=stop_at(6))
    bfloat16 = resolve_precision("auto", torch.device("cpu")) == torch.bfloat16
    same, other = ("bfloat16", "float32") if bfloat16 else ("float32", "bfloat16")
    with pytest.raises(ArtifactError, match=r"precision=auto the device decides: set the one"):
        train(shard, output, config=replace(TRAINING, precision=other))
    result = train(shard, output, config=replace(TRAINING, precision=same))
    assert result == train(shard, Folder(tmp_path / "whole"), config=auto)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_bfloat16_is_of_the_operations_alone(
    shard: Folder,
    tmp_path: Path,
    uninterrupted: tuple[bytes, bytes],
    gradient_checkpointing: bool,
) -> None:
    config = replace(TRAINING, precision="bfloat16", gradient_checkpointing=gradient_checkpointing)
    weights, metrics = train(shard, Folder(tmp_path / "whole"), config=config)
    found, exact = (
        [json.loads(line)["loss"] for line in lines.splitlines()]
        for lines in (metrics, uninterrupted[1])
    )
    assert found == pytest.approx(exact, rel=2e-2)
    assert found != exact
    state = safetensors.torch.load(weights)
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert all(value.isfinite().all() for value in state.values())
    moved = state["final_layer.linear.weight"]
    assert not torch.equal(moved, moved.bfloat16().float())
    resumed = Folder(tmp_path / "resumed")
    with pytest.raises(Stop):
        train(shard, resumed, config=config, on_progress=stop_at(6))
    assert train(shard, resumed, config=config) == (weights, metrics)


def test_training_into_an_object_store_is_the_same(
    shard: Folder, tmp_path: Path, uninterrupted: tuple[bytes, bytes]
) -> None:
    output = Folder(tmp_path)
    output._filesystem = fs.SubTreeFileSystem("/", fs.LocalFileSystem())
    assert not output.is_local
    with pytest.raises(Stop):
        train(shard, output, on_progress=stop_at(6))
    assert train(shard, output) == uninterrupted


@pytest.mark.parametrize("kept", [0, 5, 100, 0.5, -1])
def test_truncated_checkpoints_are_refused(shard: Folder, half_done: Folder, kept: float) -> None:
    payload = half_done.read(CHECKPOINT)
    length = int(kept * len(payload)) if 0 < kept < 1 else int(kept)
    half_done.write(CHECKPOINT, payload[:length])
    with pytest.raises(ArtifactError, match=f"{CHECKPOINT} is damaged"):
        train(shard, half_done)


def test_a_checkpoint_of_another_program_is_refused(shard: Folder, tmp_path: Path) -> None:
    output = Folder(tmp_path)
    output.write(CHECKPOINT, safetensors.torch.save({"weight": torch.ones(2)}))
    with pytest.raises(ArtifactError, match=CHECKPOINT):
        train(shard, output)


def test_the_loss_falls(tmp_path: Path) -> None:
    shard = write_shard(Folder(tmp_path / "shard"), 2)
    config = replace(TRAINING, steps=200, batch_size=16, log_every=20, learning_rate=5e-3)
    _, metrics = train(shard, Folder(tmp_path / "out"), config=config)
    losses = [json.loads(line)["loss"] for line in metrics.splitlines()]
    assert losses[-1] < 0.5 * losses[0]


def test_an_empty_shard_is_refused(tmp_path: Path) -> None:
    shard = Folder(tmp_path / "shard")
    columns = {"latents": np.zeros((1, 3, 2, 2)), "text_embedding": np.zeros((1, 2, 4))}
    write_part(shard, "part-0.parquet", to_table(columns).slice(0, 0))
    with pytest.raises(TrainingError, match=r"shard.* is empty"):
        train(shard, Folder(tmp_path / "out"))


def test_a_shard_without_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no Parquet files"):
        train(Folder(tmp_path / "shard"), Folder(tmp_path / "out"))


def test_a_loss_that_is_not_finite_stops_training(tmp_path: Path) -> None:
    shard = write_shard(Folder(tmp_path / "shard"), 4, mean=float("nan"))
    output = Folder(tmp_path / "out")
    with pytest.raises(TrainingError, match=r"loss is nan at step 2.*learning_rate"):
        train(shard, output)
    assert not output.exists(EXPERT_WEIGHTS)


def test_the_weights_are_the_average_in_the_released_layout(shard: Folder, tmp_path: Path) -> None:
    output = Folder(tmp_path)
    train(shard, output)
    document = output.read_json(MODEL_CONFIG)
    assert read_document(ExpertConfig, document, MODEL_CONFIG) == EXPERT
    expert = load_expert(VerifiedFolder(output, None))
    assert expert.config == EXPERT
    assert expert.final_layer.linear.weight.any()  # no longer as initialised


def test_batches_are_a_pure_function_of_the_step() -> None:
    order = BatchOrder(num_rows=7, batch_size=3, seed=1)
    forward = [order.batch(step).tolist() for step in range(20)]
    fresh = BatchOrder(num_rows=7, batch_size=3, seed=1)
    assert [fresh.batch(step).tolist() for step in reversed(range(20))] == forward[::-1]
    assert [BatchOrder(7, 3, seed=2).batch(step).tolist() for step in range(20)] != forward
    rows = list(itertools.chain.from_iterable(forward))
    epochs = {tuple(rows[start : start + 7]) for start in range(0, 56, 7)}
    assert len(epochs) > 1  # every epoch has an order of its own


def test_the_router_learns_separable_clusters(tmp_path: Path) -> None:
    means = (-1.5, 0.0, 1.5)
    shards = [
        write_shard(Folder(tmp_path / f"shard {i}"), 12, mean=mean, spread=0.2, seed=i)
        for i, mean in enumerate(means)
    ]
    facts = train_router(
        RouterConfig(num_experts=3, **GEOMETRY, **WIDTH),
        replace(TRAINING, steps=80, batch_size=32, log_every=80, learning_rate=5e-3),
        shards=shards,
        shards_digest="shards",
        seed=0,
        output=Folder(tmp_path / "router"),
        on_progress=carry_on,
    )
    assert facts.keys() == {"right_cluster"}  # no row was held out
    accuracy = facts["right_cluster"]
    assert list(accuracy) == ["0.1", "0.3", "0.5", "0.7", "0.9", "1"]
    assert accuracy["0.1"] > 0.95
    assert accuracy["0.1"] >= accuracy["0.9"]


# --- rows that all experts have, and several shards ---


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return write_shard(Folder(tmp_path_factory.mktemp("shared")), 6, mean=1.0, seed=1)


def test_shared_rows_are_trained_on(
    shard: Folder, shared: Folder, tmp_path: Path, uninterrupted: tuple[bytes, bytes]
) -> None:
    weights = [
        train(shard, Folder(tmp_path / str(share)), data={"shared": shared, "shared_share": share})
        for share in (0.25, 0.5)
    ]
    assert len({*weights, uninterrupted}) == 3
    unlike = write_shard(Folder(tmp_path / "unlike"), 6, mean=-1.0, seed=1)
    data = {"shared": unlike, "shared_share": 0.25}
    assert train(shard, Folder(tmp_path / "other"), data=data)[0] != weights[0][0]


def test_with_shared_rows_a_run_is_resumed_to_the_bit(
    shard: Folder, shared: Folder, tmp_path: Path
) -> None:
    data, output = {"shared": shared, "shared_share": 0.5}, Folder(tmp_path / "output")
    with pytest.raises(Stop):
        train(shard, output, data=data, on_progress=stop_at(6))
    whole = train(shard, Folder(tmp_path / "whole"), data=data)
    assert train(shard, output, data=data) == whole


def test_a_checkpoint_of_another_share_is_refused(
    shard: Folder, shared: Folder, tmp_path: Path, half_done: Folder
) -> None:
    half = {"shared": shared, "shared_share": 0.5}
    quarter = {"shared": shared, "shared_share": 0.25}
    output = Folder(tmp_path / "output")
    with pytest.raises(Stop):
        train(shard, output, data=half, on_progress=stop_at(6))
    for folder, data in ((output, quarter), (output, None), (half_done, half)):
        with pytest.raises(ArtifactError, match=f"{CHECKPOINT} belongs to another configuration"):
            train(shard, folder, data=data)


def test_epochs_are_those_of_an_experts_own_rows(
    shard: Folder, shared: Folder, tmp_path: Path
) -> None:
    seen: list[Progress] = []
    train(
        shard,
        Folder(tmp_path),
        config=replace(TRAINING, epochs=2.0),
        data={"shared": shared, "shared_share": 0.25},
        on_progress=seen.append,
    )
    assert seen[-1].num_steps == 5  # of ten rows, four a batch


def test_a_seed_is_trained_on_several_shards(
    shard: Folder, shared: Folder, tmp_path: Path, uninterrupted: tuple[bytes, bytes]
) -> None:
    seen: list[Progress] = []
    output = Folder(tmp_path)
    train_expert(
        EXPERT,
        replace(TRAINING, epochs=1.0),
        data=ExpertData(shards=[shard, shared], digests={"clusters": "both"}),
        seed=0,
        output=output,
        on_progress=seen.append,
    )
    assert seen[-1].num_steps == 4  # of sixteen rows
    assert output.read(EXPERT_WEIGHTS) != uninterrupted[0]
