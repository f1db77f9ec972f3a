"""Pixels: sizes and crops, damage, and what a row becomes in all."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from paris_ray.config import CorpusConfig
from paris_ray.corpora import REASONS, DecodedRow, QuarantinedRow, RawRow, decode_row
from tests.picture_files import GREEN, RED, encode, plain

CONFIG = CorpusConfig(image_size=8, max_pixels=10_000)


def noise_jpeg() -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return encode(Image.fromarray(pixels), "JPEG")


def png_header(width: int, height: int) -> bytes:
    """A well-formed PNG header that announces a size, and no pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT"


def decode(image: bytes | None, config: CorpusConfig = CONFIG) -> np.ndarray:
    row = decode_row(RawRow("k", image, "a caption"), config)
    assert isinstance(row, DecodedRow), row
    return row.image


def reason(image: bytes | None) -> str:
    row = decode_row(RawRow("k", image, "a caption"), CONFIG)
    assert isinstance(row, QuarantinedRow) and row.key == "k" and row.detail
    assert row.reason in REASONS
    return row.reason


class TestRows:
    def test_a_problem_of_the_reader_is_kept(self) -> None:
        row = decode_row(
            RawRow("k", encode(plain()), "a caption", "unreadable_shard", "why"), CONFIG
        )
        assert row == QuarantinedRow("k", "unreadable_shard", "why")

    def test_the_caption_is_cleaned_or_refused(self) -> None:
        row = decode_row(RawRow("k", encode(plain()), " a\n cat "), CONFIG)
        assert isinstance(row, DecodedRow) and row.caption == "a cat"
        row = decode_row(RawRow("k", encode(plain()), "\u200b"), CONFIG)
        assert isinstance(row, QuarantinedRow) and row.reason == "empty_caption"


class TestBadPictures:
    @pytest.mark.parametrize(
        ("image", "expected"),
        [
            (None, "missing_file"),
            (b"", "empty_image"),
            (noise_jpeg()[:1500], "truncated_image"),
            (noise_jpeg()[:12], "truncated_image"),
            (encode(plain())[:20], "truncated_image"),
            (encode(plain(), "WEBP")[:-6], "truncated_image"),
            (png_header(0, 5), "truncated_image"),
            (png_header(101, 100), "too_many_pixels"),
            (png_header(60_000, 60_000), "too_many_pixels"),
        ],
    )
    def test_reason(self, image: bytes | None, expected: str) -> None:
        assert reason(image) == expected

    def test_exactly_max_pixels_is_allowed(self) -> None:
        assert decode(encode(plain(size=(100, 100)))).shape == (8, 8, 3)

    def test_pillow_stays_strict_about_truncation(self) -> None:
        decode(encode(plain()))
        assert ImageFile.LOAD_TRUNCATED_IMAGES is False


class TestResizing:
    """A picture of noise, which every filter changes in another way, at 5.5 times the size."""

    ADM = CorpusConfig(image_size=8, max_pixels=10_000, resize="adm")

    @pytest.fixture
    def noise(self) -> Image.Image:
        pixels = np.random.default_rng(1).integers(0, 256, (44, 60, 3), dtype=np.uint8)
        return Image.fromarray(pixels)

    def test_adm_halves_by_averaging_and_then_resizes_by_cubics(self, noise: Image.Image) -> None:
        # 44 -> 22 -> 11 with a box; 11 is less than twice 8, so cubics do the rest, on the centre.
        halved = noise.resize((30, 22), Image.Resampling.BOX).resize((15, 11), Image.Resampling.BOX)
        centre = (2, 0, 13, 11)
        expected = halved.resize((8, 8), Image.Resampling.BICUBIC, box=centre)
        np.testing.assert_array_equal(decode(encode(noise), self.ADM), np.asarray(expected))

    def test_one_halving_is_the_average_of_four_pixels(self) -> None:
        pixels = np.random.default_rng(2).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        average = pixels.reshape(8, 2, 8, 2, 3).mean(axis=(1, 3))
        found = decode(encode(Image.fromarray(pixels)), self.ADM)
        assert np.abs(found - average).max() <= 1  # rounded once an axis

    def test_adm_leaves_a_picture_of_the_right_size_alone(self) -> None:
        pixels = np.random.default_rng(3).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        found = decode(encode(Image.fromarray(pixels)), self.ADM)
        np.testing.assert_array_equal(found, pixels)

    def test_lanczos_resizes_at_once(self, noise: Image.Image) -> None:
        box = (8, 0, 52, 44)
        expected = noise.resize((8, 8), Image.Resampling.LANCZOS, box=box)
        np.testing.assert_array_equal(decode(encode(noise)), np.asarray(expected))
        assert CONFIG.resize == "lanczos"
        assert (decode(encode(noise)) != decode(encode(noise), self.ADM)).any()


class TestPictures:
    def test_centre_of_the_longer_side_is_kept(self) -> None:
        wide = np.zeros((8, 24, 3), np.uint8)
        wide[:, 8:16] = GREEN
        assert (decode(encode(Image.fromarray(wide))) == GREEN).all()
        tall = wide.transpose(1, 0, 2).copy()
        assert (decode(encode(Image.fromarray(tall))) == GREEN).all()

    def test_sixteen_bits(self) -> None:
        values = np.full((8, 8), 0x8080, np.uint16)
        assert (decode(encode(Image.fromarray(values))) == 0x80).all()

    def test_damaged_exif_does_not_cost_the_picture(self) -> None:
        damaged = encode(
            Image.new("RGB", (8, 8), RED), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"
        )
        assert decode(damaged).shape == (8, 8, 3)
