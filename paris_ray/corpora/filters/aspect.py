"""`max_aspect_ratio`: banners and strips, of which the square that is cut shows a part."""

from paris_ray.config import FiltersConfig


def too_elongated(size: tuple[int, int], filters: FiltersConfig) -> str | None:
    """Return what is wrong with the shape of a picture, lying or upright; None if nothing is."""
    most = filters.max_aspect_ratio
    if most is None or max(size) <= most * min(size):
        return None
    return f"{size[0]} x {size[1]} pixels, corpus.filters.max_aspect_ratio={most}"
