"""Who goes where, against all assignments there are, and runs whose machines are taken away."""

import random
from collections.abc import Sequence
from itertools import product
from statistics import fmean

import pytest

from paris_ray.planning.assignment import Job, assign
from paris_ray.planning.durations import Duration
from paris_ray.planning.simulation import (
    equal_split,
    first_come,
    planned,
    simulate,
)


def value(
    jobs: Sequence[Job], kinds: Sequence[int], chosen: Sequence[int], deadline: float | None
) -> tuple[float, ...]:
    """What is to be small; infinite where a job may not run."""
    loads, dollars = [0.0] * len(kinds), 0.0
    for job, machine in zip(jobs, chosen, strict=True):
        days, price = job.days[kinds[machine]], job.dollars[kinds[machine]]
        if days is None or price is None:
            return (float("inf"),) * (2 if deadline is None else 3)
        loads[machine] += days
        dollars += price
    if deadline is None:
        return (max(loads), dollars)
    return (max(0.0, max(loads) - deadline), dollars, max(loads))


def question(seed: int) -> tuple[list[Job], list[int]]:
    """Some jobs for some machines; each may run on the first of them."""
    chance = random.Random(seed)
    num_kinds = chance.randint(1, 3)
    kinds = [chance.randrange(num_kinds) for _ in range(chance.randint(1, 4))]
    speeds = [chance.uniform(0.5, 3) for _ in range(num_kinds)]
    prices = [chance.uniform(0.1, 3) for _ in range(num_kinds)]
    jobs = []
    for _ in range(chance.randint(1, 5)):
        work = chance.choice([1.0, 1.0, chance.uniform(0.5, 3)])
        may = [chance.random() < 0.8 or kind == kinds[0] for kind in range(num_kinds)]
        days = [work / speed if ok else None for speed, ok in zip(speeds, may, strict=True)]
        dollars = [d if d is None else d * p for d, p in zip(days, prices, strict=True)]
        jobs.append(Job(tuple(days), tuple(dollars)))
    return jobs, kinds


@pytest.mark.parametrize("deadline", [None, 1.5, 4.0])
def test_few_jobs_are_assigned_as_well_as_can_be(deadline: float | None) -> None:
    for seed in range(40):
        jobs, kinds = question(seed)
        every = product(range(len(kinds)), repeat=len(jobs))
        best = min(value(jobs, kinds, chosen, deadline) for chosen in every)
        found = assign(jobs, kinds, deadline=deadline)
        assert value(jobs, kinds, found, deadline) == pytest.approx(best), seed


def test_longest_first_alone_would_miss_the_best() -> None:
    jobs = [Job((days,), (0.0,)) for days in (5.0, 5.0, 4.0, 4.0, 3.0, 3.0, 3.0)]
    found = assign(jobs, [0, 0, 0])
    assert value(jobs, [0, 0, 0], found, None)[0] == 9.0  # Graham's rule alone reaches 11


def test_many_jobs_are_assigned_soon_and_each_somewhere() -> None:
    jobs = [Job((1 + k % 7, 2.0 + k % 7), (1.0, 1.0)) for k in range(1024)]
    found = assign(jobs, [0, 1] * 20)
    assert len(found) == 1024
    assert set(found) == set(range(40))


def test_a_deadline_makes_it_cheaper_and_is_kept_if_it_can_be() -> None:
    jobs = [Job((1.0, 3.0), (10.0, 1.0))] * 4
    fastest = assign(jobs, [0, 1])
    assert value(jobs, [0, 1], fastest, None) == (3.0, 31.0)
    for deadline, dollars in ((6.0, 22.0), (9.0, 13.0), (12.0, 4.0)):
        found = assign(jobs, [0, 1], deadline=deadline)
        assert value(jobs, [0, 1], found, deadline)[:2] == (0.0, dollars)
    assert assign(jobs, [0, 1], deadline=1.0) == fastest


# --- machines that are taken away ---


def test_a_preemption_costs_half_an_interval_and_a_start() -> None:
    assert Duration(work=3.0, interval=0.2, start=0.05).days == pytest.approx(3.05)
    taken = Duration(work=3.0, interval=0.2, start=0.05, preemption_rate=2.0)
    assert taken.lost == pytest.approx(0.15)
    assert taken.days == pytest.approx(3.05 / (1 - 2.0 * 0.15))
    assert taken.preemptions == pytest.approx(2 * 3.05 / 0.7)


def test_what_is_taken_away_before_it_saves_never_ends() -> None:
    never = Duration(work=3.0, interval=1.0, start=0.5, preemption_rate=1.0)
    assert never.days is None
    assert never.preemptions == 0.0


@pytest.mark.parametrize("rate", [0.0, 0.5, 2.0])
def test_the_simulator_finds_on_average_what_is_expected(rate: float) -> None:
    duration = Duration(work=3.0, interval=0.1, start=0.02, preemption_rate=rate)
    runs = [simulate({"a": [duration]}, [0], planned({"a": 0}), seed=seed) for seed in range(400)]
    assert fmean(run.makespan for run in runs) == pytest.approx(duration.days, rel=0.02)
    assert fmean(run.preemptions for run in runs) == pytest.approx(duration.preemptions, rel=0.1)
    repeated = fmean(run.repeated for run in runs)
    assert repeated == pytest.approx(duration.preemptions * duration.interval / 2, rel=0.1)


def test_equal_seeds_are_equal_and_nothing_is_lost() -> None:
    duration = Duration(work=1.0, interval=0.25, start=0.0, preemption_rate=3.0)
    durations = {name: [duration] for name in "abc"}
    own = {"a": 0, "b": 0, "c": 1}
    first, again, other = (
        simulate(durations, [0, 0], planned(own), seed=seed) for seed in (1, 1, 2)
    )
    assert first == again != other
    assert first.machine_of == own
    assert first.preemptions > 0
    assert first.held == pytest.approx(3.0 + first.repeated)  # starts take no time here


def test_jobs_of_a_machine_follow_each_other_and_machines_do_not_wait() -> None:
    durations = {"a": [Duration(1.0, 1.0)], "b": [Duration(2.0, 1.0)], "c": [Duration(4.0, 1.0)]}
    run = simulate(durations, [0, 0], planned({"a": 0, "b": 0, "c": 1}), seed=0)
    assert (run.makespan, run.held, run.repeated, run.preemptions) == (4.0, 7.0, 0.0, 0)


def test_an_equal_split_and_first_come_ask_nothing_of_speed() -> None:
    durations = {f"job {k}": [Duration(1.0, 1.0), Duration(4.0, 1.0)] for k in range(4)}
    anywhere = lambda job, machine: True  # noqa: E731
    split = equal_split(list(durations), 2, anywhere)
    assert sorted(split.values()) == [0, 0, 1, 1]
    assert simulate(durations, [0, 1], planned(split), seed=0).makespan == 8.0
    came = simulate(durations, [0, 1], first_come(list(durations), anywhere), seed=0)
    assert came.makespan == 4.0
    assert sorted(came.machine_of.values()) == [0, 0, 0, 1]


def test_nothing_goes_where_it_may_not() -> None:
    only_second = lambda job, machine: machine == 1 or job == "small"  # noqa: E731
    jobs = ["large", "small", "large too"]
    assert equal_split(jobs, 2, only_second) == {"large": 1, "small": 0, "large too": 1}
    durations = {name: [Duration(1.0, 1.0)] for name in jobs}
    came = simulate(durations, [0, 0], first_come(jobs, only_second), seed=0)
    assert came.machine_of == {"small": 0, "large": 1, "large too": 1}
