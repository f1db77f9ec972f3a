"""The router: one more Ray task, on all shards, after and apart from the experts."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import ray

from paris_ray.artifacts import METRICS, read_manifest
from paris_ray.config import Config
from paris_ray.errors import ConfigError
from paris_ray.folders import Folder, parse_json
from paris_ray.ledger import Taken, bytes_by_category
from paris_ray.models.flops import text_length
from paris_ray.pipeline.placement import on_reserved_device, placed
from paris_ray.pipeline.progress import ProgressFile, Task, follow
from paris_ray.pipeline.stage import Stage, start_parent
from paris_ray.run import CLUSTERS, ROUTER, ROUTER_WEIGHTS, Run
from paris_ray.seeding import derive_seed
from paris_ray.traffic import recorded
from paris_ray.training.router import train_router as train
from paris_ray.training.spending import seconds_spent, taken_by_training

logger = logging.getLogger("paris_ray")

SECTIONS = ("seed", "router", "router_training")


def train_router(config: Config) -> None:
    """Publish `router/`.

    Raises:
        ArtifactError: if prepare has not finished.
        ConfigError: if the place that it asks for is not allowed, or at a federation's site.
    """
    if config.federation.folder is not None:
        raise ConfigError(
            f"federation.folder={config.federation.folder!r}: a site trains no router; "
            "next is jobs.federate submit"
        )
    training = on_reserved_device(config.router_training)
    config = replace(config, router_training=training)
    run = Run(config)
    parents = {"clusters": read_manifest(run.clusters, CLUSTERS).digest}
    parents |= start_parent(training, ROUTER_WEIGHTS)
    stage = Stage(ROUTER, run.router, config, sections=SECTIONS, parents=parents)
    with stage.locked():
        if stage.finished() is not None:
            return
        result = placed(train_the_router, "router", training).remote(config)
        facts, taken = follow("router", Task(result, run.router, training), stage.check)
        _say(facts)
        stage.publish(facts, taken=taken)


def _say(facts: Mapping[str, Any]) -> None:
    levels = ", ".join(f"{share:.3f} at t={t}" for t, share in facts["right_cluster"].items())
    logger.info("router: share of training rows sent to their own cluster: %s", levels)
    if "held_out" in facts:
        _say_held_out(facts["held_out"])


def _say_held_out(quality: Mapping[str, Any]) -> None:
    """Say how it does on held-out rows, and whether one without training would do as well."""
    rows = quality["levels"].items()
    levels = ", ".join(f"{row['accuracy']:.3f} at t={t}" for t, row in rows)
    logger.info("router: of %d held-out rows: %s", quality["rows"], levels)
    beaten = [t for t, row in rows if row["prototype_accuracy"] > row["accuracy"]]
    if beaten:
        levels = ", ".join(f"t={t}" for t in beaten)
        logger.warning("router: the cosine to cluster means routes better at %s", levels)


@ray.remote
def train_the_router(config: Config) -> tuple[dict[str, Any], Taken]:
    """Train the router; return how well it routes, and what it took."""
    run, training = Run(config), config.router_training
    shards: list[Folder] = [run.shard(k) for k in range(run.num_experts)]
    parent = read_manifest(run.clusters, CLUSTERS).digest
    with recorded() as traffic:
        facts = train(
            config.router,
            training,
            shards=shards,
            shards_digest=parent,
            seed=derive_seed(config.seed, "router"),
            output=run.router,
            on_progress=ProgressFile(run.router, "router"),
            held_out=run.held_out_shards(),
            text_encoder=run.encoders,
        )
    taken = taken_by_training(
        config.router,
        training,
        text_length=text_length(config),
        samples=parse_json(run.router.read(METRICS).splitlines()[-1], METRICS)["samples_seen"],
        seconds=seconds_spent(run.router),
        moved=bytes_by_category(traffic, run, run.router, training.init_from),
    )
    return facts, taken
