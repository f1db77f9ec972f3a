"""What PNG files carry that Pillow refuses, or leaves in other units than the pixels."""

import zlib
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import ImageFile

from paris_ray.corpora.profiles import CURVES, PRIMARIES, SRGB, SRGB_CURVE, profile_of

_SIGNATURE_BYTES = 8
_FRAME_BYTES = 12  # of a chunk: length, name and checksum
# The texts that may hold an orientation; all others are prompts, workflows and comments.
_ORIENTATION_TEXTS = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")
_RGB_OF_FULL_RANGE = b"\0\1"  # the end of cICP
_SAME = 0.005  # of x and y: files round those of sRGB
_MAX_BYTES = 1 << 20  # of a text or a profile, inflated: Pillow's own limit


def without_ballast(encoded: bytes) -> bytes:
    """Return a PNG file without texts, and without a profile that inflates to more than 1 MiB.

    Generators store prompts and workflows of any size beside the pixels, for which Pillow refuses
    the whole picture. Texts that may say the orientation stay. Nothing is copied if nothing is
    left out; what is damaged stays as it is, for Pillow to judge.
    """
    kept: list[memoryview] = []
    start = 0
    for begin, end in _chunks(encoded):
        if _is_ballast(encoded, begin, end):
            kept.append(memoryview(encoded)[start:begin])
            start = end
    return b"".join([*kept, memoryview(encoded)[start:]]) if kept else encoded


def fit_transparency(image: ImageFile.ImageFile) -> None:
    """Bring the one transparent colour of a PNG to the depth that its pixels are decoded to.

    Of 16 bits a channel the upper eight are decoded: colours that differ in the lower ones only
    become transparent too.
    """
    colour = image.info.get("transparency")
    if colour is None:
        return
    match image.tile[0].args:
        case "L;2":
            image.info["transparency"] = colour * 85
        case "L;4":
            image.info["transparency"] = colour * 17
        case "RGB;16B":
            image.info["transparency"] = tuple(channel >> 8 for channel in colour)


def fit_profile(image: ImageFile.ImageFile, encoded: bytes) -> None:
    """Give a PNG the profile that its numbers describe: cICP, or cHRM with the gAMA that it has.

    cICP counts before an embedded profile, and cHRM after that and sRGB. What is unknown of it, as
    HDR, is passed over.

    Source: PNG specification (third edition), 4.3, 11.3.2.1 and 11.3.2.6.
    """
    profile = _profile_of_cicp(encoded)
    if profile is None and not {"icc_profile", "srgb"} & image.info.keys():
        profile = _profile_of_chrm(image)
    if profile is not None:
        image.info["icc_profile"] = profile


def _profile_of_cicp(encoded: bytes) -> bytes | None:
    for begin, end in _chunks(encoded):
        name, content = encoded[begin + 4 : begin + 8], encoded[begin + 8 : end - 4]
        if name == b"IDAT":
            return None
        if name == b"cICP" and content[2:] == _RGB_OF_FULL_RANGE:
            primaries, curve = PRIMARIES.get(content[0]), CURVES.get(content[1])
            return profile_of(primaries, curve) if primaries and curve else None
    return None


def _profile_of_chrm(image: ImageFile.ImageFile) -> bytes | None:
    """Return the profile of primaries that are not those of sRGB."""
    numbers = image.info.get("chromaticity")
    if numbers is None:
        return None
    white, *colours = zip(numbers[::2], numbers[1::2], strict=True)
    found = (*colours, white)
    if np.abs(np.subtract(found, SRGB)).max() < _SAME:
        return None
    return profile_of(found, _curve(image.info.get("gamma")))


def _curve(gamma: object) -> Sequence[float]:
    """Return the curve of a gAMA; sRGB's if there is none, or nearly that."""
    if not isinstance(gamma, float) or not 0.1 <= gamma <= 10 or abs(2.2 * gamma - 1) < 0.05:
        return SRGB_CURVE
    return (1 / gamma,)


def _chunks(encoded: bytes) -> Iterator[tuple[int, int]]:
    """Yield where each complete chunk begins and ends."""
    begin = _SIGNATURE_BYTES
    while True:
        end = begin + _FRAME_BYTES + int.from_bytes(encoded[begin : begin + 4])
        if end > len(encoded):
            return
        yield begin, end
        begin = end


def _is_ballast(encoded: bytes, begin: int, end: int) -> bool:
    name = encoded[begin + 4 : begin + 8]
    if name not in (b"iCCP", b"tEXt", b"zTXt", b"iTXt"):
        return False
    content = encoded[begin + 8 : end - 4]
    if name != b"iCCP" and not content.startswith(_ORIENTATION_TEXTS):
        return True
    return len(content) > _MAX_BYTES or _inflates_too_far(_compressed(name, content))


def _compressed(name: bytes, content: bytes) -> bytes:
    """Return the deflated part of a chunk: behind its keyword, its method and, of iTXt, more."""
    rest = content.partition(b"\0")[2]
    if name == b"tEXt":
        return b""
    if name == b"iTXt":  # flag, method, language, keyword in that language
        return rest[2:].split(b"\0", 2)[-1] if rest[:1] != b"\0" else b""
    return rest[1:]


def _inflates_too_far(compressed: bytes) -> bool:
    inflater = zlib.decompressobj()
    try:
        inflater.decompress(compressed, _MAX_BYTES)
    except zlib.error:  # Pillow takes what is damaged for absent
        return False
    return bool(inflater.unconsumed_tail)
