"""A small line chart as a picture: what the documents show beside their tables."""

import math
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

SCALE = 3  # drawn large and shrunk, which smooths the lines
WIDTH, HEIGHT = 380, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 24, 34, 46
COLOURS = ("#0b62a4", "#c4501b", "#3d8b37")
INK, GRID = "#333333", "#dddddd"
GRID_LINES = 4

Series = Mapping[str, Sequence[tuple[float, float]]]


class _Canvas:
    """Draws in the units of the finished picture; y starts at zero."""

    def __init__(self, series: Series, logarithmic: bool) -> None:
        self.image = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), "white")
        self._draw = ImageDraw.Draw(self.image)
        self._font = ImageFont.load_default(11 * SCALE)
        points = [point for line in series.values() for point in line]
        self._along = math.log2 if logarithmic else float
        self._low, self._high = (f(self._along(x) for x, _ in points) for f in (min, max))
        self.top = _round_up(max(y for _, y in points))

    def place(self, x: float, y: float) -> tuple[float, float]:
        across = (self._along(x) - self._low) / (self._high - self._low)
        return (
            LEFT + across * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - y / self.top * (HEIGHT - TOP - BOTTOM),
        )

    def line(self, points: Sequence[tuple[float, float]], colour: str, width: float) -> None:
        scaled = [(x * SCALE, y * SCALE) for x, y in points]
        self._draw.line(scaled, colour, round(width * SCALE), joint="curve")

    def dot(self, centre: tuple[float, float], colour: str) -> None:
        self._draw.circle([part * SCALE for part in centre], 3 * SCALE, colour)

    def text(self, place: tuple[float, float], words: str, anchor: str, colour: str = INK) -> None:
        scaled = (place[0] * SCALE, place[1] * SCALE)
        self._draw.text(scaled, words, colour, self._font, anchor)

    def text_width(self, words: str) -> float:
        return self._draw.textlength(words, self._font) / SCALE


def _round_up(value: float) -> float:
    """Return the next number of which a quarter has few digits."""
    if value <= 0:
        return 1.0
    unit: float = 10.0 ** math.floor(math.log10(value))
    return next(step * unit for step in (1, 1.2, 1.6, 2, 2.4, 4, 6, 8, 10) if step * unit >= value)


def line_chart(
    x_label: str, y_label: str, series: Series, *, logarithmic: bool = True
) -> Image.Image:
    """Return a picture of some lines.

    Args:
        x_label: What is on the horizontal axis.
        y_label: What is measured, with its unit.
        series: The points `(x, y)` of each line, by its name; the first has a tick for each x.
        logarithmic: Whether the horizontal axis is.
    """
    canvas = _Canvas(series, logarithmic)
    ticks = [x for x, _ in next(iter(series.values()))]
    for number in range(GRID_LINES + 1):
        value = canvas.top * number / GRID_LINES
        canvas.line([canvas.place(ticks[0], value), canvas.place(ticks[-1], value)], GRID, 1)
        canvas.text((LEFT - 6, canvas.place(ticks[0], value)[1]), f"{value:g}", "rm")
    for tick in ticks:
        canvas.text((canvas.place(tick, 0)[0], HEIGHT - BOTTOM + 6), f"{tick:g}", "ma")
    canvas.text(((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8), x_label, "md")
    canvas.text((8, 8), y_label, "la")
    right = float(WIDTH - RIGHT)
    for (name, points), colour in reversed(list(zip(series.items(), COLOURS, strict=False))):
        places = [canvas.place(*point) for point in points]
        canvas.line(places, colour, 2)
        for place in places:
            canvas.dot(place, colour)
        canvas.text((right, 8), name, "ra", colour)
        right -= canvas.text_width(name) + 12
    return canvas.image.resize((WIDTH * 2, HEIGHT * 2), Image.Resampling.LANCZOS)
