"""Colours as any viewer shows them: profiles, gamma, deep greys, transparency."""

import io
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pillow_heif
import pillow_jxl  # noqa: F401  registers its encoder
import pytest
from PIL import Image, ImageCms

from paris_ray.config import CorpusConfig
from paris_ray.corpora.pixels import decode
from paris_ray.corpora.profiles import CURVES, PRIMARIES
from tests.picture_files import (
    ADOBE_RGB,
    BLUE,
    DISPLAY_P3,
    RED,
    SRGB,
    WHITE,
    cmyk_profile,
    encode,
    grey_profile,
    plain,
    png_of_row,
    rgb_profile,
    shown,
)

pillow_heif.register_heif_opener()
CONFIG = CorpusConfig(image_size=8)
COLOR = (200, 90, 60)
LAB_OF_RED = (138, 209, 198)  # of sRGB's, under D50: 54.3, 80.8, 69.9
LOSSLESS = {
    "PNG": {},
    "TIFF": {},
    "JPEG": {"quality": 100, "subsampling": 0},
    "WEBP": {"lossless": True},
    "AVIF": {"quality": 100, "subsampling": "4:4:4"},
    "HEIF": {"quality": -1, "chroma": 444},
}


def differs(encoded: bytes, expected: Any, config: CorpusConfig = CONFIG) -> int:
    return int(np.abs(decode(encoded, config).astype(int) - np.asarray(expected)).max())


class TestProfiles:
    @pytest.mark.parametrize("image_format", LOSSLESS)
    @pytest.mark.parametrize("primaries", [ADOBE_RGB, DISPLAY_P3], ids=["Adobe RGB", "P3"])
    def test_wide_gamut(self, image_format: str, primaries: Any) -> None:
        expected = shown(COLOR, primaries, 2.2)
        assert np.abs(expected - COLOR).max() > 10
        options = {"icc_profile": rgb_profile(primaries, 2.2), **LOSSLESS[image_format]}
        assert differs(encode(plain(COLOR), image_format, **options), expected) <= 3

    def test_colours_under_transparency(self) -> None:
        profile = rgb_profile(DISPLAY_P3, 2.2)
        half = encode(plain((*COLOR, 128), mode="RGBA"), icc_profile=profile)
        expected = (shown(COLOR, DISPLAY_P3, 2.2) * 128 + 255 * 127) / 255
        assert differs(half, expected) <= 2

    def test_palettes(self) -> None:
        image = plain(0, mode="P")
        image.putpalette(COLOR)
        encoded = encode(image, icc_profile=rgb_profile(ADOBE_RGB, 2.2))
        assert differs(encoded, shown(COLOR, ADOBE_RGB, 2.2)) <= 2

    def test_greys(self) -> None:
        expected = shown((100, 100, 100), SRGB, 1.8)
        grey = plain(100, mode="L")
        assert differs(encode(grey, icc_profile=grey_profile(1.8)), expected) <= 1
        assert differs(encode(grey, icc_profile=rgb_profile(SRGB, 1.8)), expected) <= 1
        deep = Image.fromarray(np.full((8, 8), 100 * 257, np.uint16))
        assert differs(encode(deep, icc_profile=grey_profile(1.8)), expected) <= 1

    @pytest.mark.parametrize("image_format", ["JPEG", "TIFF"])
    def test_inks(self, image_format: str) -> None:
        profile = cmyk_profile(LAB_OF_RED)
        cyan = plain((255, 0, 0, 0), mode="CMYK")
        assert differs(encode(cyan, image_format, icc_profile=profile), RED) <= 6
        paper = plain((0, 0, 0, 0), mode="CMYK")
        assert differs(encode(paper, image_format, icc_profile=profile), WHITE) <= 1
        assert differs(encode(cyan, image_format), (0, 255, 255)) <= 4

    def test_cielab(self) -> None:
        red = plain(LAB_OF_RED, mode="LAB")
        assert differs(encode(red, "TIFF"), RED) <= 6

    def test_copies_of_srgb_change_nothing(self) -> None:
        pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        target = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
        copy = bytearray(target.tobytes())
        green = 12 + int.from_bytes(copy[(at := copy.index(b"gXYZ") + 4) : at + 4])
        nudged = int.from_bytes(copy[green : green + 4]) + 30  # of 65536: as if rounded elsewhere
        copy[green : green + 4] = nudged.to_bytes(4)
        source = ImageCms.ImageCmsProfile(io.BytesIO(bytes(copy)))
        moved = ImageCms.profileToProfile(Image.fromarray(pixels), source, target)
        assert 0 < np.abs(np.asarray(moved, int) - pixels).max() <= 1
        assert differs(encode(Image.fromarray(pixels), icc_profile=bytes(copy)), pixels) == 0

    @pytest.mark.parametrize(
        "profile",
        [
            b"not a profile",
            rgb_profile(ADOBE_RGB, 2.2)[:200],
            rgb_profile(ADOBE_RGB, 2.2).replace(b"RGB XYZ ", b"5CLRXYZ "),
            rgb_profile(ADOBE_RGB, 2.2).replace(b"curv", b"vruc"),
            rgb_profile(ADOBE_RGB, 2.2) + bytes(5_000_000),
            grey_profile(1.8),  # of another kind of picture
            cmyk_profile((0, 0, 0)),
        ],
    )
    def test_a_damaged_or_foreign_profile_is_ignored(self, profile: bytes) -> None:
        options = LOSSLESS["JPEG"]
        assert differs(encode(plain(COLOR), "TIFF", icc_profile=profile), COLOR) == 0
        grey = plain(100, mode="L")
        if profile[16:20] != b"GRAY":
            assert differs(encode(grey, "TIFF", icc_profile=profile), 100) == 0
        assert differs(encode(plain(COLOR), "JPEG", icc_profile=profile, **options), COLOR) <= 3


