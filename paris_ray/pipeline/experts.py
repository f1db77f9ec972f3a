"""Experts: K isolated Ray tasks, one a cluster.

A task is a function of (config, expert id, seed): its data and its output are folders of the run,
and it reads no other's output but the seed's, which was finished before. It gets no reference to
another expert, no actor and no collective; an expert trained alone and one trained beside the
others are equal to the bit (same machine kind and thread count).
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import cache, partial
from typing import Any

import ray

from paris_ray.artifacts import METRICS, SAMPLES, VerifiedFolder, read_manifest
from paris_ray.bundle import load_expert
from paris_ray.config import Config, expert_setup
from paris_ray.devices import resolve_device
from paris_ray.errors import SpendingCapError, TrainingError
from paris_ray.folders import Folder
from paris_ray.ledger import Taken, bytes_by_category, describe
from paris_ray.models import Expert
from paris_ray.models.flops import text_length
from paris_ray.pipeline.placement import on_reserved_device, placed
from paris_ray.pipeline.progress import ProgressFile, Task, watch
from paris_ray.pipeline.samples import SampleGrid
from paris_ray.pipeline.stage import Stage, start_parent
from paris_ray.run import EXPERT, EXPERT_WEIGHTS, SEED, SHARD, Run
from paris_ray.seeding import derive_seed
from paris_ray.traffic import recorded
from paris_ray.training.expert import ExpertData, train_expert
from paris_ray.training.isolation import isolated
from paris_ray.training.spending import seconds_spent, taken_by_training

logger = logging.getLogger("paris_ray")

SECTIONS = ("seed", "expert", "training")


def train_experts(config: Config, only: Sequence[int] | None = None) -> None:
    """Train all experts, or only some, as many at a time as the cluster has room for.

    Each has its own setup (`config.experts`), which alone decides whether it is finished already.
    One that fails does not stop the others.

    Args:
        config: The run.
        only: Numbers of the experts to train; None means all, or those of a federation's site.

    Raises:
        TrainingError: naming the experts that failed, after all others are done.
        SpendingCapError: if none failed, but some reached a cap of theirs.
        ArtifactError: if prepare, or the seed where there is one, has not finished.
        ConfigError: if an expert's setup or place is not allowed.
        LockError: if another job trains one of them.
    """
    run = Run(config)
    chosen = run.trained_experts if only is None else only
    setups = {k: _setup(run, k) for k in chosen}
    stages = {k: _expert_stage(run, k, setup) for k, setup in setups.items()}
    with ExitStack() as locks:
        for stage in stages.values():
            locks.enter_context(stage.locked())
        failed = _train(run, setups, stages)
    if failed:
        capped = all(isinstance(error, SpendingCapError) for error in failed.values())
        became = "reached a cap of theirs" if capped else "failed"
        reasons = "; ".join(f"{name}: {error}" for name, error in failed.items())
        told = f"{len(failed)} of {len(chosen)} experts {became}: {reasons}"
        raise SpendingCapError(told) if capped else TrainingError(told)


def _train(
    run: Run, setups: Mapping[int, Config], stages: Mapping[int, Stage]
) -> dict[str, Exception]:
    """Train the experts that are not finished; return the errors of those that failed, by name."""
    todo = [k for k, stage in stages.items() if stage.finished() is None]
    places = {k: placed(train_one_expert, f"expert-{k}", setups[k].training) for k in todo}
    tasks = {
        f"expert {k}": Task(place.remote(setups[k], k), run.expert(k), setups[k].training)
        for k, place in places.items()
    }

    def check() -> None:
        for stage in stages.values():
            stage.check()

    failed: dict[str, Exception] = {}
    with closing(watch(tasks, check)) as watched:
        for name, error in watched:
            if error is None:
                report, taken = ray.get(tasks[name].result)
                stages[report["expert"]].publish(report, taken=taken)
                logger.info("%s: %s", name, describe(report["bytes"]))
            else:
                failed[name] = error
    return failed


def _setup(run: Run, expert: int) -> Config:
    """Return the setup of one expert, which starts from the seed unless it says otherwise."""
    if not 0 <= expert < run.num_experts:
        raise TrainingError(f"expert {expert} does not exist: allowed 0..{run.num_experts - 1}")
    setup = expert_setup(run.config, expert)
    training = on_reserved_device(setup.training)
    if run.config.seed_training.steps and training.init_from is None:
        read_manifest(run.seed, SEED)  # else a half-written one would do
        training = replace(training, init_from=run.seed.uri)
    return replace(setup, training=training)


def _expert_stage(run: Run, expert: int, setup: Config) -> Stage:
    parents = _data_digests(run, expert) | start_parent(setup.training, EXPERT_WEIGHTS)
    return Stage(EXPERT, run.expert(expert), setup, sections=SECTIONS, parents=parents)


def _data_digests(run: Run, expert: int) -> dict[str, str]:
    """Return the digests of what an expert is trained on."""
    digests = {"shard": read_manifest(run.shard(expert), SHARD).digest}
    if run.config.cluster.shared_share:
        digests["shared"] = read_manifest(run.shared, SHARD).digest
    return digests


def _expert_data(run: Run, expert: int) -> ExpertData:
    held_out = run.held_out_shards()
    own = [held_out.pop(expert)] if expert in held_out else []
    share = run.config.cluster.shared_share
    return ExpertData(
        shards=[run.shard(expert)],
        digests=_data_digests(run, expert),
        shared=run.shared if share else None,
        shared_share=share,
        held_out=own,
        held_out_others=list(held_out.values()),
    )


@ray.remote
def train_one_expert(setup: Config, expert: int) -> tuple[dict[str, Any], Taken]:
    """Train one expert on its shard and draw sample grids; return a small report."""
    run = Run(setup)
    report, taken = train_and_draw(
        setup,
        _expert_data(run, expert),
        name=f"expert-{expert}",
        seed=derive_seed(setup.seed, "expert", expert),
        output=run.expert(expert),
        expert=expert,
    )
    rows = read_manifest(run.shard(expert), SHARD).facts["rows"]
    return {"expert": expert, "rows": rows, "bytes": taken.bytes, **report}, taken


def train_and_draw(
    setup: Config,
    data: ExpertData,
    *,
    name: str,
    seed: int,
    output: Folder,
    train: Callable[..., None] = train_expert,
    expert: int | None = None,
) -> tuple[dict[str, Any], Taken]:
    """Train an expert in this process and draw sample grids.

    Returns:
        Its last metrics, and what it took.

    Args:
        setup: Its configuration.
        data: What it is trained on.
        name: What its metrics are called.
        seed: Decides weights, order, noise and the grids.
        output: Its own folder.
        train: `train_expert`, or what is called in its place.
        expert: Its number; None: it is trained on all clusters.

    Raises:
        TrainingError: as `train_expert`, and if it asks for a collective.
    """
    run = Run(setup)
    encoders = run.encoders
    grid = cache(partial(SampleGrid, setup, data.shards[0], encoders, seed))  # when data is checked

    def draw_samples(average: Expert, step: int) -> None:
        output.write(f"{SAMPLES}/step-{step:06d}.png", grid().draw(average))

    with isolated(name), recorded() as traffic:
        train(
            setup.expert,
            setup.training,
            data=data,
            seed=seed,
            output=output,
            on_progress=ProgressFile(output, name),
            text_encoder=encoders,
            draw_samples=draw_samples,
        )
        device = resolve_device(setup.training.device)
        trained = load_expert(VerifiedFolder(output, None)).to(device)
        output.write("samples.png", grid().draw(trained))
    metrics: dict[str, Any] = json.loads(output.read(METRICS).splitlines()[-1])
    taken = taken_by_training(
        setup.expert,
        setup.training,
        text_length=text_length(setup),
        samples=metrics["samples_seen"],
        seconds=seconds_spent(output),
        moved=bytes_by_category(traffic, run, output, setup.training.init_from, expert=expert),
    )
    return metrics, taken
