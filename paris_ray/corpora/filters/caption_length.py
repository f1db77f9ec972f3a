"""`min_caption_length`, `max_caption_length`: captions that say nothing, and pasted pages."""

from paris_ray.config import FiltersConfig

_SHOWN = 40  # characters of a caption


def too_short(caption: str, filters: FiltersConfig) -> str | None:
    """Return what is wrong with a clean caption; None if it is long enough."""
    least = filters.min_caption_length
    if least is None or len(caption) >= least:
        return None
    return f"{_said(caption)}, corpus.filters.min_caption_length={least}"


def too_long(caption: str, filters: FiltersConfig) -> str | None:
    """Return what is wrong with a clean caption; None if it is short enough."""
    most = filters.max_caption_length
    if most is None or len(caption) <= most:
        return None
    return f"{_said(caption)}, corpus.filters.max_caption_length={most}"


def _said(caption: str) -> str:
    return f"{len(caption)} characters: {caption[:_SHOWN]!r}"
