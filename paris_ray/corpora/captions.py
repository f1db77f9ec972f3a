"""What counts as a caption: text that shows something."""

import math
import unicodedata

from paris_ray.corpora.columns import is_said
from paris_ray.corpora.quarantine import BadRow

# Letters and symbols by their category, but drawn as nothing: fillers of Hangul, blank Braille.
_BLANK = frozenset("\u115f\u1160\u2800\u3164\uffa0")


def clean_captions(caption: object) -> tuple[str, ...]:
    """Return the caption of a row, or all of several that say something, each once.

    Raises:
        BadRow: as `clean_caption`.
    """
    if not isinstance(caption, list | tuple):
        return (clean_caption(caption),)
    said = [each for each in caption if is_said(each)] or [next(iter(caption), None)]
    return tuple(dict.fromkeys(map(clean_caption, said)))


def clean_caption(caption: object) -> str:
    """Return a caption with single spaces and without byte order marks.

    Raises:
        BadRow: if there is none, if it is not text, or if it shows nothing.
    """
    if caption is None or (isinstance(caption, float) and math.isnan(caption)):  # as pandas says it
        raise BadRow("missing_caption", f"the caption is {caption}")
    if not isinstance(caption, str):
        raise BadRow("caption_not_text", f"the caption is {_shown(caption)}")
    try:
        caption.encode()
    except UnicodeEncodeError as error:  # a lone surrogate, which no table can store
        raise BadRow("missing_caption", f"the caption is not Unicode: {error.reason}") from None
    cleaned = " ".join(caption.replace("\ufeff", "").split())
    if not any(map(_is_visible, cleaned)):
        raise BadRow("empty_caption", f"the caption is {caption[:20]!a}")
    return cleaned


def _is_visible(character: str) -> bool:
    """Tell whether a character alone leaves ink; marks and variation selectors do not."""
    category = unicodedata.category(character)
    return not category.startswith(("M", "Z", "Cc", "Cf")) and character not in _BLANK


def _shown(value: object) -> str:
    """Return a value's type and beginning; what a stranger wrote may be of any size."""
    return f"{type(value).__name__} ({ascii(value)[:40]}), not text"
