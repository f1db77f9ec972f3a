"""Pictures as files: encoded by Pillow, or put together by hand where no encoder writes them."""

import io
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
IEND = (b"IEND", b"")
# x and y of red, green, blue and white (Adobe RGB (1998); Display P3 as Apple publishes it).
ADOBE_RGB = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06), (0.3127, 0.3290))
DISPLAY_P3 = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), (0.3127, 0.3290))
SRGB = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06), (0.3127, 0.3290))
D50 = (0.9642, 1.0, 0.8249)


def encode(image: Image.Image, image_format: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, image_format, **options)
    return stream.getvalue()


def plain(color: Any = RED, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> Image.Image:
    return Image.new(mode, size, color)


def png_file(chunks: Sequence[tuple[bytes, bytes]]) -> bytes:
    return PNG_SIGNATURE + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )


def png_of_row(
    depth: int, colour_type: int, row: bytes, *between: tuple[bytes, bytes], width: int = 8
) -> bytes:
    """A PNG of eight equal rows, with chunks between its header and its pixels."""
    header = struct.pack(">IIBBBBB", width, 8, depth, colour_type, 0, 0, 0)
    pixels = zlib.compress((b"\0" + row) * 8)
    return png_file([(b"IHDR", header), *between, (b"IDAT", pixels), IEND])


def to_xyz(primaries: Sequence[tuple[float, float]]) -> np.ndarray:
    """The matrix from linear red, green and blue to XYZ, of white as the primaries have it."""
    columns = np.array([(x / y, 1, (1 - x - y) / y) for x, y in primaries])
    return columns[:3].T * np.linalg.solve(columns[:3].T, columns[3])


def _to_d50(white: np.ndarray) -> np.ndarray:
    bradford = np.array(
        [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
    )
    scale = np.diag(bradford @ np.array(D50) / (bradford @ white))
    return np.linalg.inv(bradford) @ scale @ bradford


def _fixed(values: Sequence[float]) -> bytes:
    return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))


def _profile(space: bytes, tags: dict[bytes, bytes], kind: bytes = b"mntr") -> bytes:
    """An ICC profile (version 2) of the given tags."""
    connection = b"Lab " if b"A2B0" in tags else b"XYZ "
    header = bytearray(128)
    header[8:12], header[36:40], header[68:80] = b"\x02\x40\0\0", b"acsp", _fixed(D50)
    header[12:24] = kind + space + connection
    start, table, bodies = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, body in tags.items():
        table += struct.pack(">4sII", name, start + len(bodies), len(body))
        bodies += body + bytes(-len(body) % 4)
    header[:4] = struct.pack(">I", start + len(bodies))
    return bytes(header) + table + bodies


def rgb_profile(primaries: Sequence[tuple[float, float]], gamma: float) -> bytes:
    """A profile of three colours and a gamma."""
    matrix = to_xyz(primaries)
    colorants = _to_d50(matrix.sum(axis=1)) @ matrix
    tags = {b"wtpt": b"XYZ \0\0\0\0" + _fixed(D50)}
    for name, colorant in zip(b"rgb", colorants.T, strict=True):
        tags[bytes([name]) + b"XYZ"] = b"XYZ \0\0\0\0" + _fixed(colorant)
        tags[bytes([name]) + b"TRC"] = _curve(gamma)
    return _profile(b"RGB ", tags)


def grey_profile(gamma: float) -> bytes:
    white = b"XYZ \0\0\0\0" + _fixed(D50)
    return _profile(b"GRAY", {b"wtpt": white, b"kTRC": _curve(gamma)})


def cmyk_profile(lab_of_cyan: tuple[int, int, int]) -> bytes:
    """A profile of cyan, as bytes of CIELAB say, and black; the other inks colour nothing."""
    ramp, paper, black = bytes(range(256)), bytes((255, 128, 128)), bytes((0, 128, 128))
    grid = (paper + black) * 4 + (bytes(lab_of_cyan) + black) * 4  # black varies fastest
    body = b"mft1\0\0\0\0" + bytes((4, 3, 2, 0)) + _fixed((1, 0, 0, 0, 1, 0, 0, 0, 1))
    return _profile(b"CMYK", {b"A2B0": body + ramp * 4 + grid + ramp * 3}, b"prtr")


def _curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"


def shown(
    color: Sequence[int], primaries: Sequence[tuple[float, float]], gamma: float
) -> np.ndarray:
    """What a colour of an RGB profile is in sRGB, by the formulas of IEC 61966-2-1."""
    linear = np.linalg.inv(to_xyz(SRGB)) @ to_xyz(primaries) @ (np.array(color) / 255) ** gamma
    linear = linear.clip(0, 1)
    curved = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.round(255 * curved)
