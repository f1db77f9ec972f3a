"""A folder of pictures with a `metadata.jsonl`, as the Hugging Face `imagefolder` layout has it.

Each line names a picture and its caption: `{"file_name": "cats/1.png", "text": "a cat"}`.
"""

import hashlib
import json
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path, PurePath
from typing import Any

from paris_ray.config import CorpusConfig
from paris_ray.corpora.labels import label_columns, text_columns
from paris_ray.corpora.paths import corpus_path, file_versions
from paris_ray.corpora.rows import RawRow, Shard
from paris_ray.errors import CorpusError

METADATA = "metadata.jsonl"


class ImageFolder:
    """The pictures that `metadata.jsonl` lists; every line of it is a row.

    Args:
        config: `path`, `limit`, `rows_per_shard` and `attribution` are used.

    Raises:
        CorpusError: if the folder or its `metadata.jsonl` does not exist.
    """

    def __init__(self, config: CorpusConfig) -> None:
        self.attribution: str | None = config.attribution
        self._config = config
        self._label_columns = label_columns(config)
        self._folder = corpus_path(config)
        self._metadata = self._folder / METADATA
        if not self._metadata.is_file():
            raise CorpusError(
                f"corpus.path={config.path!r} has no {METADATA}; expected a folder with one, "
                'of lines such as {"file_name": "cats/1.png", "text": "a cat"}'
            )

    def shards(self) -> list[Shard]:
        """Return byte ranges of the metadata, so that reading one does not parse the others."""
        cuts, offset = [0], 0
        with self._metadata.open("rb") as lines:
            for number, line in enumerate(islice(lines, self._config.limit), 1):
                offset += len(line)
                if number % self._config.rows_per_shard == 0:
                    cuts.append(offset)
        if offset == 0:
            raise CorpusError(f"{self._metadata} holds no rows")
        if cuts[-1] < offset:
            cuts.append(offset)
        source = str(self._metadata)
        return [Shard(index, source, *cut) for index, cut in enumerate(pairwise(cuts))]

    def keys(self, shard: Shard) -> list[str]:
        """Return the file names of a shard; a line without one is `metadata.jsonl:LINE`."""
        return [row.key for row, _ in self._entries(shard)]

    def read(self, shard: Shard) -> Iterator[RawRow]:
        """Yield the picture and caption of each line."""
        for row, file_name in self._entries(shard):
            yield row if file_name is None else _with_image(row, self._folder, file_name)

    def version(self, shard: Shard) -> str:
        """Return a digest of the lines of a shard, and of the sizes and times of their pictures."""
        lines = hashlib.sha256(self._lines(shard)).hexdigest()
        names = (name for _, name in self._entries(shard) if name is not None)
        return f"{lines} {file_versions(self._folder / name for name in names)}"

    def _lines(self, shard: Shard) -> bytes:
        with self._metadata.open("rb") as stream:
            stream.seek(shard.start)
            return stream.read(shard.stop - shard.start)

    def _entries(self, shard: Shard) -> Iterator[tuple[RawRow, str | None]]:
        """Yield each line's row without its picture, and the picture's name."""
        lines = self._lines(shard).split(b"\n")
        if not lines[-1]:  # what follows the last line end is not a line
            lines.pop()
        first = shard.index * self._config.rows_per_shard + 1
        for number, line in enumerate(lines, first):
            try:
                entry = _parse(line)
            except (ValueError, RecursionError) as error:  # deep nesting exhausts the parser
                detail = f"{type(error).__name__}: {error}"
                yield RawRow(f"{METADATA}:{number}", None, None, "bad_metadata", detail), None
            else:
                file_name = entry["file_name"]
                columns = text_columns(entry, self._label_columns)
                yield RawRow(file_name, None, *_caption(entry), columns=columns), file_name


def _parse(line: bytes) -> Mapping[str, Any]:
    """Return a line's fields; `file_name` is a usable one.

    Raises:
        ValueError: if the line is not a JSON object with a usable file name.
    """
    entry = json.loads(line)
    if not isinstance(entry, dict):
        raise ValueError(f"a JSON object was expected, not {type(entry).__name__}")
    file_name = entry.get("file_name")
    if not isinstance(file_name, str) or not file_name:
        raise ValueError(f"file_name is {file_name!r}")
    file_name.encode()  # a lone surrogate cannot be stored in a table
    return entry


def _caption(entry: Mapping[str, Any]) -> tuple[Any, str | None, str]:
    """Return the caption of a line, or None and what is wrong: problem and detail."""
    for name in ("text", "caption"):
        if name in entry:
            return entry[name], None, ""
    return None, "missing_caption", f"no text or caption among {reprlib.repr(list(entry))}"


def _with_image(row: RawRow, folder: Path, file_name: str) -> RawRow:
    try:
        path = _inside(folder, file_name)
        return replace(row, image=path.read_bytes())
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a loop of symlinks
        return replace(row, problem="missing_file", detail=str(error))


def _inside(folder: Path, file_name: str) -> Path:
    """Return the path of an existing file; metadata may not name files outside its folder."""
    path = (folder / file_name).resolve()
    if PurePath(file_name).is_absolute() or not path.is_relative_to(folder):
        raise ValueError(f"file_name {file_name!r} leaves the folder")
    if not path.is_file():
        raise ValueError(f"{file_name!r} is not a file in {folder}")
    return path
