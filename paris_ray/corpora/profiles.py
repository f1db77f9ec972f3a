"""ICC profiles of colours that a file describes by numbers, for LittleCMS to convert.

Source: ICC.1:2022, 7.2, 9.2, 10.18 and 10.31; ITU-T H.273 for the numbers of primaries and curves.
"""

import struct
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

Chromaticities = Sequence[tuple[float, float]]  # x and y of red, green, blue and white

_D65 = (0.3127, 0.3290)
SRGB: Chromaticities = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06), _D65)
# By their numbers. The curves of HDR are missing: how their light fits a screen no profile says.
PRIMARIES: dict[int, Chromaticities] = {
    1: SRGB,
    9: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046), _D65),  # BT.2020
    12: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), _D65),  # Display P3
}
# Parameters of (a x + b) ** g from d on, and below of c x; or g alone.
SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
_BT709_CURVE = (1 / 0.45, 1 / 1.099, 0.099 / 1.099, 1 / 4.5, 0.081)
CURVES: dict[int, Sequence[float]] = {
    **dict.fromkeys((1, 6, 14, 15), _BT709_CURVE),
    4: (2.2,),
    8: (1.0,),
    13: SRGB_CURVE,
}
_PARAMETRIC = {1: 0, 5: 3}  # kinds of curves, by how many parameters they have
_D50 = np.array([0.9642, 1.0, 0.8249])
_BRADFORD = np.array(
    [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
)
_MOST = 4.0  # of a number of a matrix: real ones are below 1.1


def profile_of(colours: Chromaticities, curve: Sequence[float]) -> bytes | None:
    """Return the profile of RGB pictures of these primaries and this curve.

    Args:
        colours: Chromaticities of red, green, blue and white.
        curve: As in `CURVES`: from levels to light.

    Returns:
        The bytes of a profile; None if these are no primaries of any screen.
    """
    if any(y <= 0 or x < 0 or x + y > 1 for x, y in colours):
        return None
    xyz = np.array([(x / y, 1, (1 - x - y) / y) for x, y in colours]).T
    try:
        colorants = _to_d50(xyz[:, 3]) @ xyz[:, :3] * np.linalg.solve(xyz[:, :3], xyz[:, 3])
    except np.linalg.LinAlgError:
        return None
    if not (np.abs(colorants) < _MOST).all():
        return None
    tags = {b"wtpt": b"XYZ \0\0\0\0" + _fixed(_D50)}
    kind = struct.pack(">HH", _PARAMETRIC[len(curve)], 0)
    for name, colorant in zip((b"r", b"g", b"b"), colorants.T, strict=True):
        tags[name + b"XYZ"] = b"XYZ \0\0\0\0" + _fixed(colorant)
        tags[name + b"TRC"] = b"para\0\0\0\0" + kind + _fixed(curve)
    return _file(tags)


def _to_d50(white: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the matrix that adapts XYZ from a white to that of profiles."""
    scale = (_BRADFORD @ _D50) / (_BRADFORD @ white)
    return np.linalg.inv(_BRADFORD) @ (scale[:, None] * _BRADFORD)


def _fixed(values: Iterable[float]) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def _file(tags: dict[bytes, bytes]) -> bytes:
    start = 128 + 4 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(body), len(content))
        body += content
    size = struct.pack(">I", start + len(body))
    header = size + bytes(4) + b"\x04\x30\0\0" + b"mntrRGB XYZ " + bytes(12) + b"acsp"
    return (header + bytes(28) + _fixed(_D50)).ljust(128, b"\0") + table + body
