"""What the types of `corpus.filters` cannot express."""

import math
import re
from collections.abc import Iterator

from paris_ray.config.filters import FiltersConfig

_LANGUAGE = re.compile("[a-z]{2}")
_MAX_BITS = 16  # of the 64 of a perceptual hash: pictures that differ in more are not the same
# The least and the greatest value of each filter that is a number, and how that is said.
_RANGES = {
    "min_size": (1, math.inf, "at least 1 pixel"),
    "max_aspect_ratio": (1, math.inf, "at least 1, the longer side over the shorter"),
    "min_caption_length": (1, math.inf, "at least 1 character"),
    "max_caption_length": (1, math.inf, "at least 1 character"),
    "min_clip_score": (-1, 1, "a cosine, between -1 and 1"),
    "min_aesthetic_score": (-math.inf, math.inf, "a number"),
    "max_nsfw_score": (0, 1, "a probability, between 0 and 1"),
    "picture_distance": (0, _MAX_BITS, f"between 0 and {_MAX_BITS} bits"),
    "max_similarity": (-1, 0.9999, "a cosine, between -1 and 0.9999: rounding decides above"),
}

Refusal = tuple[str, object, str]


def refused_filters(filters: FiltersConfig) -> Iterator[Refusal]:
    """Yield name, value and what is allowed of every field that is not."""
    for name, (least, most, allowed) in _RANGES.items():
        value = getattr(filters, name)
        if value is not None and not (least <= value <= most and math.isfinite(value)):
            yield name, value, f"{allowed}, or null"
    yield from _refused_captions(filters)
    yield from _refused_models(filters)


def _refused_captions(filters: FiltersConfig) -> Iterator[Refusal]:
    least, most = filters.min_caption_length, filters.max_caption_length
    if least is not None and most is not None and least > most:
        yield "min_caption_length", least, f"at most max_caption_length={most}"
    languages = filters.languages
    if languages is not None and not (languages and all(map(_LANGUAGE.fullmatch, languages))):
        yield "languages", languages, "ISO 639-1 codes such as [en, de], or null"


def _refused_models(filters: FiltersConfig) -> Iterator[Refusal]:
    for name in ("min_clip_score", "min_aesthetic_score"):
        if getattr(filters, name) is not None and filters.clip.checkpoint is None:
            yield "clip.checkpoint", None, f"an open_clip model, which {name} needs"
    if filters.min_aesthetic_score is not None and filters.aesthetic_model is None:
        yield "aesthetic_model", None, "a .safetensors file, which min_aesthetic_score needs"
