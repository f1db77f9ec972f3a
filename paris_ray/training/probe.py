"""How fast this machine trains the models of a run, found out in a minute, before there is data."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from time import perf_counter

import torch
from torch import Tensor
from torch.nn import functional

from paris_ray.config import Config, Stage, TrainingConfig
from paris_ray.devices import device_name, memory_bytes, resolve_device, resolve_precision
from paris_ray.diffusion import router_logits, sample_path
from paris_ray.folders import Folder
from paris_ray.models import Expert, Router, TextConditioning
from paris_ray.models.flops import text_length
from paris_ray.seeding import torch_generator
from paris_ray.storage import temporary_folder
from paris_ray.training.data import Batch
from paris_ray.training.loop import Loss, Progress, TrainingLoop
from paris_ray.training.recipes import recipe_of
from paris_ray.training.trainer import set_block_options

NUM_BATCHES = 4  # that are drawn once, and trained on in turn
WARM_UP_SHARE = 0.25  # of the seconds of a model: it compiles, and memory is handed out
LEAST_STEPS = 3
ENDLESS = 1_000_000_000  # steps


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """What a machine was found to do.

    Attributes:
        device: Its name.
        memory_bytes: Of the device, all of it.
        bfloat16: Whether `precision: auto` means that here.
        samples_per_second: Of trainings, by stage.
    """

    device: str
    memory_bytes: int
    bfloat16: bool
    samples_per_second: Mapping[Stage, float]


def probe_machine(config: Config, stages: Sequence[Stage], seconds: float) -> Probe:
    """Train what stages train, on noise, one after the other, as a run would.

    What reads data and what encodes token ids of text is not in it.

    Args:
        config: The run; the section `expert` says what an expert and the seed are.
        stages: Of `seed`, `expert` and `router`.
        seconds: In all.

    Raises:
        ConfigError: if the device or precision of a training is not to be had here.
    """
    torch.set_num_threads(config.training.threads)
    device = resolve_device(config.training.device)
    expert, router = Expert(config.expert), Router(config.router)
    recipe = recipe_of(config.training, config.expert)

    def learn_velocity(batch: Batch) -> Tensor:
        drawn, text = recipe.prepare(0.0, batch), TextConditioning.from_vectors(batch.text)
        return recipe.loss(expert, drawn, text)

    def learn_cluster(batch: Batch) -> Tensor:
        path, text = sample_path(batch.latents, batch.noise, batch.t), batch.text
        logits = router_logits(router, path.x_t, path.t, TextConditioning.from_vectors(text))
        return functional.cross_entropy(logits, batch.clusters)

    def rate(stage: Stage) -> float:
        share = seconds / len(stages)
        if stage == "router":
            return _rate(router, learn_cluster, config, config.router_training, share)
        training = config.seed_training if stage == "seed" else config.training
        return _rate(expert, learn_velocity, config, training, share)

    return Probe(
        device=device_name(device),
        memory_bytes=memory_bytes(device),
        bfloat16=resolve_precision("auto", device) == torch.bfloat16,
        samples_per_second={stage: rate(stage) for stage in stages},
    )


class _Enough(Exception):
    """Ends a training that has no end."""


def _rate(
    model: Expert | Router, loss: Loss, config: Config, training: TrainingConfig, seconds: float
) -> float:
    """Return the samples a second of a training, without its first steps."""
    clock = _Clock(seconds)
    training = replace(training, steps=ENDLESS, checkpoint_every=ENDLESS, log_every=1)
    training = replace(training, learning_rate=1e-6, tensorboard=False, sample_every=None)
    training = replace(training, max_hours=None, max_dollars=None)
    batches = [_noise(config, training.batch_size, i) for i in range(NUM_BATCHES)]
    device = resolve_device(training.device)
    set_block_options(model.to(device), training)
    with temporary_folder() as folder, suppress(_Enough):
        TrainingLoop(
            model,
            lambda step: batches[step % NUM_BATCHES],
            loss,
            training,
            Folder(folder),
            identity="probe",
            on_progress=clock,
        ).run()
    return clock.samples_per_second


class _Clock:
    """Notes when steps are done, and ends the training when it has lasted long enough.

    A slow machine is given the time of three steps, of which the first is not counted.
    """

    def __init__(self, seconds: float) -> None:
        self.began, self.seconds = perf_counter(), seconds
        self.done: list[tuple[int, float]] = []

    def __call__(self, progress: Progress) -> None:
        now = perf_counter() - self.began
        warming_up = now < WARM_UP_SHARE * self.seconds
        self.done = [*([] if warming_up else self.done), (progress.samples_seen, now)]
        if now >= self.seconds and len(self.done) >= LEAST_STEPS:
            raise _Enough

    @property
    def samples_per_second(self) -> float:
        (samples, began), (all_samples, ended) = self.done[0], self.done[-1]
        return (all_samples - samples) / (ended - began)


def _noise(config: Config, batch_size: int, index: int) -> Batch:
    """Return a batch of the shapes that the run's have."""
    generator = torch_generator(0, "probe", index)
    expert, length = config.expert, text_length(config)

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch_size, *shape, generator=generator)

    size = (expert.in_channels, expert.input_size, expert.input_size)
    return Batch(
        latents=normal(*size),
        noise=normal(*size),
        t=torch.rand(batch_size, generator=generator),
        text=normal(1 + length, expert.text_embed_dim),
        clusters=torch.zeros(batch_size, dtype=torch.int64),
    )
