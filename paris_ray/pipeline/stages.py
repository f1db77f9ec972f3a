"""The verbs, in order, from prepare to export; all of them; and what may follow."""

import logging
from collections.abc import Callable

from paris_ray.artifacts import read_manifest
from paris_ray.config import Config
from paris_ray.evaluation.summary import headline
from paris_ray.pipeline.cluster import prepare_clusters
from paris_ray.pipeline.distil import distil
from paris_ray.pipeline.embed import prepare_embeddings
from paris_ray.pipeline.encoders import prepare_encoders
from paris_ray.pipeline.evaluate import evaluate
from paris_ray.pipeline.experts import train_experts
from paris_ray.pipeline.export import export
from paris_ray.pipeline.router import train_router
from paris_ray.pipeline.seed import train_seed
from paris_ray.pipeline.stage import StageTimer
from paris_ray.run import EVALUATION, Run
from paris_ray.sampling.routing import parse_routing

logger = logging.getLogger("paris_ray")


def prepare(config: Config) -> None:
    """Encode and cluster the corpus."""
    encoders = prepare_encoders(config)
    embeddings = prepare_embeddings(config, encoders)
    prepare_clusters(config, embeddings)


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
    """Run one verb, or `pipeline` for all of them in order; what is finished already is kept."""
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
