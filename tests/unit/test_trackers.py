"""Weights & Biases and MLflow are shown what TensorBoard is: every row once, also after a kill."""

import json
import os
import signal
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from paris_ray.artifacts import METRICS, SPENT, publish
from paris_ray.config import TrainingConfig, load
from paris_ray.errors import ArtifactError, ConfigError, SpendingCapError, TrainingError
from paris_ray.folders import Folder
from paris_ray.training import checkpoint
from paris_ray.training.loop import OnProgress, Progress, TrainingLoop
from paris_ray.training.tensorboard import EventFile
from paris_ray.training.trackers import Trackers
from tests.training_shards import TRAINING, Stop, stop_at, train, write_shard

ROWS = [
    {"samples_seen": 8, "unix_time": 100.5, "loss": 0.5, "mfu": None},
    {"samples_seen": 16, "unix_time": 101.5, "loss": 0.25, "held_out_loss": 0.75, "mfu": None},
]


@pytest.fixture
def shard(tmp_path: Path) -> Folder:
    return write_shard(Folder(tmp_path / "shard"), 8)


def rows_of(folder: Folder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in folder.read(METRICS).splitlines()]


def preempt_at(step: int) -> OnProgress:
    """Return what sends this process a SIGTERM at a step, which `interrupted` survives."""

    def preempt(progress: Progress) -> None:
        if progress.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return preempt


@contextmanager
def interrupted() -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def train_with_a_kill(shard: Folder, output: Folder, config: TrainingConfig) -> None:
    """Be killed at step 6, after the checkpoint of step 4, and go on."""
    with pytest.raises(Stop):
        train(shard, output, config=config, on_progress=stop_at(6))
    train(shard, output, config=config)


# -- Weights & Biases ------------------------------------------------------------------------------


@pytest.fixture
def wandb_offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield
    wandb.teardown()


def logged_by_wandb(folder: Folder) -> list[dict[str, float]]:
    """Return the rows in W&B's own files, as `wandb sync` would read them."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows = []
    for path in sorted((folder.local_path / "wandb").glob("offline-run-*/*.wandb")):
        for payload in records_of(path.read_bytes()):
            record = Record.FromString(payload)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append(
                    {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items}
                )
    return rows


def records_of(log: bytes) -> Iterator[bytes]:
    """Yield the records of a file in LevelDB's log format, of one block, after W&B's own head."""
    assert log[:4] == b":W&B" and len(log) < 2**15
    at = 7
    while at < len(log):
        _checksum, length, kind = struct.unpack_from("<IHB", log, at)
        assert kind == 1, "a whole record"
        yield log[at + 7 : at + 7 + length]
        at += 7 + length


@pytest.mark.usefixtures("wandb_offline")
def test_wandb_is_shown_every_row_once(shard: Folder, tmp_path: Path) -> None:
    output = Folder(tmp_path / "runs" / "mine" / "expert_0")
    train_with_a_kill(shard, output, replace(TRAINING, wandb="paris"))
    shown = [(row["_step"], row["loss"], row["learning_rate"]) for row in logged_by_wandb(output)]
    expected = [(r["samples_seen"], r["loss"], r["learning_rate"]) for r in rows_of(output)]
    assert shown == expected
    assert len({path.suffix for path in (output.local_path / "wandb").glob("offline-run-*")}) == 1


@pytest.mark.usefixtures("wandb_offline")
def test_its_files_are_no_part_of_the_result(shard: Folder, tmp_path: Path) -> None:
    shown, plain = Folder(tmp_path / "shown"), Folder(tmp_path / "plain")
    train(shard, shown, config=replace(TRAINING, wandb="paris"))
    train(shard, plain)
    digests = {
        publish(folder, "expert", config_digest="", parents={}, facts={}).digest
        for folder in (shown, plain)
    }
    assert len(digests) == 1


@pytest.mark.usefixtures("wandb_offline")
def test_a_run_that_was_left_open_gets_nothing_of_the_next(tmp_path: Path) -> None:
    """As by a training that found its cap reached, in a process that goes on to another's."""
    folders = [Folder(tmp_path / name) for name in ("left", "next")]
    for folder in folders:
        folder.local_path.mkdir()
    left, following = (Trackers(TrainingConfig(wandb="p"), folder, "x") for folder in folders)
    with left:
        left.open([])
        with following:
            following.open([])
            following.write(ROWS)
    assert [[row["_step"] for row in logged_by_wandb(f)] for f in folders] == [[], [8, 16]]


