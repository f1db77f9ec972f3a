"""Training an adapter (LoRA) of one expert, whose own weights stay as they are."""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from paris_ray.config import LoRAConfig, TrainingConfig, identity
from paris_ray.diffusion import denoising_loss, sample_path
from paris_ray.folders import Folder
from paris_ray.models import Expert, TextConditioning
from paris_ray.models.lora import Adapter, attach
from paris_ray.models.peft_layout import save_adapter
from paris_ray.training.checkpoint import identity_digest
from paris_ray.training.data import Batch, batches, load_dataset
from paris_ray.training.loop import OnProgress, TrainingLoop
from paris_ray.training.schedule import with_steps
from paris_ray.training.text import text_reader
from paris_ray.training.trainer import DrawSamples, set_block_options, training_identity


def train_lora(
    expert: Expert,
    lora: LoRAConfig,
    config: TrainingConfig,
    *,
    shard: Folder,
    inputs: Mapping[str, Any],
    seed: int,
    output: Folder,
    on_progress: OnProgress,
    text_encoder: Folder | None = None,
    base_model: str | None = None,
    draw_samples: DrawSamples[Expert] | None = None,
) -> Expert:
    """Train an adapter, write its average in PEFT's layout, and return the expert with it.

    Only the adapter is optimised, averaged and checkpointed. The expert is neither changed nor
    copied, and may be in bfloat16: the adapter is in float32 whatever it is.

    Args:
        expert: The expert, frozen and on the device of `config`.
        lora: Rank, scale and targets.
        config: Hyper-parameters.
        shard: Folder with latents and text, made with the encoders that the expert was trained on.
        inputs: What else decides the result: digests of the expert and the data.
        seed: Decides the first weights, the order of data, times and noise.
        output: The adapter's own folder; training continues from a checkpoint in it.
        on_progress: Called with the progress from time to time.
        text_encoder: Folder with `text_encoder/` and `tokenizer/`; needed for token ids.
        base_model: Where the expert is, for whoever reads the adapter's configuration.
        draw_samples: As in `train_model`; the expert has the average so far.

    Returns:
        A view of the expert with the averaged adapter attached, in evaluation mode.

    Raises:
        ConfigError: if the rank or a target does not fit the expert.
        TrainingError, ArtifactError: as `TrainingLoop.run`; also if the shard is empty.
    """
    torch.set_num_threads(config.threads)
    dataset = load_dataset([shard])
    config = with_steps(config, len(dataset))
    encode = text_reader(dataset, text_encoder, expert.pos_embed.device)
    adapter = Adapter.create(expert, lora, seed)
    averaged = partial(_with_weights, adapter)
    adapted = attach(expert, adapter)
    set_block_options(adapted, config)
    loop = TrainingLoop(
        adapter,
        batches(dataset, config, seed=seed, purpose="batch", expert=expert.config),
        partial(_loss, adapted, encode),
        config,
        output,
        identity=_identity(lora, config, {"seed": seed, **inputs}),
        on_progress=on_progress,
        on_average=draw_samples and (lambda s, n: draw_samples(attach(expert, averaged(s)), n)),
    )
    average = averaged(loop.run())
    save_adapter(average, output, base_model)
    return attach(expert, average)


def _loss(adapted: Expert, encode: Callable[[Tensor], TextConditioning], batch: Batch) -> Tensor:
    """Return the loss of a batch by the expert with its adapter, a scalar."""
    path = sample_path(batch.latents, batch.noise, batch.t)
    return denoising_loss(adapted, path, encode(batch.text))


def _identity(lora: LoRAConfig, config: TrainingConfig, inputs: Mapping[str, Any]) -> str:
    """Return the digest of all that decides the result."""
    return identity_digest(lora=identity(lora), training=training_identity(config), **inputs)


def _with_weights(adapter: Adapter, state: Mapping[str, Tensor]) -> Adapter:
    """Return a frozen copy of an adapter with other weights."""
    other = copy.deepcopy(adapter)
    other.load_state_dict(state)
    return other.requires_grad_(False)
