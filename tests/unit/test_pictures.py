"""Picture files: records that come back, sizes, and files of strangers."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from paris_ray.errors import PictureError
from paris_ray.pictures import (
    FORMATS,
    MAX_JPEG_RECORD_BYTES,
    PictureFormat,
    encode_picture,
    read_picture,
    sparse_weights,
)
from tests.records import RECORD


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def opened(file: bytes) -> Image.Image:
    return Image.open(io.BytesIO(file))


@pytest.mark.parametrize("output_format", FORMATS)
def test_a_record_comes_back(pixels: np.ndarray, output_format: PictureFormat) -> None:
    file = encode_picture(pixels, RECORD, output_format)
    assert read_picture(file) == (RECORD, output_format)
    assert file == encode_picture(pixels, RECORD, output_format)
    assert opened(file).format == output_format.upper()
    assert opened(file).size == (32, 32)


def test_a_png_has_the_pixels_as_drawn(pixels: np.ndarray) -> None:
    np.testing.assert_array_equal(np.asarray(opened(encode_picture(pixels, RECORD, "png"))), pixels)


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_compression_makes_files_smaller(pixels: np.ndarray, output_format: PictureFormat) -> None:
    sizes = [
        len(encode_picture(pixels, replace(RECORD, output_compression=quality), output_format))
        for quality in (1, 50, 100)
    ]
    assert sizes == sorted(set(sizes))
    default = encode_picture(pixels, RECORD, output_format)
    best = encode_picture(pixels, replace(RECORD, output_compression=100), output_format)
    assert np.array_equal(np.asarray(opened(default)), np.asarray(opened(best)))


def test_other_sizes_are_resized_by_lanczos(pixels: np.ndarray) -> None:
    for size in (8, 100):
        record = replace(RECORD, size=size, resize_filter="lanczos")
        expected = Image.fromarray(pixels).resize((size, size), Image.Resampling.LANCZOS)
        got = opened(encode_picture(pixels, record, "png"))
        np.testing.assert_array_equal(np.asarray(got), np.asarray(expected))


def test_a_jpeg_holds_the_mean_of_weights_that_are_too_long(pixels: np.ndarray) -> None:
    weights = sparse_weights(np.full((1000, 8), 0.125).tolist())
    record = replace(RECORD, expert_weights=weights)
    assert len(record.to_json()) > MAX_JPEG_RECORD_BYTES
    assert read_picture(encode_picture(pixels, record, "png"))[0] == record
    assert read_picture(encode_picture(pixels, record, "webp"))[0] == record
    short, _ = read_picture(encode_picture(pixels, record, "jpeg"))
    assert short == replace(record, expert_weights=[dict.fromkeys(range(8), 0.125)])


def test_weights_are_sparse_and_short() -> None:
    assert sparse_weights([[0.0, 1 / 3, 2 / 3], [1.0, 0.0, 0.0]]) == [
        {1: 0.3333, 2: 0.6667},
        {0: 1.0},
    ]


def png(text: str | None) -> bytes:
    info = PngInfo()
    if text is not None:
        info.add_text("paris_ray", text)
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2)).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def gif() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2)).save(buffer, "GIF")
    return buffer.getvalue()


VALID = RECORD.to_json().decode()


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_damaged_exif_is_refused(pixels: np.ndarray, output_format: PictureFormat) -> None:
    file = encode_picture(pixels, RECORD, output_format)
    with pytest.raises(PictureError, match=r"damaged|carries no record"):
        read_picture(file.replace(b"MM\x00*", b"MM\x01*"))


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (b"", "not a PNG, JPEG or WebP"),
        (b"GIF89a", "not a PNG, JPEG or WebP"),
        (gif(), "not a PNG, JPEG or WebP"),
        (png(VALID)[:40], "not a PNG, JPEG or WebP|no record"),
        (png(None), "carries no record of paris_ray"),
        (png("no json"), "record is damaged: it: Invalid JSON"),
        (png("{}"), "record is damaged: software: Field required"),
        (png(VALID.replace('"seed":', '"seed":"1","x":')), "record is damaged"),
        (png(VALID.replace('"size":32', '"size":"32"')), "record is damaged: size"),
        (png(VALID.replace("bfloat16", "int4")), "record is damaged: dtype"),
    ],
)
def test_files_of_strangers_are_refused(file: bytes, message: str) -> None:
    with pytest.raises(PictureError, match=message):
        read_picture(file)
