"""The seed: one model trained briefly on everything, from which all experts start.

Isolated experts forget, or never learn, what only others' clusters show. A common start gives them
that, before they part; afterwards nothing crosses between them, as ever.
"""

import logging
from dataclasses import replace
from typing import Any

import ray

from paris_ray.artifacts import read_manifest
from paris_ray.config import Config
from paris_ray.ledger import Taken
from paris_ray.pipeline.experts import train_and_draw
from paris_ray.pipeline.placement import on_reserved_device, placed
from paris_ray.pipeline.progress import Task, follow
from paris_ray.pipeline.stage import Stage, start_parent
from paris_ray.run import CLUSTERS, EXPERT_WEIGHTS, SEED, Run
from paris_ray.seeding import derive_seed
from paris_ray.training.expert import ExpertData

logger = logging.getLogger("paris_ray")

SECTIONS = ("seed", "expert", "seed_training")


def train_seed(config: Config) -> None:
    """Publish `seed/`, unless `seed_training.steps` is 0.

    Raises:
        ArtifactError: if prepare has not finished.
        ConfigError: if the place that it asks for is not allowed.
    """
    if config.seed_training.steps == 0:
        logger.info("seed: none (seed_training.steps=0), experts start from scratch")
        return
    config = replace(config, seed_training=on_reserved_device(config.seed_training))
    run, training = Run(config), config.seed_training
    stage = Stage(SEED, run.seed, config, sections=SECTIONS, parents=_parents(run))
    with stage.locked():
        if stage.finished() is None:
            result = placed(train_the_seed, "seed", training).remote(config)
            facts, taken = follow("seed", Task(result, run.seed, training), stage.check)
            stage.publish(facts, taken=taken)


def _parents(run: Run) -> dict[str, str]:
    clusters = {"clusters": read_manifest(run.clusters, CLUSTERS).digest}
    return clusters | start_parent(run.config.seed_training, EXPERT_WEIGHTS)


@ray.remote
def train_the_seed(config: Config) -> tuple[dict[str, Any], Taken]:
    """Train the seed on all shards; return its last metrics and what it took."""
    run = Run(config)
    data = ExpertData(
        shards=[run.shard(k) for k in range(run.num_experts)],
        digests={"clusters": read_manifest(run.clusters, CLUSTERS).digest},
        held_out=list(run.held_out_shards().values()),
    )
    setup = replace(config, training=config.seed_training)
    seed = derive_seed(config.seed, "seed model")
    return train_and_draw(setup, data, name="seed", seed=seed, output=run.seed)
