"""Attribute accuracy: by hand, ties, and exactness."""

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paris_ray.errors import EvaluationError
from paris_ray.evaluation import features
from paris_ray.evaluation.attributes import attribute_accuracy


def plain(*values: int) -> np.ndarray:
    return np.stack([np.full((32, 32, 3), value, np.uint8) for value in values])


GALLERY = plain(0, 100, 200)
KNOWN = {"shape": ["dot", "dot", "bar"], "count": [1, 2, 2], "unasked": "xyz"}


def test_attributes_are_those_of_the_nearest_picture() -> None:
    wanted = {"shape": ["dot", "bar", "dot"], "count": [1, 2, 3]}
    result = attribute_accuracy(plain(10, 110, 190), wanted, GALLERY, KNOWN)
    assert result.names == ("shape", "count")
    assert result.right.tolist() == [[True, True], [False, True], [False, False]]
    assert result.all_right.tolist() == [True, False, False]
    assert result.shares == {"shape": pytest.approx(1 / 3), "count": pytest.approx(2 / 3)}
    assert result.share_all_right == pytest.approx(1 / 3)


def test_a_tie_is_right_if_one_of_the_nearest_is() -> None:
    """150 is as far from 100 (dot, 2) as from 200 (bar, 2); 51 is nearer to 100 than to 0."""
    drawn = plain(150, 150, 51)
    wanted = {"shape": ["dot", "bar", "dot"], "count": [2, 2, 1]}
    result = attribute_accuracy(drawn, wanted, GALLERY, KNOWN)
    assert result.right.tolist() == [[True, True], [True, True], [True, False]]


def test_all_right_asks_for_one_picture_that_has_everything() -> None:
    known = {"shape": ["dot", "bar"], "count": [1, 2]}
    wanted = {"shape": ["dot"], "count": [2]}
    result = attribute_accuracy(plain(50), wanted, plain(0, 100), known)
    assert result.right.tolist() == [[True, True]]
    assert result.all_right.tolist() == [False]


def test_one_step_of_one_channel_decides_and_equality_is_exact() -> None:
    """Sums of 3072 squares of up to 255 do not fit float32; the answer must not round."""
    near, far = plain(255, 255)
    far[31, 31, 2] = 254
    drawn = plain(0, 0)
    drawn[1, 31, 31, 2] = 255
    gallery, known = np.stack([near, far]), {"which": ["near", "far"]}
    for order in ([0, 1], [1, 0]):
        shuffled = {"which": [known["which"][i] for i in order]}
        for asked, right in (("far", [True, False]), ("near", [False, True])):
            result = attribute_accuracy(drawn, {"which": [asked] * 2}, gallery[order], shuffled)
            assert result.right[:, 0].tolist() == right


def test_pictures_of_the_same_pixels_in_another_order_are_tied() -> None:
    """From a plain picture all are equally far, in whatever order the squares are added."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(200, 256, size=32 * 32 * 3, dtype=np.uint8)
    gallery = np.stack([generator.permutation(pixels).reshape(32, 32, 3) for _ in range(20)])
    asked = {"which": list(range(20))}
    assert attribute_accuracy(plain(*[255] * 20), asked, gallery, asked).all_right.all()


@given(st.integers(0, 2**32))
def test_the_answer_is_that_of_brute_force(seed: int) -> None:
    """Few values, so that ties are common."""
    generator = np.random.default_rng(seed)
    drawn, gallery = (
        255 * generator.integers(2, size=(n, 1, 2, 3), dtype=np.uint8) for n in (7, 9)
    )
    known, asked = generator.integers(3, size=9), generator.integers(3, size=7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "BLOCK_ELEMENTS", 20)
        result = attribute_accuracy(drawn, {"a": asked.tolist()}, gallery, {"a": known.tolist()})
    distances = ((drawn[:, None].astype(int) - gallery) ** 2).sum(axis=(2, 3, 4))
    for i, row in enumerate(distances):
        assert result.right[i, 0] == (asked[i] in known[row == row.min()])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"drawn": plain(0).astype(np.float32)},
            "drawn of type float32 and shape (1, 32, 32, 3) is not allowed: "
            "pictures are uint8 (N, S, S, 3) with N >= 1",
        ),
        (
            {"gallery": plain(0)[:0]},
            "gallery of type uint8 and shape (0, 32, 32, 3) is not allowed: "
            "pictures are uint8 (N, S, S, 3) with N >= 1",
        ),
        (
            {"drawn": plain(0)[:, :16]},
            "drawn has pictures of (16, 32, 3): gallery has (32, 32, 3), "
            "and both must have the same",
        ),
        (
            {"wanted": {"size": [1]}},
            "wanted=['size'] is not allowed: one or more of ['count', 'shape', 'unasked']",
        ),
        (
            {"wanted": {}},
            "wanted=[] is not allowed: one or more of ['count', 'shape', 'unasked']",
        ),
        (
            {"wanted": {"count": [1, 2]}},
            "wanted['count'] has 2 values: there are 1 pictures",
        ),
        (
            {"attributes": {"count": [1]}},
            "attributes['count'] has 1 values: there are 3 pictures",
        ),
    ],
)
def test_what_is_refused(change: dict[str, Any], message: str) -> None:
    arguments = {
        "drawn": plain(0),
        "wanted": {"count": [1]},
        "gallery": GALLERY,
        "attributes": KNOWN,
    }
    with pytest.raises(EvaluationError, match=f"^{re.escape(message)}$"):
        attribute_accuracy(**(arguments | change))
