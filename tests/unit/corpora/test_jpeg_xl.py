"""The header of JPEG XL files, as their encoder writes it and as strangers may."""

import pillow_jxl  # noqa: F401  registers its encoder
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paris_ray.config import CorpusConfig
from paris_ray.corpora.jpeg_xl import Header, read_header
from paris_ray.corpora.pixels import decode
from paris_ray.corpora.quarantine import BadRow
from tests.picture_files import encode, plain

BOXED = b"\0\0\0\x0cJXL \r\n\x87\n"


def packed(*fields: tuple[int, int]) -> bytes:
    """A codestream that begins with fields, each a value and its number of bits."""
    value = shift = 0
    for field, bits in fields:
        value |= field << shift
        shift += bits
    return b"\xff\x0a" + value.to_bytes(shift // 8 + 1, "little")


def box(kind: bytes, content: bytes) -> bytes:
    return (8 + len(content)).to_bytes(4) + kind + content


EIGHT_BY_EIGHT = ((1, 1), (0, 5), (1, 3))
ANIMATED = packed(*EIGHT_BY_EIGHT, (0, 1), (1, 1), (0, 3), (0, 1), (0, 1), (1, 1))
LARGE = packed((0, 1), (3, 2), (2**30 - 1, 30), (7, 3), (1, 1))


@pytest.mark.parametrize(
    "size", [(1, 1), (8, 8), (256, 64), (7, 513), (9000, 2), (320, 240), (16, 9), (250, 200)]
)
@pytest.mark.parametrize("use_container", [False, True])
def test_sizes(size: tuple[int, int], use_container: bool) -> None:
    encoded = encode(plain(size=size), "JXL", effort=1, use_container=use_container)
    assert read_header(encoded) == Header(size, animated=False)


def test_fields_in_bits() -> None:
    assert read_header(ANIMATED) == Header((8, 8), animated=True)
    assert read_header(LARGE) == Header((2**31, 2**30), animated=False)
    preview = ((0, 1), (1, 1), (0, 3), (0, 1), (1, 1), (1, 1), (0, 2), (1, 3))
    assert read_header(packed(*EIGHT_BY_EIGHT, *preview, (1, 1))).animated
    shown_at = ((0, 1), (1, 1), (0, 3), (1, 1), *EIGHT_BY_EIGHT, (0, 1))
    assert read_header(packed(*EIGHT_BY_EIGHT, *shown_at, (1, 1))).animated


def test_a_header_may_lie_in_two_boxes() -> None:
    parts = box(b"jxlp", bytes(4) + LARGE[:3]) + box(b"jxlp", b"\0\0\0\1" + LARGE[3:])
    encoded = BOXED + box(b"ftyp", b"jxl \0\0\0\0jxl ") + parts
    assert read_header(encoded) == read_header(LARGE)


@pytest.mark.parametrize(
    ("encoded", "reason"),
    [
        (ANIMATED, "unsupported_image"),
        (LARGE, "too_many_pixels"),
        (BOXED + box(b"jxlc", LARGE), "too_many_pixels"),
        (BOXED + b"\0\0\0\1jxlc" + (2**63).to_bytes(8) + LARGE, "too_many_pixels"),
        (BOXED + box(b"free", b""), "truncated_image"),
        (LARGE[:4], "truncated_image"),
    ],
)
def test_reasons(encoded: bytes, reason: str) -> None:
    with pytest.raises(BadRow) as bad:
        decode(encoded, CorpusConfig())
    assert bad.value.reason == reason


@given(st.binary(max_size=80), st.booleans())
@settings(deadline=None, max_examples=200)
def test_arbitrary_bytes_end(content: bytes, boxed: bool) -> None:
    try:
        header = read_header((BOXED if boxed else b"\xff\x0a") + content)
    except ValueError:
        return
    assert all(0 < side <= 2**31 for side in header.size)
