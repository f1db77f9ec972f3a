"""Why a row is not used: the reasons, and the row that is set aside with one of them."""

from collections.abc import Mapping
from dataclasses import dataclass

from paris_ray.config import FILTERS

REASONS: Mapping[str, str] = {
    "missing_file": "there is no picture where the corpus says there is one",
    "unreadable_shard": "a file of the corpus cannot be read from here on",
    "bad_metadata": "the row's metadata is not JSON of the expected form",
    "empty_image": "the picture has no bytes",
    "too_many_bytes": "the picture's file is larger than corpus.max_image_bytes",
    "not_an_image": "the bytes begin like no format of pictures that is read",
    "unsupported_image": "a picture that this installation does not read; the detail says why",
    "truncated_image": "the picture begins well but cannot be decoded to its end",
    "too_many_pixels": "the header announces more than corpus.max_pixels",
    "missing_caption": "there is no caption, or it cannot be read as text",
    "caption_not_text": "the caption is a number, a list or something else that is not text",
    "empty_caption": "the caption shows nothing: white space or invisible characters",
    "duplicate_key": "an earlier row has the same key",
    **FILTERS,  # these could be used, but are not wanted
}


@dataclass(frozen=True, slots=True)
class QuarantinedRow:
    """A row that is set aside.

    Attributes:
        key: Identity of the row.
        reason: One of `REASONS`.
        detail: What was found.
    """

    key: str
    reason: str
    detail: str


class BadRow(Exception):
    """What is wrong with a row, on its way to `decode_row`.

    Args:
        reason: One of `REASONS`.
        detail: What was found.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail
