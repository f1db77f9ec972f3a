"""Evaluation: draw captions that were trained on and captions that were held out, and measure.

Numbers of training captions are recall; those of held-out ones say what was learnt. Nothing of a
row is on the driver: tasks draw, one task measures.
"""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import ray
import torch

from paris_ray.artifacts import Manifest, VerifiedFolder, read_manifest
from paris_ray.bundle import load_expert
from paris_ray.config import Config
from paris_ray.evaluation.denoising import cluster_losses
from paris_ray.evaluation.summary import headline
from paris_ray.folders import Folder
from paris_ray.pipeline.drawing import Split, draw
from paris_ray.pipeline.measuring import measure
from paris_ray.pipeline.stage import Stage
from paris_ray.pipeline.tasks import ended, gather
from paris_ray.run import DISTILLED, EMBEDDINGS, ENCODERS, EVALUATION, EXPERT, FEW_STEP, Run
from paris_ray.seeding import derive_seed
from paris_ray.training.data import load_dataset
from paris_ray.training.tensorboard import TENSORBOARD, event_file
from paris_ray.training.text import text_reader
from paris_ray.training.tracked_rows import AXIS, CLOCK
from paris_ray.training.validation import NOISE_LEVELS

logger = logging.getLogger("paris_ray")

SECTIONS = ("seed", "sampling", "evaluation")
MAX_LOSS_ROWS = 2_000


def evaluate(config: Config, student: str | None = None) -> Manifest:
    """Publish `evaluation/`: measures, a row a caption, and pictures.

    Args:
        config: The run.
        student: A distilled model to measure likewise, in `distilled/evaluation/`; None: the
            ensemble.

    Raises:
        ArtifactError: if a model has not finished.
    """
    run = Run(config)
    embeddings = read_manifest(run.embeddings, EMBEDDINGS)
    parents = _models(run, student) | {"embeddings": embeddings.digest}
    folder = run.evaluation_of(student)
    stage = Stage(EVALUATION, folder, config, sections=SECTIONS, parents=parents)
    splits: list[Split] = ["shown", "held_out"] if embeddings.facts["held_out"] else ["shown"]
    with stage.locked():
        manifest = stage.finished()
        if manifest is None:
            stage.begin()
            manifest = stage.publish(_evaluate(config, splits, student, stage.check))
    for line in headline(manifest.facts):
        logger.info("%s", line)
    return manifest


def _models(run: Run, student: str | None) -> dict[str, str]:
    """Return the digests of what draws."""
    if student is None:
        return run.parents()
    parts = {student: (run.student(student), DISTILLED), "encoders": (run.encoders, ENCODERS)}
    return {name: read_manifest(*where).digest for name, where in parts.items()}


def _evaluate(
    config: Config, splits: list[Split], student: str | None, check: Callable[[], object]
) -> dict[str, Any]:
    settings = config.evaluation
    resources = {"num_cpus": settings.num_cpus, "num_gpus": settings.num_gpus}
    parts = settings.num_tasks
    drawn = {
        split: [
            draw.options(**resources).remote(config, split, i, parts, student) for i in range(parts)
        ]
        for split in splits
    }
    with ended([part for parts_drawn in drawn.values() for part in parts_drawn]):
        losses = _losses(config, splits, student, check)
        measuring = measure.options(num_cpus=settings.num_cpus)
        (facts,) = gather([measuring.remote(config, drawn, losses, student)], check)
    if losses and student is None and config.training.tensorboard:
        Run(config).evaluation.write(TENSORBOARD, event_file(_loss_rows(Run(config), losses)))
    return dict(facts)


def _losses(
    config: Config, splits: list[Split], student: str | None, check: Callable[[], object]
) -> list[list[float | None]] | None:
    """Return the held-out losses of every model that has some of its own."""
    settings = config.evaluation
    # A way to draw has no losses of its own, and a model of few steps no velocity at a time.
    if "held_out" not in splits or settings.name is not None or student == FEW_STEP:
        return None
    # A few experts a task: starting one takes longer than asking a small expert.
    groups = np.array_split(np.array(_expert_uris(Run(config), student)), settings.num_tasks)
    task = held_out_losses.options(num_cpus=settings.num_cpus, num_gpus=settings.num_gpus)
    results = [task.remote(config, group.tolist()) for group in groups if len(group)]
    return [row for group in gather(results, check) for row in group]


def _loss_rows(run: Run, losses: Sequence[Sequence[float | None]]) -> list[dict[str, Any]]:
    """Return a row of metrics an expert: its losses, by cluster, where its own curves end."""
    now = time.time()
    return [
        {f"held_out_loss/expert_{k}/cluster_{j}": loss for j, loss in enumerate(row)}
        | {AXIS: read_manifest(run.expert(k), EXPERT).facts[AXIS], CLOCK: now}
        for k, row in enumerate(losses)
    ]


def _expert_uris(run: Run, student: str | None) -> list[str]:
    """Return the folders of the models that are asked for velocities."""
    if student is not None:
        return [(run.student(student) / "expert_0").uri]
    return [run.expert(k).uri for k in range(run.num_experts)]


@ray.remote
def held_out_losses(config: Config, experts: Sequence[str]) -> list[list[float | None]]:
    """Return experts' mean velocity errors on the held-out rows of every cluster.

    None stands for a cluster without any; experts are given by their folders.
    """
    torch.set_num_threads(config.evaluation.threads)
    run = Run(config)
    device = torch.device("cuda" if config.evaluation.num_gpus else "cpu")
    shards = run.held_out_shards()
    data = load_dataset(list(shards.values()))
    count = min(len(data), MAX_LOSS_ROWS)
    rows = torch.arange(count) * len(data) // count
    present, positions = data.clusters[rows].unique(return_inverse=True)
    clusters = [list(shards)[i] for i in present.tolist()]
    text = text_reader(data, run.encoders, device)(data.read_text(rows, 0).to(device))
    matrix = []
    for uri in experts:
        losses = cluster_losses(
            load_expert(VerifiedFolder(Folder(uri), None)).to(device),
            data.read_latents(rows),
            text,
            positions,
            NOISE_LEVELS,
            num_clusters=len(clusters),
            seed=derive_seed(config.seed, "held-out losses"),
            batch_size=config.evaluation.batch_size,
        )
        found = dict(zip(clusters, losses.tolist(), strict=True))
        matrix.append([found.get(cluster) for cluster in range(run.num_experts)])
    return matrix
