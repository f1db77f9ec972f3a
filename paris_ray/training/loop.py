"""The training loop that experts and router share: step, average, log, checkpoint, resume."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from paris_ray.artifacts import METRICS, TIMINGS, Folder
from paris_ray.config import TrainingConfig
from paris_ray.devices import autocast, resolve_device, resolve_precision
from paris_ray.errors import TrainingError
from paris_ray.seeding import derive_seed
from paris_ray.training import checkpoint
from paris_ray.training.checkpoint import TrainingState
from paris_ray.training.ema import ExponentialMovingAverage


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a training run is."""

    step: int
    num_steps: int
    samples_seen: int
    loss: float
    samples_per_second: float
    eta_s: float


OnProgress = Callable[[Progress], None]
# Given the step, draw that step's batch and return its loss; the same step always draws the same.
LossOfStep = Callable[[int], Tensor]


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Return the rate of optimiser step `step`: linear warm-up, constant, linear decay."""
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    decay_start = config.steps * (1 - config.decay_share)
    past = max(0.0, step - decay_start) / max(1.0, config.steps - decay_start)
    return config.learning_rate * warmup * (1 - past * (1 - config.final_learning_rate_share))


Model = TypeVar("Model")


def build_seeded(build: Callable[[], Model], seed: int) -> Model:
    """Return a model with the initial weights of a seed; the global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "initialise"))
        return build()


class ProgressClock:
    """Measures a loop's rate and reports its progress every few steps.

    Args:
        num_steps: Steps of the whole run.
        batch_size: Samples a step.
        on_progress: Receives the reports.
        first_step: Steps done before this process, when resuming.
        log_every: Steps between reports.
    """

    def __init__(
        self,
        num_steps: int,
        batch_size: int,
        on_progress: OnProgress,
        *,
        first_step: int = 0,
        log_every: int = 25,
    ) -> None:
        self.num_steps, self.batch_size, self.log_every = num_steps, batch_size, log_every
        self.on_progress = on_progress
        self._since, self._at = first_step, time.perf_counter()

    def tick(self, done: int, loss: Tensor) -> Progress | None:
        """Report after `done` steps, if it is time to; return what was reported.

        Raises:
            TrainingError: if the loss is not a finite number.
        """
        if done % self.log_every and done != self.num_steps:
            return None
        value = loss.item()
        if not math.isfinite(value):
            raise TrainingError(f"the loss is {value} at step {done}: lower the learning_rate")
        now = time.perf_counter()
        seconds_per_step = (now - self._at) / (done - self._since)
        self._since, self._at = done, now
        progress = Progress(
            step=done,
            num_steps=self.num_steps,
            samples_seen=done * self.batch_size,
            loss=value,
            samples_per_second=self.batch_size / seconds_per_step,
            eta_s=(self.num_steps - done) * seconds_per_step,
        )
        self.on_progress(progress)
        return progress


class TrainingLoop:
    """Trains one model into one folder, and continues there if it was interrupted.

    Args:
        model: The model, on its device.
        loss_of_step: Draws the batch of a step and returns its loss.
        config: Hyper-parameters.
        folder: Receives the checkpoint, metrics and timings.
        identity: Digest of what decides the result; a checkpoint of another is refused.
        on_progress: Called every `config.log_every` steps.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_of_step: LossOfStep,
        config: TrainingConfig,
        folder: Folder,
        *,
        identity: str,
        on_progress: OnProgress,
    ) -> None:
        self.config, self.folder, self.identity = config, folder, identity
        self.loss_of_step, self.on_progress = loss_of_step, on_progress
        self.device = resolve_device(config.device)
        self.dtype = resolve_precision(config.precision, self.device)
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad],
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,
        )
        ema = ExponentialMovingAverage(model, config.ema_decay)
        self.state = TrainingState(model, ema, optimizer)
        self.metrics: list[dict[str, Any]] = []
        self.timings: list[dict[str, Any]] = []

    def run(self) -> dict[str, Tensor]:
        """Train to the last step and return the averaged weights.

        Raises:
            TrainingError: if the loss stops being a finite number.
        """
        config, first_step = self.config, self._resume()
        clock = ProgressClock(
            config.steps,
            config.batch_size,
            self.on_progress,
            first_step=first_step,
            log_every=config.log_every,
        )
        for done in range(first_step + 1, config.steps + 1):
            progress = clock.tick(done, self._step(done - 1))
            if progress is not None:
                self._record(progress)
            if done == config.steps or done % config.checkpoint_every == 0:
                self._save(done)
        return self.state.ema.state

    def _step(self, step: int) -> Tensor:
        for group in self.state.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.config)
        with autocast(self.device, self.dtype):
            loss = self.loss_of_step(step)
        self.state.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.state.model.parameters(), self.config.max_grad_norm)
        self.state.optimizer.step()
        self.state.ema.update(self.state.model, step)
        return loss.detach()

    def _record(self, progress: Progress) -> None:
        rate = learning_rate(progress.step - 1, self.config)
        seen = {"samples_seen": progress.samples_seen}
        self.metrics.append(seen | {"loss": progress.loss, "learning_rate": rate})
        self.timings.append(seen | {"samples_per_second": progress.samples_per_second})

    def _save(self, done: int) -> None:
        """Write metrics first: a checkpoint then never says more than they show."""
        self.folder.write(METRICS, _json_lines(self.metrics))
        self.folder.write(TIMINGS, _json_lines(self.timings))
        samples_seen = done * self.config.batch_size
        progress = {"samples_seen": samples_seen, "metrics": self.metrics, "timings": self.timings}
        checkpoint.save(self.folder, self.state, identity=self.identity, progress=progress)

    def _resume(self) -> int:
        progress = checkpoint.restore(self.folder, self.state, identity=self.identity)
        if progress is None:
            return 0
        self.metrics, self.timings = progress["metrics"], progress["timings"]
        return int(progress["samples_seen"]) // self.config.batch_size


def _json_lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows).encode()
