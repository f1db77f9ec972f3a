"""Metrics as a run of Weights & Biases, in its own files on the node where it is offline.

Offline (`WANDB_MODE=offline`) each process of a training leaves a folder `wandb/` for `wandb sync`,
in the model's own folder or, where that is in a store, in the process's working folder; all go into
one run.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from paris_ray.errors import ConfigError
from paris_ray.folders import Folder
from paris_ray.training.tensorboard import AXIS, CLOCK


class WandbRun:
    """A tracker.

    Args:
        project: Of Weights & Biases.
        folder: Of the model; its last names are the run's.
        run_id: Tells trainings apart; a resumed one goes on with its run.

    Raises:
        ConfigError: with what to install, unless the package `wandb` is there.
    """

    def __init__(self, project: str, folder: Folder, run_id: str) -> None:
        try:
            import wandb  # noqa: F401
        except ModuleNotFoundError:
            raise ConfigError(
                f"wandb={project!r} needs the package wandb: pip install 'paris_ray[wandb]'"
            ) from None
        self._project, self._folder, self._run_id = project, folder, run_id
        self._run: Any = None
        self._shown = 0

    def open(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Begin, or go on after rows; raises ConfigError if that is refused."""
        import wandb

        group, _, name = self._folder.uri.rstrip("/").rpartition("/")
        try:
            self._run = wandb.init(
                project=self._project,
                id=self._run_id,
                name=name,
                group=group.rpartition("/")[2],
                dir=self._folder.uri if self._folder.is_local else None,
                resume="allow",
                # Numbers alone: no terminal, no code, nothing of the machine.
                settings=wandb.Settings(
                    console="off",
                    disable_git=True,
                    quiet=True,
                    save_code=False,
                    x_disable_stats=True,
                ),
            )
        except Exception as error:  # it has many kinds, which share no base
            raise ConfigError(
                f"wandb={self._project!r} cannot be logged to: {error} (WANDB_API_KEY, or "
                "WANDB_MODE=offline)"
            ) from error
        self._shown = len(rows)

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Show the rows that it has not been shown."""
        for row in rows[self._shown :]:
            values = {n: v for n, v in row.items() if n not in (AXIS, CLOCK) and v is not None}
            self._run.log(values | {"_timestamp": row[CLOCK]}, step=row[AXIS])
        self._shown = len(rows)

    def close(self) -> None:
        """End the run, or this process's part of it."""
        self._run.finish()
