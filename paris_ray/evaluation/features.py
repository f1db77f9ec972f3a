"""What measures share: rows of features, checked, in blocks, and their nearest neighbours."""

from collections.abc import Iterator, Mapping
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from paris_ray.errors import EvaluationError

BLOCK_ELEMENTS = 2**24  # of a temporary array: 128 MiB of float64

Features = NDArray[np.floating[Any]]


def check_features(features: Mapping[str, Features], *, min_rows: int = 1) -> None:
    """Check that arrays are `(N, D)`, finite, and of one D.

    Args:
        features: The arrays by the names of the caller's arguments.
        min_rows: The smallest N allowed.

    Raises:
        EvaluationError: if one is not.
    """
    first = next(iter(features))
    for name, array in features.items():
        if array.ndim != 2 or len(array) < min_rows:
            raise EvaluationError(
                f"{name} of shape {array.shape} is not allowed: "
                f"features are (N, D) with N >= {min_rows}"
            )
        if array.shape[1] != features[first].shape[1]:
            raise EvaluationError(
                f"{name} has {array.shape[1]} features a row: "
                f"{first} has {features[first].shape[1]}, and both must have the same"
            )
        if not np.isfinite(array).all():
            raise EvaluationError(f"{name} has values that are not finite: none are allowed")


def row_blocks(num_rows: int, row_elements: int) -> Iterator[slice]:
    """Yield slices of rows, as many at a time as keep a temporary array small.

    Args:
        num_rows: How many rows there are.
        row_elements: How many elements the temporary array has for one of them.
    """
    size = max(1, BLOCK_ELEMENTS // max(1, row_elements))
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


def nearest_neighbours(
    queries: Features, gallery: Features, k: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the nearest rows of a gallery, by exact search.

    The search is in float32; the distances of what it finds are then computed in float64 from the
    differences, so that a copy is at distance 0.

    Args:
        queries: `(N, D)`.
        gallery: `(M, D)` with M >= k.
        k: How many.

    Returns:
        L2 distances and gallery rows, both `(N, k)`, in the order that the search found them.
    """
    if k > len(gallery):
        raise ValueError(f"k={k} is not allowed: the gallery has {len(gallery)} rows")
    index = faiss.IndexFlatL2(gallery.shape[1])
    index.add(np.ascontiguousarray(gallery, dtype=np.float32))
    _, rows = index.search(np.ascontiguousarray(queries, dtype=np.float32), k)
    distances = np.empty(rows.shape)
    for block in row_blocks(len(queries), k * gallery.shape[1]):
        difference = gallery[rows[block]].astype(np.float64) - queries[block, None]
        distances[block] = np.linalg.norm(difference, axis=2)
    return distances, rows
