"""Live progress of training tasks, without any channel between them.

A task writes `progress.json` into its own folder; the driver reads it from there. That works on
any storage, needs no actor, and leaves experts nothing to share.
"""

import logging
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import ray
from ray.util import metrics

from paris_ray.artifacts import PROGRESS
from paris_ray.config import TrainingConfig
from paris_ray.errors import ArtifactError, SpendingCapError
from paris_ray.folders import Folder
from paris_ray.pipeline.placement import why_waiting
from paris_ray.pipeline.tasks import POLL_INTERVAL_S, ended
from paris_ray.training.loop import Progress

logger = logging.getLogger("paris_ray")

WRITE_INTERVAL_S = 2.0
PRINT_INTERVAL_S = 5.0
# Fields of `Progress`, as Ray's Prometheus endpoint has them after `ray_`.
GAUGE_PREFIX, GAUGE_LABELS = "paris_training_", ("model",)
GAUGES = {
    "loss": "Training loss of the latest logged step",
    "samples_seen": "Samples seen by this training run",
    "samples_per_second": "Training throughput",
    "eta_s": "Seconds left of this training run",
    "mfu": "Share of the device's peak FLOP/s that training takes; absent if not known",
}


class ProgressFile:
    """Receives a training loop's progress, for people: the task's log, a file, Ray metrics.

    Args:
        folder: The task's own folder.
        name: Value of the metrics' `model` tag; None keeps the metrics out.
    """

    def __init__(self, folder: Folder, name: str | None = None) -> None:
        self.folder, self._written_at = folder, 0.0
        self._gauges = {} if name is None else _gauges(name)

    def __call__(self, progress: Progress) -> None:
        """Tell how far training is."""
        print(_line(progress), flush=True)
        for field, gauge in self._gauges.items():
            value = getattr(progress, field)
            if value is not None:
                gauge.set(value)
        if time.monotonic() - self._written_at > WRITE_INTERVAL_S:
            self.folder.write_json(PROGRESS, asdict(progress))
            self._written_at = time.monotonic()


def _line(progress: Progress) -> str:
    mfu = "" if progress.mfu is None else f"MFU {progress.mfu:.2f} "
    return (
        f"{progress.step}/{progress.num_steps} loss {progress.loss:.3f} "
        f"{progress.samples_per_second:.0f} samples/s {mfu}ETA {progress.eta_s:.0f} s"
    )


def _gauges(name: str) -> dict[str, metrics.Gauge]:
    gauges = {}
    for field, description in GAUGES.items():
        gauge = metrics.Gauge(f"{GAUGE_PREFIX}{field}", description, tag_keys=GAUGE_LABELS)
        gauge.set_default_tags({"model": name})
        gauges[field] = gauge
    return gauges


class Task(NamedTuple):
    """A submitted task: its result, the folder that it writes to, and where it may run."""

    result: "ray.ObjectRef[Any]"
    folder: Folder
    training: TrainingConfig | None = None


def watch(
    tasks: Mapping[str, Task], check: Callable[[], object]
) -> Generator[tuple[str, Exception | None], None, None]:
    """Yield the tasks as they finish, with their errors, and print the others' progress meanwhile.

    A warning tells which tasks wait for a node that the cluster does not have. What has not
    finished when the iterator is closed, or an error passes, is ended: close it.

    Args:
        tasks: By name.
        check: Called every second; what it raises ends all tasks.
    """
    names = {task.result: name for name, task in tasks.items()}
    pending, printed_at = list(names), time.monotonic()
    warned: set[str] = set()
    with ended(list(names)):
        while pending:
            check()
            finished, pending = ray.wait(pending, timeout=POLL_INTERVAL_S)
            for result in finished:
                error = _error_of(result)
                logger.info("%s: %s", names[result], _end_of(error))
                yield names[result], error
            if pending and time.monotonic() - printed_at > PRINT_INTERVAL_S:
                printed_at = time.monotonic()
                running = {names[result]: tasks[names[result]] for result in pending}
                _print_progress(running, len(names))
                warned |= _warn_of_waiting({n: t for n, t in running.items() if n not in warned})


def follow(name: str, task: Task, check: Callable[[], object]) -> Any:
    """Print one task's progress and return its result, or raise what it or `check` raised."""
    for _, error in watch({name: task}, check):
        if error is not None:
            raise error
    return ray.get(task.result)


def _warn_of_waiting(tasks: Mapping[str, Task]) -> set[str]:
    """Warn of tasks that no node suits; return their names."""
    waiting = set()
    for name, task in tasks.items():
        reason = None if task.training is None else why_waiting(task.training)
        if reason is not None:
            logger.warning("%s: %s", name, reason)
            waiting.add(name)
    return waiting


def _end_of(error: Exception | None) -> str:
    if error is None:
        return "done"
    return f"{'stopped' if isinstance(error, SpendingCapError) else 'FAILED'}: {error}"


def _error_of(result: "ray.ObjectRef[Any]") -> Exception | None:
    try:
        ray.get(result)
    except ray.exceptions.RayError as error:
        # What the task raised says more to a user than Ray's wrapping of it.
        return error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
    return None


def _print_progress(running: Mapping[str, Task], total: int) -> None:
    """Print one line: how many are done, and each running task's step, loss, rate and rest."""
    parts = []
    for name, task in running.items():
        progress = _read_progress(task.folder)
        if progress is not None:
            parts.append(f"{name}: {_line(progress)}")
    if parts:
        logger.info("%d/%d done | %s", total - len(running), total, " | ".join(parts))


def _read_progress(folder: Folder) -> Progress | None:
    """Return a task's latest progress; None while it has written none, or is just done."""
    if not folder.exists(PROGRESS):
        return None
    try:
        return Progress(**folder.read_json(PROGRESS))
    except ArtifactError:
        return None
