"""Labels of a row: values that the corpus names beside the picture and its caption.

A labelling is written as the names of columns (`object,background`: fields of `metadata.jsonl`, of
a WebDataset `.json`, or columns of a Parquet file), or as a regular expression that is searched in
the caption, whose groups are the labels: `an? (?P<object>.+) on an? (?P<background>.+)`.
"""

import re
from collections.abc import Mapping, Sequence

from paris_ray.config.corpus import COLUMN_NAMES, CorpusConfig


def column_names(labelling: str | None) -> tuple[str, ...]:
    """Return the columns that a labelling names; none if it is a pattern or null."""
    if labelling is None or not COLUMN_NAMES.fullmatch(labelling):
        return ()
    return tuple(labelling.split(","))


def label_columns(config: CorpusConfig) -> tuple[str, ...]:
    """Return all columns that a reader has to read beside picture and caption."""
    both = column_names(config.held_out_key) + column_names(config.attributes)
    return tuple(dict.fromkeys(both))


def label_names(labelling: str | None) -> tuple[str, ...]:
    """Return the names of the labels; a pattern's unnamed group is `group_1` and so on."""
    if labelling is None:
        return ()
    return column_names(labelling) or tuple(_group_names(re.compile(labelling)))


def _group_names(pattern: re.Pattern[str]) -> Sequence[str]:
    names = {number: name for name, number in pattern.groupindex.items()}
    return [names.get(i, f"group_{i}") for i in range(1, pattern.groups + 1)]


def labels_of(
    labelling: str, columns: Mapping[str, str], caption: str | None
) -> dict[str, str] | None:
    """Return the labels of a row by name, or None if it lacks one of them."""
    names = column_names(labelling)
    if names:
        found = {name: columns[name] for name in names if name in columns}
        return found if len(found) == len(names) else None
    match = re.search(labelling, caption or "")
    if match is None or None in match.groups():
        return None
    return dict(zip(label_names(labelling), match.groups(), strict=True))


def text_columns(entry: Mapping[str, object], wanted: Sequence[str]) -> dict[str, str]:
    """Return the wanted fields of a parsed document as text; lists and objects are no labels."""
    found = {name: entry[name] for name in wanted if isinstance(entry.get(name), str | int | float)}
    # A lone surrogate, which JSON can hold, fits into no table.
    return {name: str(value).encode(errors="replace").decode() for name, value in found.items()}
