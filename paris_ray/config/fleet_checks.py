"""What the types of `fleet` cannot express."""

import math
from collections.abc import Iterator, Mapping
from typing import get_args

from paris_ray.config.fleet import FleetConfig, GpuConfig, Stage

Refusal = tuple[str, object, str]


def refused_fleet(fleet: FleetConfig, num_clusters: int) -> Iterator[Refusal]:
    """Yield name, value and what is allowed of every field that is not.

    Args:
        fleet: The section.
        num_clusters: Of the run that it is to train.
    """
    if fleet.num_images < 1:
        yield "num_images", fleet.num_images, "at least 1"
    rows = fleet.cluster_rows
    if rows and (len(rows) != num_clusters or min(rows) < 1):
        allowed = f"[], or as many numbers of rows as cluster.num_clusters={num_clusters}"
        yield "cluster_rows", rows, f"{allowed}, each at least 1"
    deadline = fleet.deadline_days
    if deadline is not None and not _is_positive(deadline):
        yield "deadline_days", deadline, "> 0, or null"
    for i, gpu in enumerate(fleet.gpus):
        for name, value, allowed in _refused_gpu(gpu):
            yield f"gpus[{i}].{name}", value, allowed


def _refused_gpu(gpu: GpuConfig) -> Iterator[Refusal]:
    for key in ("count", "memory_gb", "peak_tflops"):
        if not _is_positive(getattr(gpu, key)):
            yield key, getattr(gpu, key), "> 0"
    if not 0 < gpu.mfu <= 1:
        yield "mfu", gpu.mfu, "0 < x <= 1"
    for key in ("dollars_per_hour", "preemptions_per_day", "start_s", "watts"):
        value = getattr(gpu, key)
        if value is not None and not 0 <= value < math.inf:
            yield key, value, "at least 0"
    yield from _refused_rates(gpu.samples_per_second)


def _refused_rates(measured: Mapping[str, float]) -> Iterator[Refusal]:
    stages = get_args(Stage)
    for stage, rate in measured.items():
        if stage not in stages:
            yield "samples_per_second", stage, f"only {', '.join(stages)}"
        if not _is_positive(rate):
            yield f"samples_per_second.{stage}", rate, "> 0"
    if measured and "expert" not in measured:
        yield (
            "samples_per_second",
            measured,
            "with `expert`, by which stages not in it are reckoned",
        )


def _is_positive(value: float) -> bool:
    return 0 < value < math.inf
