"""How well pictures and captions of CLIP find each other: CLIP score and recall at k."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paris_ray.errors import EvaluationError
from paris_ray.evaluation.features import Features, check_features, row_blocks

CLIP_SCORE_SCALE = 100.0
MAX_LENGTH_ERROR = 1e-2  # of unit vectors that were stored in half precision
RESOLUTION = 1e-6  # scores that differ by less are equal: products of equal rows may differ by it


@dataclass(frozen=True, slots=True)
class Retrieval:
    """For every pair, how many of the others are in the way.

    Attributes:
        text_rank: `(N,)` captions that score higher with the picture than its own caption.
        image_rank: `(N,)` pictures that score higher with the caption than its own picture.
    """

    text_rank: NDArray[np.int64]
    image_rank: NDArray[np.int64]

    def image_to_text(self, k: int = 1) -> float:
        """Return R@k from picture to text: the share of pictures whose caption is in the first k.

        Ties are hits. A collapsed encoder ties with everything and has R@k = 1: look at
        `clip_scores` too.
        """
        return float((self.text_rank < k).mean())

    def text_to_image(self, k: int = 1) -> float:
        """Return R@k from text to picture: the share of captions whose picture is in the first k.

        Ties are hits, as in `image_to_text`.
        """
        return float((self.image_rank < k).mean())


def clip_scores(images: Features, texts: Features) -> NDArray[np.float64]:
    """Return 100 max(cos(image, text), 0) of every pair; CLIP score is the mean.

    Args:
        images: `(N, D)` unit-length embeddings of pictures.
        texts: `(N, D)` those of their captions.

    Returns:
        `(N,)` in [0, 100]. The paper's own scale is 2.5 max(cos, 0).

    Raises:
        EvaluationError: if shapes differ, or rows are not of unit length.

    Source: CLIPScore, Hessel et al. 2021 (arXiv:2104.08718), section 3; scale of torchmetrics.
    """
    _check_pairs(images, texts)
    cosines = np.einsum("nd,nd->n", images, texts, dtype=np.float64)
    return CLIP_SCORE_SCALE * cosines.clip(0, 1)


def retrieval(
    images: Features, texts: Features, captions: Sequence[str] | None = None
) -> Retrieval:
    """Rank every caption for every picture, and the other way round.

    Pairs of one caption are one another's answers, since nothing tells them apart.

    Args:
        images: `(N, D)` unit-length embeddings of pictures.
        texts: `(N, D)` those of their captions.
        captions: The N captions; without them all are taken to be different.

    Raises:
        EvaluationError: if shapes or lengths differ, or rows are not of unit length.
    """
    _check_pairs(images, texts)
    names = range(len(images)) if captions is None else captions
    if len(names) != len(images):
        raise EvaluationError(f"captions has {len(names)} entries: images has {len(images)} rows")
    _, groups = np.unique(np.asarray(names), return_inverse=True)
    return Retrieval(_ranks(images, texts, groups), _ranks(texts, images, groups))


def _ranks(queries: Features, answers: Features, groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return `(N,)` how many answers score higher than the best one of the query's own group."""
    ranks = np.empty(len(queries), dtype=np.int64)
    for block in row_blocks(len(queries), len(answers)):
        scores = queries[block] @ answers.T
        own = np.where(groups[block, None] == groups, scores, -np.inf).max(axis=1)
        ranks[block] = (scores > own[:, None] + RESOLUTION).sum(axis=1)
    return ranks


def _check_pairs(images: Features, texts: Features) -> None:
    check_features({"images": images, "texts": texts})
    if len(images) != len(texts):
        raise EvaluationError(f"texts has {len(texts)} rows: images has {len(images)}")
    for name, rows in (("images", images), ("texts", texts)):
        lengths = np.linalg.norm(rows, axis=1)
        worst = lengths[np.abs(lengths - 1).argmax()]
        if abs(worst - 1) > MAX_LENGTH_ERROR:
            raise EvaluationError(f"{name} has a row of length {worst:.3f}: unit length is needed")
