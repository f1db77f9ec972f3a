"""Training the router: which cluster does a noisy latent, with its caption, come from?"""

from collections.abc import Sequence

import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional

from paris_ray.artifacts import Folder
from paris_ray.config import RouterConfig, TrainingConfig, identity
from paris_ray.devices import resolve_device
from paris_ray.diffusion import router_logits, sample_path
from paris_ray.models import Router, TextConditioning
from paris_ray.models.release import write_document
from paris_ray.run import MODEL_CONFIG, ROUTER_WEIGHTS
from paris_ray.seeding import torch_generator
from paris_ray.training.checkpoint import identity_digest
from paris_ray.training.data import BatchOrder, LatentDataset, load_dataset
from paris_ray.training.loop import OnProgress, TrainingLoop, build_seeded

NOISE_LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
EVALUATION_BATCH_SIZE = 256


def train_router(
    router_config: RouterConfig,
    config: TrainingConfig,
    *,
    shards: Sequence[Folder],
    shards_digest: str,
    seed: int,
    output: Folder,
    on_progress: OnProgress,
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

    Returns:
        Share of training rows sent to their own cluster, by noise level t.

    Raises:
        TrainingError: if a shard is empty or the loss stops being finite.
    """
    torch.set_num_threads(config.threads)
    dataset = load_dataset(shards)
    router = build_seeded(lambda: Router(router_config), seed).to(resolve_device(config.device))
    order = BatchOrder(len(dataset), config.batch_size, seed)

    def loss_of_step(step: int) -> Tensor:
        return router_loss(router, dataset, order.batch(step), config, seed, step)

    run_identity = identity_digest(
        router=identity(router_config), training=identity(config), shards=shards_digest, seed=seed
    )
    loop = TrainingLoop(
        router, loss_of_step, config, output, identity=run_identity, on_progress=on_progress
    )
    averaged = loop.run()
    router.load_state_dict(averaged)
    weights = {name: value.cpu().contiguous() for name, value in averaged.items()}
    output.write_json(MODEL_CONFIG, write_document(router_config))
    output.write(ROUTER_WEIGHTS, safetensors.torch.save(weights))
    return router_accuracy(router, dataset, seed)


def router_loss(
    router: Router,
    dataset: LatentDataset,
    index: Tensor,
    config: TrainingConfig,
    seed: int,
    step: int,
) -> Tensor:
    """Return the cross-entropy of the clusters of rows `index (B,)` at random times."""
    generator = torch_generator(seed, "router batch", step)
    path, text = dataset.draw(index, config, generator, next(router.parameters()).device)
    logits = router_logits(router, path.x_t, path.t, text)
    return functional.cross_entropy(logits, dataset.clusters[index].to(logits.device))


@torch.no_grad()
def router_accuracy(router: Router, dataset: LatentDataset, seed: int) -> dict[str, float]:
    """Return the share of all rows whose most likely cluster is their own, by noise level t."""
    return {f"{t:g}": _accuracy_at(router, dataset, t, seed) for t in NOISE_LEVELS}


def _accuracy_at(router: Router, dataset: LatentDataset, t: float, seed: int) -> float:
    device = next(router.parameters()).device
    noise = torch.randn(
        dataset.latents.shape, generator=torch_generator(seed, "router accuracy", round(1000 * t))
    )
    hits = 0
    for rows in torch.arange(len(dataset)).split(EVALUATION_BATCH_SIZE):
        times = torch.full((len(rows),), t)
        path = sample_path(dataset.latents[rows], noise[rows], times)
        text = TextConditioning.from_pooled(dataset.text_embedding[rows, 0])
        logits = router_logits(router, path.x_t.to(device), times.to(device), text.to(device))
        hits += int((logits.argmax(dim=1).cpu() == dataset.clusters[rows]).sum())
    return hits / len(dataset)
