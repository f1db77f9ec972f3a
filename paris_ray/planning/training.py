"""The plan of one training: an expert on its shard, or the router or a student on all of them."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from paris_ray.config import (
    Config,
    ExpertConfig,
    GpuConfig,
    Precision,
    RouterConfig,
    Stage,
    TrainingConfig,
)
from paris_ray.models.flops import (
    PASSES_OF_A_TRAINING_STEP,
    num_tokens,
    parameter_count,
    text_length,
    training_flops_per_image,
)
from paris_ray.planning.disk import ModelBytes, feature_width, trained_row_bytes
from paris_ray.planning.durations import SECONDS_PER_DAY, Duration
from paris_ray.planning.memory import FLOAT32, Memory, text_tower_parameters, training_memory
from paris_ray.training.recipes.alignment import projector_parameters
from paris_ray.training.recipes.muon import ADAMW_MOMENTS

GIGA, TERA = 10**9, 10**12
# The rest is for the CUDA context, the workspaces of libraries, and fragmentation.
USABLE_SHARE = 0.9
# With fewer images at once, a GPU computes slowly.
FEW_IMAGES = 8


@dataclass(frozen=True, slots=True)
class Fit:
    """Whether a training fits a kind of GPU.

    Attributes:
        fits: So or not.
        advice: If not, the options that would make it fit.
        precision: In which it trains there, and its memory is counted.
        num_bytes: That it takes.
    """

    fits: bool
    advice: str = ""
    precision: Precision = field(default="bfloat16", compare=False)
    num_bytes: int = field(default=0, compare=False)


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
        projector_parameters: Of what alignment trains beside the model, and is no part of it.
        num_rows: Rows of its training data.
        batch_size: Samples a step.
        accumulation_steps: Parts that a batch is cut into.
        num_steps: Optimiser steps.
        flops_per_image: Of a forward and backward pass, and of what teachers compute; of the
            projector's in the mean over all steps, of which it has the first share.
        memory: What it takes on a GPU.
        temporary_bytes: What it takes in the temporary folder of its node.
        fits: One answer for each entry of `fleet.gpus`.
        durations: How long it would take on each of these.
    """

    stage: Stage
    expert: int | None
    num_parameters: int
    projector_parameters: int = 0
    num_rows: int
    batch_size: int
    accumulation_steps: int
    num_steps: int
    flops_per_image: int
    memory: Memory
    temporary_bytes: int
    fits: tuple[Fit, ...]
    durations: tuple[Duration, ...]

    @property
    def name(self) -> str:
        """What to call the model."""
        return self.stage if self.expert is None else f"expert {self.expert}"

    @property
    def samples_seen(self) -> int:
        """Samples of the whole training."""
        return self.num_steps * self.batch_size

    @property
    def on_disk(self) -> ModelBytes:
        """What the model takes there when it is trained."""
        weights = FLOAT32 * self.num_parameters
        projector = FLOAT32 * (1 + ADAMW_MOMENTS) * self.projector_parameters
        return ModelBytes(weights, 2 * weights + self.memory.optimizer + projector)

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
    row_bytes = sum(trained_row_bytes(config).values())
    projector = features = 0
    if isinstance(model, ExpertConfig) and training.alignment_weight:
        features = feature_width(config.features.model) or 0  # unknown: not counted, as on disk
        projector = projector_parameters(model.hidden_size, features)
        row_bytes += FLOAT32 * features

    def memory(setting: TrainingConfig) -> Memory:
        return training_memory(
            model,
            setting,
            text_encoder_parameters=text_encoder,
            teacher_parameters=teachers.num_parameters,
            projector_parameters=projector,
            text_length=length,
        )

    stage: Stage = "expert" if isinstance(name, int) else name
    flops_per_image = training_flops_per_image(model, length) + teachers.flops_per_image
    if features:
        macs = num_tokens(model) * (projector - features)  # a bias is no product
        flops = 2 * PASSES_OF_A_TRAINING_STEP * macs
        flops_per_image += round(training.alignment_share * flops)
    num_steps = _num_steps(training, num_rows)

    def duration(gpu: GpuConfig) -> Duration:
        rate = _rate(gpu, stage, flops_per_image, training_flops_per_image(config.expert, length))
        step = training.batch_size / rate / SECONDS_PER_DAY
        return Duration(
            work=num_steps * step,
            interval=min(training.checkpoint_every, num_steps) * step,
            start=gpu.start_s / SECONDS_PER_DAY,
            preemption_rate=gpu.preemptions_per_day,
        )

    return TrainingPlan(
        stage=stage,
        expert=name if isinstance(name, int) else None,
        num_parameters=parameter_count(model),
        projector_parameters=projector,
        num_rows=num_rows,
        batch_size=training.batch_size,
        accumulation_steps=training.accumulation_steps,
        num_steps=num_steps,
        flops_per_image=flops_per_image,
        memory=memory(training),
        temporary_bytes=num_rows * row_bytes,
        fits=tuple(_fit(training, memory, gpu) for gpu in config.fleet.gpus),
        durations=tuple(map(duration, config.fleet.gpus)),
    )


def _rate(gpu: GpuConfig, stage: Stage, flops_per_image: int, expert_flops: int) -> float:
    """Return the samples a second of a training: measured, or by what an image costs.

    Args:
        gpu: Where it trains.
        stage: Which of the trainings.
        flops_per_image: Of it.
        expert_flops: Of the expert that `samples_per_second.expert` was measured with, the one of
            the section `expert`: others are reckoned from it.
    """
    measured = gpu.samples_per_second
    if stage != "expert" and stage in measured:
        return measured[stage]
    if measured:
        return measured["expert"] * expert_flops / flops_per_image
    return gpu.peak_tflops * TERA * gpu.mfu / flops_per_image


def _num_steps(training: TrainingConfig, num_rows: int) -> int:
    if training.epochs is None:
        return training.steps
    return math.ceil(training.epochs * num_rows / training.batch_size)


def _fit(
    training: TrainingConfig, memory: Callable[[TrainingConfig], Memory], gpu: GpuConfig
) -> Fit:
    """Compare a training with a GPU; look for options that change no result but make it fit."""
    precision: Precision = "float32" if training.precision == "float32" else "bfloat16"
    if training.precision == "auto" and not gpu.bfloat16:
        precision = "float32"
    training, room = replace(training, precision=precision), USABLE_SHARE * gpu.memory_gb * GIGA
    num_bytes = memory(training).total

    def answer(advice: str) -> Fit:
        return Fit(not advice, advice, precision, num_bytes)

    if precision == "bfloat16" and not gpu.bfloat16:
        return answer("precision=float32, as it has no bfloat16 in hardware")
    if num_bytes <= room:
        return answer("")
    for changes in _smaller(training):
        if memory(replace(training, **changes)).total <= room:
            news = [f"{k}={v}" for k, v in changes.items() if v != getattr(training, k)]
            return answer(" ".join(news).replace("True", "true"))
    return answer("a smaller model")


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
