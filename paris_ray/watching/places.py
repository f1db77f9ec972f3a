"""Where the models of a run are, by the names that its listing has."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from paris_ray.artifacts import MANIFEST, METRICS, PROGRESS
from paris_ray.run import FEW_STEP, STUDENT

MAX_EXPERTS = 1024  # that a page can tell apart
_EXPERT = re.compile(r"experts/expert_(\d{1,4})/")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a model of a run is.

    Attributes:
        name: What it is called in addresses.
        title: What people call it.
        folder: Its folder, relative to the run; empty: the run is nothing else.
        manifest: Name of the file whose being there means that it is finished, from the run.
        section: Of the configuration, that its training has.
        shard: The folder of rows whose first captions its grids draw; None: it draws none.
        expert: Its number, of an expert.
    """

    name: str
    title: str
    folder: str
    manifest: str
    section: str
    shard: str | None
    expert: int | None = None


def _shard(cluster: int) -> str:
    return f"clusters/shards/cluster={cluster}"


def _expert_place(k: int) -> Place:
    folder = f"experts/expert_{k}"
    manifest = f"{folder}/{MANIFEST}"
    return Place(f"expert-{k}", f"Expert {k}", folder, manifest, "training", _shard(k), k)


def _student_place(name: str, title: str, section: str) -> Place:
    folder = f"distilled/{name}"
    own, manifest = f"{folder}/expert_0", f"{folder}/{MANIFEST}"
    return Place(name.replace("_", "-"), title, own, manifest, section, _shard(0))


_ADAPTER = Place("adapter", "Adapter", "", MANIFEST, "training", "embeddings")
_SEED = Place("seed", "Seed", "seed", f"seed/{MANIFEST}", "seed_training", _shard(0))
_LATER = (
    Place("router", "Router", "router", f"router/{MANIFEST}", "router_training", None),
    _student_place(STUDENT, "Student", "distil_training"),
    _student_place(FEW_STEP, "Few-step student", "few_step_training"),
)


def places(names: Iterable[str], experts: Iterable[int]) -> list[Place]:
    """Return the models of a run, in the order in which they are trained.

    Args:
        names: Of the files that there are, relative to the run.
        experts: Numbers of those that there will be at least, present or not.
    """
    names = list(names)
    numbers = {int(match[1]) for name in names if (match := _EXPERT.match(name))} | set(experts)

    def present(*among: Place) -> list[Place]:
        return [p for p in among if any(name.startswith(f"{p.folder}/") for name in names)]

    adapter = [_ADAPTER] if METRICS in names or PROGRESS in names else []
    trained = [_expert_place(k) for k in sorted(numbers)[:MAX_EXPERTS]]
    return [*adapter, *present(_SEED), *trained, *present(*_LATER)]
