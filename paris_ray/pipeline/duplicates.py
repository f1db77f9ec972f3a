"""Rows that repeat earlier ones are set aside, once everything is encoded.

What is compared of a row, a hash or its features, goes with its place from the tasks that read it
to those that compare: each has all rows of some values, and no others. Earlier is what comes before
in the corpus, but every row to train on before every one held out: so no held-out row stays that is
like one to train on, wherever the two are; of features, as far as the two are in one cell.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, ClassVar, Protocol

import numpy as np
import ray

from paris_ray.clustering import nearest
from paris_ray.config import Config, FiltersConfig
from paris_ray.duplicates import (
    FIT_ROWS_A_CELL,
    Features,
    Hashes,
    Mask,
    band_values,
    bands,
    comparable_caption,
    equal_to_earlier,
    fit_cells,
    hashes_of,
    near_earlier,
    num_cells,
    similar_to_earlier,
)
from paris_ray.embeddings import PICTURE_HASH, read_part, tensor_column
from paris_ray.folders import Folder
from paris_ray.pipeline.accounts import FILES_A_TASK, TASK_CPUS, files_by_shard, in_groups
from paris_ray.pipeline.moving import (
    PLACE,
    PartFile,
    Places,
    are_listed,
    by_shard,
    leaving_rows,
    list_rows,
    move,
    move_listed,
    part_files,
)
from paris_ray.run import Run
from paris_ray.seeding import derive_seed, numpy_generator

ROWS_A_TASK = 8_000_000  # 16 bytes each, and as much again to sort them
FEATURES_A_READ = 50_000  # rows: 100 MB of 512 numbers each
FEATURES_A_TASK = 250_000  # and half a GB


def drop_duplicates(
    config: Config, versions: Mapping[str, str], check: Callable[[], object] = lambda: None
) -> None:
    """Move rows that repeat earlier ones from `embeddings/` to `quarantine/`, by tasks.

    A row leaves if an earlier one is equal or near enough, whether or not that one leaves, too. A
    run that was interrupted meanwhile goes on with what it had found.

    Args:
        config: The run; all of its shards have been encoded.
        versions: Versions of the shards by name, in the order of the corpus.
        check: Called every second while files are written; what it raises ends the tasks.
    """
    run = Run(config)
    files = part_files(files_by_shard(run), list(versions))
    if not are_listed(config, versions):
        list_rows(config, files, _repeated_rows(config, files), versions, check)
    move_listed(config, files, check)


def drop_few_duplicates(config: Config, shards: Sequence[str]) -> None:
    """Move rows that repeat earlier ones, but for their features, in this process.

    For a corpus whose keys fit into memory.
    """
    run = Run(config)
    files = part_files(files_by_shard(run), shards)
    if not files:
        return
    repeated = []
    for reason, comparison in _comparisons(config.corpus.filters).items():
        count = comparison.least_parts
        parts = enumerate(comparison.split(rows_of(run, files, comparison), count))
        repeated += [(reason, _places(p, comparison.repeats(p, i, count))) for i, p in parts]
    for job in by_shard(files):
        leaving = leaving_rows(run, job, repeated)
        if leaving:
            move(run, job, leaving)


def _comparisons(filters: FiltersConfig) -> dict[str, "Texts | Pictures"]:
    """Return how rows are compared in all but their features, by reason, the first first."""
    found: dict[str, Texts | Pictures] = {"duplicate_key": KEYS}
    if filters.repeated_captions:
        found["repeated_captions"] = CAPTIONS
    if filters.picture_distance is not None:
        found["picture_distance"] = Pictures(filters.picture_distance)
    return found


class Comparison(Protocol):
    """How rows are compared in one respect."""

    def rows(self, folder: Folder, name: str) -> Places:
        """Return what is compared of the rows of one file `(N,)`: PLACE without the place yet."""
        ...

    def identity(self, rows: Places) -> Hashes:
        """Return `(N,)` numbers that are equal where rows are equal in all that is compared."""
        ...

    def split(self, rows: Places, num_parts: int) -> list[Places]:
        """Return rows in parts, each to be compared within itself; a row may be in several."""
        ...

    def repeats(self, rows: Places, part: int, num_parts: int) -> Mask:
        """Return which rows `(N,)` of a part repeat an earlier one of it."""
        ...


@dataclass(frozen=True, slots=True)
class Texts:
    """Texts of a column are the same if their hashes are, of what `comparable` makes of them."""

    column: str
    comparable: Callable[[str], str] = str
    least_parts: ClassVar[int] = 1

    def rows(self, folder: Folder, name: str) -> Places:
        """Hash the texts."""
        texts = read_part(folder, name, [self.column])[self.column].to_pylist()
        return _with_values(hashes_of(self.comparable(text).encode() for text in texts))

    def identity(self, rows: Places) -> Hashes:
        """Return the hashes."""
        return rows["value"]

    def split(self, rows: Places, num_parts: int) -> list[Places]:
        """Share rows out by hash."""
        return _shared_out(rows, rows["value"], num_parts)

    def repeats(self, rows: Places, part: int, num_parts: int) -> Mask:
        """Return all of a hash but the first."""
        return equal_to_earlier(rows["value"])


KEYS, CAPTIONS = Texts("key"), Texts("caption", comparable_caption)


@dataclass(frozen=True, slots=True)
class Pictures:
    """Pictures are the same if their perceptual hashes differ in few bits."""

    distance: int

    @property
    def least_parts(self) -> int:
        """One for each band."""
        return len(bands(self.distance))

    def rows(self, folder: Folder, name: str) -> Places:
        """Read the hashes."""
        return _with_values(read_part(folder, name, [PICTURE_HASH])[PICTURE_HASH].to_numpy())

    def identity(self, rows: Places) -> Hashes:
        """Return the hashes."""
        return rows["value"]

    def split(self, rows: Places, num_parts: int) -> list[Places]:
        """Share rows out by each band in turn, and by the bits that are in it."""
        found = bands(self.distance)
        values = (band_values(rows["value"], band) for band in found)
        return [p for each in values for p in _shared_out(rows, each, num_parts // len(found))]

    def repeats(self, rows: Places, part: int, num_parts: int) -> Mask:
        """Compare those with the same bits in the part's band."""
        found = bands(self.distance)
        return near_earlier(rows["value"], self.distance, found[part * len(found) // num_parts])


@dataclass(frozen=True, slots=True, eq=False)
class Cells:
    """Pictures are the same if they are in one cell and the cosine of their features is large."""

    centroids: Features
    max_similarity: float

    def rows(self, folder: Folder, name: str) -> Places:
        """Read the features, and find their cells."""
        features = _features(folder, name)
        field = ("features", np.float32, features.shape[1:])
        rows = np.empty(len(features), np.dtype([*PLACE.descr, field]))
        rows["features"], rows["value"] = features, nearest(features, self.centroids)
        return rows

    def identity(self, rows: Places) -> Hashes:
        """Return hashes of the features."""
        return hashes_of(features.tobytes() for features in rows["features"])

    def split(self, rows: Places, num_parts: int) -> list[Places]:
        """Share rows out by cell."""
        return _shared_out(rows, rows["value"], num_parts)

    def repeats(self, rows: Places, part: int, num_parts: int) -> Mask:
        """Compare those of each cell."""
        return similar_to_earlier(rows["features"], rows["value"], self.max_similarity)


def _features(folder: Folder, name: str) -> Features:
    features = tensor_column(read_part(folder, name, ["features"]), "features").astype(np.float32)
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    unit: Features = features / np.maximum(norms, 1e-12)
    return unit


def _with_values(values: Hashes) -> Places:
    rows = np.empty(len(values), PLACE)
    rows["value"] = values
    return rows


def _shared_out(rows: Places, values: Hashes, num_parts: int) -> list[Places]:
    part = values % np.uint64(num_parts)
    return [rows[part == i] for i in range(num_parts)]


def _repeated_rows(config: Config, files: Sequence[PartFile]) -> dict[str, list[Any]]:
    """Return references to the `Places` of rows that repeat others, by reason, the first first."""
    if not files:
        return {}
    filters, most_rows = config.corpus.filters, len(files) * config.corpus.rows_per_shard
    num_parts, groups = 1 + most_rows // ROWS_A_TASK, in_groups(files, FILES_A_TASK)
    found = {
        reason: _compare(config, groups, comparison, num_parts * comparison.least_parts)
        for reason, comparison in _comparisons(filters).items()
    }
    if filters.max_similarity is not None:
        groups = in_groups(files, ceil(FEATURES_A_READ / config.corpus.rows_per_shard))
        cells = _fit(config, groups, most_rows, filters.max_similarity)
        num_parts = 1 + most_rows // FEATURES_A_TASK
        found["max_similarity"] = _compare(config, groups, cells, num_parts, num_cpus=1)
    return found


def _compare(
    config: Config,
    groups: Sequence[Sequence[PartFile]],
    comparison: Any,
    num_parts: int,
    num_cpus: float = TASK_CPUS,
) -> list[Any]:
    """Return references to the places of rows that repeat others, as tasks find them.

    Args:
        config: The run.
        groups: Its files, by the task that reads them.
        comparison: A Comparison, or a reference to one.
        num_parts: How many tasks compare.
        num_cpus: Of each task.
    """
    read = _read.options(num_returns=1 + num_parts, num_cpus=num_cpus)
    of_groups = [read.remote(config, group, comparison, num_parts) for group in groups]
    equal, *of_parts = zip(*of_groups, strict=True)
    repeated = _repeated.options(num_cpus=num_cpus)
    found = (
        repeated.remote(comparison, part, num_parts, *rows) for part, rows in enumerate(of_parts)
    )
    return [*equal, *found]


@ray.remote
def _read(
    config: Config, files: Sequence[PartFile], comparison: Comparison, num_parts: int
) -> tuple[Places, ...]:
    """Return the places of rows that are equal to earlier ones of these files; others in parts.

    What an equal row is near to, the earlier one is near to as well. So however often a corpus has
    a picture, no part is larger for it.
    """
    rows = rows_of(Run(config), files, comparison)
    equal = equal_to_earlier(comparison.identity(rows))
    return _places(rows, equal), *comparison.split(rows[~equal], num_parts)


def rows_of(run: Run, files: Sequence[PartFile], comparison: Comparison) -> Places:
    """Return what is compared of the rows of some files, at least of one, and where they stand."""
    found = []
    for file in files:
        rows = comparison.rows(file.folder(run), file.name)
        rows["file"], rows["row"] = file.number, np.arange(len(rows))
        found.append(rows)
    return np.concatenate(found)


@ray.remote
def _repeated(comparison: Comparison, part: int, num_parts: int, *rows: Places) -> Places:
    """Return the places of rows of one part that repeat earlier ones of it."""
    together = np.concatenate(rows)
    return _places(together, comparison.repeats(together, part, num_parts))


def _places(rows: Places, chosen: Mask) -> Places:
    places = np.empty(chosen.sum(), PLACE)
    for name in PLACE.names or ():
        places[name] = rows[name][chosen]
    return places


def _fit(
    config: Config, groups: Sequence[Sequence[PartFile]], most_rows: int, max_similarity: float
) -> Any:
    """Return a reference to the cells that a sample of all files is cut into."""
    share = min(1.0, FIT_ROWS_A_CELL * num_cells(most_rows) / most_rows)
    sample = _sample.options(num_returns=2)
    samples, counts = zip(*(sample.remote(config, group, share) for group in groups), strict=True)
    count = num_cells(sum(ray.get(list(counts))))
    fit = _fit_cells.options(num_cpus=config.cluster.num_cpus)
    return fit.remote(config, count, max_similarity, *samples)


@ray.remote(num_cpus=TASK_CPUS)
def _sample(config: Config, files: Sequence[PartFile], share: float) -> tuple[Features, int]:
    """Return the features of some rows of each file, at least of one, and how many rows it has."""
    run, drawn, num_rows = Run(config), [], 0
    for file in files:
        features = _features(file.folder(run), file.name)
        generator = numpy_generator(config.seed, "semantic duplicates", file.number)
        count = ceil(share * len(features))
        rows = generator.choice(len(features), count, replace=False)
        drawn.append(features[np.sort(rows)])
        num_rows += len(features)
    return np.concatenate(drawn), num_rows


@ray.remote
def _fit_cells(config: Config, count: int, max_similarity: float, *samples: Features) -> Cells:
    seed, threads = derive_seed(config.seed, "semantic duplicates"), config.cluster.threads
    return Cells(fit_cells(np.concatenate(samples), count, seed, threads), max_similarity)
