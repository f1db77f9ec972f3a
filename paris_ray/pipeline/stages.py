"""The verbs, in order, from prepare to export; all of them; and what may follow."""

import logging
from collections.abc import Callable

from paris_ray.artifacts import RESOLVED_CONFIG, Manifest, read_manifest
from paris_ray.config import Config, digest, load
from paris_ray.errors import ArtifactError
from paris_ray.evaluation.summary import headline
from paris_ray.pipeline.cluster import prepare_clusters
from paris_ray.pipeline.distil import distil
from paris_ray.pipeline.embed import prepare_embeddings
from paris_ray.pipeline.encoders import PREPARED, prepare_encoders
from paris_ray.pipeline.evaluate import evaluate
from paris_ray.pipeline.experts import train_experts
from paris_ray.pipeline.export import export
from paris_ray.pipeline.report import report_preparation
from paris_ray.pipeline.router import train_router
from paris_ray.pipeline.seed import train_seed
from paris_ray.pipeline.stage import PART, StageTimer
from paris_ray.run import EMBEDDINGS, EVALUATION, Run
from paris_ray.sampling.routing import parse_routing

logger = logging.getLogger("paris_ray")


def prepare(config: Config) -> None:
    """Encode and cluster the corpus; only cluster it if another run has encoded it."""
    if config.prepared_from is None:
        with StageTimer(config, f"{PART}encoders"):
            encoders = prepare_encoders(config)
        with StageTimer(config, f"{PART}embeddings"):
            embeddings = prepare_embeddings(config, encoders)
    else:
        embeddings = _prepared_elsewhere(config)
    with StageTimer(config, f"{PART}clusters"):
        prepare_clusters(config, embeddings)
    report_preparation(config)


def _prepared_elsewhere(config: Config) -> Manifest:
    """Return the manifest of another run's embeddings; that run may have another seed.

    Raises:
        ArtifactError: if they are not finished, or of another corpus or other encoders.
    """
    source = Run(config).embeddings
    manifest = read_manifest(source, EMBEDDINGS)
    with source.reading(RESOLVED_CONFIG) as path:
        made = load(str(path))
    if digest(made, *PREPARED) != digest(config, *PREPARED):
        raise ArtifactError(
            f"prepared_from={config.prepared_from!r}: its {', '.join(PREPARED)} are not those of "
            f"this run (compare {source.uri}/{RESOLVED_CONFIG})"
        )
    return manifest


VERBS: dict[str, Callable[[Config], object]] = {
    "prepare": prepare,
    "train_seed": train_seed,
    "train_experts": train_experts,
    "train_router": train_router,
    "evaluate": evaluate,
    "export": export,
}
OPTIONAL_VERBS: dict[str, Callable[[Config], object]] = {"distil": distil}


def run(config: Config, verb: str) -> None:
    """Run one verb, or `pipeline` for all of them in order; what is finished already is kept.

    Raises:
        LockError: if another job writes an artefact that this one comes to.
    """
    parse_routing(config.sampling.routing, config.cluster.num_clusters)
    if verb != "pipeline":
        _run_one(config, verb)
        return
    for each in VERBS:
        _run_one(config, each)
    recall, *_ = headline(read_manifest(Run(config).evaluation, EVALUATION).facts)
    logger.info("pipeline finished: %s", recall)


def _run_one(config: Config, verb: str) -> None:
    logger.info("%s ...", verb)
    with StageTimer(config, verb):
        (VERBS | OPTIONAL_VERBS)[verb](config)