class TestGamma:
    """What a PNG of pixels 55 shows: a gAMA of 1 means linear light."""

    ROW = bytes((55, 55, 55)) * 8
    LINEAR = (b"gAMA", struct.pack(">I", 100_000))

    def test_is_followed(self) -> None:
        expected = round(255 * (55 / 255) ** (1 / 2.2))
        assert differs(png_of_row(8, 2, self.ROW, self.LINEAR), expected) == 0

    @pytest.mark.parametrize("gamma", [0, 1, 45_455, 2**32 - 1])
    def test_that_of_srgb_or_nonsense_changes_nothing(self, gamma: int) -> None:
        chunk = (b"gAMA", struct.pack(">I", gamma))
        assert differs(png_of_row(8, 2, self.ROW, chunk), 55) == 0

    def test_a_file_that_says_srgb_is_believed(self) -> None:
        assert differs(png_of_row(8, 2, self.ROW, self.LINEAR, (b"sRGB", b"\0")), 55) == 0


def chrm(primaries: Any) -> tuple[bytes, bytes]:
    numbers = np.array([primaries[3], *primaries[:3]]).ravel() * 100_000
    return b"cHRM", struct.pack(">8I", *map(round, numbers))


def light_of_video(levels: Any) -> Any:
    return np.where(levels < 0.081, levels / 4.5, ((levels + 0.099) / 1.099) ** (1 / 0.45))


def light_of_srgb(levels: Any) -> Any:
    return np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)


# ITU-T H.273, tables 2 and 3.
BT2020 = ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046), (0.3127, 0.3290))
NUMBERED: dict[int, Any] = {1: SRGB, 9: BT2020, 12: DISPLAY_P3}
LIGHT: dict[int, Callable[[Any], Any]] = {
    **dict.fromkeys((1, 6, 14, 15), light_of_video),
    4: lambda levels: levels**2.2,
    8: lambda levels: levels,
    13: light_of_srgb,
}