@pytest.mark.parametrize("seconds", [0, 3600])
def test_a_run_ends_where_the_cap_is_reached_before_the_first_step(
    shard: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: int
) -> None:
    ended: list[object] = []
    monkeypatch.setattr(EventFile, "close", lambda tracker: ended.append(tracker))
    output = Folder(tmp_path / "expert_0")
    output.write_json(SPENT, {"seconds": float(seconds)})
    capped = replace(TRAINING, tensorboard=True, max_hours=1.0)
    with pytest.raises(SpendingCapError) if seconds else nullcontext():
        train(shard, output, config=capped)
    assert len(ended) == 1


def test_a_run_ends_where_the_first_validation_of_a_process_fails(
    shard: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that resumes makes up for what the one before had no time to measure."""
    held_out = write_shard(Folder(tmp_path / "held_out"), 4, seed=1)
    config = replace(TRAINING, tensorboard=True, validate_every=4)
    options: dict[str, Any] = {"config": config, "data": {"held_out": [held_out]}}
    output = Folder(tmp_path / "expert_0")
    with interrupted(), pytest.raises(TrainingError, match="SIGTERM"):
        train(shard, output, on_progress=preempt_at(8), **options)

    def fail(*_: object) -> None:
        raise ArtifactError("the held-out rows are damaged")

    ended: list[object] = []
    monkeypatch.setattr(EventFile, "close", lambda tracker: ended.append(tracker))
    monkeypatch.setattr(TrainingLoop, "_validate", fail)
    with pytest.raises(ArtifactError, match="damaged"):
        train(shard, output, **options)
    assert len(ended) == 1


@pytest.mark.parametrize(
    ("offline", "step", "shown"), [(False, 0, [8, 16]), (False, 9, [16]), (True, 0, [])]
)
def test_a_run_is_shown_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: bool, step: int, shown: list[int]
) -> None:
    """Such as of a training that begins to show its rows half way; offline nobody can know."""
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    steps: list[int] = []
    run = SimpleNamespace(offline=offline, step=step, finish=lambda: None)
    run.log = lambda _values, step: steps.append(step)
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    with Trackers(TrainingConfig(wandb="p"), Folder(tmp_path), "x") as trackers:
        trackers.open(ROWS)
        trackers.write(ROWS)
    assert steps == shown


# -- MLflow ----------------------------------------------------------------------------------------


@pytest.fixture
def mlflow_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    pytest.importorskip("mlflow", reason="mlflow-skinny is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return (tmp_path / "mlruns").as_uri()


def logged_by_mlflow(uri: str, name: str) -> list[list[tuple[int, float]]]:
    """Return what each run has of a metric."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("paris_ray")
    return [
        [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]
        for run in client.search_runs([experiment.experiment_id])
    ]


def test_mlflow_is_shown_every_row_once(shard: Folder, tmp_path: Path, mlflow_uri: str) -> None:
    output = Folder(tmp_path / "expert_0")
    train_with_a_kill(shard, output, replace(TRAINING, mlflow=mlflow_uri))
    (shown,) = logged_by_mlflow(mlflow_uri, "loss")
    assert shown == [(row["samples_seen"], row["loss"]) for row in rows_of(output)]


def test_a_kill_in_the_middle_of_a_checkpoint_shows_nothing_twice(
    shard: Folder, tmp_path: Path, mlflow_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise Stop

    output, config = Folder(tmp_path / "expert_0"), replace(TRAINING, mlflow=mlflow_uri)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save", killed)
        with pytest.raises(Stop):
            train(shard, output, config=config)
    assert logged_by_mlflow(mlflow_uri, "loss") != [[]]
    train(shard, output, config=config)
    (shown,) = logged_by_mlflow(mlflow_uri, "loss")
    assert shown == [(row["samples_seen"], row["loss"]) for row in rows_of(output)]


def test_a_row_that_is_still_to_be_measured_is_shown_when_it_is(
    shard: Folder, tmp_path: Path, mlflow_uri: str
) -> None:
    """At a SIGTERM there is no time to validate: the process that goes on does."""
    output = Folder(tmp_path / "expert_0")
    held_out = write_shard(Folder(tmp_path / "held_out"), 4, seed=1)
    config = replace(TRAINING, mlflow=mlflow_uri, validate_every=4)
    options: dict[str, Any] = {"config": config, "data": {"held_out": [held_out]}}
    with interrupted(), pytest.raises(TrainingError, match="SIGTERM"):
        train(shard, output, on_progress=preempt_at(8), **options)
    (shown,) = logged_by_mlflow(mlflow_uri, "loss")
    assert [step for step, _ in shown] == [8, 16, 24]
    train(shard, output, **options)
    (loss,) = logged_by_mlflow(mlflow_uri, "loss")
    (measured,) = logged_by_mlflow(mlflow_uri, "held_out_loss")
    assert [step for step, _ in loss] == [8, 16, 24, 32, 40, 48]
    expected = [(r["samples_seen"], r["held_out_loss"]) for r in rows_of(output) if len(r) > 3]
    assert measured == expected and [step for step, _ in measured] == [16, 32, 48]


def test_each_training_is_a_run_of_its_own(tmp_path: Path, mlflow_uri: str) -> None:
    for folder, identity in (("a", "x"), ("b", "x"), ("a", "y")):
        config = TrainingConfig(mlflow=mlflow_uri)
        with Trackers(config, Folder(tmp_path / folder), identity) as trackers:
            trackers.open([])
            trackers.write(ROWS)
    runs = logged_by_mlflow(mlflow_uri, "held_out_loss")
    assert runs == [[(16, 0.75)]] * 3


def test_an_unreachable_place_is_refused_at_the_start(tmp_path: Path, mlflow_uri: str) -> None:
    trackers = Trackers(TrainingConfig(mlflow="no-such-scheme://here"), Folder(tmp_path), "x")
    with pytest.raises(ConfigError, match="mlflow='no-such-scheme://here' cannot be logged to"):
        trackers.open([])


def test_where_one_cannot_begin_those_that_have_are_ended(
    tmp_path: Path, mlflow_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[object] = []
    monkeypatch.setattr(EventFile, "close", lambda tracker: ended.append(tracker))
    config = TrainingConfig(tensorboard=True, mlflow="no-such-scheme://here")
    trackers = Trackers(config, Folder(tmp_path), "x")
    with pytest.raises(ConfigError, match="cannot be logged to"):
        trackers.open([])
    assert len(ended) == 1


def test_a_place_that_is_lost_on_the_way_costs_no_training(
    tmp_path: Path, mlflow_uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    trackers = Trackers(TrainingConfig(mlflow=mlflow_uri, tensorboard=True), Folder(tmp_path), "x")
    trackers.open([])
    (tmp_path / "mlruns").rename(tmp_path / "lost")
    with trackers:
        trackers.write(ROWS)
        trackers.write(ROWS)
    (message,) = [r.getMessage() for r in caplog.records if r.name == "paris_ray"]
    assert message.startswith("MlflowRun is shown nothing more of this training")
    assert Folder(tmp_path).exists("tensorboard")


# -- Both ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "package", "extra"),
    [({"wandb": "p"}, "wandb", "wandb"), ({"mlflow": "http://h"}, "mlflow", "mlflow")],
)
def test_without_its_package_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: Any, package: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"paris_ray\[{extra}\]"):
        Trackers(TrainingConfig(**options), Folder(tmp_path), "x")


@pytest.mark.parametrize("section", ["training", "seed_training", "router_training"])
def test_a_uri_with_a_password_is_refused(section: str) -> None:
    with pytest.raises(ConfigError, match=rf"{section}\.mlflow") as refusal:
        load("quickstart", [f"{section}.mlflow=https://me:secret@host"])
    assert "secret" not in str(refusal.value)
