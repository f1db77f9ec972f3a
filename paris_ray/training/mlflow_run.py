"""Metrics as a run of MLflow, on a tracking server or wherever else its URI leads."""

from typing import Any

from paris_ray.errors import ConfigError
from paris_ray.folders import Folder
from paris_ray.training.tracked_rows import AXIS, CLOCK, Rows, numbers_of, require, rows_after

EXPERIMENT = "paris_ray"
TAG = "paris_ray.training"  # by which a resumed training finds its run
IN_ALL_ROWS = "loss"
BATCH = 900  # numbers at a time; MLflow takes at most 1000


class MlflowRun:
    """A tracker.

    Args:
        uri: Of the tracking server, as MLflow understands it.
        folder: Of the model; its last names are the run's.
        run_id: Tells trainings apart; a resumed one goes on with its run.

    Raises:
        ConfigError: with what to install, unless the package `mlflow` is there.
    """

    def __init__(self, uri: str, folder: Folder, run_id: str) -> None:
        require("mlflow", f"mlflow={uri!r}", "mlflow-skinny", "mlflow")
        self._uri, self._tag = uri, run_id
        self._name = "/".join(folder.uri.rstrip("/").split("/")[-3:])
        self._client: Any = None
        self._run = ""
        self._shown = -1  # the last place on the axis

    def open(self, rows: Rows) -> None:
        """Begin, or go on; raises ConfigError if that is refused."""
        from mlflow import MlflowClient

        try:
            self._client = MlflowClient(tracking_uri=self._uri)
            experiment = self._experiment()
            runs = self._client.search_runs([experiment], f"tags.`{TAG}` = '{self._tag}'")
            if runs:
                self._run = runs[0].info.run_id
                self._client.update_run(self._run, status="RUNNING")
                known = self._client.get_metric_history(self._run, IN_ALL_ROWS)
                self._shown = max((each.step for each in known), default=-1)
            else:
                run = self._client.create_run(
                    experiment, run_name=self._name, tags={TAG: self._tag}
                )
                self._run = run.info.run_id
        except Exception as error:  # its own, and those of what carries its requests
            raise ConfigError(f"mlflow={self._uri!r} cannot be logged to: {error}") from error

    def _experiment(self) -> str:
        """Return the id of the experiment, made by whichever training comes first."""
        from mlflow.exceptions import MlflowException

        known = self._client.get_experiment_by_name(EXPERIMENT)
        if known is None:
            try:
                return str(self._client.create_experiment(EXPERIMENT))
            except MlflowException:
                known = self._client.get_experiment_by_name(EXPERIMENT)
                if known is None:
                    raise
        return str(known.experiment_id)

    def write(self, rows: Rows) -> None:
        """Show the rows that it has not been shown."""
        from mlflow.entities import Metric

        metrics = [
            Metric(name, float(value), int(1000 * row[CLOCK]), int(row[AXIS]))
            for row in rows_after(self._shown, rows)
            for name, value in numbers_of(row).items()
        ]
        for first in range(0, len(metrics), BATCH):
            self._client.log_batch(self._run, metrics=metrics[first : first + BATCH])
        self._shown = max((metric.step for metric in metrics), default=self._shown)

    def close(self) -> None:
        """End the run, until it is taken up again."""
        self._client.set_terminated(self._run)
