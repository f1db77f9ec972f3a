"""Trainings killed at any moment end as if nothing had happened, to the bit.

Each objective is killed three times; twenty-five times with CHAOS=1, as `make chaos` sets it, and
then it tells what the kills cost.
"""

import json
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from paris_ray.artifacts import METRICS
from paris_ray.training.loop import LOGGED
from tests.chaos.trainings import (
    INTERVAL,
    OBJECTIVES,
    STEPS,
    TRAINING,
    Death,
    Inputs,
    pictures,
    result,
    start,
    steps_done,
    write_shards,
)
from tests.long_tests import CHAOS

NUM_KILLS = 25 if CHAOS else 3
SEED = 12
# SIGXFSZ is what the kernel ends a process with in a write, SIGTERM what a preemption begins with.
ENDED_BY = [-signal.SIGKILL, -signal.SIGXFSZ, -signal.SIGTERM]


@pytest.fixture(scope="module")
def inputs(tiny_bundle_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    shards = tmp_path_factory.mktemp("shards")
    write_shards(shards)
    inputs = Inputs(shards=shards, bundle=tiny_bundle_path)
    assert run("router", inputs, shards / "first") == 0  # which waits for the imports of all
    return inputs


def run(objective: str, inputs: Inputs, output: Path, death: Death | None = None) -> int:
    """Train until it ends or dies; return the exit code."""
    process = start(objective, inputs, output, death)
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def draw_death(generator: random.Random) -> Death:
    """Return a moment of the start or of the first two or three checkpoint intervals after it."""
    how = generator.choice(["at", "in", "after", "asked"])
    return Death(how, generator.randint(1, 300 if how == "after" else 30))


def kill_until_done(objective: str, inputs: Inputs, output: Path, deaths: list[Death]) -> int:
    """Train to the end, with a death an attempt as long as there are some; return how many came."""
    kills = 0
    while code := run(objective, inputs, output, deaths.pop() if deaths else None):
        assert code in ENDED_BY
        kills += 1
    return kills


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_killed_training_ends_as_if_nothing_had_happened(
    objective: str, inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    undisturbed = tmp_path / "undisturbed"
    started = time.monotonic()
    assert run(objective, inputs, undisturbed) == 0
    seconds = time.monotonic() - started
    generator = random.Random(f"{SEED} {objective}")
    kills = trainings = repeated = 0
    lost = 0.0
    while kills < NUM_KILLS:
        output, trainings = tmp_path / f"killed-{trainings}", trainings + 1
        deaths = [draw_death(generator) for _ in range(NUM_KILLS - kills)]
        started = time.monotonic()
        came = kill_until_done(objective, inputs, output, deaths)
        lost += time.monotonic() - started - seconds
        steps = steps_done(output)
        assert sorted(set(steps)) == list(range(1, STEPS + 1))
        assert len(steps) - STEPS <= came * INTERVAL
        assert result(output) == result(undisturbed)
        assert pictures(output).items() <= pictures(undisturbed).items()
        assert len(pictures(undisturbed)) - len(pictures(output)) <= came
        kills, repeated = kills + came, repeated + len(steps) - STEPS
    if NUM_KILLS > 3:
        with capsys.disabled():
            print(
                f"\n{objective}: {kills} kills of {trainings} trainings, every file the same; "
                f"{repeated / kills:.1f} steps of at most {INTERVAL} repeated a kill, "
                f"{lost / kills:.2f} s lost a kill"
            )


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_preempted_training_keeps_every_step(
    objective: str, inputs: Inputs, tmp_path: Path
) -> None:
    asked = 2 * INTERVAL - 1  # a step before the next checkpoint
    assert run(objective, inputs, tmp_path / "undisturbed") == 0
    assert run(objective, inputs, tmp_path / "asked", Death("asked", asked)) == -signal.SIGTERM
    assert steps_done(tmp_path / "asked") == list(range(1, asked + 1))
    assert run(objective, inputs, tmp_path / "asked") == 0
    assert steps_done(tmp_path / "asked") == list(range(1, STEPS + 1))
    assert result(tmp_path / "asked") == result(tmp_path / "undisturbed")


def test_a_preempted_training_saves_before_it_validates_and_draws(
    inputs: Inputs, tmp_path: Path
) -> None:
    """Of its time of grace nothing is spent on them: who goes on does what has to be the same."""
    asked = TRAINING.validate_every
    assert asked == TRAINING.sample_every
    output = tmp_path / "asked"
    assert run("flow matching", inputs, tmp_path / "undisturbed") == 0
    assert run("flow matching", inputs, output, Death("asked", asked)) == -signal.SIGTERM
    (*_, last) = (output / METRICS).read_text().splitlines()
    assert json.loads(last).keys() == LOGGED
    assert not pictures(output)
    assert run("flow matching", inputs, output) == 0
    assert result(output) == result(tmp_path / "undisturbed")


@pytest.mark.parametrize("threads", [1, 2])
def test_what_trains_beside_it_changes_no_bit(inputs: Inputs, tmp_path: Path, threads: int) -> None:
    inputs = replace(inputs, threads=threads)
    assert run("flow matching", inputs, tmp_path / "alone") == 0
    others = [start("DDPM", inputs, tmp_path / f"other-{i}") for i in range(3)]
    assert run("flow matching", inputs, tmp_path / "beside") == 0
    for other in others:
        other.join()
    assert result(tmp_path / "beside") == result(tmp_path / "alone")
