"""Which column, field or member holds the picture, and which the caption.

The usual names are tried in the order of these lists, unless `corpus.image_column` and
`corpus.caption_column` say it. Where two of them hold captions it is not for us to choose.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from paris_ray.errors import CorpusError

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes")
CAPTION_COLUMNS = ("caption", "captions", "text", "prompt", "description")


def choose_column(
    option: str,
    wanted: str | None,
    usual: Sequence[str],
    usable: Collection[str],
    table: tuple[object, Mapping[str, object]],
) -> str:
    """Return the one column of a table to read.

    Args:
        option: Name of the option that names it, for example `caption_column`.
        wanted: Value of the option.
        usual: Columns that need no option.
        usable: Columns of the table with values of the right kind.
        table: What is read, and what kind of values each of its columns has; for the message.

    Raises:
        CorpusError: if there is none, or there are several.
    """
    names = [name for name in ([wanted] if wanted else usual) if name in usable]
    if len(names) == 1:
        return names[0]
    source, columns = table
    found = ", ".join(f"{name} ({kind})" for name, kind in columns.items()) or "none"
    problem = f"both {' and '.join(names)}" if names else "none of " + ", ".join(usual)
    if wanted:
        problem = f"no usable {wanted}"
    raise CorpusError(
        f"{source} has {problem}: corpus.{option}={wanted!r} must name one of the columns {found}"
    )


def first_caption(entry: Mapping[str, Any], wanted: str | None) -> Any:
    """Return the caption among the fields of a document: the first that says something.

    Returns:
        What is there, of whatever type; None if there is nothing.
    """
    values = [entry.get(name) for name in ([wanted] if wanted else CAPTION_COLUMNS)]
    return next((v for v in values if is_said(v)), next((v for v in values if v is not None), None))


def is_said(value: object) -> bool:
    """Return whether a value is more than nothing or whitespace."""
    return bool(value.strip()) if isinstance(value, str) else value is not None
