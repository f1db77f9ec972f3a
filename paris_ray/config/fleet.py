"""What a run is planned with: `--dry-run` of every job, and `jobs.plan`."""

from dataclasses import dataclass, field
from typing import Literal

# The trainings of a run, in the order in which they follow each other.
Stage = Literal["seed", "expert", "router", "student", "few_step"]


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuConfig:
    """Some equal GPUs of a fleet, or equal places of machines that train on their CPUs."""

    name: str = "A40"
    count: int = 8
    memory_gb: float = 48.0
    peak_tflops: float = 149.7  # dense bfloat16, as the maker states it
    mfu: float = 0.4  # share of the peak that training is expected to reach
    # What trainings really reach, by stage, in place of these two (`jobs.plan --probe` measures it)
    samples_per_second: dict[str, float] = field(default_factory=dict)
    bfloat16: bool = True  # in hardware; where not, precision=auto means float32
    dollars_per_hour: float = 0.4  # of one GPU
    watts: float | None = None  # of one, with its share of the machine around it; null: unknown
    preemptions_per_day: float = 0.0  # of one, as the mean of many days
    start_s: float = 0.0  # from being given a machine, at first or again, to the first new step


@dataclass(frozen=True, kw_only=True, slots=True)
class FleetConfig:
    """What a run is planned with; nothing else reads it."""

    num_images: int = 2_000  # rows of the corpus
    cluster_rows: list[int] = field(default_factory=list)  # of each cluster; empty: all are equal
    deadline_days: float | None = None  # if given: the cheapest plan that keeps it
    gpus: list[GpuConfig] = field(default_factory=list)
