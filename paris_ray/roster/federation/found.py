"""Found a federation: the coordinator writes what all sites keep to, from a run of its own."""

import logging
from collections.abc import Sequence
from dataclasses import replace

from paris_ray.artifacts import open_finished, read_manifest
from paris_ray.clustering import WEIGHTS as CENTROIDS
from paris_ray.config import Config, expert_setup, local_paths
from paris_ray.errors import ConfigError, FederationError
from paris_ray.export import public_name
from paris_ray.folders import Folder
from paris_ray.roster.federation.handover import begin_handover, hand_over
from paris_ray.roster.federation.terms import (
    NAMED_MODELS,
    Site,
    Terms,
    read_federation,
    shared_part,
)
from paris_ray.run import (
    CLUSTERS,
    ENCODERS,
    EXPERT_WEIGHTS,
    FEDERATION,
    MODEL_CONFIG,
    ROUTER,
    ROUTER_WEIGHTS,
    SEED,
    Run,
)
from paris_ray.signatures import Signer

logger = logging.getLogger("paris_ray")


def found(
    config: Config,
    coordinator: Signer,
    output: Folder,
    *,
    name: str,
    sites: Sequence[Site],
    first_site_wins: bool = False,
) -> Terms:
    """Write a federation's folder, `federation.json` last; no row of the run's corpus is in it.

    Args:
        config: The coordinator's run: encoders, clusters and router are finished, and the seed, if
            it has one.
        coordinator: Who signs.
        output: A new folder on this machine; what an interrupted call left in it is written anew.
        name: What the bundle is to be called.
        sites: Who is expected.
        first_site_wins: Whether of two experts of one cluster the one counts whose site stands
            first; else two are refused.

    Raises:
        FederationError: if there is one already, or sites contradict each other.
        ConfigError: if the run has what other sites could not have.
        ArtifactError: if a part is not finished.
    """
    _refuse_own_ways(config)
    shared = _without_places(config)
    terms = Terms(
        name=name,
        sites=list(sites),
        first_site_wins=first_site_wins,
        run=shared_part(shared),
    )
    _copy_parts(Run(config), output)
    hand_over(output, FEDERATION, terms.to_json(), coordinator)
    read_federation(output, coordinator.public_key)  # what sites will refuse is told here
    logger.info("federation %s: finished (%s)", name, output.uri)
    return terms


def _refuse_own_ways(config: Config) -> None:
    """Raise ConfigError if sites could not cluster, or start, as this run does."""
    if config.cluster.features == "random":
        raise ConfigError(
            "cluster.features='random' is not allowed in a federation: image, caption or both, "
            "which have centroids to give"
        )
    setups = {"": config} | {f"experts.{k}.": expert_setup(config, int(k)) for k in config.experts}
    for name, setup in setups.items():
        start = setup.training.init_from
        if start is not None:
            raise ConfigError(
                f"{name}training.init_from={start!r} is not allowed in a federation: null, as "
                "sites have no such weights; with seed_training.steps they are given a seed"
            )


def _without_places(config: Config) -> Config:
    """Return the configuration with models named as a bundle names them.

    Raises:
        ConfigError: if sites would need a file of this machine.
    """
    checkpoint = local_paths(config).get("features.checkpoint")
    if checkpoint is not None:
        raise ConfigError(
            f"features.checkpoint={checkpoint!r} is not allowed in a federation: a hub's name or "
            "a tag, or null to train it on the corpus"
        )
    for section, field in NAMED_MODELS:
        values = getattr(config, section)
        name = getattr(values, field)
        if name is not None:
            config = replace(config, **{section: replace(values, **{field: public_name(name)})})
    return config


def _copy_parts(run: Run, output: Folder) -> None:
    encoders = open_finished(run.encoders, ENCODERS)
    names = {f"{ENCODERS}/{name}": (encoders, name) for name in encoders.digests or ()}
    names[CENTROIDS] = (open_finished(run.clusters, CLUSTERS), CENTROIDS)
    clusters = read_manifest(run.clusters, CLUSTERS).digest
    if read_manifest(run.router, ROUTER).parents.get("clusters") != clusters:
        raise FederationError(f"{run.router.uri} was trained on other clusters")
    models = {ROUTER: (run.router, ROUTER, ROUTER_WEIGHTS)}
    if run.config.seed_training.steps:
        models[SEED] = (run.seed, SEED, EXPERT_WEIGHTS)
    for part, (folder, kind, weights) in models.items():
        source = open_finished(folder, kind)
        names |= {f"{part}/{name}": (source, name) for name in (MODEL_CONFIG, weights)}
    begin_handover(output, FEDERATION, names)
    for target, (source, name) in names.items():
        output.write(target, source.read(name))
