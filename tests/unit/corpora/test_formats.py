"""Formats: pictures are known by their bytes, and what is not read says why."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
import pillow_jxl
import pytest
from PIL import Image

from paris_ray.config import CorpusConfig
from paris_ray.corpora.jpeg import has_too_many_scans
from paris_ray.corpora.pixels import decode
from paris_ray.corpora.quarantine import REASONS, BadRow
from tests.picture_files import BLUE, RED, encode, plain

pillow_heif.register_heif_opener()
CONFIG = CorpusConfig(image_size=8, max_pixels=10_000)
# Each with a picture that it can hold.
MODES = {"XBM": "1", "MSP": "1"}
WRITTEN = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO", "PCX")
WRITTEN += ("QOI", "SGI", "DDS", "XBM", "MSP", "HEIF", "JXL")


def refusal(encoded: bytes, config: CorpusConfig = CONFIG) -> BadRow:
    with pytest.raises(BadRow) as bad:
        decode(encoded, config)
    assert bad.value.reason in REASONS and bad.value.detail
    return bad.value


def is_red(pixels: np.ndarray) -> bool:
    return bool(np.abs(pixels.astype(int) - RED).max() < 8)


@pytest.mark.parametrize("image_format", WRITTEN)
def test_pictures_are_known_by_their_bytes(image_format: str) -> None:
    mode = MODES.get(image_format)
    image = plain(size=(32, 16)) if mode is None else plain(0, (32, 16), mode)
    pixels = decode(encode(image, image_format), CONFIG)
    assert pixels.shape == (8, 8, 3) and pixels.dtype == np.uint8
    assert is_red(pixels) if mode is None else pixels.std() == 0


@pytest.mark.parametrize("image_format", ["AVIF", "HEIF"])
def test_a_general_brand_is_read_by_the_others(image_format: str) -> None:
    encoded = encode(plain(), image_format)
    assert is_red(decode(encoded[:8] + b"mif1" + encoded[12:], CONFIG))


@pytest.mark.parametrize("image_format", ["GIF", "PNG", "WEBP", "AVIF", "TIFF", "MPO", "HEIF"])
def test_the_first_of_several_pictures_is_taken(image_format: str) -> None:
    encoded = encode(plain(RED), image_format, save_all=True, append_images=[plain(BLUE)])
    assert is_red(decode(encoded, CONFIG))


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_is_not_gone_through_for_days(progressive: bool) -> None:
    """Nor is one refused for what lies behind it, such as a film, or in a field of it."""
    intact = encode(
        plain(size=(32, 16)), "JPEG", progressive=progressive, comment=b"\xff\xda" * 200
    )
    begin = intact.rindex(b"\xff\xda")
    assert is_red(decode(intact + intact[begin:-2] * 200, CONFIG))
    bad = refusal(intact[:begin] + intact[begin:-2] * 101 + intact[-2:])
    assert (bad.reason, bad.detail) == ("unsupported_image", "JPEG: of more than 100 scans")


@pytest.mark.parametrize("before", [b"\xff", b"\xff\x01", b"\xff\xd0", b"\xff\xd8", b"\xff\0"])
def test_what_has_no_length_hides_no_scan(before: bytes) -> None:
    """Nor does a long run of it take time that is squared: of 1 MB that would be hours."""
    intact = encode(plain(size=(32, 16)), "JPEG")
    begin = intact.rindex(b"\xff\xda")
    head, scan = intact[:begin], before + intact[begin:-2]
    run = before * ((1 << 20) // len(before))
    assert not has_too_many_scans(head + scan * 100 + run)
    assert has_too_many_scans(head + run + scan * 101)


def with_orientation(image_format: str, folder: Path) -> bytes:
    """A picture, white above and black below, that is to be turned clockwise."""
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(pixels)
    if image_format != "JPEG in JXL":
        return encode(image, image_format, exif=exif.tobytes())
    image.save(folder / "a.jpg", exif=exif)
    with Image.open(folder / "a.jpg") as jpeg:
        return encode(jpeg, "JXL", lossless_jpeg=True)


@pytest.mark.parametrize(
    "image_format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIF", "JPEG in JXL"]
)
def test_orientation_is_followed_once(image_format: str, tmp_path: Path) -> None:
    upright = decode(with_orientation(image_format, tmp_path), CONFIG).astype(int)
    assert upright[:, 6:].min() > 200 and upright[:, :2].max() < 50


def test_jpeg_xl_is_turned_by_its_decoder_alone(tmp_path: Path) -> None:
    pixels = decode(with_orientation("JXL", tmp_path), CONFIG)
    assert pixels[:2].min() > 200 and pixels[6:].max() < 50


@pytest.mark.parametrize(
    ("package", "image_format", "name"),
    [("pillow_heif", "HEIF", "HEIC"), ("pillow_jxl", "JXL", "JPEG XL")],
)
def test_a_missing_plug_in_is_named(
    package: str, image_format: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = encode(plain(), image_format)
    monkeypatch.setitem(sys.modules, package, None)
    bad = refusal(encoded)
    assert bad.reason == "unsupported_image"
    assert bad.detail.startswith(f"{name}: needs paris_ray[formats]")


@pytest.mark.parametrize(
    ("image_format", "name"),
    [
        *(("PNG", "PNG"), ("JPEG", "JPEG"), ("GIF", "GIF"), ("WEBP", "WEBP"), ("TIFF", "TIFF")),
        *(("AVIF", "AVIF"), ("JPEG2000", "JPEG"), ("HEIF", "HE"), ("JXL", "JPEG XL")),
    ],
)
def test_what_begins_well_is_truncated(image_format: str, name: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    encoded = encode(Image.fromarray(pixels), image_format)
    for kept in (len(encoded) // 2, 16):
        bad = refusal(encoded[:kept])
        assert bad.reason == "truncated_image" and bad.detail.startswith(name)


@pytest.mark.parametrize(
    "encoded",
    [
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%PDF-1.7 and so on",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",  # another program would draw it
        b"<!DOCTYPE html><title>404</title>",
        b"BMW owners meet on Sundays",
        b"\0\0\0\x18ftypisom\0\0\2\0isomiso2" + bytes(100),  # a film
        encode(plain(), "TGA"),  # without a signature
    ],
)
def test_what_is_no_picture_shows_how_it_begins(encoded: bytes) -> None:
    bad = refusal(encoded)
    assert bad.reason == "not_an_image" and repr(encoded[:8]) in bad.detail


class TestLimits:
    def test_of_bytes(self) -> None:
        encoded = encode(plain())
        config = CorpusConfig(image_size=8, max_image_bytes=len(encoded))
        assert is_red(decode(encoded, config))
        bad = refusal(encoded + b"\0", config)
        assert bad.reason == "too_many_bytes" and "corpus.max_image_bytes" in bad.detail

    @pytest.mark.parametrize("image_format", ["PNG", "TIFF", "AVIF", "JPEG2000", "HEIF", "JXL"])
    def test_of_pixels_before_they_are_decoded(
        self, image_format: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert is_red(decode(encode(plain(size=(100, 100)), image_format), CONFIG))
        encoded = encode(plain(size=(101, 100)), image_format)

        def decodes(*_: Any, **__: Any) -> None:
            raise AssertionError("pixels are decoded")

        monkeypatch.setattr(pillow_jxl.JpegXLImagePlugin, "Decoder", decodes)
        monkeypatch.setattr(Image.Image, "load", decodes)
        bad = refusal(encoded)
        assert bad.reason == "too_many_pixels" and bad.detail.startswith("101 x 100 pixels")

    def test_of_a_picture_that_is_larger_than_its_icon_says(self) -> None:
        icon = bytearray(encode(plain(size=(16, 16)), "ICO", sizes=[(16, 16)]))
        within = encode(plain(size=(200, 100)))
        icon[14:18] = len(within).to_bytes(4, "little")
        assert refusal(bytes(icon[:22]) + within).reason == "too_many_pixels"
