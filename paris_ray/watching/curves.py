"""Curves from the rows that a training writes: short enough to send, true to every spike."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

from paris_ray.watching.lines import number

AXIS, CLOCK, RATE, RESUMES = "samples_seen", "unix_time", "samples_per_second", "resumes"
MAX_POINTS = 600  # of a curve that is sent
MAX_SERIES = 16
_NAME = re.compile(r"[a-z][a-z0-9_]{0,40}")
_NOT_SHOWN = (AXIS, CLOCK, RESUMES)

Rows = Sequence[Mapping[str, Any]]


class Point(NamedTuple):
    """One point of a curve, at both axes that it can be drawn over.

    Attributes:
        samples: Samples seen.
        seconds: Since training began, pauses included; None where no clock was kept.
        value: What was measured.
    """

    samples: float
    seconds: float | None
    value: float


@dataclass(frozen=True, slots=True)
class Curves:
    """What is drawn of one training.

    Attributes:
        series: Points by the name of what was measured, in their order.
        resumes: `(samples, seconds)` of the first row after each time that training was resumed.
    """

    series: dict[str, list[Point]] = field(default_factory=dict)
    resumes: list[tuple[float, float | None]] = field(default_factory=list)


def curves(metrics: Rows, timings: Rows, limit: int = MAX_POINTS) -> Curves:
    """Return the curves of a training.

    Args:
        metrics: Rows of `metrics.jsonl`.
        timings: Rows of `timings.jsonl`, for as many `samples_seen`, or fewer.
        limit: The most points of a curve.
    """
    clock = _elapsed(timings)
    series: dict[str, list[Point]] = {}
    for row in (*metrics, *timings):
        samples = number(row.get(AXIS))
        if samples is None:
            continue
        for name, value in _measured(row).items():
            if name in series or len(series) < MAX_SERIES:
                point = Point(samples, clock.get(samples), value)
                series.setdefault(name, []).append(point)
    thin = {name: thinned(points, limit) for name, points in series.items()}
    return Curves(thin, _resumes(timings, clock))


def _measured(row: Mapping[str, Any]) -> dict[str, float]:
    values = {name: number(value) for name, value in row.items() if name not in _NOT_SHOWN}
    return {n: v for n, v in values.items() if v is not None and _NAME.fullmatch(n)}


def _elapsed(timings: Rows) -> dict[float, float]:
    """Return the seconds from the beginning of training to each row, by its samples."""
    times = [(number(row.get(AXIS)), number(row.get(CLOCK)), row) for row in timings]
    known = [(samples, at, row) for samples, at, row in times if samples and at]
    if not known:
        return {}
    samples, at, row = known[0]
    rate = number(row.get(RATE))
    began = at - ((rate and number(samples / rate)) or 0.0)
    return {samples: round(at - began, 3) for samples, at, _ in known}


def _resumes(timings: Rows, clock: Mapping[float, float]) -> list[tuple[float, float | None]]:
    counts = [(number(row.get(AXIS)), number(row.get(RESUMES)) or 0) for row in timings]
    return [
        (samples, clock.get(samples))
        for (_, before), (samples, count) in pairwise([(None, 0), *counts])
        if samples is not None and count > before
    ]


def compute_seconds(timings: Rows) -> float:
    """Return for how long a training computed what its rows tell, pauses not counted."""
    seconds, before = 0.0, 0.0
    for row in timings:
        samples, rate = number(row.get(AXIS)), number(row.get(RATE))
        if samples and rate and rate > 0:
            seconds += number(max(0.0, samples - before) / rate) or 0.0
            before = samples
    return seconds


def thinned(points: Sequence[Point], limit: int) -> list[Point]:
    """Return at most `limit` points of a curve, at least 4, among them every extreme.

    The points between the first and the last are cut into stretches, of each of which the lowest
    and the highest stay.
    """
    if len(points) <= limit:
        return list(points)
    inner, stretches = points[1:-1], limit // 2 - 1
    kept = [points[0]]
    for i in range(stretches):
        first, end = (len(inner) * j // stretches for j in (i, i + 1))
        stretch = range(first, end)
        lowest = min(stretch, key=lambda j: inner[j].value)
        highest = max(stretch, key=lambda j: inner[j].value)
        kept += [inner[j] for j in sorted({lowest, highest})]
    return [*kept, points[-1]]
