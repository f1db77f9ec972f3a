"""One trained model of a run, as far as its files tell: how far, how fast, at what cost."""

from collections.abc import Mapping
from typing import Any

from paris_ray.artifacts import METRICS, PROGRESS, RESOLVED_CONFIG, SPENT, TIMINGS
from paris_ray.config import read_values
from paris_ray.errors import ArtifactError, ConfigError
from paris_ray.folders import Folder, Stamp
from paris_ray.watching.curves import AXIS, RATE, RESUMES, Curves, Point, compute_seconds, curves
from paris_ray.watching.grids import grid_files
from paris_ray.watching.lines import GrowingRows, number
from paris_ray.watching.places import Place


class WatchedModel:
    """What the files of one model tell; `look` reads what changed of them.

    Args:
        run: The folder of its run.
        place: Where it is in there.
    """

    def __init__(self, run: Folder, place: Place) -> None:
        self.place = place
        self.folder = run / place.folder if place.folder else run
        self.stamps: Mapping[str, Stamp] = {}
        self.grids: Mapping[str, str] = {}  # the files of its sample grids, by step
        self.settings: Mapping[str, Any] = {}
        self._metrics = GrowingRows(self.folder, METRICS)
        self._timings = GrowingRows(self.folder, TIMINGS)
        self._progress: Mapping[str, Any] = {}
        self._spent: Mapping[str, Any] = {}
        self._rows_s = 0.0  # that its device computed, by its rows
        self._read: dict[str, Stamp | None] = {}
        self._latest: dict[str, Any] = {}  # of everything that its rows tell
        self._finished = False

    def look(self, stamps: Mapping[str, Stamp], *, finished: bool, settings: Any) -> None:
        """Read what changed.

        Args:
            stamps: Of its files, by their names in its folder.
            finished: Whether its manifest is there.
            settings: Of its whole run, until it has its own.

        Raises:
            ArtifactError: if a file cannot be read.
        """
        self.stamps, self._finished = stamps, finished
        self.grids = grid_files(stamps)
        changed = self._metrics.look(stamps.get(METRICS))
        if self._timings.look(stamps.get(TIMINGS)) or changed:
            self._latest = {}
            for row in (*self._metrics.rows, *self._timings.rows):
                self._latest |= row
            self._rows_s = compute_seconds(self._timings.rows)
        self._progress = self._object(PROGRESS, self._progress)
        self._spent = self._object(SPENT, self._spent)
        own = stamps.get(RESOLVED_CONFIG)
        if own is None:
            self.settings = settings
        elif own != self._read.get(RESOLVED_CONFIG):
            self.settings = read_settings(self.folder)
            self._read[RESOLVED_CONFIG] = own

    def _object(self, name: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return what a small JSON file says; nothing where it is damaged or just gone.

        Args:
            name: Of the file; what could not be read of it is tried again by the next look.
            known: What it said the last time, if it did not change.
        """
        stamp = self.stamps.get(name)
        if stamp == self._read.get(name):
            return known
        try:
            value = {} if stamp is None else self.folder.read_json(name)
        except ArtifactError:
            self._read[name] = None
            return {}
        self._read[name] = stamp
        return value if isinstance(value, dict) else {}

    @property
    def compute_s(self) -> float:
        """Seconds that its device was held: of all its processes, or else those of its rows."""
        spent = number(self._spent.get("seconds"))
        return self._rows_s if spent is None else spent

    @property
    def state(self) -> str:
        """`finished`, `training` or `waiting`."""
        if self._finished:
            return "finished"
        return "training" if METRICS in self.stamps or PROGRESS in self.stamps else "waiting"

    @property
    def eta_s(self) -> float | None:
        """Seconds left, as it last told; 0 once it is finished."""
        return 0.0 if self._finished else number(self._progress.get("eta_s"))

    def training(self, key: str) -> Any:
        """Return what its training's configuration says; None: nothing."""
        section = self.settings.get(self.place.section)
        return section.get(key) if isinstance(section, dict) else None

    @property
    def batch_size(self) -> float | None:
        """Samples of a step; None: not known yet."""
        step, seen = (number(self._progress.get(key)) for key in ("step", AXIS))
        return number(seen / step) if step and seen else number(self.training("batch_size"))

    def overview(self) -> dict[str, Any]:
        """Return how far it is, as JSON."""
        last = self._last()
        batch_size, seen = self.batch_size, number(last.get(AXIS))
        steps = number(seen / batch_size) if seen and batch_size else None
        step = None if steps is None else round(steps)
        num_steps = step if self._finished else number(self._progress.get("num_steps"))
        names = ("loss", "held_out_loss", "held_out_loss_others", RATE, "mfu", "memory_bytes")
        written = [stamp.modified_ns for name, stamp in self.stamps.items() if name in _TOLD]
        return {
            "name": self.place.name,
            "title": self.place.title,
            "expert": self.place.expert,
            "state": self.state,
            "version": f"{self._metrics.version}-{self._timings.version}-{seen}",
            "step": step,
            "num_steps": num_steps,
            "samples_seen": seen,
            "batch_size": batch_size,
            "eta_s": self.eta_s,
            "written_at": max(written) / 1e9 if written else None,
            "compute_s": round(self.compute_s, 3),
            "resumes": number(last.get(RESUMES)) or 0,
            "grids": list(self.grids),
        } | {name: number(last.get(name)) for name in names}

    def _last(self) -> Mapping[str, Any]:
        """Return the latest value of everything that is told, by rows or since."""
        if (number(self._progress.get(AXIS)) or 0) < (number(self._latest.get(AXIS)) or 0):
            return self._latest
        told = {key: value for key, value in self._progress.items() if value is not None}
        return self._latest | told

    def curves(self) -> Curves:
        """Return its curves, up to the last progress that it told."""
        drawn = curves(self._metrics.rows, self._timings.rows)
        seen, loss = (number(self._progress.get(key)) for key in (AXIS, "loss"))
        known = drawn.series.get("loss", [])
        if seen is not None and loss is not None and (not known or seen > known[-1].samples):
            drawn.series["loss"] = [*known, Point(seen, None, loss)]
        return drawn


_TOLD = frozenset({METRICS, TIMINGS, PROGRESS})


def read_settings(folder: Folder) -> Mapping[str, Any]:
    """Return the resolved configuration in a folder as plain values; none if it is damaged.

    Raises:
        ArtifactError: if it cannot be read.
    """
    payload = folder.read(RESOLVED_CONFIG)
    try:
        return read_values(payload.decode())
    except (ConfigError, UnicodeDecodeError):
        return {}
