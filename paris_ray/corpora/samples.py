"""A sample: a picture and what stands beside it under the same name, in a folder or in a tar."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from paris_ray.config import CorpusConfig
from paris_ray.corpora.columns import first_caption, is_said
from paris_ray.corpora.labels import label_columns, text_columns
from paris_ray.corpora.paths import inside
from paris_ray.corpora.places import Place
from paris_ray.corpora.rows import RawRow
from paris_ray.json_documents import load_json

# The first that exists is used, of captions the first that says something.
IMAGE_EXTENSIONS = (
    *("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic", "heif", "jxl"),
    *("jp2", "jfif", "ppm", "tga"),
)
CAPTION_EXTENSIONS = ("txt", "caption", "json")
MAX_CAPTION_BYTES = 1 << 20


# What loading a member raises; RuntimeError: links lead in a circle.
LOAD_ERRORS = (OSError, ValueError, RuntimeError)


class Member(Protocol):
    """A file of a sample."""

    def load(self, max_bytes: int) -> bytes:
        """Return its content.

        Raises:
            TooLargeError: if it is larger, before it is loaded.
            OSError: or another of `LOAD_ERRORS`, if it cannot be.
        """
        ...


class TooLargeError(ValueError):
    """A file is larger than pictures, or captions, are."""

    def __init__(self, num_bytes: int, max_bytes: int) -> None:
        super().__init__(f"it has {num_bytes} bytes, at most {max_bytes} are read")


@dataclass(frozen=True, slots=True)
class FileMember:
    """A `Member` that is a file of its own.

    Attributes:
        root: The corpus, which its name must not leave.
        folder: What its name is relative to.
        name: Its name.
    """

    root: Place
    folder: Place
    name: str

    def load(self, max_bytes: int) -> bytes:
        """Return its content."""
        path = inside(self.root, self.folder, self.name)
        with path.open("rb") as stream:  # its size would be another request to a store
            content = stream.read(max_bytes + 1)
        if len(content) > max_bytes:
            raise TooLargeError(path.stat().st_size, max_bytes)
        return content


def problem_of(error: Exception) -> str:
    """Return why a picture is bad whose loading raised one of `LOAD_ERRORS`."""
    return "too_many_bytes" if isinstance(error, TooLargeError) else "missing_file"


def wanted_extensions(config: CorpusConfig) -> frozenset[str]:
    """Return the extensions of all files that `read_sample` may load."""
    named = (config.image_column, config.caption_column)
    return frozenset((*IMAGE_EXTENSIONS, *CAPTION_EXTENSIONS, *filter(None, named)))


def image_extensions(config: CorpusConfig) -> Sequence[str]:
    """Return the extensions of pictures."""
    return (config.image_column,) if config.image_column else IMAGE_EXTENSIONS


def read_sample(key: str, members: Mapping[str, Member], config: CorpusConfig) -> RawRow:
    """Return the row of a sample.

    Args:
        key: Its key.
        members: Its files by extension, in lower case.
        config: `max_image_bytes`; `image_column` is the extension of pictures; `caption_column` is
            the extension of captions or a field of the `.json`, where labels are too.
    """
    extension = next((e for e in image_extensions(config) if e in members), None)
    if extension is None:
        found = ", ".join(sorted(members)[:10])
        return RawRow(key, None, None, "missing_file", f"no picture among: {found}")
    try:
        image = members[extension].load(config.max_image_bytes)
    except LOAD_ERRORS as error:
        return RawRow(key, None, None, problem_of(error), f".{extension}: {error}")
    try:
        caption, labels = _caption(members, config.caption_column), label_columns(config)
        fields = _fields(members["json"]) if labels and "json" in members else {}
    except UnicodeDecodeError:
        return RawRow(key, image, None, "missing_caption", "the caption is not UTF-8")
    except LOAD_ERRORS as error:
        return RawRow(key, image, None, "bad_metadata", str(error))
    if caption is None:
        detail = f"no caption in: {', '.join(sorted(members)[:10])}"
        return RawRow(key, image, None, "missing_caption", detail)
    return RawRow(key, image, caption, columns=text_columns(fields, labels))


def _caption(members: Mapping[str, Member], wanted: str | None) -> Any:
    """Return the first caption that says something, or else what there is."""
    field: str | None = None
    extensions: Sequence[str] = CAPTION_EXTENSIONS
    if wanted is not None:
        field, extensions = (None, (wanted,)) if wanted in members else (wanted, ("json",))
    caption = None
    for extension in filter(members.__contains__, extensions):
        member = members[extension]
        found = first_caption(_fields(member), field) if extension == "json" else _text(member)
        if is_said(found):
            return found
        caption = found if caption is None else caption
    return caption


def _fields(member: Member) -> dict[str, Any]:
    content = member.load(MAX_CAPTION_BYTES)
    try:
        fields = load_json(content.decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f".json: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f".json: a JSON object was expected, not {type(fields).__name__}")
    return fields


def _text(member: Member) -> str:
    return member.load(MAX_CAPTION_BYTES).decode("utf-8-sig")
