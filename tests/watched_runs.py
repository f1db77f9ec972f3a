"""Small run folders for the tests of watching, by real trainings."""

from collections.abc import Callable
from dataclasses import asdict, replace

import numpy as np

from paris_ray.artifacts import PROGRESS, RESOLVED_CONFIG, SAMPLES, TIMINGS, publish
from paris_ray.cluster_facts import ClusterFacts, write_clusters
from paris_ray.config import Config, FleetConfig, GpuConfig, load, to_yaml
from paris_ray.folders import Folder
from paris_ray.models import Expert
from paris_ray.reports import picture_grid, png_bytes
from paris_ray.run import EXPERT, ROUTER
from paris_ray.training.loop import Progress
from tests.training_shards import TRAINING, Stop, stop_at, train, write_shard

# What a run from a stranger may say.
HOSTILE = "<img src=x onerror=document.title='pwned'>"
WORDS = (["cat", HOSTILE], ["dog"], [])
PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
)
SECRET = "token-that-stays-secret"
NUM_PICTURES, SIDE = 16, 16
CONFIG = replace(TRAINING, sample_every=4, validate_every=4)
DOLLARS_PER_HOUR = 2.5


def captions(cluster: int) -> list[str]:
    """The captions of a cluster's rows, in their order."""
    return [f"picture {i} of cluster {cluster}, {HOSTILE}" for i in range(NUM_PICTURES)]


def grid_of(step: int) -> bytes:
    """A grid whose pictures have colours of their own, and of the step."""
    pictures = np.zeros((NUM_PICTURES, SIDE, SIDE, 3), np.uint8)
    pictures[..., 0] = 10 * np.arange(NUM_PICTURES)[:, None, None]
    pictures[..., 1] = 20 * step
    return png_bytes(picture_grid(pictures, columns=8))


def tells(folder: Folder, then: Callable[[Progress], None] | None = None) -> Callable[..., None]:
    """Return what writes a training's progress down, as its task does."""

    def on_progress(progress: Progress) -> None:
        folder.write_json(PROGRESS, asdict(progress))
        if then is not None:
            then(progress)

    return on_progress


def train_one(run: Folder, k: int, *, stop: int | None = None) -> None:
    """Train an expert with sample grids, from its checkpoint if it has one; or be killed."""
    folder, held_out = run / f"experts/expert_{k}", run / f"clusters/held_out/cluster={k}"

    def draw_samples(_expert: Expert, step: int) -> None:
        folder.write(f"{SAMPLES}/step-{step:06d}.png", grid_of(step))

    try:
        train(
            run / f"clusters/shards/cluster={k}",
            folder,
            config=CONFIG,
            seed=k,
            on_progress=tells(folder, None if stop is None else stop_at(stop)),
            draw_samples=draw_samples,
            data={"held_out": [held_out]},
        )
    except Stop:
        return
    folder.write("samples.png", grid_of(12))
    folder.write(RESOLVED_CONFIG, (run / "clusters").read(RESOLVED_CONFIG))
    publish(folder, EXPERT, config_digest="", parents={}, facts={})


def config(seed: int) -> Config:
    """What the run was configured with."""
    fleet = FleetConfig(gpus=[GpuConfig(dollars_per_hour=DOLLARS_PER_HOUR)])
    return replace(load("quickstart", []), seed=seed, training=CONFIG, fleet=fleet)


def write_run(run: Folder, *, seed: int = 0) -> Folder:
    """A run of three experts.

    The first was killed, resumed and is finished; the second was killed half way; the third has not
    begun.
    """
    facts = [ClusterFacts(rows=NUM_PICTURES, words=w, pictures=[PIXEL] * 2) for w in WORDS]
    write_clusters(run / "clusters", facts)
    (run / "clusters").write(RESOLVED_CONFIG, to_yaml(config(seed)).encode())
    for k in range(len(WORDS)):
        text = np.array(captions(k), dtype=object)
        write_shard(run / f"clusters/shards/cluster={k}", NUM_PICTURES, seed=seed + k, caption=text)
        write_shard(run / f"clusters/held_out/cluster={k}", 4, seed=100 + k)
    train_one(run, 0, stop=10)
    train_one(run, 0)
    train_one(run, 1, stop=6)
    write_router(run / "router")
    run.write(TIMINGS, b'{"stage": "prepare", "seconds": 12.5, "failed": false}\n')
    run.write("ray_token", SECRET.encode())
    return run


def write_router(folder: Folder) -> None:
    """What the task of a router reports, without the router."""
    bins = {"counts": [1, 3], "confidence": [0.4, 0.9], "accuracy": [0.0, 1.0]}
    level = {"accuracy": 0.75, "prototype_accuracy": 0.5, "ece": 0.2, "ece_calibrated": 0.1}
    level |= {"nll_calibrated": 0.6, "reliability": bins}
    facts = {
        "right_cluster": {"0.1": 0.9, "1": 0.5},
        "held_out": {"rows": 4, "temperature": 1.5, "levels": {"0.1": level, "1": level}},
    }
    publish(folder, ROUTER, config_digest="", parents={}, facts=facts)
