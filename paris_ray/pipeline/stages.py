"""The verbs, in order, from prepare to export; all of them; and what may follow."""

import logging
from importlib import import_module

from paris_ray.artifacts import read_manifest
from paris_ray.config import Config, run_folder
from paris_ray.evaluation.summary import headline
from paris_ray.pipeline.stage import StageTimer, watch_hint
from paris_ray.run import EVALUATION, Run
from paris_ray.sampling_options import parse_routing

logger = logging.getLogger("paris_ray")

# Each with the module of this package that has it, and that is imported when it runs: what the
# later ones import takes seconds, in which `prepare` works already.
VERBS = {
    "prepare": "prepare",
    "train_seed": "seed",
    "train_experts": "experts",
    "train_router": "router",
    "evaluate": "evaluate",
    "export": "export",
}
OPTIONAL_VERBS = {"distil": "distil"}
TRAINING_VERBS = ("train_seed", "train_experts", "train_router", "distil", "pipeline")


def run(config: Config, verb: str) -> None:
    """Run one verb, or `pipeline` for all of them in order; what is finished already is kept.

    Raises:
        LockError: if another job writes an artefact that this one comes to.
    """
    parse_routing(config.sampling.routing, config.cluster.num_clusters)
    if verb in TRAINING_VERBS:
        logger.info("%s", watch_hint(run_folder(config)))
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
        module = import_module(f"paris_ray.pipeline.{(VERBS | OPTIONAL_VERBS)[verb]}")
        getattr(module, verb)(config)
