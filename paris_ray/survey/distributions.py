"""How sizes, shapes and captions of rows are spread, in a few bars each."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from paris_ray.survey.sample import SampledRow

# The smallest value of every bar but the first, which has what is below.
SIDES = (64, 128, 256, 512, 1024, 2048)
WORDS = (2, 5, 9, 17, 33, 65)
RATIOS = (0.5, 0.8, 1.25, 2.0)
SHAPES = ("taller than 1:2", "1:2 to 4:5", "about square", "5:4 to 2:1", "wider than 2:1")

Bars = list[tuple[str, int]]


@dataclass(frozen=True, slots=True)
class Distribution:
    """One property of some rows.

    Attributes:
        title: What is measured.
        bars: Label and number of rows; bars of no rows before the first and after the last that
            has some are left out.
        note: What follows from it, or nothing.
    """

    title: str
    bars: Bars
    note: str = ""


def distributions(rows: Sequence[SampledRow], image_size: int) -> list[Distribution]:
    """Return sizes, aspect ratios and caption lengths of the good ones among some rows."""
    good = [row for row in rows if row.reason is None]
    found = size_distributions([row.size for row in good if row.size is not None], image_size)
    return [*found, caption_lengths([row.caption for row in good])]


def size_distributions(sizes: Sequence[tuple[int, int]], image_size: int) -> list[Distribution]:
    """Return the shorter sides and the aspect ratios of pictures, given as width and height.

    Args:
        sizes: In pixels.
        image_size: The side that pictures are brought to.
    """
    if not sizes:
        return []
    sides = [min(size) for size in sizes]
    small = sum(side < image_size for side in sides)
    note = f"{small} of {len(sides)} are enlarged to corpus.image_size={image_size}."
    names = _ranges(SIDES)
    return [
        Distribution("Shorter side, pixels", _bars(sides, SIDES, names), note if small else ""),
        Distribution("Aspect ratio, width to height", _bars(_ratios(sizes), RATIOS, SHAPES)),
    ]


def _ratios(sizes: Iterable[tuple[int, int]]) -> list[float]:
    return [width / height for width, height in sizes]


def caption_lengths(captions: Sequence[str]) -> Distribution:
    """Return how many words captions have."""
    lengths = [len(caption.split()) for caption in captions]
    same = ""
    if len(captions) > 1 and len(set(captions)) < len(captions):
        most, times = Counter(captions).most_common(1)[0]
        distinct = len(set(captions))
        same = f"{distinct} of {len(captions)} captions differ; {times} are {most[:80]!r}."
    return Distribution("Caption length, words", _bars(lengths, WORDS, _ranges(WORDS)), same)


def _bars(values: Iterable[float], starts: Sequence[float], names: Sequence[str]) -> Bars:
    counts = Counter(bisect_right(starts, value) for value in values)
    if not counts:
        return []
    return [(names[i], counts[i]) for i in range(min(counts), max(counts) + 1)]


def _ranges(starts: Sequence[int]) -> list[str]:
    middle = [
        str(low) if low + 1 == high else f"{low} to {high - 1}" for low, high in pairwise(starts)
    ]
    first = "1" if starts[0] == 2 else f"below {starts[0]}"
    return [first, *middle, f"{starts[-1]} or more"]
