"""Which rows repeat earlier ones, against the plain definition."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from paris_ray import duplicates
from paris_ray.clustering import nearest
from paris_ray.corpora.perceptual_hash import perceptual_hashes
from paris_ray.duplicates import (
    HASH_BITS,
    Hashes,
    Mask,
    bands,
    comparable_caption,
    equal_to_earlier,
    fit_cells,
    hashes_of,
    near_earlier,
    num_cells,
    similar_to_earlier,
)


def near_by_definition(hashes: Hashes, distance: int) -> Mask:
    values = hashes.tolist()
    return np.array(
        [any((a ^ b).bit_count() <= distance for b in values[:i]) for i, a in enumerate(values)],
        bool,
    )


def near_in_bands(hashes: Hashes, distance: int) -> Mask:
    found = [near_earlier(hashes, distance, band) for band in bands(distance)]
    return np.logical_or.reduce(found)


def planted(seed: int, num_rows: int, distance: int) -> Hashes:
    """Return hashes of which half differ from another in about `distance` bits, some in none."""
    generator = np.random.default_rng(seed)
    hashes = generator.integers(0, 2**64, num_rows, dtype=np.uint64)
    for row in range(1, num_rows, 2):
        bits = generator.choice(HASH_BITS, generator.integers(0, distance + 2), replace=False)
        changed = sum(1 << int(bit) for bit in bits)
        hashes[row] = hashes[generator.integers(0, row)] ^ np.uint64(changed)
    return generator.permutation(hashes)


@given(st.integers(0, 2**32), st.integers(0, 120), st.integers(0, 16))
def test_bands_find_what_comparing_all_pairs_finds(seed: int, num_rows: int, distance: int) -> None:
    hashes = planted(seed, num_rows, distance)
    assert np.array_equal(near_in_bands(hashes, distance), near_by_definition(hashes, distance))


@given(st.integers(0, 2**32), st.integers(0, 120), st.integers(0, 16))
def test_of_what_is_left_no_two_are_near(seed: int, num_rows: int, distance: int) -> None:
    hashes = planted(seed, num_rows, distance)
    left = hashes[~near_in_bands(hashes, distance)]
    assert not near_by_definition(left, distance).any()


@pytest.mark.parametrize("block", [1, 7, 50, 1024])
def test_blocks_of_a_crowded_band_change_nothing(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "HASHES_A_BLOCK", block)
    generator = np.random.default_rng(1)
    hashes = generator.integers(0, 2**20, 200, dtype=np.uint64)  # equal in most bands
    hashes[::3] = 0
    assert np.array_equal(near_in_bands(hashes, 4), near_by_definition(hashes, 4))


@pytest.mark.parametrize("distance", range(17))
def test_bands_cut_a_hash_into_pieces_without_gaps(distance: int) -> None:
    found = bands(distance)
    bits = [bit for first, width in found for bit in range(first, first + width)]
    assert bits == list(range(HASH_BITS))
    assert len(found) == distance + 1


def test_equal_hashes_cost_no_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    def compared(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(duplicates, "_matches_earlier", compared)
    assert near_earlier(np.zeros(100_000, np.uint64), 4, (0, 13)).sum() == 99_999


def test_all_but_the_first_of_equal_ones_repeat() -> None:
    repeats = equal_to_earlier(np.array([5, 3, 5, 3, 1], np.uint64))
    assert repeats.tolist() == [False, False, True, True, False]
    assert equal_to_earlier(hashes_of([])).tolist() == []


@pytest.mark.parametrize(
    "other",
    ["A red cat.", "a  red\tcat", "\u201ca red cat!\u201d", "\uff21 red CAT", "a r\u00aded cat"],
)
def test_captions_are_compared_without_case_punctuation_and_space(other: str) -> None:
    assert comparable_caption(other) == "a red cat"


def test_captions_keep_what_tells_them_apart() -> None:
    told = ["a cat", "cat", "a cat 2", "\u2764 a cat", "c\u00e1t a", "...", "!", "a\u0301 cat"]
    assert len({comparable_caption(caption) for caption in told}) == len(told)
    assert comparable_caption("stra\u00dfe") == comparable_caption("STRASSE")


def pictures(side: int) -> np.ndarray:
    """Return twenty pictures of coloured clouds, the same ones of any size."""
    clouds = np.random.default_rng(0).integers(0, 256, (20, 9, 9, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(each).resize((side, side))) for each in clouds])


def test_similar_pictures_have_similar_hashes() -> None:
    hashes = perceptual_hashes(pictures(64))
    assert hashes.dtype == np.uint64
    noise = np.random.default_rng(1).integers(-6, 7, (20, 64, 64, 3))
    noisy = np.clip(pictures(64) + noise, 0, 255).astype(np.uint8)
    for similar in (noisy, pictures(48), pictures(200)):
        assert np.bitwise_count(perceptual_hashes(similar) ^ hashes).max() <= 8
    others = np.bitwise_count(hashes[:, None] ^ hashes)[~np.eye(20, dtype=bool)]
    assert others.min() > 8


def test_the_hash_of_a_picture_is_fixed() -> None:
    ramp = np.arange(32, dtype=np.uint8) * 8
    slope = np.broadcast_to(ramp[None, :, None], (32, 32, 3))
    blank = np.full((32, 32, 3), 200, np.uint8)
    # A slope from left to right has no frequency that changes downwards.
    assert perceptual_hashes(np.stack([slope, blank])).tolist() == [0, 0]
    corner = np.zeros((1, 32, 32, 3), np.uint8)
    corner[0, :16, :16] = 255
    assert perceptual_hashes(corner).tolist() == perceptual_hashes(corner // 2 + 30).tolist()


def unit_rows(seed: int, num_rows: int, width: int) -> np.ndarray:
    """Return random directions of which a third are next to others."""
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(num_rows, width))
    near = np.arange(num_rows // 3) * 3
    features[near] = features[generator.integers(0, num_rows, len(near))]
    features[near] += generator.normal(scale=0.05, size=(len(near), width))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    return features.astype(np.float32)


def similar_by_definition(features: np.ndarray, cells: np.ndarray, bound: float) -> Mask:
    similar = (features @ features.T > bound) & (cells[:, None] == cells)
    return np.tril(similar, -1).any(axis=1)


@pytest.mark.parametrize("block", [3, 64, 2048])
def test_similar_rows_of_a_cell_are_found_in_blocks(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "FEATURES_A_BLOCK", block)
    features = unit_rows(0, 500, 16)
    cells = np.random.default_rng(1).integers(0, 5, 500) ** 2 // 8  # one holds most of them
    found = similar_to_earlier(features, cells, 0.9)
    assert np.array_equal(found, similar_by_definition(features, cells, 0.9))
    assert 20 < found.sum() < 200


def test_cells_part_few_rows_that_are_similar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "ROWS_A_CELL", 100)
    features = unit_rows(2, 1000, 16)
    assert num_cells(1000) == 10
    cells = nearest(features, fit_cells(features, 10, 3))
    assert np.array_equal(cells, nearest(features, fit_cells(features, 10, 3)))
    found = similar_to_earlier(features, cells, 0.9)
    assert np.array_equal(found, similar_by_definition(features, cells, 0.9))
    everywhere = similar_by_definition(features, np.zeros(1000), 0.9)
    assert not (found & ~everywhere).any()
    assert found.sum() > 0.8 * everywhere.sum()  # the rest lies across a border


def test_few_rows_are_one_cell() -> None:
    features = unit_rows(5, 2, 4)[[0, 0, 1]]
    cells = nearest(features, fit_cells(features, num_cells(3), 0))
    assert similar_to_earlier(features, cells, 0.9999).tolist()[:2] == [False, True]
