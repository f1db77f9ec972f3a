"""Which GPU of the fleet trains what, and when."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from paris_ray.config import GpuConfig
from paris_ray.planning.training import Stage, TrainingPlan

SECONDS_PER_DAY = 86_400
TERA = 10**12


@dataclass(frozen=True, kw_only=True, slots=True)
class Assignment:
    """One training on one GPU of the fleet; times in days."""

    name: str
    gpu: str
    start: float
    days: float
    dollars: float

    @property
    def end(self) -> float:
        """When it is done."""
        return self.start + self.days


@dataclass(frozen=True, slots=True)
class Schedule:
    """The trainings of a run, stage after stage, on a fleet.

    Attributes:
        assignments: Every training that fits a GPU, in the order in which they were placed.
        unplaced: Names of those that fit none; then there is no total.
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


def schedule(trainings: Sequence[TrainingPlan], gpus: Sequence[GpuConfig]) -> Schedule:
    """Place a stage after the other: in each the longest first, on the GPU that ends it first.

    Experts wait for the seed, if there is one, and then for nothing but a GPU: this greedy rule is
    never worse than 4/3 of the best schedule on equal GPUs (Graham 1969).

    Args:
        trainings: Of all stages that there are.
        gpus: The fleet, at least one GPU; `fits` of the trainings is in this order.
    """
    fleet, pairs = _Fleet(gpus), []
    for stage in get_args(Stage):
        earliest = fleet.busy_until
        members = sorted((t for t in trainings if t.stage == stage), key=lambda t: -t.flops)
        pairs += [(training, fleet.place(training, earliest)) for training in members]
    return Schedule(
        tuple(assignment for _, assignment in pairs if assignment is not None),
        tuple(training.name for training, assignment in pairs if assignment is None),
    )


class _Fleet:
    """Single GPUs, and from when on, in days, each is free."""

    def __init__(self, gpus: Sequence[GpuConfig]) -> None:
        self.gpus = gpus
        self.free_from = {(kind, i): 0.0 for kind, gpu in enumerate(gpus) for i in range(gpu.count)}

    @property
    def busy_until(self) -> float:
        """The day on which all that was placed is done."""
        return max(self.free_from.values())

    def place(self, training: TrainingPlan, earliest: float) -> Assignment | None:
        """Train on the GPU that ends first, not before a day; None if none is large enough."""
        ends = {
            slot: max(free, earliest) + _days(training, self.gpus[slot[0]])
            for slot, free in self.free_from.items()
            if training.fits[slot[0]].fits
        }
        if not ends:
            return None
        kind, number = best = min(ends, key=lambda slot: ends[slot])
        gpu = self.gpus[kind]
        days = _days(training, gpu)
        self.free_from[best] = ends[best]
        return Assignment(
            name=training.name,
            gpu=f"{gpu.name} {number + 1}",
            start=ends[best] - days,
            days=days,
            dollars=24 * days * gpu.dollars_per_hour,
        )


def _days(training: TrainingPlan, gpu: GpuConfig) -> float:
    return training.flops / (gpu.peak_tflops * TERA * gpu.mfu) / SECONDS_PER_DAY
