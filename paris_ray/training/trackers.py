"""Who else is shown the metrics of a training: TensorBoard, Weights & Biases, MLflow.

Each has its file, which imports its package when it is asked for. All are shown rows when there is
a checkpoint, and none twice: a training that is killed then takes back nothing that it has shown.
"""

import logging
from typing import Any, Protocol, Self

from paris_ray.artifacts import sha256_hex
from paris_ray.config import TrainingConfig
from paris_ray.errors import ConfigError
from paris_ray.folders import Folder
from paris_ray.training.mlflow_run import MlflowRun
from paris_ray.training.tensorboard import EventFile
from paris_ray.training.tracked_rows import Rows
from paris_ray.training.wandb_run import WandbRun

logger = logging.getLogger("paris_ray")


class Tracker(Protocol):
    """What a training shows its metrics to."""

    def open(self, rows: Rows) -> None:
        """Begin, or go on; `rows` are those that an earlier process of this training had."""

    def write(self, rows: Rows) -> None:
        """Show all rows so far: of those that it has been shown nothing changes."""

    def close(self) -> None:
        """End."""


class Trackers:
    """Those that a configuration asks for; a context manager, which closes them.

    One that fails on the way is told of and left out: it must not cost a training.

    Args:
        config: Of the training.
        folder: Of the model.
        identity: Digest of what decides the result; with the folder it tells trainings apart.

    Raises:
        ConfigError: if a package is missing.
    """

    def __init__(self, config: TrainingConfig, folder: Folder, identity: str) -> None:
        run_id = sha256_hex(f"{folder.uri} {identity}".encode())[:16]
        self._trackers: list[Tracker] = []
        if config.tensorboard:
            self._trackers.append(EventFile(folder))
        if config.wandb is not None:
            self._trackers.append(WandbRun(config.wandb, folder, run_id))
        if config.mlflow is not None:
            self._trackers.append(MlflowRun(config.mlflow, folder, run_id))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._each("close")

    def open(self, rows: Rows) -> None:
        """Begin, or go on; `rows` are those that an earlier process had.

        Raises:
            ConfigError: if one of them cannot be reached.
        """
        asked, self._trackers = self._trackers, []
        for tracker in asked:
            try:
                tracker.open(rows)
            except ConfigError:
                self._each("close")  # those that have begun
                raise
            self._trackers.append(tracker)

    def write(self, rows: Rows) -> None:
        """Show all rows so far."""
        self._each("write", rows)

    def _each(self, verb: str, *arguments: Any) -> None:
        for tracker in tuple(self._trackers):
            try:
                getattr(tracker, verb)(*arguments)
            except Exception as error:  # of whatever kind its package raises
                if isinstance(tracker, EventFile):  # the folder, without which nothing can go on
                    raise
                self._trackers.remove(tracker)
                logger.warning(
                    "%s is shown nothing more of this training: %s", type(tracker).__name__, error
                )
