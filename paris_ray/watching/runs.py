"""One run folder: its models, clusters, router and cost, looked at again when somebody asks."""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

from paris_ray.artifacts import (
    IN_PROGRESS,
    MANIFEST,
    METRICS,
    PROGRESS,
    RAY_HEAD,
    RESOLVED_CONFIG,
    SAMPLES,
    SPENT,
    TIMINGS,
    VerifiedFolder,
)
from paris_ray.cluster_facts import FILE as CLUSTERS_FILE
from paris_ray.cluster_facts import ClusterFacts, read_clusters
from paris_ray.embeddings import opened_part, part_names
from paris_ray.errors import ArtifactError, BundleError, ConfigError
from paris_ray.folders import LOCKS, Folder, Stamp
from paris_ray.storage import is_uri
from paris_ray.watching.facts import flattened, forecast, router_facts, stage_told
from paris_ray.watching.grids import preview, read_grid
from paris_ray.watching.lines import GrowingRows, number
from paris_ray.watching.models import WatchedModel, read_settings
from paris_ray.watching.places import MAX_EXPERTS, Place, places

logger = logging.getLogger(__name__)

LOCAL_INTERVAL_S, STORE_INTERVAL_S = 1.0, 5.0  # between looks, however many pages ask
MAX_CAPTIONS, MAX_CAPTION_LENGTH = 16, 300
MAX_PREVIEWS = 64  # that are kept
MAX_STAGES = 100  # that are told, the last
LISTED = ("seed", "experts", "router", "distilled/student", "distilled/few_step")
# One of these is there as soon as a run, or an adapter's training, has begun: its Ray, or a lock.
BEGUN = (
    *("encoders", "embeddings", "clusters", "experts", "distilled"),
    *(TIMINGS, IN_PROGRESS, METRICS, PROGRESS, RAY_HEAD, LOCKS),
)
CLUSTERS = f"clusters/{CLUSTERS_FILE}"
ROUTER, SETTINGS = f"router/{MANIFEST}", f"clusters/{RESOLVED_CONFIG}"
SINGLE = (TIMINGS, CLUSTERS, SETTINGS)
ADAPTER_FILES = (
    METRICS,
    PROGRESS,
    SPENT,
    MANIFEST,
    RESOLVED_CONFIG,
    "samples.png",
    "samples_without_lora.png",
)


def check_run(field: str, location: str) -> None:
    """Raise ConfigError unless there is a run at a location.

    Args:
        field: What the location was given as.
        location: Path or URI.
    """
    allowed = "the folder of a run, or of an adapter's training, that has begun"
    folder = Folder(location)
    if not folder.exists():
        problem = "does not exist"
    elif folder.stamp("") is not None:
        problem = "is a file"
    elif not any(folder.exists(name) for name in BEGUN):
        problem = f"has none of {', '.join(BEGUN)}"
    else:
        return
    raise ConfigError(f"{field}={location!r} is not allowed: it {problem}; allowed: {allowed}")


