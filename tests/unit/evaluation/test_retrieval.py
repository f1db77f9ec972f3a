"""CLIP score and recall at k: closed forms, equal captions, ties."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paris_ray.errors import EvaluationError
from paris_ray.evaluation import features
from paris_ray.evaluation.retrieval import clip_scores, retrieval


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


EYE = np.eye(4, dtype=np.float32)


def test_scores_are_cosines_in_percent_and_never_negative() -> None:
    images = np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    texts = np.array([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]])
    np.testing.assert_allclose(clip_scores(images, texts), [100, 60, 0])


def test_the_identity_finds_everything() -> None:
    result = retrieval(EYE, EYE)
    assert result.image_to_text() == 1
    assert result.text_to_image() == 1


def test_ranks_by_hand_in_both_directions() -> None:
    """The scores are the rows of `images`, whose third one is best with the first text."""
    images = unit(np.array([[3.0, 2.0, 0.0], [0.0, 3.0, 1.0], [3.0, 2.0, 1.0]]))
    result = retrieval(images, np.eye(3))
    assert result.text_rank.tolist() == [0, 0, 2]
    assert result.image_rank.tolist() == [0, 0, 1]
    assert result.image_to_text(1) == pytest.approx(2 / 3)
    assert result.image_to_text(2) == pytest.approx(2 / 3)
    assert result.image_to_text(3) == 1
    assert result.text_to_image(1) == pytest.approx(2 / 3)
    assert result.text_to_image(2) == 1


def test_equal_captions_are_one_anothers_answers() -> None:
    texts = EYE[[1, 0, 2, 3]]  # the first two are swapped
    assert retrieval(EYE, texts).text_rank.tolist() == [1, 1, 0, 0]
    result = retrieval(EYE, texts, ["a cat", "a cat", "a dog", "a flag"])
    assert result.text_rank.tolist() == [0, 0, 0, 0]
    assert result.image_rank.tolist() == [0, 0, 0, 0]


def test_ties_are_hits() -> None:
    same = np.tile(unit(np.random.default_rng(0).standard_normal((1, 37))), (50, 1))
    result = retrieval(same.astype(np.float32), same.astype(np.float32))
    assert result.image_to_text() == 1
    assert result.text_to_image() == 1


def test_unrelated_pairs_are_found_by_chance_only() -> None:
    generator = np.random.default_rng(0)
    images, texts = (unit(generator.standard_normal((500, 16))) for _ in range(2))
    assert retrieval(images, texts).image_to_text() < 0.02
    assert retrieval(images, texts).image_to_text(250) == pytest.approx(0.5, abs=0.1)


@given(st.integers(0, 2**32), st.integers(1, 20))
def test_the_order_of_pairs_does_not_matter_and_blocks_do_not(seed: int, count: int) -> None:
    generator = np.random.default_rng(seed)
    images, texts = (unit(generator.standard_normal((count, 3))) for _ in range(2))
    captions = [f"caption {i}" for i in generator.integers(4, size=count)]
    result = retrieval(images, texts, captions)
    order = generator.permutation(count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "BLOCK_ELEMENTS", 2 * count)
        moved = retrieval(images[order], texts[order], [captions[i] for i in order])
    assert np.array_equal(moved.text_rank, result.text_rank[order])
    assert np.array_equal(moved.image_rank, result.image_rank[order])
    recalls = [result.image_to_text(k) for k in range(1, count + 1)]
    assert recalls == sorted(recalls)
    assert recalls[-1] == 1


@pytest.mark.parametrize(
    ("images", "texts", "captions", "message"),
    [
        (EYE, EYE[:3], None, "texts has 3 rows: images has 4"),
        (EYE, EYE, ["a cat"], "captions has 1 entries: images has 4 rows"),
        (2 * EYE, EYE, None, "images has a row of length 2.000: unit length is needed"),
        (EYE, 0 * EYE, None, "texts has a row of length 0.000: unit length is needed"),
    ],
)
def test_what_is_refused(
    images: np.ndarray, texts: np.ndarray, captions: list[str] | None, message: str
) -> None:
    with pytest.raises(EvaluationError, match=f"^{re.escape(message)}$"):
        retrieval(images, texts, captions)
