"""WebDataset: tar files in which members that share a name up to the first dot are one sample."""

import json
import sys
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from paris_ray.config import CorpusConfig
from paris_ray.corpora.labels import label_columns, text_columns
from paris_ray.corpora.paths import corpus_path, file_versions, list_files
from paris_ray.corpora.rows import RawRow, Shard
from paris_ray.errors import CorpusError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")  # the first that exists is used
_BLOCK = 512  # a tar ends in blocks of zeros
# What tarfile raises for headers of arbitrary bytes.
_READ_ERRORS = (tarfile.TarError, OSError, ValueError, OverflowError)


@dataclass(frozen=True, slots=True)
class _Member:
    key: str
    extension: str
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class _Sample:
    """Members of one key, or, with `damage`, the place from which a tar cannot be read."""

    key: str
    members: dict[str, _Member] = field(default_factory=dict)  # by extension
    damage: str = ""


class WebDataset:
    """The samples of one tar file, or of a folder of them in the order of their names.

    A sample has a picture (`.jpg .jpeg .png .webp`) and a caption: UTF-8 in `.txt`, or `caption` or
    `text` in `.json`, where labels are too. A tar is a shard. What can be read before damage is
    kept; the damage is one more row, with the tar's name as its key. Nothing is extracted to disk.

    Args:
        config: `path`, `limit` and `attribution` are used.

    Raises:
        CorpusError: if the path does not exist.
    """

    def __init__(self, config: CorpusConfig) -> None:
        self.attribution: str | None = config.attribution
        self._limit = config.limit
        self._config = config
        self._label_columns = label_columns(config)
        self._path = corpus_path(config)

    def shards(self) -> list[Shard]:
        """Return one shard for each tar that is not empty.

        Without a limit `stop` is `sys.maxsize`: counting means reading every header of every tar.

        Raises:
            CorpusError: if there is no readable sample.
        """
        shards: list[Shard] = []
        left = self._limit
        readable = False
        for path in list_files(self._config, [".tar"]):
            samples = list(islice(_walk(path), 1 if left is None else left))
            readable |= any(not sample.damage for sample in samples)
            stop = sys.maxsize if left is None else len(samples)
            left = None if left is None else left - len(samples)
            if samples:
                shards.append(Shard(len(shards), str(path), 0, stop))
        if not readable:
            raise CorpusError(f"corpus.path={str(self._path)!r} holds no readable samples")
        return shards

    def keys(self, shard: Shard) -> list[str]:
        """Return the paths of a tar's samples up to the first dot, as `__key__` in WebDataset."""
        return [sample.key for sample in islice(_walk(Path(shard.source)), shard.stop)]

    def read(self, shard: Shard) -> Iterator[RawRow]:
        """Yield the samples of a tar in order."""
        path = Path(shard.source)
        for sample in islice(_walk(path), shard.stop):
            if sample.damage:
                yield RawRow(sample.key, None, None, "unreadable_shard", sample.damage)
                continue
            with path.open("rb") as stream:
                row = _read_sample(stream, sample, self._label_columns)
            yield row

    def version(self, shard: Shard) -> str:
        """Return a digest of the tar's size and time."""
        return file_versions([Path(shard.source)])


def _walk(path: Path) -> Iterator[_Sample]:
    """Yield the samples of a tar from its headers alone, then its damage if there is any."""
    sample: _Sample | None = None
    damage = ""
    try:
        for member in _members(path):
            # A repeated extension begins another sample: two pictures are two rows.
            if sample and (member.key != sample.key or member.extension in sample.members):
                yield sample
                sample = None
            sample = sample or _Sample(member.key)
            sample.members[member.extension] = member
    except _READ_ERRORS as error:
        damage = f"{type(error).__name__}: {error}"
    if sample:
        yield sample
    if damage:
        yield _Sample(path.name, damage=damage)


def _members(path: Path) -> Iterator[_Member]:
    """Yield the complete regular files of a tar whose names have an extension.

    Raises:
        tarfile.ReadError: where the tar is damaged. `tarfile` itself takes a damaged header for the
            end of the archive.
    """
    size = path.stat().st_size
    with tarfile.open(path, "r:", encoding="utf-8", errors="replace") as tar:
        while (header := tar.next()) is not None:
            if tar.offset <= header.offset:  # a negative size would make us read in circles
                raise tarfile.ReadError(f"the size of {header.name!r} is negative")
            folder, _, name = header.name.rpartition("/")
            stem, dot, extension = name.partition(".")
            # A sparse file is not contiguous and may claim any size.
            if not (stem and dot and header.isreg()) or header.issparse():
                continue
            if header.offset_data + header.size > size:
                raise tarfile.ReadError(f"the data of {header.name!r} is cut off")
            key = f"{folder}/{stem}" if folder else stem
            yield _Member(key, extension.lower(), header.offset_data, header.size)
        end = tar.offset
    with path.open("rb") as stream:
        stream.seek(end)
        if stream.read(_BLOCK) != bytes(_BLOCK):
            raise tarfile.ReadError(f"neither a header nor the end of the archive at byte {end}")


def _read_sample(stream: BinaryIO, sample: _Sample, label_columns: Sequence[str]) -> RawRow:
    extension = next((e for e in IMAGE_EXTENSIONS if e in sample.members), None)
    if extension is None:
        found = ", ".join(sorted(sample.members))
        return RawRow(sample.key, None, None, "missing_file", f"no picture among: {found}")
    image = _bytes(stream, sample.members[extension])
    try:
        row = RawRow(sample.key, image, _caption(stream, sample))
        if not label_columns or "json" not in sample.members:
            return row
        return replace(row, columns=text_columns(_document(stream, sample), label_columns))
    except UnicodeDecodeError:
        return RawRow(sample.key, image, None, "missing_caption", "the caption is not UTF-8")
    except (ValueError, RecursionError) as error:  # deep nesting exhausts the parser
        return RawRow(sample.key, image, None, "bad_metadata", f".json: {error}")


def _caption(stream: BinaryIO, sample: _Sample) -> str | None:
    if "txt" in sample.members:
        return _bytes(stream, sample.members["txt"]).decode()
    if "json" not in sample.members:
        return None
    entry = _document(stream, sample)
    return entry.get("caption", entry.get("text"))


def _document(stream: BinaryIO, sample: _Sample) -> dict[str, Any]:
    entry = json.loads(_bytes(stream, sample.members["json"]))
    if not isinstance(entry, dict):
        raise ValueError(f"a JSON object was expected, not {type(entry).__name__}")
    return entry


def _bytes(stream: BinaryIO, member: _Member) -> bytes:
    stream.seek(member.offset)
    return stream.read(member.num_bytes)
