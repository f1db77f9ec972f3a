"""Filters that look at one row: which usable pictures and captions are wanted.

A filter is a function that returns what is wrong, in words, or None. It is called by the name of
the field of `corpus.filters` that turns it on, and so are the rows that it takes.
"""

from collections.abc import Callable, Mapping
from importlib.util import find_spec

from paris_ray.config import FiltersConfig
from paris_ray.corpora.filters.aspect import too_elongated
from paris_ray.corpora.filters.caption_length import too_long, too_short
from paris_ray.corpora.filters.language import foreign
from paris_ray.corpora.filters.size import too_small
from paris_ray.corpora.quarantine import BadRow
from paris_ray.errors import ConfigError

Size = tuple[int, int]  # width and height in pixels

_OF_PICTURES: Mapping[str, Callable[[Size, FiltersConfig], str | None]] = {
    "min_size": too_small,
    "max_aspect_ratio": too_elongated,
}
_OF_CAPTIONS: Mapping[str, Callable[[str, FiltersConfig], str | None]] = {
    "min_caption_length": too_short,
    "max_caption_length": too_long,
    "languages": foreign,
}
# Packages that a filter needs beside what is installed anyway.
_PACKAGES = {"languages": "py3langid", "max_nsfw_score": "onnxruntime"}


def filters_of_rows(filters: FiltersConfig) -> tuple[str, ...]:
    """Return the filters of this folder that are on."""
    return tuple(name for name in filters.on if name in _OF_PICTURES or name in _OF_CAPTIONS)


def require_packages(filters: FiltersConfig) -> None:
    """Raise ConfigError if a filter needs a package that is not installed."""
    for name, package in _PACKAGES.items():
        value = getattr(filters, name)
        if value is not None and find_spec(package) is None:
            needs = f"corpus.filters.{name}={value!r} needs {package}"
            raise ConfigError(f"{needs}: pip install 'paris_ray[filters]'")


def check_size(size: Size, filters: FiltersConfig) -> None:
    """Raise BadRow if a picture of this size is not wanted, on its side or upright."""
    for reason, judge in _OF_PICTURES.items():
        found = judge(size, filters)
        if found is not None:
            raise BadRow(reason, found)


def wanted_captions(captions: tuple[str, ...], filters: FiltersConfig) -> tuple[str, ...]:
    """Return the captions of a row that are wanted, one or more of them.

    Raises:
        BadRow: if none is, with the reason of the first.
    """
    found = {caption: _unwanted(caption, filters) for caption in captions}
    wanted = tuple(caption for caption, bad in found.items() if bad is None)
    first = found[captions[0]]
    if not wanted and first is not None:
        raise first
    return wanted


def _unwanted(caption: str, filters: FiltersConfig) -> BadRow | None:
    for reason, judge in _OF_CAPTIONS.items():
        found = judge(caption, filters)
        if found is not None:
            return BadRow(reason, found)
    return None
