"""Measure filters: features by their cosine, pictures by their hashes, languages of captions.

    python tests/benchmarks/bench_filters.py [--rows 1000000] [PART ...]

The rows are drawn at random: half of them in clouds about 2,000 directions, as pictures of things
lie, the others anywhere; a tenth is next to an earlier row. Each part runs in a process of its own,
whose peak memory is measured, what it imports included. Nothing is asserted: a bar that is missed
is printed as missed; bars are for a million rows on two cores.
"""

import argparse
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from paris_ray.clustering import nearest
from paris_ray.config import FiltersConfig
from paris_ray.corpora.filters.language import foreign
from paris_ray.duplicates import (
    FIT_ROWS_A_CELL,
    bands,
    fit_cells,
    near_earlier,
    num_cells,
    similar_to_earlier,
)

WIDTH = 512
NUM_CLOUDS = 2000
REPEAT_EVERY = 10  # rows; its cosine to one before it is about 0.98
MAX_SIMILARITY = 0.95
BLOCK = 10_000  # rows that are drawn at once
DISTANCE = 4  # bits
LANGUAGES = {  # of the package `emoji`
    "en": "English",
    "de": "German",
    "fr": "French",
    "es": "Spanish",
    "ru": "Russian",
    "ja": "Japanese",
}


def report(what: str, value: float, bar: float) -> None:
    """Print a measurement beside its bar, as `bench_engine.report` does, which imports torch."""
    print(f"- {what}: {value:.2f} (bar <= {bar}: {'met' if value <= bar else 'MISSED'})")


def draw_features(num_rows: int) -> NDArray[np.float32]:
    """Return unit-length features `(N, 512)`, of which every tenth is next to an earlier one."""
    generator = np.random.default_rng(0)
    clouds = _unit(generator.standard_normal((NUM_CLOUDS, WIDTH), np.float32))
    features = np.empty((num_rows, WIDTH), np.float32)
    for start in range(0, num_rows, BLOCK):
        rows = features[start : start + BLOCK]
        rows[:] = _unit(generator.standard_normal(rows.shape, np.float32))
        rows[::2] += clouds[generator.integers(0, NUM_CLOUDS, len(rows[::2]))]
        late = np.arange(start, start + len(rows))[REPEAT_EVERY - 1 :: REPEAT_EVERY]
        near = features[generator.integers(0, late)] if start else rows[late - start - 1]
        noise = _unit(generator.standard_normal(near.shape, np.float32))
        rows[late - start] = _unit(near) + 0.2 * noise
        rows[:] = _unit(rows)
    return features


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    unit: NDArray[np.float32] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit


def features(num_rows: int) -> None:
    """Semantic duplicates, by the functions that the tasks of `prepare` call, in one process."""
    drawn = draw_features(num_rows)
    drawn_peak = _peak_bytes()
    started = time.monotonic()
    count = num_cells(num_rows)
    size = min(num_rows, count * FIT_ROWS_A_CELL)
    rows = np.random.default_rng(0).choice(num_rows, size, replace=False)
    centroids = fit_cells(drawn[np.sort(rows)], count, seed=0, threads=os.cpu_count() or 1)
    found = similar_to_earlier(drawn, nearest(drawn, centroids), MAX_SIMILARITY)
    seconds = time.monotonic() - started
    planted = found[REPEAT_EVERY - 1 :: REPEAT_EVERY]
    name = f"semantic duplicates of {num_rows:,} x {WIDTH}"
    report(f"{name}: seconds", seconds, 120)
    report(f"{name}: peak memory over the vectors", _peak_bytes() / drawn.nbytes, 2)
    print(f"- to draw them: {drawn_peak / drawn.nbytes:.2f} of the vectors at the peak")
    print(f"- of the rows next to an earlier one found: {planted.mean():.1%}")
    print(f"- of the others: {(found.sum() - planted.sum()) / (len(found) - len(planted)):.1%}")


def pictures(num_rows: int) -> None:
    """Near perceptual hashes in one process, band after band."""
    generator = np.random.default_rng(0)
    hashes = generator.integers(0, 2**64, num_rows, dtype=np.uint64)
    late = np.arange(REPEAT_EVERY - 1, num_rows, REPEAT_EVERY)
    bits = generator.integers(0, 64, (len(late), DISTANCE)).astype(np.uint64)
    changed = np.bitwise_or.reduce(np.uint64(1) << bits, axis=1)
    hashes[late] = hashes[late - 1] ^ changed
    hashes[::20] = 0  # blank pictures
    started = time.monotonic()
    found = np.zeros(num_rows, bool)
    for band in bands(DISTANCE):
        found |= near_earlier(hashes, DISTANCE, band)
    seconds = time.monotonic() - started
    print(f"- hashes of {num_rows:,} pictures, {DISTANCE} bits apart: {seconds:.1f} s on one core")
    print(f"- of the planted ones found: {found[late].mean():.1%}")


def languages(_: int) -> None:
    """What `languages=[en]` makes of names of emoji, about as short as captions get."""
    import emoji
    import py3langid

    english = FiltersConfig(languages=["en"])
    emoji.config.load_language(list(LANGUAGES))
    for code, language in LANGUAGES.items():
        names = [
            entry[code].strip(":").replace("_", " ").lower()
            for entry in emoji.EMOJI_DATA.values()
            if code in entry and entry["status"] == emoji.STATUS["fully_qualified"]
        ]
        kept = np.mean([foreign(name, english) is None for name in names])
        likeliest = np.mean([py3langid.classify(name)[0] == "en" for name in names])
        print(
            f"- of {len(names):,} {language} names `[en]` keeps {kept:.1%}; "
            f"{likeliest:.1%} are likeliest English"
        )


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


PARTS: dict[str, Callable[[int], None]] = {
    "features": features,
    "pictures": pictures,
    "languages": languages,
}


def main() -> None:
    """Print the parts."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--rows", type=int, default=1_000_000)
    options = parser.parse_args()
    if unknown := set(options.parts) - PARTS.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    processes = multiprocessing.get_context("spawn")
    for name in options.parts or PARTS:
        process = processes.Process(target=PARTS[name], args=(options.rows,))
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(process.exitcode)


if __name__ == "__main__":
    main()
