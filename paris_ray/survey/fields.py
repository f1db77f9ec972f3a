"""Which column, member or file of a corpus became the picture, and which the caption.

It is found by comparison of what the reader returned with what lies there, so it is what was taken,
whatever rule a layout has for choosing it.
"""

import csv
import io
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from paris_ray.corpora import RawRow
from paris_ray.corpora.columns import is_said
from paris_ray.corpora.metadata import MAX_LINE_BYTES
from paris_ray.corpora.paths import names_in
from paris_ray.corpora.places import Place, open_parquet, place
from paris_ray.corpora.samples import LOAD_ERRORS
from paris_ray.corpora.tars import READ_ERRORS, Tar
from paris_ray.json_documents import load_json
from paris_ray.survey.listing import Listing

FIRST_ROWS = 16  # of which one has both
RECORDS = 256  # in which its origin is looked for
MAX_FIELD_BYTES = 1 << 26
# What damaged files, and files of another form than expected, raise.
_READ_ERRORS = (*READ_ERRORS, csv.Error, pa.ArrowException)

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Fields:
    """Names of columns, members or files.

    Attributes:
        picture: What holds the picture, or its name.
        caption: What holds the caption.
        others: What was not taken.
    """

    picture: str
    caption: str
    others: tuple[str, ...]


def taken_fields(listing: Listing) -> Fields | None:
    """Return what was taken of the first rows; None where that cannot be told."""
    shard = listing.shards[0]
    source = place(shard.source)
    if not source.exists():  # made by a package
        return None
    for row in islice(listing.corpus.read(shard), FIRST_ROWS):
        if row.image and row.caption and is_said(row.caption):
            try:
                return _fields_of(row, source)
            except _READ_ERRORS:
                return None
    return None


def _fields_of(row: RawRow, source: Place) -> Fields | None:
    for record in islice(_records(row, source), RECORDS):
        pictures = [name for name, value in record.items() if _is_picture(value, row)]
        captions = [name for name, value in record.items() if _is_caption(value, row)]
        if pictures and captions:
            others = [n for n in record if n not in (pictures[0], captions[0])]
            return Fields(pictures[0], captions[0], tuple(others))
    return None


def _is_picture(value: Any, row: RawRow) -> bool:
    if isinstance(value, Mapping):
        value = value.get("bytes")
    if isinstance(value, str):  # a table of names
        return bool(value) and row.key.endswith(value.removeprefix("./"))
    return bool(value == row.image)


def _is_caption(value: Any, row: RawRow) -> bool:
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    values = value if isinstance(value, list) else [value]
    caption = row.caption[0] if isinstance(row.caption, list) else row.caption
    wanted = " ".join((caption or "").split())
    return any(isinstance(v, str) and " ".join(v.split()) == wanted for v in values)


def _records(row: RawRow, source: Place) -> Iterator[Record]:
    """Yield what lies in the source of a shard, sample by sample."""
    if source.is_dir():
        return _files_beside(row, source)
    match source.suffix:
        case ".parquet":
            return _parquet(source)
        case ".csv":
            return _csv(source)
        case ".jsonl":
            return _json_lines(source)
    return _tar(source)


def _files_beside(row: RawRow, folder: Place) -> Iterator[Record]:
    stem = PurePosixPath(row.key).stem
    files = [folder / name for name in names_in(folder) if PurePosixPath(name).stem == stem]
    contents = {f.suffix: f.read_bytes() for f in files if f.stat().st_size <= MAX_FIELD_BYTES}
    yield _unfolded(contents)


def _parquet(path: Place) -> Iterator[Record]:
    with open_parquet(path) as file:
        for batch in file.iter_batches(1):
            yield from batch.to_pylist()


def _csv(path: Place) -> Iterator[Record]:
    with path.open("rb") as lines:
        yield from csv.DictReader(io.TextIOWrapper(lines, encoding="utf-8-sig", newline=""))


def _json_lines(path: Place) -> Iterator[Record]:
    with path.open("rb") as lines:
        while line := lines.readline(MAX_LINE_BYTES):
            entry = load_json(line)
            if isinstance(entry, dict):
                yield entry


def _tar(path: Place) -> Iterator[Record]:
    with path.open("rb") as stream:
        stem, contents = "", dict[str, bytes]()
        for member_name, member in Tar(path, stream).members(_is_small):
            folder, _, name = member_name.rpartition("/")
            begin, dot, extension = name.partition(".")
            if not dot:
                continue
            if (key := f"{folder}/{begin}") != stem and contents:
                yield _unfolded(contents)
                contents = {}
            stem = key
            with suppress(*LOAD_ERRORS):  # too large, or no file
                contents[f".{extension}"] = member.load(MAX_FIELD_BYTES)
        yield _unfolded(contents)


def _is_small(name: str, num_bytes: int) -> bool:
    return num_bytes <= MAX_FIELD_BYTES


def _unfolded(contents: Mapping[str, bytes]) -> Record:
    """Return files by extension, and the fields of JSON among them as files of their own."""
    record: dict[str, Any] = {}
    for extension, content in contents.items():
        document = load_json(content) if extension.lower() == ".json" else None
        if isinstance(document, dict):
            record |= {f"{name} in {extension}": value for name, value in document.items()}
        else:
            record[extension] = content
    return record
