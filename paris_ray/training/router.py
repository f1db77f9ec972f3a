"""Training the router: which cluster does a noisy latent, with its caption, come from?"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from paris_ray.artifacts import Folder
from paris_ray.config import RouterConfig, TrainingConfig
from paris_ray.devices import resolve_device
from paris_ray.diffusion import router_logits, sample_path
from paris_ray.models import Router, TextConditioning
from paris_ray.seeding import torch_generator
from paris_ray.training.data import Batch, LatentDataset, batches, load_dataset
from paris_ray.training.loop import OnProgress, build_seeded
from paris_ray.training.schedule import with_steps
from paris_ray.training.text import text_reader
from paris_ray.training.trainer import train_model

NOISE_LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
EVALUATION_BATCH_SIZE = 256
MAX_EVALUATION_ROWS = 50_000

Encode = Callable[[Tensor], TextConditioning]


def train_router(
    router_config: RouterConfig,
    config: TrainingConfig,
    *,
    shards: Sequence[Folder],
    shards_digest: str,
    seed: int,
    output: Folder,
    on_progress: OnProgress,
    text_encoder: Folder | None = None,
) -> dict[str, float]:
    """Train the router on all shards and write its averaged weights, in the released layout.

    Args:
        router_config: Architecture.
        config: Hyper-parameters.
        shards: One folder a cluster, in the order of the experts.
        shards_digest: Digest of them; a checkpoint made on others is refused.
        seed: Decides the initial weights, the order of data, times and noise.
        output: The router's own folder.
        on_progress: Called with the progress from time to time.
        text_encoder: Folder with the run's encoders; needed if the router reads text and the
            shards hold token ids.

    Returns:
        Share of training rows sent to their own cluster, by noise level t; of very many rows,
        evenly spread ones count.

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
    return router_accuracy(average, dataset, encode, seed)


@torch.no_grad()
def router_accuracy(
    router: Router, dataset: LatentDataset, encode: Encode, seed: int
) -> dict[str, float]:
    """Return the share of rows whose most likely cluster is their own, by noise level t."""
    return {f"{t:g}": _accuracy_at(router, dataset, encode, t, seed) for t in NOISE_LEVELS}


def _accuracy_at(
    router: Router, dataset: LatentDataset, encode: Encode, t: float, seed: int
) -> float:
    device = next(router.parameters()).device
    generator = torch_generator(seed, "router accuracy", round(1000 * t))
    count = min(len(dataset), MAX_EVALUATION_ROWS)
    hits = 0
    for rows in (torch.arange(count) * len(dataset) // count).split(EVALUATION_BATCH_SIZE):
        latents = dataset.read_latents(rows)
        noise = torch.randn(latents.shape, generator=generator)
        path = sample_path(latents, noise, torch.full((len(rows),), t))
        text = encode(dataset.read_text(rows, 0).to(device))
        logits = router_logits(router, path.x_t.to(device), path.t.to(device), text)
        hits += int((logits.argmax(dim=1).cpu() == dataset.clusters[rows]).sum())
    return hits / count
