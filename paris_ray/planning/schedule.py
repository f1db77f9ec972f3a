"""Which GPU of the fleet trains what, and when."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from paris_ray.config import GpuConfig, Precision, Stage
from paris_ray.planning.assignment import Job, assign
from paris_ray.planning.training import TrainingPlan

HOURS_PER_DAY = 24


@dataclass(frozen=True, kw_only=True, slots=True)
class Assignment:
    """One training on one GPU of the fleet; times in days, preemptions included.

    Attributes:
        name: Of the training.
        gpu: Kind and number of the GPU.
        precision: In which it trains there.
        start: When it begins, and is given the GPU.
        days: That it holds the GPU, as expected.
        preemptions: How often the GPU is taken away meanwhile, as expected.
        dollars: What these days cost.
        kwh: What they consume; None where `watts` are unknown.
    """

    name: str
    gpu: str
    precision: Precision
    start: float
    days: float
    preemptions: float
    dollars: float
    kwh: float | None

    @property
    def end(self) -> float:
        """When it is done."""
        return self.start + self.days


@dataclass(frozen=True, slots=True)
class Schedule:
    """The trainings of a run, stage after stage, on a fleet.

    Attributes:
        assignments: Every training that some GPU can train, in the order in which they begin on it.
        unplaced: Names of those that none can; then there is no total.
    """

    assignments: tuple[Assignment, ...]
    unplaced: tuple[str, ...]

    @property
    def days(self) -> float | None:
        """Days until all is trained."""
        return None if self.unplaced else max(a.end for a in self.assignments)

    @property
    def gpu_days(self) -> float | None:
        """Days of all GPUs together, while they train."""
        return None if self.unplaced else sum(a.days for a in self.assignments)

    @property
    def dollars(self) -> float | None:
        """What those days cost."""
        return None if self.unplaced else sum(a.dollars for a in self.assignments)

    @property
    def kwh(self) -> float | None:
        """What they consume; None where that of one is unknown."""
        parts = [a.kwh for a in self.assignments if a.kwh is not None]
        return sum(parts) if not self.unplaced and len(parts) == len(self.assignments) else None


def schedule(
    trainings: Sequence[TrainingPlan], gpus: Sequence[GpuConfig], deadline: float | None = None
) -> Schedule:
    """Place one stage after the other.

    Experts wait for the seed, if there is one, and then for nothing but a GPU.

    Args:
        trainings: Of all stages that there are.
        gpus: The fleet, at least one GPU; `fits` and `durations` of trainings are in this order.
        deadline: Days from now: the cheapest schedule that keeps it is wanted. None: the earliest.
    """
    placed = [t for t in trainings if set(job_of(t, gpus).days) != {None}]
    stages = [_Stage([t for t in placed if t.stage == s], gpus) for s in get_args(Stage)]
    if deadline is not None:
        slack = deadline - sum(stage.days for stage in stages)
        # What is to spare goes first where the most can be saved with it.
        for stage in sorted(stages, key=lambda stage: -stage.days):
            slack -= stage.relax(slack)
    assignments: list[Assignment] = []
    day = 0.0
    for stage in stages:
        assignments += stage.assignments(day)
        day += stage.days
    names = {a.name for a in assignments}
    return Schedule(tuple(assignments), tuple(t.name for t in trainings if t.name not in names))


def job_of(training: TrainingPlan, gpus: Sequence[GpuConfig]) -> Job:
    """Return what a training takes on each kind of GPU; None where it does not fit or never ends.

    Args:
        training: Its `fits` and `durations` are in the order of the fleet.
        gpus: The fleet.
    """
    days = tuple(
        duration.days if fit.fits else None
        for fit, duration in zip(training.fits, training.durations, strict=True)
    )
    prices = (HOURS_PER_DAY * gpu.dollars_per_hour for gpu in gpus)
    dollars = tuple(d if d is None else d * price for d, price in zip(days, prices, strict=True))
    return Job(days, dollars)


def slots(gpus: Sequence[GpuConfig]) -> list[tuple[int, str]]:
    """Return every single GPU of a fleet: its kind, an index into the fleet, and its name."""
    return [
        (kind, f"{gpu.name} {number + 1}")
        for kind, gpu in enumerate(gpus)
        for number in range(gpu.count)
    ]


class _Stage:
    """The trainings of one stage, which may all run at once, and where each goes."""

    def __init__(self, trainings: Sequence[TrainingPlan], gpus: Sequence[GpuConfig]) -> None:
        self.trainings, self.gpus, self.slots = trainings, gpus, slots(gpus)
        self.jobs = [job_of(training, gpus) for training in trainings]
        self._assign(None)

    def _assign(self, deadline: float | None) -> None:
        kinds = [kind for kind, _ in self.slots]
        self.machines = assign(self.jobs, kinds, deadline=deadline) if self.jobs else []

    @property
    def days(self) -> float:
        """Days until the last of them is done."""
        return max((a.end for a in self.assignments(0.0)), default=0.0)

    def relax(self, slack: float) -> float:
        """Take up to so many days more, if that is cheaper; return how many it took."""
        before = self.days
        if slack > 0:
            self._assign(before + slack)
        return self.days - before

    def assignments(self, first_day: float) -> list[Assignment]:
        """Return them from a day on; on each GPU the longest begins first."""
        free_from = [first_day] * len(self.slots)
        result = []
        for i in sorted(range(len(self.jobs)), key=lambda i: -self.jobs[i].least_days):
            machine = self.machines[i]
            result.append(self._assignment(i, *self.slots[machine], free_from[machine]))
            free_from[machine] = result[-1].end
        return result

    def _assignment(self, index: int, kind: int, name: str, start: float) -> Assignment:
        training, gpu, job = self.trainings[index], self.gpus[kind], self.jobs[index]
        days, dollars = job.days[kind], job.dollars[kind]
        assert days is not None
        assert dollars is not None
        return Assignment(
            name=training.name,
            gpu=name,
            precision=training.fits[kind].precision,
            start=start,
            days=days,
            preemptions=training.durations[kind].preemptions,
            dollars=dollars,
            kwh=None if gpu.watts is None else HOURS_PER_DAY * days * gpu.watts / 1000,
        )
