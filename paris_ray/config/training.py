"""One training loop."""

from dataclasses import dataclass, field
from typing import Literal

from paris_ray.config.recipes import RecipeConfig

Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig(RecipeConfig):
    """One training loop. Steps are optimiser steps; progress is counted in samples seen."""

    steps: int = 600
    epochs: float | None = None  # of the expert's own shard; if given, it replaces steps
    batch_size: int = 64  # samples of an optimiser step
    accumulation_steps: int = 1  # parts that a batch is cut into to fit the memory
    init_from: str | None = None  # folder of an expert to start from, such as jobs.convert_dit's
    learning_rate: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.98)
    adam_eps: float = 1e-8
    weight_decay: float = 0.01
    warmup_steps: int = 30
    schedule: Literal["constant", "linear", "cosine"] = "linear"  # after the warm-up
    decay_share: float = 0.5  # last share of the steps, over which the rate falls
    final_learning_rate_share: float = 0.02
    max_grad_norm: float | None = 1.0  # null: gradients are not clipped
    ema_decay: float = 0.995
    ema_device: Literal["model", "cpu"] = "model"
    text_dropout: float = 0.1
    text_noise: float = 0.0  # standard deviation of noise added to sentence vectors
    # Of several captions a row, how often each is drawn, in their order: a number for each of
    # corpus.captions_per_row, which must be given; null: alike
    caption_weights: list[float] | None = None
    t_distribution: Literal["uniform", "logit_normal"] = "logit_normal"
    t_logit_mean: float = 0.3
    t_logit_std: float = 1.0
    t_one_share: float = 0.1  # share of each batch at t = 1, pure noise
    precision: Precision = "auto"  # auto: bfloat16 autocast where the device has it in hardware
    gradient_checkpointing: bool = False
    compile: bool = False  # torch.compile of the blocks
    prefetch: int = 2  # batches made ready ahead; 0: none
    device: str = "auto"  # auto: a GPU if num_gpus reserves one, else the CPU
    threads: int = 1  # torch threads of one training process, never taken from num_cpus
    log_every: int = 25  # steps
    checkpoint_every: int = 200  # steps
    validate_every: int = 200  # steps between losses on held-out rows; at the next log
    sample_every: int | None = None  # steps between sample grids; null: at the end alone
    tensorboard: bool = False  # also write TensorBoard event files
    wandb: str | None = None  # also log to this project of Weights & Biases
    mlflow: str | None = None  # also log to the MLflow at this tracking URI
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    accelerator_type: str | None = None  # Ray's name of a GPU, such as L40S
    labels: dict[str, str] = field(default_factory=dict)  # Ray labels that the node must have
    fallback_labels: list[dict[str, str]] = field(default_factory=list)  # else these, in order
    max_retries: int = 3  # of a task whose process or node died
    # Caps of each training, over all of its processes: it is saved and ended; null: none
    max_hours: float | None = None
    max_dollars: float | None = None
    dollars_per_hour: float | None = None  # of what a training reserves; max_dollars needs it
