"""A run on a fleet, event by event: machines that are taken away at random, and what that costs.

Plans tell expected days; this draws when each machine is taken away and lets the trainings run. It
knows nothing of how a plan was made, so that plans may be compared by it.
"""

import heapq
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from paris_ray.planning.durations import Duration
from paris_ray.seeding import derive_seed

# Returns the next job of a machine that is free, and forgets it; None: there is no more for it.
Next = Callable[[int], str | None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a run; times in days.

    Attributes:
        makespan: Until the last job was done.
        held: That machines were held, all together.
        repeated: Of these, what was trained a second time.
        preemptions: How often a machine was taken away.
        machine_of: On which each job ran.
    """

    makespan: float
    held: float
    repeated: float
    preemptions: int
    machine_of: Mapping[str, int]


def simulate(
    durations: Mapping[str, Sequence[Duration]],
    machines: Sequence[int],
    next_job: Next,
    *,
    seed: int,
) -> Outcome:
    """Run jobs until none is left.

    A machine that is taken away is replaced by one like it, which goes on from the last checkpoint.
    When that happens depends on the seed and the machine alone, not on what the others do.

    Args:
        durations: What each job takes, by its name, on each kind of machine.
        machines: The kind of each machine.
        next_job: Is asked whenever a machine is free.
        seed: Decides when machines are taken away.
    """
    chances = [random.Random(derive_seed(seed, "preemptions", m)) for m in range(len(machines))]
    free = [(0.0, machine) for machine in range(len(machines))]  # a heap: who is free first
    runs: list[_Run] = []
    machine_of: dict[str, int] = {}
    makespan = 0.0
    while free:
        now, machine = heapq.heappop(free)
        job = next_job(machine)
        if job is None:
            continue
        run = _run(durations[job][machines[machine]], chances[machine])
        runs.append(run)
        machine_of[job] = machine
        makespan = max(makespan, now + run.held)
        heapq.heappush(free, (now + run.held, machine))
    return Outcome(
        makespan=makespan,
        held=sum(run.held for run in runs),
        repeated=sum(run.repeated for run in runs),
        preemptions=sum(run.preemptions for run in runs),
        machine_of=machine_of,
    )


def planned(machine_of: Mapping[str, int]) -> Next:
    """Return a `Next` by which each machine does its own jobs, in their order.

    Args:
        machine_of: The machine of each job.
    """
    queues: dict[int, list[str]] = {}
    for job, machine in machine_of.items():
        queues.setdefault(machine, []).append(job)

    def next_job(machine: int) -> str | None:
        queue = queues.get(machine)
        return queue.pop(0) if queue else None

    return next_job


def first_come(jobs: Sequence[str], may_run: Callable[[str, int], bool]) -> Next:
    """Return a `Next` by which whoever is free takes the first job that it may run, as Ray does.

    Args:
        jobs: In their order.
        may_run: Whether a job may run on a machine.
    """
    waiting = list(jobs)

    def next_job(machine: int) -> str | None:
        job = next((job for job in waiting if may_run(job, machine)), None)
        if job is not None:
            waiting.remove(job)
        return job

    return next_job


def equal_split(
    jobs: Sequence[str], num_machines: int, may_run: Callable[[str, int], bool]
) -> dict[str, int]:
    """Return a machine for each job so that all have as many, whatever machines they are.

    Args:
        jobs: Each may run somewhere.
        num_machines: How many there are.
        may_run: Whether a job may run on a machine.
    """
    counts = [0] * num_machines
    machine_of = {}
    for job in jobs:
        allowed = (machine for machine in range(num_machines) if may_run(job, machine))
        machine_of[job] = min(allowed, key=lambda machine: counts[machine])
        counts[machine_of[job]] += 1
    return machine_of


@dataclass(frozen=True, slots=True)
class _Run:
    held: float
    repeated: float
    preemptions: int


def _run(duration: Duration, chance: random.Random) -> _Run:
    """Run one job to its end on machines of one kind."""
    held = repeated = done = 0.0
    preemptions = 0
    while True:
        needed = duration.start + duration.work - done
        rate = duration.preemption_rate
        taken_after = chance.expovariate(rate) if rate else needed
        if taken_after >= needed:
            return _Run(held + needed, repeated, preemptions)
        preemptions += 1
        held += taken_after
        reached = done + max(0.0, taken_after - duration.start)
        saved = reached // duration.interval * duration.interval
        done = max(done, saved)  # the quotient may be rounded down past what is saved
        repeated += reached - done
