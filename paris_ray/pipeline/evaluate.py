"""Evaluation: draw captions that were trained on and captions that were held out, and measure.

Numbers of training captions are recall; those of held-out ones say what was learnt. Nothing of a
row is on the driver: tasks draw, one task measures.
"""

import logging
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
        experts = range(config.cluster.num_clusters)
        tasks = [held_out_losses.options(**resources).remote(config, k) for k in experts]
        losses = ray.get(tasks)
    task = measure.options(num_cpus=settings.num_cpus)
    facts: dict[str, Any] = ray.get(task.remote(config, drawn, losses))
    return facts


@ray.remote
def held_out_losses(config: Config, expert: int) -> list[float | None]:
    """Return an expert's mean velocity error on the held-out rows of every cluster.

    None stands for a cluster without any.
    """
    torch.set_num_threads(config.evaluation.threads)
    run = Run(config)
    device = torch.device("cuda" if config.evaluation.num_gpus else "cpu")
    model = load_expert(VerifiedFolder(run.expert(expert), None)).to(device)
    shards = run.held_out_shards()
    data = load_dataset(list(shards.values()))
    count = min(len(data), MAX_LOSS_ROWS)
    rows = torch.arange(count) * len(data) // count
    positions = data.clusters[rows].unique(return_inverse=True)
    encode = text_reader(data, run.encoders, device)
    losses = cluster_losses(
        model,
        data.read_latents(rows),
        encode(data.read_text(rows, 0).to(device)),
        positions[1],
        NOISE_LEVELS,
        num_clusters=len(positions[0]),
        seed=derive_seed(config.seed, "held-out losses"),
        batch_size=config.evaluation.batch_size,
    )
    clusters = np.array(list(shards))[positions[0].numpy()]
    found = dict(zip(clusters.tolist(), losses.tolist(), strict=True))
    return [found.get(k) for k in range(run.num_experts)]
