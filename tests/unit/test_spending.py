"""Caps of what a training may take: it is saved and ended, and goes on to the same bytes."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from jobs.command import EXIT_CAP_REACHED, EXIT_USER_ERROR, fail, reported
from paris_ray.artifacts import CHECKPOINT, SPENT
from paris_ray.config import RESOURCE_KEYS, TrainingConfig, load
from paris_ray.errors import ArtifactError, ConfigError, SpendingCapError, TrainingError
from paris_ray.folders import Folder
from paris_ray.run import EXPERT_WEIGHTS
from paris_ray.training import spending
from paris_ray.training.loop import Progress
from paris_ray.training.spending import cpu_seconds_spent, seconds_spent
from tests.training_shards import TRAINING, Stop, carry_on, stop_at, train, write_shard

STEP_S = 900.0  # of the clock below: between two logs, two steps
EVERY_STEP = replace(TRAINING, log_every=1)


class Clock:
    """A clock that only training moves on, by a quarter of an hour a step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(spending, "monotonic", lambda: self.now)

    def tick(self, progress: Progress) -> None:
        self.now += STEP_S


def test_cpu_seconds_of_killed_processes_count_too(
    shard: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of other processes alone those before this one: each counts from where it began."""
    computed, output = [100.0], Folder(tmp_path / "output")
    monkeypatch.setattr(spending, "process_time", lambda: computed[0])

    def compute(progress: Progress) -> None:
        computed[0] += 7.0
        if progress.step == 6:
            raise Stop

    with pytest.raises(Stop):
        train(shard, output, on_progress=compute)
    assert cpu_seconds_spent(output) == 14.0  # at the checkpoint of step 4
    computed[0] = 0.0
    train(shard, output, on_progress=compute_on(computed))
    assert cpu_seconds_spent(output) == 14.0 + 4 * 7.0
    output.write_json(SPENT, {"seconds": 5.0})  # of earlier code
    assert (cpu_seconds_spent(output), seconds_spent(output)) == (0.0, 5.0)


def compute_on(computed: list[float]) -> Callable[[Progress], None]:
    def compute(progress: Progress) -> None:
        computed[0] += 7.0

    return compute


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def shard(tmp_path: Path) -> Folder:
    return write_shard(Folder(tmp_path / "shard"), 10)


def samples_in(checkpoint: Folder) -> int:
    header = checkpoint.read(CHECKPOINT)
    size = int.from_bytes(header[:8], "little")
    return int(json.loads(header[8 : 8 + size])["__metadata__"]["samples_seen"])


def trained(shard: Folder, output: Folder, clock: Clock, **caps: Any) -> tuple[bytes, bytes]:
    return train(shard, output, config=replace(EVERY_STEP, **caps), on_progress=clock.tick)


@pytest.mark.parametrize(
    ("caps", "told"),
    [
        ({"max_hours": 1.0}, r"max_hours=1 is reached \(1 hours\)"),
        (
            {"max_dollars": 2.0, "dollars_per_hour": 2.0},
            r"max_dollars=2 is reached \(1 hours, 2 dollars at 2 an hour\)",
        ),
    ],
    ids=["hours", "dollars"],
)
def test_a_capped_training_is_saved_and_goes_on_to_the_same_bytes(
    shard: Folder, tmp_path: Path, clock: Clock, caps: dict[str, float], told: str
) -> None:
    uncapped = trained(shard, Folder(tmp_path / "whole"), clock)
    output = Folder(tmp_path / "capped")
    with pytest.raises(SpendingCapError, match=f"{told}: .*run again with a higher max_"):
        trained(shard, output, clock, **caps)
    assert not output.exists(EXPERT_WEIGHTS)
    assert samples_in(output) == 4 * EVERY_STEP.batch_size  # an hour, though no checkpoint was due
    assert seconds_spent(output) == 4 * STEP_S
    higher = caps | {name: 10.0 for name in caps if name.startswith("max_")}
    assert trained(shard, output, clock, **higher) == uncapped
    assert seconds_spent(output) == EVERY_STEP.steps * STEP_S


def test_with_the_same_cap_not_a_step_is_trained(
    shard: Folder, tmp_path: Path, clock: Clock
) -> None:
    output = Folder(tmp_path / "capped")
    for _ in range(2):
        with pytest.raises(SpendingCapError):
            trained(shard, output, clock, max_hours=1.0)
    assert clock.now == 4 * STEP_S


def test_a_finished_training_has_no_cap(shard: Folder, tmp_path: Path, clock: Clock) -> None:
    output, caps = Folder(tmp_path / "whole"), {"max_hours": EVERY_STEP.steps * STEP_S / 3600}
    first = trained(shard, output, clock, **caps)
    assert trained(shard, output, clock, **caps) == first


def test_what_a_killed_process_had_trained_counts_between_logs_too(
    shard: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spending, "monotonic", count(step=STEP_S).__next__)  # on, whoever looks

    def killed(*_: Any) -> None:
        raise Stop

    config = replace(TRAINING, log_every=1000, checkpoint_every=1000, sample_every=3)
    with pytest.raises(Stop):
        train(shard, Folder(tmp_path / "killed"), config=config, draw_samples=killed)
    assert seconds_spent(Folder(tmp_path / "killed")) >= STEP_S


def test_what_a_killed_process_had_trained_counts(
    shard: Folder, tmp_path: Path, clock: Clock
) -> None:
    output = Folder(tmp_path / "killed")

    def killed_at_7(progress: Progress) -> None:
        clock.tick(progress)
        stop_at(7)(progress)

    with pytest.raises(Stop):
        train(shard, output, config=EVERY_STEP, on_progress=killed_at_7)
    assert samples_in(output) == 4 * EVERY_STEP.batch_size
    # Six logs were noted; the seventh is what nobody knows of.
    assert seconds_spent(output) == 6 * STEP_S
    with pytest.raises(SpendingCapError, match=r"\(1\.75 hours\)"):
        trained(shard, output, clock, max_hours=1.75)
    assert samples_in(output) == 5 * EVERY_STEP.batch_size


def test_seconds_are_written_down_from_time_to_time_alone(
    shard: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    write_json = Folder.write_json

    def counting(folder: Folder, name: str, value: Any) -> None:
        written.append(name)
        write_json(folder, name, value)

    monkeypatch.setattr(Folder, "write_json", counting)
    train(shard, Folder(tmp_path / "quick"), config=EVERY_STEP)
    assert written.count(SPENT) == EVERY_STEP.steps // EVERY_STEP.checkpoint_every


@pytest.mark.parametrize("content", ['{"seconds": "many"}', "[]", '{"seconds": -1}', '{"s": 1}'])
def test_a_damaged_account_is_refused(shard: Folder, tmp_path: Path, content: str) -> None:
    output = Folder(tmp_path / "output")
    output.write(SPENT, content.encode())
    with pytest.raises(ArtifactError, match=f"{SPENT} is damaged"):
        train(shard, output)


def test_caps_decide_no_result() -> None:
    assert {"max_hours", "max_dollars", "dollars_per_hour"} <= RESOURCE_KEYS
    assert TrainingConfig().max_hours is TrainingConfig().max_dollars is None


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["training.max_hours=0"], "training.max_hours=0.0 is not allowed: > 0, or null"),
        (["training.max_dollars=-1"], "training.max_dollars=-1.0 is not allowed"),
        (["training.max_dollars=1"], "training.dollars_per_hour=None is not allowed: at least 0"),
        (["router_training.dollars_per_hour=-1"], "router_training.dollars_per_hour=-1.0"),
    ],
)
def test_caps_that_say_nothing_are_refused(overrides: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load("quickstart", overrides)


def test_a_job_that_is_capped_has_an_exit_code_of_its_own(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert fail(SpendingCapError("max_hours=1 is reached")) == EXIT_CAP_REACHED
    assert capsys.readouterr().err == "stopped: max_hours=1 is reached\n"
    assert fail(TrainingError("3 experts failed")) == EXIT_USER_ERROR
    with pytest.raises(SystemExit) as ended, reported():
        raise SpendingCapError("max_hours=1 is reached")
    assert ended.value.code == EXIT_CAP_REACHED != EXIT_USER_ERROR


def test_a_price_alone_caps_nothing(shard: Folder, tmp_path: Path) -> None:
    output = Folder(tmp_path / "priced")
    config = replace(TRAINING, dollars_per_hour=1e9)
    assert train(shard, output, config=config, on_progress=carry_on)[0]
