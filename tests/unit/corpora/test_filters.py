"""Filters that look at one row: what they take, with which detail, and what they leave alone."""

from dataclasses import replace
from typing import Any

import pytest

from paris_ray.config import FILTERS, CorpusConfig, FiltersConfig
from paris_ray.corpora import DecodedRow, QuarantinedRow, RawRow, decode_row, filters, open_corpus
from paris_ray.corpora.filters import filters_of_rows
from paris_ray.corpora.filters.language import foreign
from paris_ray.corpora.filters.scores import judge_scores, score_name
from paris_ray.errors import ConfigError, CorpusError
from tests.small_corpora import jpeg

WIDE, TALL = jpeg((96, 64)), jpeg((96, 64), orientation=6)
GERMAN, ENGLISH = "Eine Katze sitzt auf dem Sofa", "a cat sits on the sofa"


def decoded(
    caption: str | list[str] = ENGLISH, picture: bytes = WIDE, **limits: Any
) -> DecodedRow | QuarantinedRow:
    corpus = CorpusConfig(image_size=8, filters=FiltersConfig(**limits))
    return decode_row(RawRow("k", picture, caption), corpus)


@pytest.mark.parametrize("picture", [WIDE, TALL], ids=["lying", "upright"])
@pytest.mark.parametrize(
    ("name", "kept", "taken"), [("min_size", 64, 65), ("max_aspect_ratio", 1.5, 1.49)]
)
def test_sizes_are_judged_as_stored(picture: bytes, name: str, kept: float, taken: float) -> None:
    assert isinstance(decoded(picture=picture, **{name: kept}), DecodedRow)
    detail = f"96 x 64 pixels, corpus.filters.{name}={taken}"
    assert decoded(picture=picture, **{name: taken}) == QuarantinedRow("k", name, detail)


def test_a_picture_that_is_too_small_is_not_decoded() -> None:
    row = decoded(picture=WIDE[:-40], min_size=65)
    assert isinstance(row, QuarantinedRow) and row.reason == "min_size"


@pytest.mark.parametrize(
    ("name", "kept", "taken"), [("min_caption_length", 3, 4), ("max_caption_length", 3, 2)]
)
def test_lengths_are_those_of_clean_captions(name: str, kept: int, taken: int) -> None:
    assert isinstance(decoded("  a \n b ", **{name: kept}), DecodedRow)
    detail = f"3 characters: 'a b', corpus.filters.{name}={taken}"
    assert decoded("  a \n b ", **{name: taken}) == QuarantinedRow("k", name, detail)


def test_of_several_captions_those_that_are_not_wanted_are_dropped() -> None:
    row = decoded([GERMAN, ENGLISH, "cat"], languages=["en"], min_caption_length=5)
    assert isinstance(row, DecodedRow) and row.captions == (ENGLISH,)
    row = decoded([GERMAN, "cat"], languages=["en"], min_caption_length=5)
    assert isinstance(row, QuarantinedRow) and row.reason == "languages"  # as the first caption


@pytest.mark.parametrize(
    ("caption", "language"),
    [
        (GERMAN, "de"),
        ("un chien sur la plage", "fr"),
        ("hombre con perro", "es"),
        ("日本の山の写真", "ja"),
    ],
)
def test_captions_in_other_languages_are_taken(caption: str, language: str) -> None:
    detail = f"{language}: {caption!r}, corpus.filters.languages=['en']"
    assert decoded(caption, languages=["en"]) == QuarantinedRow("k", "languages", detail)
    assert isinstance(decoded(caption, languages=["en", language]), DecodedRow)


def test_short_english_captions_stay() -> None:
    # The first emoji of the quickstart: keycaps, and flags with names of places in all languages.
    corpus = open_corpus(CorpusConfig(limit=400))
    captions = [row.first_caption for shard in corpus.shards() for row in corpus.read(shard)]
    english = FiltersConfig(languages=["en"])
    taken = [caption for caption in captions if caption and foreign(caption, english)]
    assert len(taken) <= 0.06 * len(captions), taken


def test_a_language_that_is_not_known_is_refused_with_those_that_are() -> None:
    with pytest.raises(CorpusError, match=r"has 'xx', which is not allowed: af, .*, zu"):
        decoded(languages=["en", "xx"])


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ({"languages": ["en"]}, r"languages=\['en'\] needs py3langid: pip install 'paris_ray\[f"),
        ({"max_nsfw_score": 0.5}, r"max_nsfw_score=0.5 needs onnxruntime: pip install"),
    ],
)
def test_a_missing_package_is_told_before_anything_is_read(
    limit: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filters, "find_spec", lambda name: None)
    corpus = CorpusConfig(limit=1)
    open_corpus(corpus)
    with pytest.raises(ConfigError, match=message):
        open_corpus(replace(corpus, filters=FiltersConfig(**limit)))


def test_filters_are_on_when_they_have_a_limit_even_zero() -> None:
    assert FiltersConfig().on == ()
    some = FiltersConfig(picture_distance=0, min_size=3, max_nsfw_score=0.0, repeated_captions=True)
    assert some.on == ("min_size", "max_nsfw_score", "picture_distance", "repeated_captions")
    assert some.scores == ("max_nsfw_score",)
    assert filters_of_rows(some) == ("min_size",)
    assert set(some.on) <= FILTERS.keys()


LIMITS = FiltersConfig(min_clip_score=0.2, min_aesthetic_score=5.0, max_nsfw_score=0.5)
GOOD = {"clip_score": 0.2, "aesthetic_score": 5.0, "nsfw_score": 0.5}  # all on their limits


@pytest.mark.parametrize(
    ("name", "score"),
    [
        ("min_clip_score", 0.19),
        ("min_aesthetic_score", 4.5),
        ("max_nsfw_score", 0.51),
        ("max_nsfw_score", float("nan")),
    ],
)
def test_scores_out_of_their_limits_are_taken(name: str, score: float) -> None:
    assert judge_scores(GOOD, LIMITS) is None
    column = score_name(name)
    detail = f"{column} {score:.3f}, corpus.filters.{name}={getattr(LIMITS, name)}"
    assert judge_scores(GOOD | {column: score}, LIMITS) == (name, detail)
