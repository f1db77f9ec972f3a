"""Training one expert on one shard, alone: nothing here knows that other experts exist."""

import safetensors.torch
import torch
from torch import Tensor

from paris_ray.artifacts import Folder
from paris_ray.config import ExpertConfig, TrainingConfig, identity
from paris_ray.devices import resolve_device
from paris_ray.diffusion import denoising_loss
from paris_ray.models import Expert
from paris_ray.models.release import write_document
from paris_ray.run import EXPERT_WEIGHTS, MODEL_CONFIG
from paris_ray.seeding import torch_generator
from paris_ray.training.checkpoint import identity_digest
from paris_ray.training.data import BatchOrder, LatentDataset, load_dataset
from paris_ray.training.loop import OnProgress, TrainingLoop, build_seeded


def train_expert(
    expert_config: ExpertConfig,
    config: TrainingConfig,
    *,
    shard: Folder,
    shard_digest: str,
    seed: int,
    output: Folder,
    on_progress: OnProgress,
) -> None:
    """Train an expert on a shard and write its averaged weights, in the released layout.

    Args:
        expert_config: Architecture.
        config: Hyper-parameters.
        shard: Folder with the latents and text of one cluster.
        shard_digest: Digest of that shard; a checkpoint made on another is refused.
        seed: Decides the initial weights, the order of data, times and noise.
        output: The expert's own folder; the loop continues from a checkpoint in it.
        on_progress: Called with the progress from time to time.

    Raises:
        TrainingError: if the shard is empty or the loss stops being finite.
    """
    torch.set_num_threads(config.threads)
    dataset = load_dataset([shard])
    expert = build_seeded(lambda: Expert(expert_config), seed).to(resolve_device(config.device))
    order = BatchOrder(len(dataset), config.batch_size, seed)

    def loss_of_step(step: int) -> Tensor:
        return expert_loss(expert, dataset, order.batch(step), config, seed, step)

    run_identity = identity_digest(
        expert=identity(expert_config), training=identity(config), shard=shard_digest, seed=seed
    )
    loop = TrainingLoop(
        expert, loss_of_step, config, output, identity=run_identity, on_progress=on_progress
    )
    weights = {name: value.cpu().contiguous() for name, value in loop.run().items()}
    output.write_json(MODEL_CONFIG, write_document(expert_config))
    output.write(EXPERT_WEIGHTS, safetensors.torch.save(weights))


def expert_loss(
    expert: Expert,
    dataset: LatentDataset,
    index: Tensor,
    config: TrainingConfig,
    seed: int,
    step: int,
) -> Tensor:
    """Draw times, noise and text for rows `index (B,)`, place them on the path, compare."""
    generator = torch_generator(seed, "batch", step)
    path, text = dataset.draw(index, config, generator, next(expert.parameters()).device)
    return denoising_loss(expert, path, text)
