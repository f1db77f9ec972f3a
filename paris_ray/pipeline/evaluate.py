"""Evaluation: draw captions that were trained on and captions that were held out, and measure.

Numbers of training captions are recall; those of held-out ones say what was learnt. Nothing of a
row is on the driver: tasks draw, one task measures.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray
import torch

from paris_ray.artifacts import Manifest, VerifiedFolder, read_manifest
from paris_ray.bundle import load_expert
from paris_ray.config import Config
from paris_ray.evaluation.denoising import cluster_losses
from paris_ray.evaluation.summary import headline
from paris_ray.pipeline.drawing import Split, draw
from paris_ray.pipeline.measuring import measure
from paris_ray.pipeline.stage import Stage
from paris_ray.run import EMBEDDINGS, EVALUATION, Run
from paris_ray.seeding import derive_seed
from paris_ray.training.data import load_dataset
from paris_ray.training.text import text_reader
from paris_ray.training.validation import NOISE_LEVELS

logger = logging.getLogger("paris_ray")

SECTIONS = ("seed", "sampling", "evaluation")
MAX_LOSS_ROWS = 2_000


def evaluate(config: Config) -> Manifest:
    """Publish `evaluation/`: measures, a row a caption, and pictures.

    Raises:
        ArtifactError: if an expert or the router has not finished.
    """
    run = Run(config)
    embeddings = read_manifest(run.embeddings, EMBEDDINGS)
    parents = run.parents() | {"embeddings": embeddings.digest}
    stage = Stage(EVALUATION, run.evaluation, config, sections=SECTIONS, parents=parents)
    manifest = stage.finished()
    if manifest is None:
        stage.begin()
        splits: list[Split] = ["shown"]
        if embeddings.facts["held_out"]:
            splits.append("held_out")
        manifest = stage.publish(_evaluate(config, splits))
    for line in headline(manifest.facts):
        logger.info("%s", line)
    return manifest


def _evaluate(config: Config, splits: list[Split]) -> dict[str, Any]:
    settings = config.evaluation
    resources = {"num_cpus": settings.num_cpus, "num_gpus": settings.num_gpus}
    parts = settings.num_tasks
    drawn = {
        split: [draw.options(**resources).remote(config, split, i, parts) for i in range(parts)]
        for split in splits
    }
    losses = None
    if "held_out" in splits:
        # A few experts a task: starting one takes longer than asking a small expert.
        groups = np.array_split(np.arange(config.cluster.num_clusters), parts)
        task = held_out_losses.options(**resources)
        rows = ray.get([task.remote(config, group.tolist()) for group in groups])
        losses = [row for group in rows for row in group]
    measuring = measure.options(num_cpus=settings.num_cpus)
    facts: dict[str, Any] = ray.get(measuring.remote(config, drawn, losses))
    return facts


@ray.remote
def held_out_losses(config: Config, experts: Sequence[int]) -> list[list[float | None]]:
    """Return experts' mean velocity errors on the held-out rows of every cluster.

    None stands for a cluster without any.
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
    for k in experts:
        losses = cluster_losses(
            load_expert(VerifiedFolder(run.expert(k), None)).to(device),
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
