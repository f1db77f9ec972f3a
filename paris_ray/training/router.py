"""Training the router: which cluster does a noisy latent, with its caption, come from?"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from paris_ray.config import RouterConfig, TrainingConfig
from paris_ray.devices import resolve_device
from paris_ray.diffusion import router_logits, sample_path
from paris_ray.folders import Folder
from paris_ray.models import Router, TextConditioning
from paris_ray.seeding import build_seeded
from paris_ray.training.data import Batch, LatentDataset, batches, load_dataset
from paris_ray.training.loop import OnProgress
from paris_ray.training.router_quality import Encode, held_out_quality, right_cluster
from paris_ray.training.schedule import with_steps
from paris_ray.training.text import text_reader
from paris_ray.training.trainer import train_model


def train_router(
    router_config: RouterConfig,
    config: TrainingConfig,
    *,
    shards: Sequence[Folder],
    shards_digest: str,
    seed: int,
    output: Folder,
    on_progress: OnProgress,
    held_out: Mapping[int, Folder] = MappingProxyType({}),
    text_encoder: Folder | None = None,
) -> dict[str, Any]:
    """Train the router on all shards and write its averaged weights, in the released layout.

    Args:
        router_config: Architecture.
        config: Hyper-parameters.
        shards: One folder a cluster, in the order of the experts.
        shards_digest: Digest of them; a checkpoint made on others is refused.
        seed: Decides the initial weights, the order of data, times and noise.
        output: The router's own folder.
        on_progress: Called with the progress from time to time.
        held_out: Folders of rows to measure on, by cluster; the temperature is fitted to them.
        text_encoder: Folder with the run's encoders; needed if the router reads text and the
            shards hold token ids.

    Returns:
        `right_cluster`, the share of training rows sent to their own cluster by noise level t;
        with held-out rows also `held_out`, as `router_quality.held_out_quality` returns it.

    Raises:
        TrainingError: if a shard is empty or the loss stops being finite.
        ConfigError: if the configuration does not fit the shards or what it starts from.
    """
    dataset = load_dataset(shards)
    config = with_steps(config, len(dataset))
    router = build_seeded(lambda: Router(router_config), seed)
    encode: Encode = TextConditioning.from_vectors  # of no use to a router without text
    if router_config.text_embed_dim:
        encode = text_reader(dataset, text_encoder, resolve_device(config.device))

    def loss(batch: Batch) -> Tensor:
        path = sample_path(batch.latents, batch.noise, batch.t)
        logits = router_logits(router, path.x_t, path.t, encode(batch.text))
        return functional.cross_entropy(logits, batch.clusters)

    average = train_model(
        router,
        batches(dataset, config, seed=seed, purpose="router batch"),
        loss,
        config,
        inputs={"shards": shards_digest, "seed": seed},
        text_length=dataset.text_length,
        output=output,
        on_progress=on_progress,
    )
    return measure_router(average, dataset, held_out, encode, seed)


def measure_router(
    router: Router,
    dataset: LatentDataset,
    held_out: Mapping[int, Folder],
    encode: Encode,
    seed: int,
) -> dict[str, Any]:
    """Return what `train_router` returns, of a router in evaluation mode.

    Args:
        router: The router.
        dataset: Rows of all clusters that may have been trained on.
        held_out: Folders of other rows, by cluster.
        encode: From their text to its conditioning.
        seed: Decides the noise.
    """
    facts: dict[str, Any] = {"right_cluster": right_cluster(router, dataset, encode, seed)}
    if held_out:
        rows = load_dataset(list(held_out.values()))
        rows = replace(rows, clusters=torch.tensor(list(held_out))[rows.clusters])
        facts["held_out"] = held_out_quality(router, dataset, rows, encode, seed)
    return facts
