"""Parquet files with pictures and captions in columns, as Hugging Face data sets are published."""

import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from paris_ray.config import CorpusConfig
from paris_ray.corpora.columns import CAPTION_COLUMNS, IMAGE_COLUMNS, choose_column
from paris_ray.corpora.img2dataset import SUCCESS, status_column
from paris_ray.corpora.labels import label_columns, text_columns
from paris_ray.corpora.paths import corpus_path, file_versions, list_files, place_of
from paris_ray.corpora.places import Place, open_parquet, place
from paris_ray.corpora.rows import RawRow, Shard, rows_per_slice
from paris_ray.errors import CorpusError

# What pyarrow raises for damaged files; damaged column names are not UTF-8, or there twice.
READ_ERRORS = (pa.ArrowException, OSError, UnicodeDecodeError, KeyError)
# And for a value that Python has no object for, such as the year 300,000.
VALUE_ERRORS = (pa.ArrowException, ValueError, OverflowError, ArithmeticError, KeyError)
_NUMBERED_CAPTION = re.compile(r"caption_?\d+")  # one of several captions of a row
_FOOTERS_AT_ONCE = 16  # a store that is far away answers each in its own time
_FEW_ROWS = 1 << 16  # of which a file needs no size of its own to be believed
_ROWS_AT_ONCE = 16  # whole pictures: a batch should not outgrow memory


class Parquet:
    """The rows of one Parquet file, or of a folder of them and those below it, by their names.

    Columns: a picture (binary, or a struct with `bytes`), a caption (text, or a list of them), and
    optionally `key`. A row is called `FILE/KEY`, without a key `FILE:ROW`. A shard is a slice of
    one file, and reading it touches only the row groups it overlaps. What img2dataset could not
    fetch (a column `status`) is no row.

    Args:
        config: `path`, `split`, `image_column`, `caption_column`, `limit`, `rows_per_shard` and
            `attribution` are used.

    Raises:
        CorpusError: if the path does not exist.
    """

    def __init__(self, config: CorpusConfig) -> None:
        self.attribution: str | None = config.attribution
        self._config = config
        self._path = corpus_path(config)

    def shards(self) -> list[Shard]:
        """Return slices of files, of `rows_per_shard` rows or, of a long file, a multiple of them.

        A file that is not readable Parquet counts with as many rows, which all are bad, as the
        file with the most rows has: what it held cannot be known.

        Raises:
            CorpusError: if no file has readable rows, or one lacks a column.
        """
        paths = list_files(self._config, [".parquet"])
        with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as pool:
            counts = dict(zip(paths, pool.map(self._count_rows, paths), strict=True))
        most = max(count or 0 for count in counts.values())
        if most == 0:
            raise CorpusError(f"corpus.path={str(self._path)!r} holds no readable Parquet rows")
        shards: list[Shard] = []
        left, rows_per_shard = self._config.limit or sys.maxsize, self._config.rows_per_shard
        for path, count in counts.items():
            stop = min(most if count is None else count, left)
            left -= stop
            size = rows_per_slice(stop, rows_per_shard)
            for row in range(0, stop, size):
                shards.append(Shard(len(shards), str(path), row, min(row + size, stop)))
        return shards

    def keys(self, shard: Shard) -> Iterator[str]:
        """Yield the keys of a shard, from the `key` column or the positions of its rows."""
        name, row = place_of(self._path, place(shard.source)), shard.start
        # Where the file is damaged, reading the pictures fails too, and says so row by row.
        with suppress(*READ_ERRORS), open_parquet(place(shard.source)) as file:
            status = status_column(file.schema_arrow.names)
            columns = [c for c in ("key", status) if c and c in file.schema_arrow.names]
            for found, values in _records(file, shard, columns):
                row = found + 1
                key = _text(values["key"]) if "key" in values else None
                if _is_fetched(values, status):
                    yield f"{name}:{found}" if key is None else f"{name}/{key}"
        for left in range(row, shard.stop):
            yield f"{name}:{left}"

    def read(self, shard: Shard) -> Iterator[RawRow]:
        """Yield the rows of a slice; from where it cannot be read on, every row says so."""
        remaining = self.keys(shard)
        problem = "the file was not readable when the corpus was listed"
        try:
            with open_parquet(place(shard.source)) as file:
                _num_rows(file, place(shard.source))
                names = file.schema_arrow.names
                image, captions = self._columns(place(shard.source), file.schema_arrow)
                labels = [name for name in label_columns(self._config) if name in names]
                status = status_column(names)
                wanted = filter(None, dict.fromkeys([image, *captions, *labels, status]))
                for _, values in _records(file, shard, list(wanted)):
                    if _is_fetched(values, status):
                        yield _row(next(remaining), values, image, captions, labels)
        except READ_ERRORS as error:
            problem = f"{type(error).__name__}: {error}"
        for key in remaining:
            yield RawRow(key, None, None, "unreadable_shard", problem)

    def version(self, shard: Shard) -> str:
        """Return a digest of the file's size and time."""
        return file_versions([place(shard.source)])

    def not_fetched(self) -> dict[str, int]:
        """Return how many rows img2dataset wrote of pictures that it could not fetch, by reason."""
        counts: Counter[str] = Counter()
        with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as pool:
            for found in pool.map(_count_statuses, list_files(self._config, [".parquet"])):
                counts.update(found)
        return {reason: count for reason, count in sorted(counts.items()) if reason != SUCCESS}

    def _count_rows(self, path: Place) -> int | None:
        """Return a file's number of rows, None if it is not readable Parquet.

        Raises:
            CorpusError: if it is readable but lacks a column.
        """
        try:
            with open_parquet(path) as file:
                self._columns(path, file.schema_arrow)
                return _num_rows(file, path)
        except READ_ERRORS:
            return None

    def _columns(self, path: Place, schema: pa.Schema) -> tuple[str, list[str]]:
        """Return the columns of pictures and of captions.

        Raises:
            CorpusError: if there is no telling which they are.
        """
        table = path, {field.name: field.type for field in schema}
        images = {field.name for field in schema if _holds_images(field.type)}
        texts = {field.name for field in schema if _holds_texts(field.type)}
        wanted = self._config.image_column
        image = choose_column("image_column", wanted, IMAGE_COLUMNS, images, table)
        numbered = [n for n in schema.names if n in texts and _NUMBERED_CAPTION.fullmatch(n)]
        wanted = self._config.caption_column
        if wanted is None and numbered and texts.isdisjoint(CAPTION_COLUMNS):
            return image, numbered
        return image, [choose_column("caption_column", wanted, CAPTION_COLUMNS, texts, table)]


