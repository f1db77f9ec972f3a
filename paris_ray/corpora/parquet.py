"""Parquet files with pictures and captions in columns, as Hugging Face data sets are published."""

import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from paris_ray.config import CorpusConfig
from paris_ray.corpora.labels import label_columns, text_columns
from paris_ray.corpora.paths import corpus_path, file_versions, list_files
from paris_ray.corpora.rows import RawRow, Shard
from paris_ray.errors import CorpusError

# What pyarrow raises for damaged files; damaged column names are not UTF-8.
READ_ERRORS = (pa.ArrowException, OSError, UnicodeDecodeError)
_ROWS_AT_ONCE = 16  # whole pictures: a batch should not outgrow memory


class Parquet:
    """The rows of one Parquet file, or of a folder of them in the order of their names.

    Columns: `image` (binary, or a struct with `bytes`), `caption` or `text`, and optionally `key`.
    A row without a key is called `FILE:ROW`. A shard is a slice of one file, and reading it touches
    only the row groups it overlaps.

    Args:
        config: `path`, `limit`, `rows_per_shard` and `attribution` are used.

    Raises:
        CorpusError: if the path does not exist.
    """

    def __init__(self, config: CorpusConfig) -> None:
        self.attribution: str | None = config.attribution
        self._config = config
        self._path = corpus_path(config)

    def shards(self) -> list[Shard]:
        """Return slices of files; that of a file that is not readable Parquet is empty.

        Raises:
            CorpusError: if no file has readable rows, or one lacks a column.
        """
        slices = list(self._slices())
        if all(start == stop for _, start, stop in slices):
            raise CorpusError(f"corpus.path={str(self._path)!r} holds no readable Parquet rows")
        return [Shard(index, *piece) for index, piece in enumerate(slices)]

    def keys(self, shard: Shard) -> list[str]:
        """Return the `key` column of a shard, or the positions of its rows."""
        name = Path(shard.source).name
        if shard.start == shard.stop:
            return [name]
        keys = [f"{name}:{row}" for row in range(shard.start, shard.stop)]
        # Where the file is damaged, reading the pictures fails too, and says so row by row.
        with suppress(*READ_ERRORS), pq.ParquetFile(shard.source) as file:
            if "key" in file.schema_arrow.names:
                values = (
                    v
                    for b in batches_of(file, shard.start, shard.stop, ["key"])
                    for v in b.column("key")
                )
                for row, value in enumerate(values):
                    keys[row] = _key(value) or keys[row]
        return keys

    def read(self, shard: Shard) -> Iterator[RawRow]:
        """Yield the rows of a slice; from where it cannot be read on, every row says so."""
        remaining = iter(self.keys(shard))
        problem = "the file was not readable when the corpus was listed"
        try:
            with pq.ParquetFile(shard.source) as file:
                names = file.schema_arrow.names
                caption_column = _caption_column(names)
                labels = [name for name in label_columns(self._config) if name in names]
                for batch in batches_of(
                    file, shard.start, shard.stop, ["image", caption_column, *labels]
                ):
                    columns = batch.select(labels).to_pylist()
                    pairs = zip(batch.column("image"), batch.column(caption_column), strict=True)
                    for (image, caption), found in zip(pairs, columns, strict=True):
                        row = _row(next(remaining), image, caption)
                        yield replace(row, columns=text_columns(found, labels))
        except READ_ERRORS as error:
            problem = f"{type(error).__name__}: {error}"
        for key in remaining:
            yield RawRow(key, None, None, "unreadable_shard", problem)

    def version(self, shard: Shard) -> str:
        """Return a digest of the file's size and time."""
        return file_versions([Path(shard.source)])

    def _slices(self) -> Iterator[tuple[str, int, int]]:
        size = self._config.rows_per_shard
        left = sys.maxsize if self._config.limit is None else self._config.limit
        for path in list_files(self._config, [".parquet"]):
            if left == 0:
                return
            num_rows = _count_rows(path)
            if num_rows is None:
                yield str(path), 0, 0
                left -= 1
                continue
            stop = min(num_rows, left)
            left -= stop
            yield from ((str(path), row, min(row + size, stop)) for row in range(0, stop, size))


def _count_rows(path: Path) -> int | None:
    """Return a file's number of rows, None if it is not readable Parquet.

    Raises:
        CorpusError: if it is readable but lacks a column.
    """
    try:
        with pq.ParquetFile(path) as file:
            _check_columns(path, file.schema_arrow)
            return int(file.metadata.num_rows)
    except READ_ERRORS:
        return None


def _check_columns(path: Path, schema: pa.Schema) -> None:
    if _caption_column(schema.names) in schema.names and _holds_images(schema):
        return
    found = ", ".join(f"{field.name} ({field.type})" for field in schema)
    raise CorpusError(
        f"{path} has the columns {found}; expected image (binary, or struct with bytes) "
        "and caption or text"
    )


def _caption_column(names: list[str]) -> str:
    return "caption" if "caption" in names else "text"


def _holds_images(schema: pa.Schema) -> bool:
    if "image" not in schema.names:
        return False
    kind = schema.field("image").type
    if pa.types.is_struct(kind):
        kind = next((field.type for field in kind if field.name == "bytes"), None)
    return kind in (pa.binary(), pa.large_binary())


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


def _key(value: pa.Scalar) -> str | None:
    try:
        return str(value.as_py()) if value.is_valid else None
    except UnicodeDecodeError:
        return None


def _row(key: str, image: pa.Scalar, caption: pa.Scalar) -> RawRow:
    if isinstance(image, pa.StructScalar) and image.is_valid:
        image = image["bytes"]
    encoded = image.as_py()
    if encoded is None:
        return RawRow(key, None, None, "missing_file", "the image column has no bytes")
    try:
        return RawRow(key, encoded, caption.as_py())
    except UnicodeDecodeError:
        return RawRow(key, encoded, None, "missing_caption", "the caption is not UTF-8")
