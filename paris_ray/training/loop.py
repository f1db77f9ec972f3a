"""The training loop: step, average, log, checkpoint, resume.

What is trained need not be what is run: a loop optimises, averages and checkpoints one module, and
the loss, a function of the batch, may run another one around it.
"""

import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from paris_ray.artifacts import METRICS, TIMINGS
from paris_ray.config import TrainingConfig
from paris_ray.devices import (
    autocast,
    peak_flops,
    peak_memory_bytes,
    resolve_device,
    resolve_precision,
)
from paris_ray.errors import ParisError, TrainingError
from paris_ray.folders import Folder, parse_json
from paris_ray.training import checkpoint
from paris_ray.training.checkpoint import TrainingState
from paris_ray.training.data import Batch
from paris_ray.training.ema import ExponentialMovingAverage
from paris_ray.training.preemption import PreemptionNotice
from paris_ray.training.prefetch import draw_ahead
from paris_ray.training.recipes.muon import MULTIPLE, optimizers
from paris_ray.training.schedule import learning_rate
from paris_ray.training.spending import Spending
from paris_ray.training.trackers import Trackers

ROWS_EVERY_S = 30.0  # rows are written between checkpoints too, for whoever watches
UNMEASURED = "unmeasured"  # a last row whose measures the process that goes on will add
LOGGED = {"samples_seen", "loss", "learning_rate"}  # in every row of the metrics


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a training run is.

    `mfu` is the share of the device's dense bfloat16 peak that the model's own operations take;
    None where the peak is not known.
    """

    step: int
    num_steps: int
    samples_seen: int
    loss: float
    samples_per_second: float
    eta_s: float
    mfu: float | None = None


OnProgress = Callable[[Progress], None]
Draw = Callable[[int], Batch]
Loss = Callable[[Batch], Tensor]
# Receives the averaged state so far and the number of steps done.
OnAverage = Callable[[dict[str, Tensor], int], None]
# Returns measures of the averaged state, by name.
Measure = Callable[[dict[str, Tensor]], Mapping[str, float]]


class ProgressClock:
    """Measures a loop's rate and reports its progress every few steps.

    Args:
        num_steps: Steps of the whole run.
        batch_size: Samples a step.
        on_progress: Receives the reports.
        first_step: Steps done before this process, when resuming.
        log_every: Steps between reports.
        peak_samples_per_second: The rate that counts as an MFU of 1, if it is known.
    """

    def __init__(
        self,
        num_steps: int,
        batch_size: int,
        on_progress: OnProgress,
        *,
        first_step: int = 0,
        log_every: int = 25,
        peak_samples_per_second: float | None = None,
    ) -> None:
        self.num_steps, self.batch_size, self.log_every = num_steps, batch_size, log_every
        self.on_progress, self.peak_samples_per_second = on_progress, peak_samples_per_second
        self._since, self._at = first_step, time.perf_counter()

    def tick(self, done: int, loss: Tensor) -> Progress | None:
        """Report after `done` steps, if it is time to; return what was reported.

        Raises:
            TrainingError: if the loss is not a finite number.
        """
        if done % self.log_every and done != self.num_steps:
            return None
        value = _finite("loss", loss, done)
        now = time.perf_counter()
        seconds_per_step = (now - self._at) / (done - self._since)
        self._since, self._at = done, now
        rate, peak = self.batch_size / seconds_per_step, self.peak_samples_per_second
        progress = Progress(
            step=done,
            num_steps=self.num_steps,
            samples_seen=done * self.batch_size,
            loss=value,
            samples_per_second=rate,
            eta_s=(self.num_steps - done) * seconds_per_step,
            mfu=None if peak is None else rate / peak,
        )
        self.on_progress(progress)
        return progress


class TrainingLoop:
    """Trains one module into one folder, and continues there if it was interrupted.

    Args:
        model: What is optimised, averaged and checkpointed, on its device: all of an expert, or
            only an adapter of one.
        draw: Returns the batch of a step, on the CPU; the same step always draws the same. With
            `config.prefetch` it is called in a thread of its own.
        loss: Returns the loss of a batch on the device, the mean over its rows. It may run other
            modules than the model.
        config: Hyper-parameters, `epochs` resolved (`with_steps`).
        folder: Receives the checkpoint, metrics and timings.
        identity: Digest of what decides the result; a checkpoint of another is refused.
        on_progress: Called every `config.log_every` steps.
        flops_per_image: Of a training step, for the MFU; None if it is not to be told.
        on_average: Called every `config.sample_every` steps but the last, after the checkpoint;
            a step at which the process is ended may be left out.
        measure: Called at the first log after every `config.validate_every` steps, and at the end;
            what it returns joins the metrics. It must depend on the averaged state alone.
        heads: What is optimised and checkpointed beside the model, and not averaged.

    Raises:
        ConfigError: if `config` asks for a tracker that cannot be had (`trackers`).
    """

    def __init__(
        self,
        model: nn.Module,
        draw: Draw,
        loss: Loss,
        config: TrainingConfig,
        folder: Folder,
        *,
        identity: str,
        on_progress: OnProgress,
        flops_per_image: float | None = None,
        on_average: OnAverage | None = None,
        measure: Measure | None = None,
        heads: nn.Module | None = None,
    ) -> None:
        self.draw, self.loss, self.config = draw, loss, config
        self.folder, self.identity = folder, identity
        self.on_progress, self.on_average, self.measure = on_progress, on_average, measure
        self.device = resolve_device(config.device)
        self.dtype = resolve_precision(config.precision, self.device)
        peak = peak_flops(self.device)
        self.peak_rate = peak / flops_per_image if peak and flops_per_image else None
        self.trackers = Trackers(config, folder, identity)
        heads = nn.Module() if heads is None else heads
        ema_device = torch.device("cpu") if config.ema_device == "cpu" else None
        ema = ExponentialMovingAverage(model, config.ema_decay, ema_device)
        self.state = TrainingState(model, ema, optimizers([model, heads], config), heads)
        self.spending = Spending(folder, config)
        self.metrics: list[dict[str, Any]] = []
        self.timings: list[dict[str, Any]] = []
        self._resumes, self._rows_written_at = 0, time.monotonic()

    def run(self) -> dict[str, Tensor]:
        """Train to the last step and return the averaged weights.

        At a SIGTERM, or a cap of what may be spent, the step is finished and a checkpoint written;
        then the signal, or the error, takes effect, and what would be measured or passed on at this
        step is not.

        Raises:
            SpendingCapError: if `config.max_hours` or `config.max_dollars` is reached before the
                last step, now or by earlier processes.
            TrainingError: if the loss, a gradient or a weight stops being a finite number; the
                checkpoint before stays. Or if a SIGTERM came that did not end the process.
            ArtifactError: if the checkpoint or its metrics are damaged or of another identity.
        """
        with self.trackers:  # opened by `_resume`, which may fail after
            self._train(self._resume())
        return self.state.ema.state

    def _train(self, first_step: int) -> None:
        """Do the steps that are left, or end where `run` says."""
        config = self.config
        clock = ProgressClock(
            config.steps,
            config.batch_size,
            self.on_progress,
            first_step=first_step,
            log_every=config.log_every,
            peak_samples_per_second=self.peak_rate,
        )
        steps = range(first_step, config.steps)
        drawn = closing(draw_ahead(self._draw, steps, config.prefetch))
        with PreemptionNotice() as notice, drawn as batches:
            if steps and (reached := self.spending.cap_reached()):
                raise reached
            for step, batch in zip(steps, batches, strict=True):
                loss = self._step(step, batch)
                progress = clock.tick(step + 1, loss)
                if progress is not None:
                    self._record(progress)
                ending = self._ending(step + 1, notice)
                if ending is not None:
                    self._leave(step + 1, loss, ending)
                if progress is not None:
                    self._validate()
                self._keep(step + 1, loss)

    def _draw(self, step: int) -> Batch:
        batch = self.draw(step)
        return batch.pin() if self.device.type == "cuda" else batch

    def _step(self, step: int, batch: Batch) -> Tensor:
        """Do one optimiser step; return the loss, the mean over the parts of the batch."""
        for optimizer in self.state.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, self.config) * group.get(MULTIPLE, 1.0)
            optimizer.zero_grad(set_to_none=True)
        num_parts = self.config.accumulation_steps
        losses = [
            self._backward(part, num_parts) for part in batch.to(self.device).split(num_parts)
        ]
        if self.config.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.state.parameters(), self.config.max_grad_norm)
        for optimizer in self.state.optimizers:
            optimizer.step()
        self.state.ema.update(self.state.model, step)
        return torch.stack(losses).sum()

    def _backward(self, part: Batch, num_parts: int) -> Tensor:
        """Add a part's share to the gradients; return its share of the loss."""
        with autocast(self.device, self.dtype):
            loss = self.loss(part) / num_parts
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _record(self, progress: Progress) -> None:
        rate = learning_rate(progress.step - 1, self.config)
        seen = {"samples_seen": progress.samples_seen}
        self.metrics.append(seen | {"loss": progress.loss, "learning_rate": rate})
        measured = {
            "samples_per_second": progress.samples_per_second,
            "mfu": progress.mfu,
            "memory_bytes": peak_memory_bytes(self.device),
            "resumes": self._resumes,
        }
        self.timings.append(seen | {"unix_time": time.time()} | measured)
        if time.monotonic() - self._rows_written_at > ROWS_EVERY_S:
            self._write_rows()

    def _validate(self) -> bool:
        """Add the measures to the last row, if since the one before it became time to; return so.

        The average has to be that of the row's step. A row that has them already is left alone.
        """
        if self.measure is None or not self._validation_is_due():
            return False
        self.metrics[-1] |= self.measure(self.state.ema.state)
        return True

    def _validation_is_due(self) -> bool:
        """Return whether the last row is to get measures, and has none yet."""
        if self.measure is None or not self.metrics or self.metrics[-1].keys() != LOGGED:
            return False
        every, rows = self.config.validate_every * self.config.batch_size, self.metrics[-2:]
        *before, seen = (row["samples_seen"] for row in rows)
        at_end = seen == self.config.steps * self.config.batch_size
        return at_end or seen // every != sum(before) // every

    def _keep(self, done: int, loss: Tensor) -> None:
        """Checkpoint and pass on the average, if it is time to.

        In this order: a drawing that ends the process would otherwise end the next at this step,
        too. What was not passed on then stays missing.
        """
        config, at_end = self.config, done == self.config.steps
        if at_end or done % config.checkpoint_every == 0:
            self._check_finite(done, loss)
            self._save(done)
        samples_due = config.sample_every is not None and done % config.sample_every == 0
        if self.on_average is not None and samples_due and not at_end:
            self.on_average(self.state.ema.state, done)

    def _ending(self, done: int, notice: PreemptionNotice) -> ParisError | None:
        """Return why training ends after a step that is not the last; None if it goes on."""
        self.spending.note()
        if notice.given:
            told = f"SIGTERM came: step {done} is in the checkpoint, run again to go on"
            return TrainingError(told)
        return self.spending.cap_reached() if done < self.config.steps else None

    def _leave(self, done: int, loss: Tensor, ending: ParisError) -> None:
        """Checkpoint at once: there may be seconds left. Who goes on validates what is due."""
        self._check_finite(done, loss)
        if self._validation_is_due():
            self.timings[-1][UNMEASURED] = True
        self._save(done)
        raise ending

    @torch.no_grad()
    def _check_finite(self, done: int, loss: Tensor) -> None:
        """Refuse a state that would replace the last good checkpoint and never recover.

        A finite loss does not tell: the gradients that came of it have changed the weights since.
        """
        parameters = self.state.parameters()
        gradients = [p.grad for p in parameters if p.grad is not None]
        _finite("loss", loss, done)
        _finite("norm of the gradients", nn.utils.get_total_norm(gradients), done)
        _finite("norm of the weights", nn.utils.get_total_norm(parameters), done)

    def _save(self, done: int) -> None:
        """Write metrics first: a checkpoint then never says more than they show."""
        self._write_rows()
        self.trackers.write(self._tracked())
        samples_seen = done * self.config.batch_size
        checkpoint.save(self.folder, self.state, identity=self.identity, samples_seen=samples_seen)
        self.spending.note(at_once=True)

    def _write_rows(self) -> None:
        self.folder.write(METRICS, _json_lines(self.metrics))
        self.folder.write(TIMINGS, _json_lines(self.timings))
        self._rows_written_at = time.monotonic()

    def _tracked(self) -> list[dict[str, Any]]:
        """Return what trackers are shown, which keep it: every row once, when it is whole."""
        rows = [m | t for m, t in zip(self.metrics, self.timings, strict=True)]
        return rows[:-1] if rows and rows[-1].get(UNMEASURED) else rows

    def _resume(self) -> int:
        samples_seen = checkpoint.restore(self.folder, self.state, identity=self.identity)
        if samples_seen is not None:
            self.metrics = _read_rows(self.folder, METRICS, samples_seen)
            self.timings = _read_rows(self.folder, TIMINGS, samples_seen)
            self._resumes = 1 + max((row.get("resumes", 0) for row in self.timings), default=0)
        self.trackers.open(self._tracked())
        if samples_seen is None:
            return 0
        if self.timings:
            self.timings[-1].pop(UNMEASURED, None)
        step = samples_seen // self.config.batch_size
        if self.metrics and self.metrics[-1]["samples_seen"] == samples_seen and self._validate():
            self._save(step)
        return step


def _finite(what: str, value: Tensor, done: int) -> float:
    """Return a number; raises TrainingError if it is not finite."""
    number = value.item()
    if not math.isfinite(number):
        raise TrainingError(
            f"the {what} is {number} at step {done}: lower the learning_rate or max_grad_norm"
        )
    return number


def _read_rows(folder: Folder, name: str, samples_seen: int) -> list[dict[str, Any]]:
    """Return the rows up to a checkpoint; a killed run may have written more of them than that."""
    lines = folder.read(name).splitlines()
    rows = (parse_json(line, f"{folder.uri}/{name}") for line in lines)
    return [row for row in rows if row["samples_seen"] <= samples_seen]


def _json_lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows).encode()