class TestNumbers:
    """What a PNG says of its colours by numbers."""

    ROW = bytes(COLOR) * 8
    P3 = (b"cICP", bytes((12, 13, 0, 1)))  # Display P3, the curve of sRGB
    LINEAR = (b"gAMA", struct.pack(">I", 100_000))

    @pytest.mark.parametrize("primaries", [ADOBE_RGB, DISPLAY_P3], ids=["Adobe RGB", "P3"])
    @pytest.mark.parametrize("gamma", [1.8, 1.0])
    def test_primaries_are_followed_with_the_gamma(self, primaries: Any, gamma: float) -> None:
        chunk = (b"gAMA", struct.pack(">I", round(100_000 / gamma)))
        expected = shown(COLOR, primaries, gamma)
        assert np.abs(expected - COLOR).max() > 10
        assert differs(png_of_row(8, 2, self.ROW, chrm(primaries), chunk), expected) <= 1

    def test_those_of_srgb_change_nothing(self) -> None:
        rounded = [(x + 0.001, y) for x, y in SRGB]
        assert differs(png_of_row(8, 2, self.ROW, chrm(rounded)), COLOR) == 0
        assert differs(png_of_row(8, 2, self.ROW, (b"sRGB", b"\0"), chrm(DISPLAY_P3)), COLOR) == 0
        assert differs(png_of_row(8, 2, self.ROW, (b"cICP", bytes((1, 13, 0, 1)))), COLOR) == 0

    def test_primaries_by_number_count_before_all_else(self) -> None:
        grid = np.linspace(0, 255, 8).astype(int)
        for color in [COLOR, *zip(grid, grid[::-1], [40] * 8, strict=True)]:
            row = bytes(int(level) for level in color) * 8
            expected = decode(png_of_row(8, 2, row, chrm(DISPLAY_P3)), CONFIG)
            others = ((b"sRGB", b"\0"), self.LINEAR, chrm(ADOBE_RGB))
            assert differs(png_of_row(8, 2, row, self.P3, *others), expected) <= 1
        assert differs(png_of_row(8, 2, self.ROW, self.P3), COLOR) > 10

    @pytest.mark.parametrize("curve", LIGHT)
    @pytest.mark.parametrize("primaries", NUMBERED)
    def test_all_numbers_mean_what_the_standard_says(self, primaries: int, curve: int) -> None:
        light = LIGHT[curve](np.array(COLOR) / 255)
        expected = shown(255 * light, NUMBERED[primaries], 1.0)
        chunk = (b"cICP", bytes((primaries, curve, 0, 1)))
        assert differs(png_of_row(8, 2, self.ROW, chunk), expected) <= 1

    def test_no_number_is_followed_without_a_test(self) -> None:
        assert (PRIMARIES.keys(), CURVES.keys()) == (NUMBERED.keys(), LIGHT.keys())

    @pytest.mark.parametrize(
        "chunk",
        [
            (b"cICP", bytes((9, 16, 0, 1))),  # HDR
            (b"cICP", bytes((12, 13, 0, 0))),  # of a narrow range
            (b"cICP", bytes((77, 13, 0, 1))),
            (b"cICP", b"\x0c"),
            (b"cHRM", bytes(32)),
            (b"cHRM", b"\xff" * 32),
            chrm([(0.3, 0.3)] * 4),  # one colour four times
        ],
    )
    def test_what_is_unknown_or_nonsense_changes_nothing(self, chunk: tuple[bytes, bytes]) -> None:
        assert differs(png_of_row(8, 2, self.ROW, chunk), COLOR) == 0


