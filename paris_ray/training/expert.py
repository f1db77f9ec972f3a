"""Training one expert on one shard, alone: nothing here knows that other experts exist."""

from torch import Tensor

from paris_ray.artifacts import Folder
from paris_ray.config import ExpertConfig, TrainingConfig
from paris_ray.devices import resolve_device
from paris_ray.diffusion import denoising_loss, sample_path
from paris_ray.models import Expert
from paris_ray.training.data import Batch, batches, load_dataset
from paris_ray.training.loop import OnProgress, build_seeded
from paris_ray.training.schedule import with_steps
from paris_ray.training.text import text_reader
from paris_ray.training.trainer import DrawSamples, train_model


def train_expert(
    expert_config: ExpertConfig,
    config: TrainingConfig,
    *,
    shard: Folder,
    shard_digest: str,
    seed: int,
    output: Folder,
    on_progress: OnProgress,
    text_encoder: Folder | None = None,
    draw_samples: DrawSamples[Expert] | None = None,
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
        text_encoder: Folder with the run's encoders; needed if the shard holds token ids.
        draw_samples: Called every `config.sample_every` steps but the last, with the averaged
            expert in evaluation mode, which is good only during the call, and the steps done.

    Raises:
        TrainingError: if the shard is empty or the loss stops being finite.
        ConfigError: if the configuration does not fit the shard or what it starts from.
    """
    dataset = load_dataset([shard])
    config = with_steps(config, len(dataset))
    expert = build_seeded(lambda: Expert(expert_config), seed)
    encode = text_reader(dataset, text_encoder, resolve_device(config.device))

    def loss(batch: Batch) -> Tensor:
        path = sample_path(batch.latents, batch.noise, batch.t)
        return denoising_loss(expert, path, encode(batch.text))

    train_model(
        expert,
        batches(dataset, config, seed=seed, purpose="batch", expert=expert_config),
        loss,
        config,
        inputs={"shard": shard_digest, "seed": seed},
        text_length=dataset.text_length,
        output=output,
        on_progress=on_progress,
        draw_samples=draw_samples,
    )
