"""Caption recall: is the nearest picture of the corpus the one with the asked-for caption?

Nearest by L2 distance on 32x32 RGB. Pictures of an identical caption count as hits, since nothing
tells them apart. It measures recall of the training set, not the quality of new pictures.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paris_ray.evaluation.features import nearest_neighbours


@dataclass(frozen=True, slots=True)
class CaptionRecall:
    """Per drawn picture.

    Attributes:
        nearest: `(N,)` the gallery row that is nearest.
        hit: `(N,)` whether that row has the caption that was asked for.
        squared_error: `(N,)` mean squared pixel error to the caption's own picture, pixels in
            [-1, 1].
        by_chance: Share of hits that pictures drawn at random from the gallery would have: 1 where
            all rows have one caption, and recall says nothing.
    """

    nearest: NDArray[np.int64]
    hit: NDArray[np.bool_]
    squared_error: NDArray[np.float32]
    by_chance: float


def caption_recall(
    drawn: NDArray[np.uint8],
    own: NDArray[np.int64],
    gallery: NDArray[np.uint8],
    captions: Sequence[str],
) -> CaptionRecall:
    """Compare drawn pictures with the corpus.

    Args:
        drawn: `(N, 32, 32, 3)` pictures that were drawn.
        own: `(N,)` the gallery row whose caption each was drawn from.
        gallery: `(M, 32, 32, 3)` pictures of the corpus.
        captions: The M captions.
    """
    flat_drawn, flat_gallery = _flatten(drawn), _flatten(gallery)
    nearest = nearest_neighbours(flat_drawn, flat_gallery, 1)[1][:, 0]
    hit = np.array([captions[i] == captions[j] for i, j in zip(nearest, own, strict=True)])
    squared_error = ((flat_drawn - flat_gallery[own]) ** 2).mean(axis=1)
    counts = Counter(captions)
    by_chance = sum(counts[captions[i]] for i in own) / (len(own) * len(captions))
    return CaptionRecall(nearest, hit, squared_error, by_chance)


def _flatten(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    return images.reshape(len(images), -1).astype(np.float32) / 127.5 - 1
