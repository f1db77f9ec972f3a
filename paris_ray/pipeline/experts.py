"""Experts: K isolated Ray tasks, one a cluster.

A task is a function of (config, shard, expert id, seed, output). It gets no reference to another
expert, no actor and no collective; an expert trained alone and one trained beside the others are
equal to the bit (same machine kind and thread count).
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import ray
import torch

from paris_ray.artifacts import METRICS, SAMPLES, Folder, VerifiedFolder, read_manifest
from paris_ray.bundle import load_expert
from paris_ray.config import Config, expert_setup
from paris_ray.devices import resolve_device
from paris_ray.errors import TrainingError
from paris_ray.models import Expert
from paris_ray.pipeline.placement import on_reserved_device, placed
from paris_ray.pipeline.progress import ProgressFile, Task, watch
from paris_ray.pipeline.samples import SampleGrid
from paris_ray.pipeline.stage import Stage, start_parent
from paris_ray.run import EXPERT, EXPERT_WEIGHTS, SHARD, Run
from paris_ray.seeding import derive_seed
from paris_ray.training.expert import train_expert

logger = logging.getLogger("paris_ray")

SECTIONS = ("seed", "expert", "training")


def train_experts(config: Config, only: Sequence[int] | None = None) -> None:
    """Train all experts, or only some, as many at a time as the cluster has room for.

    Each has its own setup (`config.experts`), which alone decides whether it is finished already.
    One that fails does not stop the others.

    Args:
        config: The run.
        only: Numbers of the experts to train; None means all.

    Raises:
        TrainingError: naming the experts that failed, after all others are done.
        ArtifactError: if prepare has not finished.
        ConfigError: if an expert's setup or place is not allowed.
    """
    run = Run(config)
    chosen = range(run.num_experts) if only is None else only
    setups = {k: _setup(run, k) for k in chosen}
    stages = {k: _expert_stage(run, k, setup) for k, setup in setups.items()}
    todo = [k for k, stage in stages.items() if stage.finished() is None]
    places = {k: placed(train_one_expert, f"expert-{k}", setups[k].training) for k in todo}
    tasks = {f"expert {k}": _submit(run, k, setups[k], places[k]) for k in todo}
    failed = []
    for name, error in watch(tasks):
        if error is None:
            report = ray.get(tasks[name].result)
            stages[report["expert"]].publish(report)
        else:
            failed.append(f"{name}: {error}")
    if failed:
        reasons = "; ".join(failed)
        raise TrainingError(f"{len(failed)} of {len(chosen)} experts failed: {reasons}")


def _setup(run: Run, expert: int) -> Config:
    if not 0 <= expert < run.num_experts:
        raise TrainingError(f"expert {expert} does not exist: allowed 0..{run.num_experts - 1}")
    setup = expert_setup(run.config, expert)
    return replace(setup, training=on_reserved_device(setup.training))


def _expert_stage(run: Run, expert: int, setup: Config) -> Stage:
    parents = {"shard": read_manifest(run.shard(expert), SHARD).digest}
    parents |= start_parent(setup.training, EXPERT_WEIGHTS)
    return Stage(EXPERT, run.expert(expert), setup, sections=SECTIONS, parents=parents)


def _submit(run: Run, expert: int, setup: Config, place: Any) -> Task:
    result = place.remote(
        setup,
        run.shard(expert).uri,
        expert,
        derive_seed(setup.seed, "expert", expert),
        run.expert(expert).uri,
        run.encoders.uri,
    )
    return Task(result, run.expert(expert), setup.training)


@ray.remote
def train_one_expert(
    setup: Config, shard_uri: str, expert: int, seed: int, output_uri: str, encoders_uri: str
) -> dict[str, Any]:
    """Train one expert on its shard and draw sample grids; return a small report."""
    shard, output, encoders = Folder(shard_uri), Folder(output_uri), Folder(encoders_uri)
    manifest = read_manifest(shard, SHARD)
    grid = cache(partial(SampleGrid, setup, shard, encoders, seed))  # when the shard was checked

    def draw_samples(average: Expert, step: int) -> None:
        output.write(f"{SAMPLES}/step-{step:06d}.png", grid().draw(average))

    train_expert(
        setup.expert,
        setup.training,
        shard=shard,
        shard_digest=manifest.digest,
        seed=seed,
        output=output,
        on_progress=ProgressFile(output, f"expert-{expert}"),
        text_encoder=encoders,
        draw_samples=draw_samples,
    )
    assert not torch.distributed.is_initialized(), "experts must train without any collective"
    trained = load_expert(VerifiedFolder(output, None)).to(resolve_device(setup.training.device))
    output.write("samples.png", grid().draw(trained))
    last_metrics = json.loads(output.read(METRICS).splitlines()[-1])
    return {"expert": expert, "rows": manifest.facts["rows"], **last_metrics}
