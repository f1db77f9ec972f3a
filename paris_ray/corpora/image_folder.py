"""Pictures that a table beside them names, as the Hugging Face `imagefolder` layout has it.

For example a `metadata.jsonl` of lines such as `{"file_name": "cats/1.png", "text": "a cat"}`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import chain, groupby, islice
from pathlib import PurePosixPath
from typing import Any

from paris_ray.config import CorpusConfig
from paris_ray.corpora.columns import CAPTION_COLUMNS, choose_column, first_caption, is_said
from paris_ray.corpora.labels import label_columns, text_columns
from paris_ray.corpora.metadata import METADATA, Entry, entries_version, read_entries
from paris_ray.corpora.paths import corpus_path, file_versions, inside, list_files, place_of
from paris_ray.corpora.places import Place, place
from paris_ray.corpora.rows import RawRow, Shard
from paris_ray.corpora.samples import LOAD_ERRORS, FileMember, problem_of
from paris_ray.errors import CorpusError

FILE_NAME = "file_name"
MAX_CAPTIONS = 64  # of a picture
_ROWS_LOOKED_AT = 64  # to know the columns of a table of JSON lines


class ImageFolder:
    """The pictures that metadata files list, in the folder itself or below; every row is one.

    Pictures are named relative to the metadata file, in `file_name` or a column that ends in
    `_file_name`; captions are in one of `CAPTION_COLUMNS`. A key is the path of the picture.

    Args:
        config: `path`, `split`, `image_column`, `caption_column`, `limit`, `rows_per_shard` and
            `attribution` are used.

    Raises:
        CorpusError: if the folder or its metadata does not exist, or lacks a column.
    """

    def __init__(self, config: CorpusConfig) -> None:
        self.attribution: str | None = config.attribution
        self._config = config
        self._label_columns = label_columns(config)
        self._folder = corpus_path(config)
        if not self._folder.is_dir():
            raise CorpusError(f"corpus.path={config.path!r} is a file; expected a folder")

    @cached_property
    def _tables(self) -> list[Place]:
        try:
            tables = list_files(self._config, METADATA)
        except CorpusError as error:
            raise CorpusError(
                f'{error}, of lines such as {{"file_name": "cats/1.png", "text": "a cat"}}; '
                "for captions in files of their own beside the pictures, corpus.kind=sidecars"
            ) from None
        for folder, group in groupby(tables, key=lambda table: table.parent):
            names = [table.name for table in group]
            if len(names) > 1:
                raise CorpusError(f"{folder} holds {' and '.join(names)}: expected one of them")
        return tables

    def shards(self) -> list[Shard]:
        """Return pieces of the metadata files, so that reading one does not parse the others."""
        shards: list[Shard] = []
        left: int | None = self._config.limit
        for table in self._tables:
            self._check_columns(table)
            start, first, groups = 0, 1, islice(self._groups(read_entries(table)), left)
            while piece := list(islice(groups, self._config.rows_per_shard)):
                last = piece[-1][-1]
                shards.append(Shard(len(shards), str(table), start, last.end, first))
                start, first = last.end, last.number + 1
                left = None if left is None else left - len(piece)
        if not shards:
            raise CorpusError(f"{', '.join(map(str, self._tables))} holds no rows")
        return shards

    def keys(self, shard: Shard) -> Iterator[str]:
        """Yield the paths of a shard's pictures; a row without one is `metadata.jsonl:LINE`."""
        return (row.key for row, _ in self._rows(shard))

    def read(self, shard: Shard) -> Iterator[RawRow]:
        """Yield the picture and caption of each row."""
        folder = place(shard.source).parent
        for row, file_name in self._rows(shard):
            if file_name is not None:
                row = self._with_image(row, FileMember(self._folder, folder, file_name))
            yield row

    def _with_image(self, row: RawRow, picture: FileMember) -> RawRow:
        try:
            return replace(row, image=picture.load(self._config.max_image_bytes))
        except LOAD_ERRORS as error:
            return replace(row, problem=problem_of(error), detail=str(error))

    def version(self, shard: Shard) -> str:
        """Return a digest of a shard's rows, and of the sizes and times of their pictures."""
        table = place(shard.source)
        names = (name for _, name in self._rows(shard) if name is not None)
        pictures = file_versions(self._place(table.parent, name) for name in names)
        return f"{entries_version(table, shard.start, shard.stop)} {pictures}"

    def _place(self, folder: Place, file_name: str) -> Place:
        try:
            return inside(self._folder, folder, file_name)
        except LOAD_ERRORS:
            return folder / file_name

    def _rows(self, shard: Shard) -> Iterator[tuple[RawRow, str | None]]:
        """Yield each row without its picture, and the picture's name."""
        table = place(shard.source)
        within = PurePosixPath(place_of(self._folder, table))
        for group in self._groups(read_entries(table, shard.start, shard.first)):
            entry = group[0]
            try:
                file_name = _file_name(entry, self._config.image_column)
            except ValueError as error:
                key = f"{within}:{entry.number}"
                yield RawRow(key, None, None, "bad_metadata", str(error)), None
            else:
                columns = text_columns(entry.fields, self._label_columns)
                key = (within.parent / file_name).as_posix()
                yield RawRow(key, None, self._captions(group), columns=columns), file_name
            if group[-1].end >= shard.stop:
                return

    def _groups(self, entries: Iterable[Entry]) -> Iterator[list[Entry]]:
        """Yield the entries of each row: a picture that is named repeatedly has several captions.

        Entries without a usable name, and more than `MAX_CAPTIONS`, are rows of their own.
        """
        group: list[Entry] = []
        name = None
        for entry in entries:
            previous, name = name, _name_or_none(entry, self._config.image_column)
            if group and (name is None or name != previous or len(group) == MAX_CAPTIONS):
                yield group
                group = []
            group.append(entry)
        if group:
            yield group

    def _captions(self, group: Sequence[Entry]) -> Any:
        """Return the caption of a row, or a list of its captions."""
        found = [first_caption(e.fields, self._config.caption_column) for e in group]
        if len(found) == 1:
            return found[0]
        lists = (each if isinstance(each, list) else [each] for each in found)
        return list(chain.from_iterable(lists))

    def _check_columns(self, table: Place) -> None:
        """Refuse a table that does not tell pictures or captions, by its first rows."""
        entries = list(islice(read_entries(table), _ROWS_LOOKED_AT))
        rows = [entry.fields for entry in entries if not entry.problem]
        if entries and not rows:
            raise CorpusError(f"{table} cannot be read: {entries[0].problem}")
        if not rows:
            return
        columns = {name: type(value).__name__ for row in rows for name, value in row.items()}
        config, found = self._config, (table, columns)
        choose_column("image_column", config.image_column, _file_columns(columns), columns, found)
        said = [{name for name, value in row.items() if is_said(value)} for row in rows]
        usable = max(said, key=lambda names: len(names.intersection(CAPTION_COLUMNS)))
        if config.caption_column is not None:
            usable = set().union(*said)
        choose_column("caption_column", config.caption_column, CAPTION_COLUMNS, usable, found)


def _file_columns(columns: Mapping[str, object]) -> list[str]:
    if FILE_NAME in columns:
        return [FILE_NAME]
    return [name for name in columns if name.endswith(f"_{FILE_NAME}")] or [FILE_NAME]


def _file_name(entry: Entry, column: str | None) -> str:
    """Return the picture's name.

    Raises:
        ValueError: if the row has none that is usable.
    """
    if entry.problem:
        raise ValueError(entry.problem)
    column = column or _file_columns(entry.fields)[0]
    file_name = entry.fields.get(column)
    if not isinstance(file_name, str) or not file_name:
        raise ValueError(f"{column} is {file_name!r}")
    file_name.encode()  # a lone surrogate cannot be stored in a table
    return file_name


def _name_or_none(entry: Entry, column: str | None) -> str | None:
    try:
        return _file_name(entry, column)
    except ValueError:
        return None
