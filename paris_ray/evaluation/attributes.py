"""Attribute accuracy: does a drawn picture show what was asked for, colour by colour?

A drawn picture is taken to show the attributes of the picture nearest to it in a gallery that has
every combination, by L2 distance of pixels. Distances are exact integers, so that ties are ties.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paris_ray.errors import EvaluationError
from paris_ray.evaluation.features import row_blocks

EXACT_PRODUCTS = 2**24 // 128**2  # of pixels less 128: float32 sums so many without rounding

Attributes = Mapping[str, Sequence[Hashable]]


@dataclass(frozen=True, slots=True)
class AttributeAccuracy:
    """What is right about every drawn picture.

    Attributes:
        names: The A attributes.
        right: `(N, A)` whether a nearest picture has the value that was asked for.
        all_right: `(N,)` whether one nearest picture has all of them.
    """

    names: tuple[str, ...]
    right: NDArray[np.bool_]
    all_right: NDArray[np.bool_]

    @property
    def shares(self) -> dict[str, float]:
        """Share of pictures that are right, by attribute."""
        return dict(zip(self.names, self.right.mean(axis=0).tolist(), strict=True))

    @property
    def share_all_right(self) -> float:
        """Share of pictures that are right in everything."""
        return float(self.all_right.mean())


def attribute_accuracy(
    drawn: NDArray[np.uint8],
    wanted: Attributes,
    gallery: NDArray[np.uint8],
    attributes: Attributes,
) -> AttributeAccuracy:
    """Compare what was asked for with what the nearest pictures have.

    Of several nearest pictures, at exactly equal distance, the one that fits best counts.

    Args:
        drawn: `(N, S, S, 3)` pictures that were drawn.
        wanted: N values of every attribute, as asked for.
        gallery: `(M, S, S, 3)` pictures whose attributes are known.
        attributes: Their M values of at least the attributes of `wanted`.

    Raises:
        EvaluationError: if shapes, types or lengths do not fit, or an attribute is not known.
    """
    _check(drawn, wanted, gallery, attributes)
    names = tuple(wanted)
    codes = [_codes(wanted[name], attributes[name]) for name in names]
    right = np.empty((len(drawn), len(names)), dtype=bool)
    all_right = np.empty(len(drawn), dtype=bool)
    for queries, nearest in _nearest_pairs(drawn, gallery):
        fits = np.stack([asked[queries] == known[nearest] for asked, known in codes], axis=1)
        rows, first = np.unique(queries, return_index=True)
        right[rows] = np.logical_or.reduceat(fits, first)
        all_right[rows] = np.logical_or.reduceat(fits.all(axis=1), first)
    return AttributeAccuracy(names, right, all_right)


def _nearest_pairs(
    drawn: NDArray[np.uint8], gallery: NDArray[np.uint8]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield drawn rows, in order, and the gallery rows nearest to each: more than one if tied."""
    x, y = _centred(drawn), _centred(gallery)
    norms = np.einsum("mp,mp->m", y, y, dtype=np.float64)
    for block in row_blocks(len(x), len(y)):
        distances = np.tile(norms, (block.stop - block.start, 1))  # less the norms of x
        for start in range(0, x.shape[1], EXACT_PRODUCTS):
            values = slice(start, start + EXACT_PRODUCTS)
            distances -= 2 * (x[block, values] @ y[:, values].T)
        rows, nearest = np.nonzero(distances == distances.min(axis=1, keepdims=True))
        yield block.start + rows, nearest


def _centred(pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
    return np.subtract(pictures.reshape(len(pictures), -1), 128, dtype=np.float32)


def _codes(
    asked: Sequence[Hashable], known: Sequence[Hashable]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return values as numbers, equal where the values are."""
    numbers = {value: i for i, value in enumerate(dict.fromkeys([*asked, *known]))}
    asked_codes, known_codes = (np.array([numbers[v] for v in vs]) for vs in (asked, known))
    return asked_codes, known_codes


def _check(
    drawn: NDArray[np.uint8],
    wanted: Attributes,
    gallery: NDArray[np.uint8],
    attributes: Attributes,
) -> None:
    for name, pictures in (("drawn", drawn), ("gallery", gallery)):
        if pictures.dtype != np.uint8 or pictures.ndim != 4 or not len(pictures):
            raise EvaluationError(
                f"{name} of type {pictures.dtype} and shape {pictures.shape} is not allowed: "
                "pictures are uint8 (N, S, S, 3) with N >= 1"
            )
    if drawn.shape[1:] != gallery.shape[1:]:
        raise EvaluationError(
            f"drawn has pictures of {drawn.shape[1:]}: gallery has {gallery.shape[1:]}, "
            "and both must have the same"
        )
    if not wanted or not set(wanted) <= set(attributes):
        raise EvaluationError(
            f"wanted={sorted(wanted)} is not allowed: one or more of {sorted(attributes)}"
        )
    for name in wanted:
        _check_length(f"wanted[{name!r}]", wanted[name], len(drawn))
        _check_length(f"attributes[{name!r}]", attributes[name], len(gallery))


def _check_length(name: str, values: Sequence[Hashable], count: int) -> None:
    if len(values) != count:
        raise EvaluationError(f"{name} has {len(values)} values: there are {count} pictures")