class TestDeepPictures:
    RAMP = np.linspace(0, 1, 8, dtype=np.float32)[None].repeat(8, axis=0)
    EXPECTED = np.round(255 * RAMP)[..., None]

    @pytest.mark.parametrize("image_format", ["PNG", "TIFF", "PPM", "JPEG2000"])
    def test_sixteen_bits(self, image_format: str) -> None:
        deep = Image.fromarray((self.RAMP * 65535).astype(np.uint16))
        assert differs(encode(deep, image_format), self.EXPECTED) <= 1

    def test_sixteen_bits_a_channel(self) -> None:
        row = np.repeat((self.RAMP[0] * 65535).astype(">u2"), 3).tobytes()
        assert differs(png_of_row(16, 2, row), self.EXPECTED) <= 1

    @pytest.mark.parametrize("brightest", [1, 255, 65535])
    def test_floats_up_to_what_is_usual(self, brightest: int) -> None:
        deep = Image.fromarray(self.RAMP * brightest)
        assert differs(encode(deep, "TIFF"), self.EXPECTED) <= 1

    @pytest.mark.parametrize(("low", "high"), [(-3, 5), (100, 1e9), (-1e30, 1e38)])
    def test_other_floats_by_their_own_range(self, low: float, high: float) -> None:
        deep = Image.fromarray((low + (high - low) * self.RAMP.astype(float)).astype(np.float32))
        assert differs(encode(deep, "TIFF"), self.EXPECTED) <= 1

    def test_whole_numbers_of_32_bits(self) -> None:
        levels = (-(2**31) + (2**32 - 1) * self.RAMP.astype(float)).astype(np.int32)
        assert differs(encode(Image.fromarray(levels), "TIFF"), self.EXPECTED) <= 1

    @pytest.mark.parametrize("level", [-5, 70_000, np.nan, np.inf])
    def test_a_level_without_a_range_is_black(self, level: float) -> None:
        deep = Image.fromarray(np.full((8, 8), level, np.float32))
        assert differs(encode(deep, "TIFF"), 0) == 0

    def test_one_bit_and_palettes_of_greys(self) -> None:
        stripes = Image.fromarray(np.arange(64).reshape(8, 8) % 2 == 0)
        expected = np.asarray(stripes, int)[..., None] * 255
        for image_format in ("PNG", "TIFF", "BMP", "PPM"):
            assert differs(encode(stripes, image_format), expected) == 0


class TestTransparency:
    ON_BLUE = CorpusConfig(image_size=8, background=list(BLUE))

    @pytest.mark.parametrize("image_format", ["PNG", "WEBP", "TIFF", "AVIF", "HEIF", "JXL", "GIF"])
    def test_the_background_shows_through(self, image_format: str) -> None:
        clear = encode(plain((255, 0, 0, 0), mode="RGBA"), image_format)
        assert differs(clear, WHITE) <= 2
        assert differs(clear, BLUE, self.ON_BLUE) <= 2

    @pytest.mark.parametrize("mode", ["LA", "RGBA"])
    def test_half(self, mode: str) -> None:
        half = encode(plain((0, 128) if mode == "LA" else (0, 0, 0, 128), mode=mode))
        assert differs(half, (0, 0, 127), self.ON_BLUE) <= 1

    def test_palette_with_a_transparent_colour(self) -> None:
        image = plain(0, mode="P")
        image.putpalette([10, 20, 30, *BLUE])
        assert differs(encode(image), (10, 20, 30)) == 0
        assert differs(encode(image, transparency=0), BLUE, self.ON_BLUE) == 0
        assert differs(encode(image, transparency=bytes((0, 255))), WHITE) == 0

    @pytest.mark.parametrize(("alpha", "expected"), [(0, (200, 40, 40)), (255, (200, 40, 40))])
    def test_alpha_of_a_bitmap(self, alpha: int, expected: tuple[int, ...]) -> None:
        assert differs(bitmap([alpha] * 64), expected, self.ON_BLUE) == 0

    def test_alpha_of_a_bitmap_that_uses_it(self) -> None:
        half = decode(bitmap([0] * 32 + [255] * 32), self.ON_BLUE)  # from below
        assert (half[4:] == BLUE).all() and (half[:4] == (200, 40, 40)).all()


def bitmap(alphas: list[int]) -> bytes:
    """A BMP of 32 bits a pixel, whose header (version 4) says where alpha is."""
    pixels = b"".join(bytes((40, 40, 200, alpha)) for alpha in alphas)
    header = struct.pack("<IiiHHIIiiII", 108, 8, 8, 1, 32, 3, len(pixels), 2835, 2835, 0, 0)
    header += struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + b"BGRs" + bytes(48)
    begin = b"BM" + struct.pack("<IHHI", 14 + len(header) + len(pixels), 0, 0, 14 + len(header))
    return begin + header + pixels
