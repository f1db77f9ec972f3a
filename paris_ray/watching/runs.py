"""One run folder: its models, clusters, router and cost, looked at again when somebody asks."""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import chain, islice
from statistics import median
from typing import Any

from paris_ray.artifacts import (
    MANIFEST,
    METRICS,
    PROGRESS,
    RESOLVED_CONFIG,
    SAMPLES,
    TIMINGS,
    VerifiedFolder,
)
from paris_ray.cluster_facts import FILE as CLUSTERS_FILE
from paris_ray.cluster_facts import ClusterFacts, read_clusters
from paris_ray.embeddings import opened_part, part_names
from paris_ray.errors import ArtifactError, BundleError
from paris_ray.folders import Folder, Stamp
from paris_ray.storage import is_uri
from paris_ray.watching.grids import preview, read_grid
from paris_ray.watching.lines import GrowingRows, number
from paris_ray.watching.models import Place, WatchedModel, places, read_settings

logger = logging.getLogger(__name__)

LOCAL_INTERVAL_S, STORE_INTERVAL_S = 1.0, 5.0  # between looks, however many pages ask
MAX_CAPTIONS, MAX_CAPTION_LENGTH = 16, 300
MAX_PREVIEWS = 64  # that are kept
LISTED = ("seed", "experts", "router", "distilled/student", "distilled/few_step")
CLUSTERS = f"clusters/{CLUSTERS_FILE}"
ROUTER, SETTINGS = f"router/{MANIFEST}", f"clusters/{RESOLVED_CONFIG}"
SINGLE = (TIMINGS, CLUSTERS, SETTINGS)
ADAPTER_FILES = (
    METRICS,
    PROGRESS,
    MANIFEST,
    RESOLVED_CONFIG,
    "samples.png",
    "samples_without_lora.png",
)


