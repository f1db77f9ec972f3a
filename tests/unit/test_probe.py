"""How fast a machine trains, found out by training on it."""

from dataclasses import replace
from itertools import count

import pytest

from paris_ray.config import ExpertConfig, RouterConfig, load
from paris_ray.training import probe
from paris_ray.training.loop import Progress
from paris_ray.training.probe import probe_machine
from tests.training_shards import GEOMETRY, TRAINING, WIDTH

CONFIG = replace(
    load("quickstart"),
    expert=ExpertConfig(**GEOMETRY, **WIDTH),
    router=RouterConfig(**GEOMETRY, **WIDTH),
    training=TRAINING,
    seed_training=replace(TRAINING, batch_size=8, max_hours=1e-9),
    router_training=replace(TRAINING, batch_size=2),
)


def test_each_stage_is_trained_as_the_run_would() -> None:
    found = probe_machine(CONFIG, ["seed", "expert", "router"], 0.3)
    assert found.device == "CPU"
    assert found.memory_bytes > 1e8
    assert list(found.samples_per_second) == ["seed", "expert", "router"]
    assert all(rate > 0 for rate in found.samples_per_second.values())


def test_a_slow_machine_has_three_steps_of_which_the_first_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seconds = count(step=10.0)
    monkeypatch.setattr(probe, "perf_counter", lambda: next(seconds))
    found = probe_machine(CONFIG, ["expert"], 1.0)
    assert found.samples_per_second == {"expert": TRAINING.batch_size / 10.0}


def test_steps_that_warm_up_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 20.0, 30.0, 31.0, 32.0, 100.0])
    monkeypatch.setattr(probe, "perf_counter", lambda: next(times))
    clock = probe._Clock(100.0)
    steps = [
        Progress(step=n, num_steps=9, samples_seen=4 * n, loss=0, samples_per_second=0, eta_s=0)
        for n in range(1, 6)
    ]
    for step in steps[:-1]:
        clock(step)
    with pytest.raises(probe._Enough):
        clock(steps[-1])
    assert clock.samples_per_second == pytest.approx(4 * 4 / 80), "from the last of these on"
