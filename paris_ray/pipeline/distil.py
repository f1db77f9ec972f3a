"""Distillation: the ensemble into one expert, a Ray task that reads every expert and the router.

`distilled/student/` is the expert that predicts velocities, `distilled/few_step/`, if wanted, the
one that was trained on from it. Both are measured as the ensemble is, on the same captions from the
same noise, and so is the student in few steps without that training: what it is worth is seen
beside it. The last of them becomes `distilled/bundle/`, a bundle of one expert.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import ray

from paris_ray.artifacts import read_manifest
from paris_ray.config import (
    Config,
    DistillationConfig,
    SamplingConfig,
    TrainingConfig,
    check_distillation,
    digest,
)
from paris_ray.evaluation.summary import comparison
from paris_ray.export import open_student, open_trained_parts, student_sampling, write_bundle
from paris_ray.ledger import Taken
from paris_ray.model_card import distilled_card
from paris_ray.pipeline.evaluate import evaluate
from paris_ray.pipeline.experts import train_and_draw
from paris_ray.pipeline.export import expert_manifests, started_from
from paris_ray.pipeline.placement import on_reserved_device, placed
from paris_ray.pipeline.progress import Task, follow
from paris_ray.pipeline.stage import Stage, start_parent
from paris_ray.run import (
    BUNDLE,
    CLUSTERS,
    DISTILLED,
    EMBEDDINGS,
    EXPERT_WEIGHTS,
    FEW_STEP,
    SEED,
    STUDENT,
    Run,
)
from paris_ray.sampling.teacher import EnsembleTeacher
from paris_ray.sampling_options import sampling_options
from paris_ray.seeding import derive_seed
from paris_ray.training.distil import OBJECTIVES, velocities, write_single_router
from paris_ray.training.expert import ExpertData, Lesson, train_expert

logger = logging.getLogger("paris_ray")

SECTIONS = ("seed", "expert", "training", "distillation", "sampling")
ENSEMBLE = "ensemble"
UNTAUGHT = f"{STUDENT}_in_few_steps"


def distil(config: Config) -> None:
    """Publish `distilled/`: one or two models, their evaluations and a bundle.

    Raises:
        ArtifactError: if an expert or the router has not finished.
        ConfigError: if the distillation, or the place that it asks for, is not allowed.
    """
    check_distillation(config)
    run = Run(config)
    measured = {ENSEMBLE: evaluate(config).facts}
    last = STUDENT
    _train(run, STUDENT)
    measured[STUDENT] = evaluate(config, STUDENT).facts
    if config.distillation.num_inference_steps is not None:
        last = FEW_STEP
        _train(run, FEW_STEP)
        measured[UNTAUGHT] = evaluate(_in_few_steps(config), STUDENT).facts
        measured[FEW_STEP] = evaluate(config, FEW_STEP).facts
    _publish(run, last, measured)
    for line in comparison(measured):
        logger.info("distil: %s", line)


def _train(run: Run, name: str) -> None:
    setup = _setup(run, name)
    inputs = run.parents() | {"clusters": read_manifest(run.clusters, CLUSTERS).digest}
    parents = inputs | start_parent(setup.training, EXPERT_WEIGHTS)
    folder = run.student(name)
    stage = Stage(DISTILLED, folder, setup, sections=SECTIONS, parents=parents)
    with stage.locked():
        if stage.finished() is not None:
            return
        stage.begin()
        place = placed(train_one_student, f"distilled-{name}", setup.training)
        result = place.remote(setup, name, inputs | {"sampling": digest(setup, "sampling")})
        task = Task(result, folder / "expert_0", setup.training)
        facts, taken = follow(name, task, stage.check)
        stage.publish(facts, taken=taken)


def _setup(run: Run, name: str) -> Config:
    """Return the configuration of one model: its training, and of the distillation its part."""
    config = run.config
    if name == FEW_STEP:
        start = (run.student(STUDENT) / "expert_0").uri
        training = replace(config.few_step_training, init_from=start)
        return replace(config, training=on_reserved_device(training))
    velocities_only = DistillationConfig(routed_share=config.distillation.routed_share)
    training = on_reserved_device(_from_seed(run, config.distil_training))
    return replace(config, training=training, distillation=velocities_only)


def _from_seed(run: Run, training: TrainingConfig) -> TrainingConfig:
    """Return a training that starts from the seed, if there is one and nothing else is said."""
    if training.init_from is not None or run.config.seed_training.steps == 0:
        return training
    read_manifest(run.seed, SEED)  # else a half-written one would do
    return replace(training, init_from=run.seed.uri)


def _sampling(config: Config, measured: str) -> SamplingConfig:
    if measured == UNTAUGHT:
        return student_sampling(_in_few_steps(config), STUDENT)
    return student_sampling(config, measured)


@ray.remote
def train_one_student(
    setup: Config, name: str, inputs: Mapping[str, str]
) -> tuple[dict[str, Any], Taken]:
    """Train a student and draw sample grids; return its last metrics and what it took.

    Args:
        setup: What `_setup` returned.
        name: `STUDENT` or `FEW_STEP`.
        inputs: Digests of everything that it learns from.
    """
    run, output = Run(setup), Run(setup).student(name)
    data = ExpertData(
        shards=[run.shard(k) for k in range(run.num_experts)],
        digests=inputs,
        held_out=list(run.held_out_shards().values()),
    )
    result = train_and_draw(
        replace(setup, sampling=student_sampling(setup, name)),
        data,
        name=f"distilled-{name}",
        seed=derive_seed(setup.seed, f"distilled {name}"),
        output=output / "expert_0",
        train=partial(train_expert, lesson=_lesson(run)),
    )
    write_single_router(setup.expert, output / "router")
    return result


def _lesson(run: Run) -> Lesson:
    config = run.config
    ensemble = open_trained_parts(run, device=config.training.device)
    options = sampling_options(ensemble)
    teacher, wanted = EnsembleTeacher(ensemble, options), config.distillation
    if wanted.num_inference_steps is None:
        return velocities(teacher, wanted.routed_share)
    few_steps = OBJECTIVES[wanted.objective]
    return few_steps(teacher, wanted.num_inference_steps, options.num_inference_steps)


def _in_few_steps(config: Config) -> Config:
    steps = config.distillation.num_inference_steps
    assert steps is not None
    sampling = replace(config.sampling, num_inference_steps=steps)
    evaluation = replace(config.evaluation, name=f"in_{steps}_steps")
    return replace(config, sampling=sampling, evaluation=evaluation)


def _publish(run: Run, name: str, measured: Mapping[str, Mapping[str, Any]]) -> None:
    """Publish the bundle of the model `name`, with all measurements in its card and facts."""
    students = [each for each in (STUDENT, FEW_STEP) if each in measured]
    folders = {each: read_manifest(run.student(each), DISTILLED).digest for each in students}
    stage = Stage(
        BUNDLE,
        run.distilled_bundle,
        run.config,
        sections=("sampling", "evaluation", "distillation"),
        parents=run.parents() | folders,
    )
    with stage.locked():
        if stage.finished() is None:
            _write_bundle(stage, run, name, measured)


def _write_bundle(
    stage: Stage, run: Run, name: str, measured: Mapping[str, Mapping[str, Any]]
) -> None:
    bundle = open_student(run, name)
    student = read_manifest(run.student(STUDENT), DISTILLED)
    card = distilled_card(
        bundle,
        open_trained_parts(run),
        embeddings=read_manifest(run.embeddings, EMBEDDINGS).facts,
        measured=measured,
        sampling={n: _sampling(run.config, n) for n in measured if n != ENSEMBLE},
        started_from=started_from(run, expert_manifests(run) | {STUDENT: student}),
    )
    stage.begin()
    write_bundle(bundle, run.distilled_bundle, model_card=card)
    stage.publish(measured)