def _num_rows(file: pq.ParquetFile, path: Place) -> int:
    """Return the number of rows of a file.

    Raises:
        pa.ArrowInvalid: if they cannot be as many as its footer says.
    """
    groups = range(file.metadata.num_row_groups)
    counts = [file.metadata.row_group(group).num_rows for group in groups]
    count = int(file.metadata.num_rows)
    if min(counts, default=0) < 0 or sum(counts) != count or _are_too_many(count, path):
        raise pa.ArrowInvalid(f"it cannot have the {count} rows that its footer tells")
    return count


def _are_too_many(count: int, path: Place) -> bool:
    """Tell whether rows would take less than a byte each, which a picture alone takes."""
    return count > _FEW_ROWS and count > path.stat().st_size


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        kind = next((field.type for field in kind if field.name == "bytes"), kind)
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return kind in (pa.binary(), pa.large_binary(), pa.binary_view())


def _holds_texts(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if any(is_list(kind) for is_list in (pa.types.is_list, pa.types.is_large_list)):
        return _holds_texts(kind.value_type)
    return kind in (pa.string(), pa.large_string(), pa.string_view())


def _records(
    file: pq.ParquetFile, shard: Shard, columns: list[str]
) -> Iterator[tuple[int, dict[str, pa.Scalar]]]:
    """Yield the number of each row of a slice and its values by column."""
    row = shard.start
    for batch in batches_of(file, shard.start, shard.stop, columns) if columns else ():
        for values in zip(*(batch.column(name) for name in columns), strict=True):
            yield row, dict(zip(columns, values, strict=True))
            row += 1


def batches_of(
    file: pq.ParquetFile, start: int, stop: int, columns: list[str]
) -> Iterator[pa.RecordBatch]:
    """Yield exactly the rows of a slice, from the row groups it overlaps."""
    groups: list[int] = []
    position = end = 0
    for group in range(file.metadata.num_row_groups):
        begin, end = end, end + file.metadata.row_group(group).num_rows
        if end <= start:
            position = end
        elif begin < stop:
            groups.append(group)
    for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=groups, columns=columns):
        first = max(start - position, 0)
        last = min(stop - position, batch.num_rows)
        if first < last:
            yield batch.slice(first, last - first)
        position += batch.num_rows
        if position >= stop:
            return


def _count_statuses(path: Place) -> Counter[str]:
    """Return how many links img2dataset has tried, by what became of them; none of other files."""
    counts: Counter[str] = Counter()
    with suppress(*READ_ERRORS), open_parquet(path) as file:
        status = status_column(file.schema_arrow.names)
        for batch in file.iter_batches(columns=[status]) if status else ():
            counts.update(map(str, batch.column(status).to_pylist()))
    return counts


def _is_fetched(values: Mapping[str, pa.Scalar], status: str | None) -> bool:
    return status is None or _text(values[status]) == SUCCESS


def _text(value: pa.Scalar) -> str | None:
    try:
        return str(value.as_py()) if value.is_valid else None
    except VALUE_ERRORS:
        return None


def _row(
    key: str,
    values: Mapping[str, pa.Scalar],
    image_column: str,
    caption_columns: Sequence[str],
    labels: Sequence[str],
) -> RawRow:
    image = values[image_column]
    if isinstance(image, pa.StructScalar) and image.is_valid:
        image = image["bytes"]
    encoded = image.as_py()
    if encoded is None:
        return RawRow(key, None, None, "missing_file", f"{image_column} has no bytes")
    try:
        captions: Any = [values[name].as_py() for name in caption_columns]
    except UnicodeDecodeError:
        return RawRow(key, encoded, None, "missing_caption", "the caption is not UTF-8")
    try:
        columns = text_columns({name: values[name].as_py() for name in labels}, labels)
    except VALUE_ERRORS as error:
        return RawRow(key, encoded, None, "bad_metadata", f"{type(error).__name__}: {error}")
    return RawRow(key, encoded, captions if captions[1:] else captions[0], columns=columns)