class WatchedRun:
    """A run folder.

    Args:
        location: Path or URI of it.
        dollars_per_hour: What a device costs; None: what the run's `fleet` says, if that is one.
        clock: Seconds; a parameter for tests.
    """

    def __init__(
        self,
        location: str,
        *,
        dollars_per_hour: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder = Folder(location)
        self.models: dict[str, WatchedModel] = {}
        self.problem: str | None = None
        self._dollars_per_hour, self._clock = dollars_per_hour, clock
        self._interval_s = STORE_INTERVAL_S if is_uri(self.folder.uri) else LOCAL_INTERVAL_S
        self._looked_at: float | None = None
        self._stages = GrowingRows(self.folder, TIMINGS)
        self._stamps: dict[str, Stamp] = {}
        self._settings: Mapping[str, Any] = {}
        self._clusters: list[ClusterFacts] = []
        self._router: Mapping[str, Any] = {}
        self._captions: dict[str, list[str]] = {}
        self._previews: dict[tuple[str, Stamp], bytes] = {}
        self._lock = threading.RLock()

    def look(self) -> None:
        """Read what changed, unless somebody just did; what cannot be read becomes `problem`."""
        with self._lock:
            now = self._clock()
            if self._looked_at is not None and now - self._looked_at < self._interval_s:
                return
            try:
                problems = self._look()
            except ArtifactError as error:
                problems = [str(error)]
            if problems and problems[0] != self.problem:
                logger.warning("%s", problems[0])
            self.problem = problems[0] if problems else None
            self._looked_at = self._clock()

    def _look(self) -> list[str]:
        """Read what changed; return what could not be read, which the next look tries again."""
        stamps = dict(self._listing())
        problems = []
        for name, read in self._readers().items():
            if self._stamps.get(name) == stamps.get(name):
                continue
            try:
                read(name in stamps)
            except ArtifactError as error:
                problems.append(str(error))
                stamps.pop(name, None)
        self._stages.look(stamps.get(TIMINGS))
        self._look_at_models(stamps)
        self._stamps = stamps
        return problems

    def _readers(self) -> dict[str, Callable[[bool], None]]:
        """Return what reads each of the run's own files, or forgets it where it is gone."""

        def settings(present: bool) -> None:
            self._settings = read_settings(self.folder / "clusters") if present else {}

        def clusters(present: bool) -> None:
            self._clusters = _read_clusters(self.folder) if present else []

        def router(present: bool) -> None:
            self._router = _facts(self.folder / "router") if present else {}

        return {SETTINGS: settings, CLUSTERS: clusters, ROUTER: router}

    def _look_at_models(self, stamps: Mapping[str, Stamp]) -> None:
        found = places(stamps, len(self._clusters))
        known = self.models
        self.models = {
            place.name: known.get(place.name) or WatchedModel(self.folder, place) for place in found
        }
        for model in self.models.values():
            folder = f"{model.place.folder}/" if model.place.folder else ""
            own = {n.removeprefix(folder): s for n, s in stamps.items() if n.startswith(folder)}
            model.look(own, finished=model.place.manifest in stamps, settings=self._settings)

    def _listing(self) -> Iterator[tuple[str, Stamp]]:
        """Yield the stamps of all files that are looked at; large folders are not listed."""
        for part in LISTED:
            for name, stamp in (self.folder / part).stamps().items():
                yield f"{part}/{name}", stamp
        single: tuple[str, ...] = SINGLE
        if self.folder.exists(METRICS) or self.folder.exists(PROGRESS):  # of an adapter
            single += ADAPTER_FILES
            for name, stamp in (self.folder / SAMPLES).stamps().items():
                yield f"{SAMPLES}/{name}", stamp
        for name in single:
            written = self.folder.stamp(name)
            if written is not None:
                yield name, written

    def overview(self) -> dict[str, Any]:
        """Return how far everything is, as JSON."""
        with self._lock:
            self.look()
            price = self._price()
            models = [model.overview() for model in self.models.values()]
            return {
                "name": self.folder.uri.rstrip("/").rpartition("/")[2],
                "place": self.folder.uri,
                "problem": self.problem,
                "stages": [row for row in map(_stage, self._stages.rows) if row is not None],
                "models": models,
                "clusters": _version(self._stamps.get(CLUSTERS)),
                "router": _version(self._stamps.get(ROUTER)),
                "dollars_per_hour": price,
                "forecast": forecast(models),
            }

    def _price(self) -> float | None:
        """Return the price of a device by the hour; None where it is not known."""
        if self._dollars_per_hour is not None:
            return self._dollars_per_hour
        fleet = self._settings.get("fleet")
        gpus = fleet.get("gpus") if isinstance(fleet, dict) else None
        known = [gpu for gpu in gpus or () if isinstance(gpu, dict)]
        return number(known[0].get("dollars_per_hour")) if len(known) == 1 else None

    def model(self, name: str) -> WatchedModel | None:
        """Return a model by the name that the overview has told; None: there is none."""
        with self._lock:
            self.look()
            return self.models.get(name)

    def curves(self, model: WatchedModel) -> dict[str, Any]:
        """Return a model's curves, as JSON."""
        with self._lock:
            drawn = model.curves()
        return {
            "batch_size": model.batch_size,
            "series": {name: list(map(list, points)) for name, points in drawn.series.items()},
            "resumes": [list(place) for place in drawn.resumes],
        }

    def clusters(self) -> dict[str, Any]:
        """Return rows, words and pictures of each cluster, as JSON."""
        with self._lock:
            self.look()
            known = self._clusters
        told = [{"rows": c.rows, "words": c.words, "pictures": c.pictures} for c in known]
        return {"clusters": told}

    def router(self) -> dict[str, Any]:
        """Return what was measured of the router when it was finished, as JSON; nothing yet: {}."""
        with self._lock:
            self.look()
            return router_facts(self._router)

    def settings(self) -> Mapping[str, Any]:
        """Return the configuration of the run as flat `section.key: value`."""
        with self._lock:
            self.look()
            own = (model.settings for model in self.models.values() if model.settings)
            return flattened(next(own, self._settings))

    def captions(self, place: Place) -> list[str]:
        """Return what a model's grids draw, picture by picture; empty where it is not known.

        Raises:
            ArtifactError: if the rows cannot be read.
        """
        if place.shard is None:
            return []
        if place.shard not in self._captions:
            found = _first_captions(self.folder / place.shard)
            if not found:
                return []  # not yet: it is asked again
            self._captions[place.shard] = found
        return self._captions[place.shard]

    def grid(self, model: WatchedModel, told: str, *, small: bool) -> bytes | None:
        """Return a sample grid as PNG; None: there is none.

        Args:
            model: Whose.
            told: Which, as the overview told.
            small: Whether smaller pictures will do.

        Raises:
            ArtifactError: if it is damaged or too large.
        """
        name = model.grids.get(told)
        if name is None:
            return None
        if not small:
            return read_grid(model.folder, name)
        key = (f"{model.folder.uri}/{name}", model.stamps[name])
        known = self._previews.get(key)
        if known is None:
            known = preview(read_grid(model.folder, name), key[0])
            while len(self._previews) >= MAX_PREVIEWS:
                self._previews.pop(next(iter(self._previews)), None)
            self._previews[key] = known
        return known


def forecast(models: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what was computed and what is left, of what an overview tells of models.

    Experts that have not begun are taken to need as long as the others do, and as many to be
    trained at a time as are now.

    Returns:
        `computed_s`, and `left_s` of devices together and `eta_s` until all is trained; these two
        are None where nothing is known, and 0 where nothing is left.
    """
    computed = sum(model["compute_s"] for model in models)
    running = [m for m in models if m["state"] == "training"]
    waiting = [m for m in models if m["state"] == "waiting"]
    if not running and not waiting:
        return {"computed_s": computed, "left_s": 0.0, "eta_s": 0.0}
    known = [m["eta_s"] for m in running if m["eta_s"] is not None]
    lengths = [
        m["compute_s"] + (m["eta_s"] or 0)
        for m in models
        if m["expert"] is not None and (m["state"] == "finished" or m["eta_s"] is not None)
    ]
    if len(known) < len(running) or (waiting and not lengths):
        return {"computed_s": computed, "left_s": None, "eta_s": None}
    left = sum(known) + (len(waiting) * median(lengths) if waiting else 0.0)
    at_once = max(1, len(running))
    return {"computed_s": computed, "left_s": left, "eta_s": max([*known, left / at_once])}


def router_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return of a router's facts what is drawn: by noise level, and in bins of confidence."""
    held_out = facts.get("held_out")
    levels = held_out.get("levels") if isinstance(held_out, dict) else None
    right = facts.get("right_cluster")
    told: dict[str, Any] = {}
    if isinstance(right, dict):
        told["right_cluster"] = {t: number(share) for t, share in _by_level(right)}
    if isinstance(held_out, dict) and isinstance(levels, dict):
        told |= {key: number(held_out.get(key)) for key in ("rows", "temperature")}
        told["levels"] = {t: _level(row) for t, row in _by_level(levels) if isinstance(row, dict)}
    return told


def _by_level(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(t, value) for t, value in islice(values.items(), 32) if isinstance(t, str)]


def _level(row: Mapping[str, Any]) -> dict[str, Any]:
    names = ("accuracy", "prototype_accuracy", "ece", "ece_calibrated", "nll_calibrated")
    bins, told = row.get("reliability"), {name: number(row.get(name)) for name in names}
    if not isinstance(bins, dict):
        return told
    columns = ("counts", "confidence", "accuracy")
    lists = {c: bins[c][:64] for c in columns if isinstance(bins.get(c), list)}
    return told | {"reliability": {c: [number(v) for v in values] for c, values in lists.items()}}


def flattened(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as `section.key: value`, values as text."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"[:120]] = str(value)[:200]
    return flat


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[list[str | None]]:
    """Return `[key, value, value]` of every setting in which two runs differ; None: not there."""
    keys = sorted(one.keys() | other.keys())
    return [[key, one.get(key), other.get(key)] for key in keys if one.get(key) != other.get(key)]


def _stage(row: Mapping[str, Any]) -> dict[str, Any] | None:
    name, seconds = row.get("stage"), number(row.get("seconds"))
    if not isinstance(name, str) or seconds is None:
        return None
    return {"stage": name[:80], "seconds": seconds, "failed": row.get("failed") is True}


def _version(stamp: Stamp | None) -> str | None:
    return None if stamp is None else f"{stamp.size}-{stamp.modified_ns}"


def _read_clusters(run: Folder) -> list[ClusterFacts]:
    try:
        return read_clusters(VerifiedFolder(run / "clusters", None), None)
    except BundleError as error:
        raise ArtifactError(str(error)) from None


def _facts(folder: Folder) -> Mapping[str, Any]:
    document = folder.read_json(MANIFEST)
    facts = document.get("facts") if isinstance(document, dict) else None
    return facts if isinstance(facts, dict) else {}


def _first_captions(shard: Folder) -> list[str]:
    """Return the captions of the first rows of a folder of rows; empty: there are none yet."""
    captions: list[str] = []
    for name in part_names(shard):
        with opened_part(shard, name) as file:
            if "caption" not in file.schema_arrow.names:
                return []
            batches = file.iter_batches(MAX_CAPTIONS, columns=["caption"])
            rows = chain.from_iterable(batch.column("caption").to_pylist() for batch in batches)
            captions += [str(row)[:MAX_CAPTION_LENGTH] for row in islice(rows, MAX_CAPTIONS)]
        if len(captions) >= MAX_CAPTIONS:
            break
    return captions[:MAX_CAPTIONS]
