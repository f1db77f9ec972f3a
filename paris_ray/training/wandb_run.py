"""Metrics as a run of Weights & Biases, in its own files on the node where it is offline.

Offline (`WANDB_MODE=offline`) each process of a training leaves a folder `wandb/` for `wandb sync`,
in the model's own folder or, where that is in a store, in the process's working folder; all go into
one run.
"""

from typing import Any

from paris_ray.errors import ConfigError
from paris_ray.folders import Folder
from paris_ray.training.tracked_rows import AXIS, CLOCK, Rows, numbers_of, require, rows_after


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
        require("wandb", f"wandb={project!r}", "wandb", "wandb")
        self._project, self._folder, self._run_id = project, folder, run_id
        self._run: Any = None
        self._shown = -1  # the last place on the axis

    def open(self, rows: Rows) -> None:
        """Begin, or go on; raises ConfigError if that is refused."""
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
                # Else a run that an earlier task of this process has left open would get all.
                reinit="create_new",
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
        # Offline nobody knows what there is already; rows are not shown twice.
        last = rows[-1][AXIS] if rows else -1
        self._shown = last if self._run.offline else self._run.step - 1

    def write(self, rows: Rows) -> None:
        """Show the rows that it has not been shown."""
        for row in rows_after(self._shown, rows):
            self._run.log(numbers_of(row) | {"_timestamp": row[CLOCK]}, step=row[AXIS])
            self._shown = row[AXIS]

    def close(self) -> None:
        """End the run, or this process's part of it."""
        self._run.finish()
