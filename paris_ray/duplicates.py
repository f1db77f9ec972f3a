"""Which rows repeat earlier ones: in their key, their caption, their picture or its features.

One rule for all: a row repeats if an *earlier* row is equal or near enough, whether or not that
one repeats a still earlier one. So each pair decides by itself, pairs may be looked at in any order
and on any machine, and of rows that do not repeat no two are near each other.
"""

import hashlib
import unicodedata
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paris_ray.clustering import fit_centroids

Hashes = NDArray[np.uint64]
Features = NDArray[np.float32]
Mask = NDArray[np.bool_]

HASH_BITS = 64
HASHES_A_BLOCK = 1024  # blocks of as many by as many are compared at once
FEATURES_A_BLOCK = 2048
ROWS_A_CELL = 1000  # on average
MAX_CELLS = 16_384
FIT_ROWS_A_CELL = 32
FIT_ITERATIONS = 10


def hashes_of(payloads: Iterable[bytes]) -> Hashes:
    """Return 64-bit hashes `(N,)` of bytes.

    That two of a hundred million have one by chance has a probability of 0.03 %, of a billion 3 %.
    """
    digests = b"".join(hashlib.blake2b(each, digest_size=8).digest() for each in payloads)
    return np.frombuffer(digests, np.uint64)


class _Comparable(dict[int, str]):
    """What becomes of a character, by its number: found when it is met first."""

    def __missing__(self, code: int) -> str:
        kind = unicodedata.category(chr(code))[0]
        self[code] = " " if kind in "PZ" or chr(code).isspace() else chr(code) * (kind != "C")
        return self[code]


_COMPARABLE = _Comparable()


def comparable_caption(caption: str) -> str:
    """Return a caption without what does not tell it from others: case, punctuation, white space.

    So do compatibility forms (Unicode's NFKC) and invisible characters. A caption of nothing else
    is returned as it is.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", caption).casefold())
    return " ".join(folded.translate(_COMPARABLE).split()) or caption


def equal_to_earlier(hashes: Hashes) -> Mask:
    """Return which of some hashes `(N,)` an earlier one is equal to."""
    repeats = np.ones(len(hashes), bool)
    repeats[np.unique(hashes, return_index=True)[1]] = False
    return repeats


def bands(distance: int) -> list[tuple[int, int]]:
    """Return `distance + 1` bands of a hash, each the number of its first bit and of its bits.

    Hashes that differ in `distance` bits at most agree in one of them at least: so many bits
    cannot be in more bands.
    """
    edges = np.linspace(0, HASH_BITS, distance + 2).round().astype(int).tolist()
    return [(first, last - first) for first, last in pairwise(edges)]


def band_values(hashes: Hashes, band: tuple[int, int]) -> Hashes:
    """Return the bits `(N,)` of hashes in a band, as numbers."""
    first, width = band
    return (hashes >> np.uint64(first)) & np.uint64((1 << width) - 1)


def near_earlier(hashes: Hashes, distance: int, band: tuple[int, int]) -> Mask:
    """Return which of some hashes `(N,)` an earlier one is near to, of those with the same band.

    Equal hashes count once: a corpus that is full of blank pictures costs no more than another.

    Args:
        hashes: In the order of their rows.
        distance: In how many bits they may differ.
        band: The bits that agree.
    """
    different, first = np.unique(hashes, return_index=True)
    values = band_values(different, band)
    order = np.lexsort((first, values))
    near = np.ones(len(hashes), bool)
    near[first] = False
    for group in _groups(values[order]):
        rows = order[group]
        near[first[rows]] = _matches_earlier(
            len(rows), HASHES_A_BLOCK, _within(different[rows], distance)
        )
    return near


def _within(hashes: Hashes, distance: int) -> "Matches":
    def matches(rows: NDArray[np.intp], earlier: NDArray[np.intp]) -> Mask:
        return np.bitwise_count(hashes[rows, None] ^ hashes[earlier]) <= distance

    return matches


def num_cells(num_rows: int) -> int:
    """Return into how many cells so many rows are cut."""
    return min(MAX_CELLS, max(1, num_rows // ROWS_A_CELL))


def fit_cells(sample: Features, count: int, seed: int, threads: int = 1) -> Features:
    """Return the centres `(C, D)` of cells: spherical k-means on a sample of unit-length features.

    Args:
        sample: `(M, D)`; `FIT_ROWS_A_CELL` rows a cell are enough.
        count: Number of cells, C; of fewer rows there are as many cells.
        seed: Of the first centres.
        threads: How many fit.
    """
    count = min(count, len(sample))
    return fit_centroids(sample, count, iterations=FIT_ITERATIONS, seed=seed, threads=threads)


def similar_to_earlier(
    features: Features, cells: NDArray[np.integer[Any]], max_similarity: float
) -> Mask:
    """Return which rows `(N,)` an earlier row of their cell is more similar to than that.

    Two that lie on either side of a border of cells are not found.

    Args:
        features: `(N, D)` of unit length, in the order of the rows.
        cells: `(N,)` number of each row's cell.
        max_similarity: The largest cosine of rows that are told apart.

    Source: Abbas et al. 2023, SemDeDup (arXiv 2303.09540); there the row that is least like its
    cell's centre stays, here the first one.
    """
    order = np.argsort(cells, kind="stable")
    similar = np.zeros(len(features), bool)
    for group in _groups(cells[order]):
        rows = order[group]
        similar[rows] = _matches_earlier(
            len(rows), FEATURES_A_BLOCK, _more_similar(features, rows, max_similarity)
        )
    return similar


def _more_similar(features: Features, cell: NDArray[np.intp], max_similarity: float) -> "Matches":
    def matches(rows: NDArray[np.intp], earlier: NDArray[np.intp]) -> Mask:
        cosines = features[cell[rows]] @ features[cell[earlier]].T
        return cosines > max_similarity

    return matches


Matches = Callable[[NDArray[np.intp], NDArray[np.intp]], Mask]


def _matches_earlier(num_rows: int, block: int, matches: Matches) -> Mask:
    """Return which of some rows match an earlier one; blocks of them are compared.

    Args:
        num_rows: Their number, N.
        block: How many are compared with how many at once.
        matches: Tells of rows `(A,)` and of others `(B,)` which match, `(A, B)`.
    """
    found = np.zeros(num_rows, bool)
    for first in range(0, num_rows, block):
        for start in range(0, first + 1, block):
            rows = first + np.flatnonzero(~found[first : first + block])
            if not len(rows):
                break
            earlier = np.arange(start, min(start + block, num_rows))
            matching = matches(rows, earlier)
            if start == first:
                matching &= earlier < rows[:, None]
            found[rows] = matching.any(axis=1)
    return found


def _groups(values: NDArray[Any]) -> Iterable[slice]:
    """Yield where equal ones of ascending values stand, of those that are more than one."""
    edges = np.flatnonzero(np.diff(values, prepend=values[:1] - 1, append=values[-1:] + 1))
    for i in np.flatnonzero(np.diff(edges) > 1):
        yield slice(edges[i], edges[i + 1])
