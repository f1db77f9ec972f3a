"""The table beside the pictures of an image folder: `metadata.jsonl`, `.csv` or `.parquet`.

A table is read from any row on without the rows before it: each row is told with the place where it
ends, a byte of a text file or a row of a Parquet file.
"""

import csv
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import pyarrow as pa

from paris_ray.artifacts import sha256_hex
from paris_ray.corpora.parquet import READ_ERRORS, VALUE_ERRORS, batches_of
from paris_ray.corpora.paths import file_versions
from paris_ray.corpora.places import Place, open_parquet
from paris_ray.errors import CorpusError
from paris_ray.json_documents import load_json

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
MAX_LINE_BYTES = 1 << 20  # of a longer line each such piece is a row, a bad one
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True, slots=True)
class Entry:
    """A row of the table.

    Attributes:
        number: Its line, or its last one, from 1; of Parquet its row, from 1.
        end: Where it ends in the file.
        fields: Its values by column; none if it is bad.
        problem: Why it is bad.
    """

    number: int
    end: int
    fields: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""


def read_entries(path: Place, start: int = 0, first: int = 1) -> Iterator[Entry]:
    """Yield the rows of a table from a place on; blank lines are none.

    Args:
        path: A file with one of the names `METADATA`.
        start: Where a row ends and the next one begins, or 0.
        first: Number of that next row.

    Raises:
        CorpusError: if the file is UTF-16, or not readable Parquet.
    """
    return _READERS[path.suffix](path, start, first)


def entries_version(path: Place, start: int, stop: int) -> str:
    """Return a digest of a piece of a table; of one with a header or pages, of the file's time."""
    if path.suffix != ".jsonl":
        return file_versions([path])
    with path.open("rb") as stream:
        stream.seek(start)
        return sha256_hex(stream.read(stop - start))


def _json_entries(path: Place, start: int, first: int) -> Iterator[Entry]:
    with path.open("rb") as stream:
        for line, number, end in _Lines(path, stream).lines_from(start, first):
            if not line.isspace():
                yield _json_entry(line, number, end)


def _json_entry(line: bytes, number: int, end: int) -> Entry:
    try:
        fields = load_json(line)
        if not isinstance(fields, dict):
            raise ValueError(f"a JSON object was expected, not {type(fields).__name__}")
        return Entry(number, end, fields)
    except ValueError as error:
        return Entry(number, end, problem=f"{type(error).__name__}: {error}")


class _Lines:
    """The lines of a text file, and how far it has been read."""

    def __init__(self, path: Place, stream: BinaryIO) -> None:
        self.stream, self.end, self.number = stream, 0, 0
        if stream.read(2) in _UTF_16:
            raise CorpusError(f"{path} is UTF-16: save it as UTF-8")
        stream.seek(0)

    def lines_from(self, start: int, first: int) -> Iterator[tuple[bytes, int, int]]:
        """Yield each line from a byte on, its number and where it ends."""
        self.stream.seek(start)
        self.end, self.number = start, first - 1
        while line := self.stream.readline(MAX_LINE_BYTES):
            self.end += len(line)
            self.number += 1
            yield line, self.number, self.end

    def texts_from(self, start: int, first: int) -> Iterator[str]:
        """Yield each line as text; bytes that are not UTF-8 become lone surrogates."""
        for line, _, _ in self.lines_from(start, first):
            yield line.decode("utf-8-sig", "surrogateescape")


def _csv_entries(path: Place, start: int, first: int) -> Iterator[Entry]:
    with path.open("rb") as stream:
        lines = _Lines(path, stream)
        header = _csv_record(csv.reader(lines.texts_from(0, 1)))
        if not isinstance(header, list):
            raise CorpusError(f"{path} has no first line with the names of its columns: {header}")
        start, first = max(start, lines.end), max(first, lines.number + 1)
        records = csv.reader(lines.texts_from(start, first))
        while (record := _csv_record(records)) is not None:
            if record:
                yield _csv_entry(header, record, lines.number, lines.end)


def _csv_record(records: Iterator[list[str]]) -> list[str] | str | None:
    """Return the next record, or why it is none, or None at the end; a blank line is empty."""
    try:
        return next(records, None)
    except csv.Error as error:
        return str(error)


def _csv_entry(header: list[str], record: list[str] | str, number: int, end: int) -> Entry:
    if isinstance(record, str):
        return Entry(number, end, problem=f"CSV: {record}")
    if len(record) != len(header):
        problem = f"{len(record)} values were found where the first line names {len(header)}"
        return Entry(number, end, problem=problem)
    return Entry(number, end, dict(zip(header, record, strict=True)))


def _parquet_entries(path: Place, start: int, first: int) -> Iterator[Entry]:
    try:
        with open_parquet(path) as file:
            names = [f.name for f in file.schema_arrow if not _is_binary(f.type)]
            for batch in batches_of(file, start, file.metadata.num_rows, names):
                yield from _batch_entries(batch, start)
                start += batch.num_rows
    except READ_ERRORS as error:
        raise CorpusError(f"{path} is not readable Parquet: {error}") from None


def _batch_entries(batch: pa.RecordBatch, before: int) -> Iterator[Entry]:
    """Yield the rows of a batch; one by one, which is slow, only if one of them is bad."""
    try:
        rows = batch.to_pylist()
    except VALUE_ERRORS as error:
        if batch.num_rows == 1:
            yield Entry(before + 1, before + 1, problem=f"{type(error).__name__}: {error}")
            return
        for row in range(batch.num_rows):
            yield from _batch_entries(batch.slice(row, 1), before + row)
        return
    for number, fields in enumerate(rows, before + 1):
        yield Entry(number, number, fields)


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


_READERS: Mapping[str, Callable[[Place, int, int], Iterator[Entry]]] = {
    ".jsonl": _json_entries,
    ".csv": _csv_entries,
    ".parquet": _parquet_entries,
}
