"""What awaits a decoder of JPEG XL, read from the header: its plug-in for Pillow decodes at once.

Source: ISO/IEC 18181-1 (SizeHeader, ImageMetadata, PreviewHeader) and 18181-2 (boxes).
"""

from collections.abc import Iterator
from dataclasses import dataclass

_BOXED = b"\0\0\0\x0cJXL \r\n\x87\n"
_CODESTREAM = b"\xff\x0a"
_HEADER_BYTES = 64  # far more than the fields below take
# Width by height, as the numbers 1 to 7 say it.
_RATIOS = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))
# A number is coded by which of four widths it has, and what is added: (bits, offset).
_Coding = tuple[tuple[int, int], ...]
_SIZE: _Coding = ((9, 1), (13, 1), (18, 1), (30, 1))
_PREVIEW: _Coding = ((6, 1), (8, 65), (10, 321), (12, 1345))
_PREVIEW_EIGHTHS: _Coding = ((0, 16), (0, 32), (5, 1), (9, 33))


@dataclass(frozen=True, slots=True)
class Header:
    """What a JPEG XL file says of itself.

    Attributes:
        size: Width and height in pixels, as they are stored.
        animated: Whether it has frames in time.
    """

    size: tuple[int, int]
    animated: bool


def read_header(encoded: bytes) -> Header:
    """Return the size of a JPEG XL file, bare or in boxes, and whether it is an animation.

    Raises:
        ValueError: if it ends before its header does.
    """
    bits = _Bits(_codestream(encoded))
    size = _size(bits)
    return Header(size, animated=_is_animated(bits))


class _Bits:
    """Numbers of a few bits each, the lowest bit of a byte first."""

    def __init__(self, content: bytes) -> None:
        self._value = int.from_bytes(content, "little")
        self._left = 8 * len(content)

    def take(self, count: int) -> int:
        if count > self._left:
            raise ValueError("the header of the JPEG XL file is cut off")
        number = self._value & ((1 << count) - 1)
        self._value >>= count
        self._left -= count
        return number

    def coded(self, coding: _Coding) -> int:
        count, offset = coding[self.take(2)]
        return offset + self.take(count)


def _codestream(encoded: bytes) -> bytes:
    """Return the beginning of the coded picture, without its mark.

    Raises:
        ValueError: if there is none.
    """
    begin = encoded[:_HEADER_BYTES]
    if encoded.startswith(_BOXED):
        begin = b""
        for part in _parts(encoded):
            begin += part
            if len(begin) >= _HEADER_BYTES:
                break
    if not begin.startswith(_CODESTREAM):
        raise ValueError("the JPEG XL file holds no picture")
    return begin[len(_CODESTREAM) :]


def _parts(encoded: bytes) -> Iterator[bytes]:
    """Yield how each box begins that holds the coded picture, or a part of it."""
    begin = 0
    while begin + 8 <= len(encoded):
        num_bytes, kind = int.from_bytes(encoded[begin : begin + 4]), encoded[begin + 4 : begin + 8]
        content = begin + 8
        if num_bytes == 1:  # too long for four bytes
            num_bytes, content = int.from_bytes(encoded[content : content + 8]), content + 8
        end = begin + num_bytes if num_bytes else len(encoded)
        if end < content:
            return
        if kind in (b"jxlc", b"jxlp"):
            content += 4 if kind == b"jxlp" else 0  # the number of the part
            yield encoded[content : min(end, content + _HEADER_BYTES)]
        begin = end


def _size(bits: _Bits) -> tuple[int, int]:
    in_eighths = bits.take(1)

    def side() -> int:
        return 8 * (1 + bits.take(5)) if in_eighths else bits.coded(_SIZE)

    height = side()
    return _width(bits.take(3), height) or side(), height


def _width(ratio: int, height: int) -> int | None:
    if ratio == 0:
        return None
    numerator, denominator = _RATIOS[ratio - 1]
    return height * numerator // denominator


def _is_animated(bits: _Bits) -> bool:
    all_default = bits.take(1)
    if all_default or not bits.take(1):  # without the fields that follow
        return False
    bits.take(3)  # orientation
    if bits.take(1):
        _size(bits)  # to show it at
    if bits.take(1):
        _skip_preview(bits)
    return bool(bits.take(1))


def _skip_preview(bits: _Bits) -> None:
    coding = _PREVIEW_EIGHTHS if bits.take(1) else _PREVIEW
    bits.coded(coding)
    if bits.take(3) == 0:
        bits.coded(coding)
