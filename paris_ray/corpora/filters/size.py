"""`min_size`: pictures that would have to be enlarged, or show too little."""

from paris_ray.config import FiltersConfig


def too_small(size: tuple[int, int], filters: FiltersConfig) -> str | None:
    """Return what is wrong with the size of a picture, as it is stored; None if nothing is."""
    least = filters.min_size
    if least is None or min(size) >= least:
        return None
    return f"{size[0]} x {size[1]} pixels, corpus.filters.min_size={least}"
