"""The plan of one training: an expert on its shard, or the router or a student on all of them."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

from paris_ray.config import Config, ExpertConfig, GpuConfig, RouterConfig, TrainingConfig
from paris_ray.models.flops import parameter_count, text_length, training_flops_per_image
from paris_ray.planning.disk import trained_row_bytes
from paris_ray.planning.memory import Memory, text_tower_parameters, training_memory

Stage = Literal["seed", "expert", "router", "student", "few_step"]

GIGA = 10**9
# The rest is for the CUDA context, the workspaces of libraries, and fragmentation.
USABLE_SHARE = 0.9
# With fewer images at once, a GPU computes slowly.
FEW_IMAGES = 8


@dataclass(frozen=True, slots=True)
class Fit:
    """Whether a training fits a kind of GPU and, if not, the options that would make it fit."""

    fits: bool
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Teachers:
    """Frozen models that compute the targets of a training.

    Attributes:
        num_parameters: Of all of them; they stay on the GPU.
        flops_per_image: Of the targets.
    """

    num_parameters: int
    flops_per_image: int


NO_TEACHERS = Teachers(0, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingPlan:
    """The training of one model.

    Attributes:
        stage: Stages follow each other.
        expert: Its number, of an expert.
        num_parameters: Position table included.
        num_rows: Rows of its training data.
        batch_size: Samples a step.
        accumulation_steps: Parts that a batch is cut into.
        num_steps: Optimiser steps.
        flops_per_image: Of a forward and backward pass, and of what teachers compute.
        memory: What it takes on a GPU.
        temporary_bytes: What it takes in the temporary folder of its node.
        fits: One answer for each entry of `fleet.gpus`.
    """

    stage: Stage
    expert: int | None
    num_parameters: int
    num_rows: int
    batch_size: int
    accumulation_steps: int
    num_steps: int
    flops_per_image: int
    memory: Memory
    temporary_bytes: int
    fits: tuple[Fit, ...]

    @property
    def name(self) -> str:
        """What to call the model."""
        return self.stage if self.expert is None else f"expert {self.expert}"

    @property
    def samples_seen(self) -> int:
        """Samples of the whole training."""
        return self.num_steps * self.batch_size

    @property
    def flops(self) -> int:
        """FLOPs of the whole training."""
        return self.samples_seen * self.flops_per_image


def plan_training(
    config: Config,
    name: Stage | int,
    model: ExpertConfig | RouterConfig,
    training: TrainingConfig,
    num_rows: int,
    *,
    teachers: Teachers = NO_TEACHERS,
) -> TrainingPlan:
    """Return the plan of one training.

    Args:
        config: The run: its text encoder and its fleet.
        name: Number of the expert, or which of the other stages.
        model: Its architecture.
        training: How it is trained.
        num_rows: Rows of its training data.
        teachers: What computes its targets, of a distillation.
    """
    length = text_length(config)
    reads_tokens = config.text.kind != "minilm" and model.text_embed_dim > 0
    text_encoder = text_tower_parameters(model.text_embed_dim) if reads_tokens else 0

    def memory(setting: TrainingConfig) -> Memory:
        return training_memory(
            model,
            setting,
            text_encoder_parameters=text_encoder,
            teacher_parameters=teachers.num_parameters,
            text_length=length,
        )

    return TrainingPlan(
        stage="expert" if isinstance(name, int) else name,
        expert=name if isinstance(name, int) else None,
        num_parameters=parameter_count(model),
        num_rows=num_rows,
        batch_size=training.batch_size,
        accumulation_steps=training.accumulation_steps,
        num_steps=_num_steps(training, num_rows),
        flops_per_image=training_flops_per_image(model, length) + teachers.flops_per_image,
        memory=memory(training),
        temporary_bytes=num_rows * sum(trained_row_bytes(config).values()),
        fits=tuple(_fit(training, memory, gpu) for gpu in config.fleet.gpus),
    )


def _num_steps(training: TrainingConfig, num_rows: int) -> int:
    if training.epochs is None:
        return training.steps
    return math.ceil(training.epochs * num_rows / training.batch_size)


def _fit(
    training: TrainingConfig, memory: Callable[[TrainingConfig], Memory], gpu: GpuConfig
) -> Fit:
    """Compare a training with a GPU; look for options that change no result but make it fit."""
    room = USABLE_SHARE * gpu.memory_gb * GIGA
    if memory(training).total <= room:
        return Fit(True)
    for changes in _smaller(training):
        if memory(replace(training, **changes)).total <= room:
            news = [f"{k}={v}" for k, v in changes.items() if v != getattr(training, k)]
            return Fit(False, " ".join(news).replace("True", "true"))
    return Fit(False, "a smaller model")


def _smaller(training: TrainingConfig) -> list[dict[str, Any]]:
    """Return what can be set to need less memory, from the fastest to the slowest."""
    batch, parts = training.batch_size, training.accumulation_steps
    choices = product(
        dict.fromkeys((training.ema_device, "cpu")),
        dict.fromkeys((training.gradient_checkpointing, True)),
        [n for n in range(parts, batch + 1) if batch % n == 0],
    )
    fastest_first = sorted(choices, key=lambda values: batch // values[-1] < FEW_IMAGES)
    names = ("ema_device", "gradient_checkpointing", "accumulation_steps")
    return [dict(zip(names, values, strict=True)) for values in fastest_first]
