"""What the training of an expert read and wrote, in bytes by category: what experts get apart."""

from collections import Counter
from collections.abc import Mapping

from paris_ray.artifacts import (
    CHECKPOINT,
    METRICS,
    PROGRESS,
    SAMPLES,
    SPENT,
    TIMINGS,
    absolute_uri,
)
from paris_ray.run import EXPERT_WEIGHTS, MODEL_CONFIG, Run
from paris_ray.traffic import Traffic

OTHER_EXPERTS, ELSEWHERE = "other experts", "elsewhere"
# Of its own folder, by the names of files and of the folders that hold them.
_OWN = {
    CHECKPOINT: "checkpoints",
    EXPERT_WEIGHTS: "weights",
    MODEL_CONFIG: "weights",
    METRICS: "metrics",
    TIMINGS: "metrics",
    PROGRESS: "metrics",
    SPENT: "metrics",
    "tensorboard": "metrics",
    SAMPLES: "pictures",
    "samples.png": "pictures",
}

Bytes = Mapping[str, Mapping[str, int]]


def bytes_by_category(traffic: Traffic, run: Run, expert: int, init_from: str | None) -> Bytes:
    """Return `{"read": {category: bytes}, "written": {category: bytes}}` of an expert's training.

    `OTHER_EXPERTS` is always there, so that nothing is told too.

    Args:
        traffic: What its process moved.
        run: The run.
        expert: Its number.
        init_from: The folder of the weights that it started from, or None.
    """
    places = _places(run, expert, init_from)

    def sums(moved: Mapping[str, int]) -> dict[str, int]:
        total = Counter({OTHER_EXPERTS: 0})
        for uri, size in moved.items():
            total[_category(uri, places, run.expert(expert).uri)] += size
        return dict(sorted(total.items()))

    return {"read": sums(traffic.read), "written": sums(traffic.written)}


def _places(run: Run, expert: int, init_from: str | None) -> dict[str, str]:
    """Return the category of each folder that an expert has to do with; inner ones come first."""
    return {
        run.shard(expert).uri: "shard",
        run.shared.uri: "shared rows",
        (run.clusters / "held_out").uri: "held-out rows",
        run.encoders.uri: "encoders",
        **({} if init_from is None else {absolute_uri(init_from): "initial weights"}),
        (run.folder / "experts").uri: OTHER_EXPERTS,
    }


def _category(uri: str, places: Mapping[str, str], own: str) -> str:
    if uri.startswith(f"{own}/"):
        name = uri.removeprefix(f"{own}/").partition("/")[0]
        return _OWN.get(name, "other")
    for place, category in places.items():
        if uri.startswith(f"{place}/"):
            return category
    return ELSEWHERE


def describe(moved: Bytes) -> str:
    """Return a line for people: what was read and written, in megabytes, the most first."""
    return "; ".join(f"{direction} {_amounts(moved[direction])}" for direction in moved)


def _amounts(amounts: Mapping[str, int]) -> str:
    ordered = sorted(amounts.items(), key=lambda item: -item[1])
    return ", ".join(f"{size / 1e6:.2f} MB of {category}" for category, size in ordered)
