"""PNG as generators of pictures write it: prompts and workflows of any size beside the pixels."""

import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from paris_ray.config import CorpusConfig
from paris_ray.corpora.pixels import decode
from paris_ray.corpora.png import without_ballast
from tests.picture_files import BLUE, PNG_SIGNATURE, RED, encode, plain, png_of_row

CONFIG = CorpusConfig(image_size=8, background=BLUE)
TEXT = np.random.default_rng(0).integers(32, 127, 3_000_000, dtype=np.uint8).tobytes()
LARGE = {
    "tEXt": (b"tEXt", b"prompt\0" + TEXT),
    "zTXt": (b"zTXt", b"workflow\0\0" + zlib.compress(TEXT, 1)),
    "iTXt": (b"iTXt", b"workflow\0\0\0\0\0" + TEXT),
    "iTXt, deflated": (b"iTXt", b"workflow\0\1\0en\0\0" + zlib.compress(TEXT, 1)),
    "XMP": (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + TEXT),
    "XMP, deflated": (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(TEXT, 1)),
    "EXIF in hexadecimals": (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(TEXT, 1)),
    "profile": (b"iCCP", b"icc\0\0" + zlib.compress(TEXT, 1)),
}
BOMB = zlib.compress(bytes(20_000_000), 1)


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def with_chunk(encoded: bytes, added: bytes, behind_pixels: bool) -> bytes:
    at = encoded.index(b"IEND") - 4 if behind_pixels else encoded.index(b"IDAT") - 4
    return encoded[:at] + added + encoded[at:]


@pytest.mark.parametrize("kind", LARGE)
@pytest.mark.parametrize("behind_pixels", [False, True])
def test_large_chunks_do_not_cost_the_picture(kind: str, behind_pixels: bool) -> None:
    encoded = with_chunk(encode(plain()), chunk(*LARGE[kind]), behind_pixels)
    assert (decode(encoded, CONFIG) == RED).all()


def test_many_texts_do_not_cost_the_picture() -> None:
    text = chunk(b"zTXt", b"prompt\0\0" + zlib.compress(bytes(1_000_000)))
    assert (decode(with_chunk(encode(plain()), text * 100, False), CONFIG) == RED).all()


@pytest.mark.parametrize(
    "begin", [b"zTXtprompt\0\0", b"zTXtRaw profile type exif\0\0", b"iCCPi\0\0"]
)
def test_memory_is_bounded(begin: bytes) -> None:
    encoded = with_chunk(encode(plain()), chunk(begin[:4], begin[4:] + BOMB), False)
    tracemalloc.start()
    assert (decode(encoded, CONFIG) == RED).all()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000


def test_a_text_with_the_orientation_is_followed() -> None:
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8] = 255
    xmp = b"XML:com.adobe.xmp\0\0\0\0\0" + b'<rdf tiff:Orientation="6"/>'
    encoded = with_chunk(encode(Image.fromarray(pixels)), chunk(b"iTXt", xmp), False)
    upright = decode(encoded, CONFIG)
    assert upright[:, 6:].min() > 200 and upright[:, :2].max() < 50


def test_nothing_is_copied_in_vain() -> None:
    encoded = encode(plain(), exif=Image.Exif())
    assert without_ballast(encoded) is encoded
    text = chunk(b"tEXt", b"prompt\0a cat")
    for behind_pixels in (False, True):
        assert without_ballast(with_chunk(encoded, text, behind_pixels)) == encoded


@pytest.mark.parametrize("kept", [0, 3, 8, 12, 33, 40, 60])
def test_what_is_damaged_is_left_as_it_is(kept: int) -> None:
    encoded = encode(plain())[:kept]
    assert without_ballast(encoded) is encoded
    huge = PNG_SIGNATURE + b"\xff\xff\xff\xfftEXt" + encoded
    assert without_ballast(huge) is huge


@pytest.mark.parametrize(
    ("depth", "colour_type", "row", "colour"),
    [
        (1, 0, b"\xff", (1,)),
        (2, 0, b"\xaa\xaa", (2,)),
        (4, 0, b"\x55" * 4, (5,)),
        (8, 0, b"\x55" * 8, (0x55,)),
        (16, 0, b"\x55\x66" * 8, (0x5566,)),
        (8, 2, b"\x11\x22\x33" * 8, (0x11, 0x22, 0x33)),
        (16, 2, b"\x11\x99\x22\x99\x33\x99" * 8, (0x1199, 0x2299, 0x3399)),
    ],
)
def test_the_transparent_colour_at_every_depth(
    depth: int, colour_type: int, row: bytes, colour: tuple[int, ...]
) -> None:
    opaque = decode(png_of_row(depth, colour_type, row), CONFIG)
    assert (opaque != BLUE).any(axis=-1).all()
    transparent = (b"tRNS", struct.pack(f">{len(colour)}H", *colour))
    assert (decode(png_of_row(depth, colour_type, row, transparent), CONFIG) == BLUE).all()
    other = (b"tRNS", struct.pack(f">{len(colour)}H", *(0 for _ in colour)))
    assert (decode(png_of_row(depth, colour_type, row, other), CONFIG) == opaque).all()