class WatchedRun:
    """A run folder.

    Args:
        location: Path or URI of it.
        dollars_per_hour: What a device costs; None: what the run's `training` says or, if it says
            nothing, its `fleet`, if that is of one kind.
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
        self._lock, self._preview_lock = threading.RLock(), threading.Lock()

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
        try:
            self._stages.look(stamps.get(TIMINGS))
        except ArtifactError as error:
            problems.append(str(error))
        problems += self._look_at_models(stamps)
        self._stamps = stamps
        return problems

    def _readers(self) -> dict[str, Callable[[bool], None]]:
        """Return what reads each of the run's own files, or forgets it where it is gone."""

        def settings(present: bool) -> None:
            self._settings = read_settings(self.folder / "clusters") if present else {}

        def clusters(present: bool) -> None:
            self._clusters = _read_clusters(self.folder) if present else []
            self._captions.clear()  # there may be other shards now

        def router(present: bool) -> None:
            self._router = _facts(self.folder / "router") if present else {}

        return {SETTINGS: settings, CLUSTERS: clusters, ROUTER: router}

    def _experts(self) -> Sequence[int]:
        """Return the numbers of the experts that there will be: a federation's site trains some."""
        federation = self._settings.get("federation")
        told = federation.get("experts") if isinstance(federation, dict) else None
        own = told if isinstance(told, list) else []
        own = [k for k in own if isinstance(k, int) and 0 <= k < MAX_EXPERTS]
        return own or range(len(self._clusters))

    def _look_at_models(self, stamps: Mapping[str, Stamp]) -> Iterator[str]:
        """Let each model read what changed of it; yield what could not be read."""
        found = places(stamps, self._experts())
        known = self.models
        self.models = {
            place.name: known.get(place.name) or WatchedModel(self.folder, place) for place in found
        }
        own = _by_folder(stamps, {place.folder for place in found})
        for place, model in zip(found, self.models.values(), strict=True):
            finished = place.manifest in stamps
            try:
                model.look(own[place.folder], finished=finished, settings=self._settings)
            except ArtifactError as error:
                yield str(error)

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
            models = [model.overview() for model in self.models.values()]
            rows = self._stages.rows[-MAX_STAGES:]
            return {
                "name": self.folder.uri.rstrip("/").rpartition("/")[2],
                "place": self.folder.uri,
                "problem": self.problem,
                "stages": [stage for row in rows if (stage := stage_told(row)) is not None],
                "models": models,
                "clusters": _version(self._stamps.get(CLUSTERS)),
                "router": _version(self._stamps.get(ROUTER)),
                "dollars_per_hour": self._price(),
                "forecast": forecast(models),
            }

    def _price(self) -> float | None:
        """Return the price of a device by the hour; None where it is not known."""
        if self._dollars_per_hour is not None:
            return self._dollars_per_hour
        settings = self._newest_settings()
        training, fleet = settings.get("training"), settings.get("fleet")
        price = number(training.get("dollars_per_hour")) if isinstance(training, dict) else None
        if price is not None:
            return price
        gpus = fleet.get("gpus") if isinstance(fleet, dict) else None
        known = [gpu for gpu in gpus or () if isinstance(gpu, dict)]
        return number(known[0].get("dollars_per_hour")) if len(known) == 1 else None

    def _newest_settings(self) -> Mapping[str, Any]:
        """Return the configuration of the first model that has one, or else of the clusters."""
        own = (model.settings for model in self.models.values() if model.settings)
        return next(own, self._settings)

    def model(self, name: str) -> WatchedModel | None:
        """Return a model by the name that the overview has told; None: there is none."""
        with self._lock:
            self.look()
            return self.models.get(name)

    def curves(self, model: WatchedModel) -> dict[str, Any]:
        """Return a model's curves, as JSON."""
        with self._lock:
            drawn, batch_size = model.curves(), model.batch_size
        return {
            "batch_size": batch_size,
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
            return flattened(self._newest_settings())

    def captions(self, place: Place) -> list[str]:
        """Return what a model's grids draw, picture by picture; empty where it is not known.

        Raises:
            ArtifactError: if the rows cannot be read.
        """
        if place.shard is None:
            return []
        known = self._captions.get(place.shard)
        if known is None:
            known = _first_captions(self.folder / place.shard)
            if known:  # else not yet: it is asked again
                self._captions[place.shard] = known
        return known

    def grid(self, model: WatchedModel, told: str, *, small: bool) -> bytes | None:
        """Return a sample grid as PNG; None: there is none.

        Args:
            model: Whose.
            told: Which, as the overview told.
            small: Whether smaller pictures will do.

        Raises:
            ArtifactError: if it is damaged or too large.
        """
        with self._lock:
            name = model.grids.get(told)
            if name is None:
                return None
            key = (f"{model.folder.uri}/{name}", model.stamps[name])
        if not small:
            return read_grid(model.folder, name)
        with self._preview_lock:  # one at a time: some take hundreds of megabytes
            known = self._previews.get(key)
            if known is None:
                known = preview(read_grid(model.folder, name), key[0])
                while len(self._previews) >= MAX_PREVIEWS:
                    self._previews.pop(next(iter(self._previews)))
                self._previews[key] = known
            return known


def _by_folder(
    stamps: Mapping[str, Stamp], folders: Iterable[str]
) -> Mapping[str, Mapping[str, Stamp]]:
    """Return the files in each folder, by their names there; the empty folder has all."""
    inner: dict[str, dict[str, Stamp]] = {folder: {} for folder in folders}
    for name, stamp in stamps.items():
        parts = name.split("/")
        for depth in range(len(parts)):
            files = inner.get("/".join(parts[:depth]))
            if files is not None:
                files["/".join(parts[depth:])] = stamp
    return inner


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
