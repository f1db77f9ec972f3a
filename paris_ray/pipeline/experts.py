"""Experts: K isolated Ray tasks, one a cluster.

A task is a function of (config, shard, expert id, seed, output). It gets no reference to another
expert, no actor and no collective; an expert trained alone and one trained beside the others are
equal to the bit (same machine kind and thread count).
"""

import json
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray
import torch

from paris_ray.artifacts import METRICS, Folder, VerifiedFolder, read_manifest
from paris_ray.bundle import load_expert
from paris_ray.config import Config, SamplingConfig
from paris_ray.devices import resolve_device
from paris_ray.embeddings import read_null_text, read_table, tensor_column
from paris_ray.encoders.codec import load_codec
from paris_ray.errors import TrainingError
from paris_ray.models import TextConditioning
from paris_ray.pipeline.progress import ProgressFile, watch
from paris_ray.pipeline.stage import Stage
from paris_ray.reports import picture_grid, png_bytes
from paris_ray.run import EXPERT, SHARD, Run
from paris_ray.sampling.sampler import sample_one_expert
from paris_ray.seeding import derive_seed
from paris_ray.training.expert import train_expert

logger = logging.getLogger("paris_ray")

SECTIONS = ("seed", "expert", "training")
SAMPLES_PER_EXPERT = 16


def train_experts(config: Config, only: Sequence[int] | None = None) -> None:
    """Train all experts, or only some, as many at a time as the cluster has room for.

    One that fails does not stop the others.

    Args:
        config: The run.
        only: Numbers of the experts to train; None means all.

    Raises:
        TrainingError: naming the experts that failed, after all others are done.
        ArtifactError: if prepare has not finished.
    """
    run = Run(config)
    chosen = range(run.num_experts) if only is None else only
    stages = {k: _expert_stage(run, k) for k in chosen}
    todo = [k for k, stage in stages.items() if stage.finished() is None]
    tasks = {f"expert {k}": (_submit(run, k), run.expert(k)) for k in todo}
    failed = []
    for name, error in watch(tasks):
        task, _ = tasks[name]
        if error is None:
            report = ray.get(task)
            stages[report["expert"]].publish(report)
        else:
            failed.append(f"{name}: {error}")
    if failed:
        reasons = "; ".join(failed)
        raise TrainingError(f"{len(failed)} of {len(chosen)} experts failed: {reasons}")


def _expert_stage(run: Run, expert: int) -> Stage:
    if not 0 <= expert < run.num_experts:
        raise TrainingError(f"expert {expert} does not exist: allowed 0..{run.num_experts - 1}")
    parents = {"shard": read_manifest(run.shard(expert), SHARD).digest}
    return Stage(EXPERT, run.expert(expert), run.config, sections=SECTIONS, parents=parents)


def _submit(run: Run, expert: int) -> "ray.ObjectRef[dict[str, Any]]":
    training = run.config.training
    task = train_one_expert.options(
        name=f"expert-{expert}",
        num_cpus=training.num_cpus,
        num_gpus=training.num_gpus,
        scheduling_strategy="SPREAD",
        max_retries=training.max_retries,
    )
    return task.remote(
        run.config,
        run.shard(expert).uri,
        expert,
        derive_seed(run.config.seed, "expert", expert),
        run.expert(expert).uri,
        (run.encoders / "codec").uri,
    )


@ray.remote
def train_one_expert(
    config: Config, shard_uri: str, expert: int, seed: int, output_uri: str, codec_uri: str
) -> dict[str, Any]:
    """Train one expert on its shard and draw a sample grid; return a small report."""
    shard, output = Folder(shard_uri), Folder(output_uri)
    train_expert(
        config.expert,
        config.training,
        shard=shard,
        shard_digest=read_manifest(shard, SHARD).digest,
        seed=seed,
        output=output,
        on_progress=ProgressFile(output, f"expert-{expert}"),
    )
    assert not torch.distributed.is_initialized(), "experts must train without any collective"
    device = resolve_device(config.training.device)
    _draw_samples(config.sampling, shard, output, Folder(codec_uri), seed, device)
    last_metrics = json.loads(output.read(METRICS).splitlines()[-1])
    return {"expert": expert, "rows": read_manifest(shard, SHARD).facts["rows"], **last_metrics}


def _draw_samples(
    sampling: SamplingConfig,
    shard: Folder,
    output: Folder,
    codec: Folder,
    seed: int,
    device: torch.device,
) -> None:
    """Write `samples.png`: what this expert, asked alone, draws for captions of its own shard."""
    table = read_table(shard, ["text_embedding"]).slice(0, SAMPLES_PER_EXPERT)
    embedding = tensor_column(table, "text_embedding")[:, 0].astype(np.float32)
    null_text = read_null_text(shard)[None]
    latents = sample_one_expert(
        load_expert(VerifiedFolder(output, None)).to(device),
        TextConditioning.from_pooled(torch.from_numpy(embedding)),
        TextConditioning.from_pooled(torch.from_numpy(null_text)),
        seeds=range(seed, seed + len(embedding)),
        num_inference_steps=sampling.num_inference_steps,
        guidance_scale=sampling.guidance_scale,
    )
    pictures = load_codec(VerifiedFolder(codec, None)).decode(latents)
    output.write("samples.png", png_bytes(picture_grid(pictures, columns=8, scale=4)))
