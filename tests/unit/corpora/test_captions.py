"""Captions: what is text, what shows something, and what is left of it."""

import math
from typing import Any

import numpy as np
import pytest

from paris_ray.corpora.captions import clean_caption
from paris_ray.corpora.quarantine import REASONS, BadRow


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        (None, "missing_caption"),
        (math.nan, "missing_caption"),  # pandas' "none"
        ("\ud800", "missing_caption"),
        (7, "caption_not_text"),
        (2.5, "caption_not_text"),
        (True, "caption_not_text"),
        (b"a cat", "caption_not_text"),
        (["a"], "caption_not_text"),
        (np.zeros(2), "caption_not_text"),
        ({"en": "a"}, "caption_not_text"),
        ("", "empty_caption"),
        (" \n\t\u00a0\u3000", "empty_caption"),
        ("\u200b", "empty_caption"),  # zero-width space
        ("\ufeff", "empty_caption"),  # byte order mark
        ("\u00ad\u2060\u200e\u202e", "empty_caption"),  # soft hyphen, joiner, directions
        ("\x00\x07\x1b", "empty_caption"),
        ("\ufe0f\u0301", "empty_caption"),  # a variation and an accent of nothing
        ("\u3164 \u2800 \u115f", "empty_caption"),  # letters and Braille that are blank
    ],
)
def test_reason(caption: Any, reason: str) -> None:
    with pytest.raises(BadRow) as bad:
        clean_caption(caption)
    assert bad.value.reason == reason and reason in REASONS
    assert bad.value.detail.isascii() and bad.value.detail.startswith("the caption is ")


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("  a\n red\t\tsquare ", "a red square"),
        ("\ufeffa red cat", "a red cat"),  # a file of a Windows editor
        ("\ufeffone\n\ufefftwo", "one two"),
        ("7", "7"),
        ("?", "?"),
        ("\u2665", "\u2665"),
        ("\u732b", "\u732b"),
        ("\U0001f3f4\U000e0067\U000e0062\U000e007f", "\U0001f3f4\U000e0067\U000e0062\U000e007f"),
        ("\u0645\u06cc\u200c\u062e", "\u0645\u06cc\u200c\u062e"),  # a joiner within a word
    ],
)
def test_what_shows_something_is_kept(caption: str, expected: str) -> None:
    assert clean_caption(caption) == expected


def test_a_detail_is_short_whatever_the_value_is() -> None:
    with pytest.raises(BadRow) as bad:
        clean_caption(["word"] * 100_000)
    assert len(bad.value.detail) < 100 and "list" in bad.value.detail
