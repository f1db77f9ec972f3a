"""Export: the trained parts as one model folder, with a card of measured numbers only."""

from collections.abc import Mapping

from paris_ray.artifacts import MANIFEST, Manifest, read_manifest
from paris_ray.bundle import Bundle
from paris_ray.config import Config
from paris_ray.errors import ArtifactError
from paris_ray.export import open_trained_parts, write_bundle
from paris_ray.model_card import model_card
from paris_ray.pipeline.stage import Stage
from paris_ray.run import (
    BUNDLE,
    CLUSTERS,
    EMBEDDINGS,
    EVALUATION,
    EXPERT,
    EXPERT_WEIGHTS,
    ROUTER,
    SEED,
    Run,
)

SECTIONS = ("sampling",)


def export(config: Config) -> None:
    """Publish `bundle/`; an evaluation that was made appears in its model card.

    Raises:
        ArtifactError: if an expert or the router has not finished.
    """
    run = Run(config)
    parents = run.parents()
    evaluation = _evaluation(run, parents)
    if evaluation is not None:
        parents["evaluation"] = evaluation.digest
    if config.seed_training.steps:
        parents["seed"] = read_manifest(run.seed, SEED).digest
    stage = Stage(BUNDLE, run.bundle, config, sections=SECTIONS, parents=parents)
    with stage.locked():
        if stage.finished() is not None:
            return
        bundle = open_trained_parts(run)
        write_bundle(bundle, run.bundle, model_card=_card(run, bundle, evaluation))
        stage.publish({} if evaluation is None else dict(evaluation.facts))


def _evaluation(run: Run, parents: Mapping[str, str]) -> Manifest | None:
    """Return the evaluation of these very parts, or None if none was made."""
    folder = run.main_evaluation
    if not folder.exists(MANIFEST):
        return None
    evaluation = read_manifest(folder, EVALUATION)
    if any(evaluation.parents.get(name) != digest for name, digest in parents.items()):
        raise ArtifactError(f"{folder.uri} is of other experts: delete it, evaluate again")
    return evaluation


def _card(run: Run, bundle: Bundle, evaluation: Manifest | None) -> str:
    experts = expert_manifests(run)
    return model_card(
        bundle,
        embeddings=read_manifest(run.embeddings, EMBEDDINGS).facts,
        cluster_sizes=list(read_manifest(run.clusters, CLUSTERS).facts["sizes"]),
        router=read_manifest(run.router, ROUTER).facts,
        losses=[expert.facts["loss"] for expert in experts.values()],
        started_from=started_from(run, experts),
        evaluation=None if evaluation is None else evaluation.facts,
    )


def expert_manifests(run: Run) -> dict[str, Manifest]:
    """Return the manifests of all experts, by part."""
    return {f"expert_{k}": read_manifest(run.expert(k), EXPERT) for k in range(run.num_experts)}


def started_from(run: Run, parts: Mapping[str, Manifest]) -> dict[str, str]:
    """Return the digests of the weights of elsewhere that parts started from, by part."""
    starts = {name: m.parents["init"] for name, m in parts.items() if "init" in m.parents}
    if run.config.seed_training.steps:
        seed = read_manifest(run.seed, SEED)
        own = seed.files[EXPERT_WEIGHTS]
        starts = {name: digest for name, digest in starts.items() if digest != own}
        starts |= {"seed": seed.parents["init"]} if "init" in seed.parents else {}
    return starts
