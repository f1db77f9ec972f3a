"""The ledger of a run: what making each of its artefacts took.

A file an artefact in `ledger/` of the run folder, written when it is finished: samples, FLOPs,
device-hours, dollars, and the bytes read and written by category. Of an expert the category of the
other experts' bytes says that it got apart. Hours differ from run to run, so no digest has them.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from paris_ray.artifacts import CHECKPOINT, LEDGER, METRICS, PROGRESS, SAMPLES, SPENT, TIMINGS
from paris_ray.errors import ArtifactError
from paris_ray.folders import Folder, absolute_uri
from paris_ray.run import EXPERT_WEIGHTS, MODEL_CONFIG, ROUTER_WEIGHTS, Run
from paris_ray.traffic import Traffic

SECONDS_PER_HOUR = 3600

OTHER_EXPERTS, ELSEWHERE = "other experts", "elsewhere"
# Of its own folder, by the names of files and of the folders that hold them.
_OWN = {
    CHECKPOINT: "checkpoints",
    EXPERT_WEIGHTS: "weights",
    ROUTER_WEIGHTS: "weights",
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Taken:
    """What making one artefact took.

    Attributes:
        hours: That its device was held, of a training; else those of the job, by the clock. Of a
            training those of processes that were killed count, else of the last job alone.
        device: What trained; None: it is no training.
        samples: That a training saw.
        flops: Of a training: the model's own arithmetic, as its MFU counts it.
        dollars: Hours times `training.dollars_per_hour`; None where there is no price.
        bytes: `{"read": {category: bytes}, "written": {category: bytes}}`: of a training what the
            process that ended it moved, else what lies in the artefact's folder.
    """

    hours: float
    device: str | None = None
    samples: int = 0
    flops: int = 0
    dollars: float | None = None
    bytes: Bytes = field(default_factory=dict)


def taken_by_job(folder: Folder, seconds: float) -> Taken:
    """Return what an artefact took that is no training.

    Args:
        folder: Of the artefact, in which everything is.
        seconds: Of the job.
    """
    written: Counter[str] = Counter()
    for name, stamp in folder.stamps().items():
        written[name.partition("/")[0] if "/" in name else "files of its own"] += stamp.size
    return Taken(hours=seconds / SECONDS_PER_HOUR, bytes={"written": dict(sorted(written.items()))})


def write_taken(run: Folder, place: str, taken: Taken) -> None:
    """Write what an artefact took.

    Args:
        run: Folder of the run.
        place: Of the artefact in it, such as `experts/expert_3`.
        taken: What it took.
    """
    run.write_json(f"{LEDGER}/{place}.json", asdict(taken))


def read_ledger(run: Folder) -> dict[str, Taken]:
    """Return what every artefact of a run took, by its place.

    Raises:
        ArtifactError: naming a file that is damaged.
    """
    ledger = run / LEDGER
    return {
        name.removesuffix(".json"): _parsed(ledger.read_json(name), f"{ledger.uri}/{name}")
        for name in ledger.files()
    }


def _parsed(told: Any, source: str) -> Taken:
    try:
        taken = Taken(**told)
        _ = taken.hours + taken.samples + taken.flops + (taken.dollars or 0)
        _ = [sum(moved.values()) for moved in taken.bytes.values()]
    except (TypeError, AttributeError) as error:
        raise ArtifactError(f"{source} is damaged: {error}") from None
    return taken


def bytes_by_category(
    traffic: Traffic, run: Run, own: Folder, init_from: str | None, *, expert: int | None = None
) -> Bytes:
    """Return `{"read": {category: bytes}, "written": {category: bytes}}` of a training.

    Of an expert `OTHER_EXPERTS` is always there, so that nothing is told too.

    Args:
        traffic: What its process moved.
        run: The run.
        own: The folder of what was trained.
        init_from: The folder of the weights that it started from, or None.
        expert: Its number; None: it is no expert of one cluster, and reads all shards.
    """
    places = _places(run, expert, init_from)

    def sums(moved: Mapping[str, int]) -> dict[str, int]:
        total = Counter({} if expert is None else {OTHER_EXPERTS: 0})
        for uri, size in moved.items():
            total[_category(uri, places, own.uri)] += size
        return dict(sorted(total.items()))

    return {"read": sums(traffic.read), "written": sums(traffic.written)}


def _places(run: Run, expert: int | None, init_from: str | None) -> dict[str, str]:
    """Return the category of each folder that a training has to do with; inner ones come first."""
    alone = expert is not None
    shards = run.shard(expert) if expert is not None else run.clusters / "shards"
    return {
        shards.uri: "shard" if alone else "shards",
        run.shared.uri: "shared rows",
        (run.clusters / "held_out").uri: "held-out rows",
        run.encoders.uri: "encoders",
        **({} if init_from is None else {absolute_uri(init_from): "initial weights"}),
        (run.folder / "experts").uri: OTHER_EXPERTS if alone else "experts",
        run.router.uri: "router",
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
