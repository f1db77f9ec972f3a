"""Caption recall: what is a hit, and the error that goes with it."""

import numpy as np

from paris_ray.evaluation.recall import caption_recall

CAPTIONS = ["flag", "cat", "flag"]


def plain(*values: int) -> np.ndarray:
    return np.stack([np.full((32, 32, 3), value, np.uint8) for value in values])


GALLERY = plain(0, 100, 200)


def test_the_corpus_itself_is_all_hits() -> None:
    result = caption_recall(GALLERY, np.arange(3), GALLERY, CAPTIONS)
    assert result.nearest.tolist() == [0, 1, 2]
    assert result.hit.all()
    assert not result.squared_error.any()


def test_identical_captions_are_hits_and_others_are_not() -> None:
    drawn = plain(190, 190, 90)
    result = caption_recall(drawn, np.array([0, 1, 2]), GALLERY, CAPTIONS)
    assert result.nearest.tolist() == [2, 2, 1]
    assert result.hit.tolist() == [True, False, False]


def test_the_error_is_to_the_own_picture_in_unit_range() -> None:
    result = caption_recall(plain(255, 51), np.array([0, 1]), GALLERY, CAPTIONS)
    np.testing.assert_allclose(result.squared_error, [2.0**2, (49 / 127.5) ** 2], rtol=1e-5)


def test_where_captions_are_shared_chance_says_how_little_a_hit_is() -> None:
    own = np.arange(3)
    assert caption_recall(GALLERY, own, GALLERY, ["one"] * 3).by_chance == 1
    assert caption_recall(GALLERY, own, GALLERY, ["a", "b", "c"]).by_chance == 1 / 3
    assert caption_recall(GALLERY, own, GALLERY, CAPTIONS).by_chance == (2 + 1 + 2) / 9
