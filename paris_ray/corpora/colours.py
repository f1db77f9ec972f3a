"""From the pixels of a file to sRGB: deep greys, profiles, gamma and transparency."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

_OPAQUE, _CLEAR = 255, 0
# What a whole number or a float at full brightness is: the least of these that holds all pixels.
_PEAKS = {"I": (65535,), "F": (1, 255, 65535)}
_MAX_PROFILE_BYTES = 4 << 20  # profiles of printers have up to 3 MB
# How the pixels of a profile's colour space are called here.
_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}


def to_rgb(image: Image.Image, background: Sequence[int]) -> Image.Image:
    """Return a picture as a viewer shows it: in sRGB, opaque.

    An embedded profile is followed; without one, or with a damaged one, colours are taken for
    sRGB, and CMYK is converted as Pillow does. Of PNG, gAMA is followed where no profile says more.

    Args:
        image: What Pillow decoded, of any mode.
        background: Red, green and blue, 0 to 255, to show through transparent pixels.
    """
    file_format, info = image.format, image.info
    if image.mode[0] in "IF":
        image = _eight_bits(image)
    alpha = _alpha(image) if image.has_transparency_data else None
    if file_format == "BMP" and alpha is not None and alpha.getextrema() == (_CLEAR, _CLEAR):
        alpha = None  # the fourth byte of a pixel is unused, and then zero
    picture = _to_srgb(_without_alpha(image), info)
    if alpha is None:
        return picture
    picture.putalpha(alpha)
    canvas = Image.new("RGBA", picture.size, tuple(background))
    return Image.alpha_composite(canvas, picture).convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale greys of 16 and 32 bits to 8, which Pillow's own conversion clips at 255."""
    values = np.nan_to_num(np.asarray(image), nan=0, posinf=0, neginf=0)
    low, high = values.min(), values.max()
    peaks = (peak for peak in _PEAKS[image.mode[0]] if low >= 0 and high <= peak)
    match next(peaks, None):
        case 65535:
            scaled = values // 257
        case int(peak):
            scaled = values * (255 / peak) + 0.5
        case None:  # nothing says what is black and white: the darkest and the brightest pixel
            span = float(high) - float(low) or 1
            scaled = (values.astype(np.float64) - low) * (255 / span) + 0.5
    grey = Image.fromarray(scaled.astype(np.uint8))
    if "transparency" not in image.info:
        return grey
    clear = values == image.info["transparency"]
    mask = Image.fromarray(np.where(clear, _CLEAR, _OPAQUE).astype(np.uint8))
    return Image.merge("LA", (grey, mask))


def _alpha(image: Image.Image) -> Image.Image:
    return image.convert("RGBA").getchannel("A")


def _without_alpha(image: Image.Image) -> Image.Image:
    """Return the colours alone, in the colour space of the file: L, CMYK, LAB or RGB."""
    if image.mode in ("CMYK", "LAB"):
        return image
    if image.mode in ("1", "L", "LA"):
        return image.convert("L")
    return (image.convert("RGBA") if image.mode == "RGBa" else image).convert("RGB")


def _to_srgb(image: Image.Image, info: Mapping[str | tuple[int, int], object]) -> Image.Image:
    profile = info.get("icc_profile")
    if image.mode == "LAB":
        profile = None
    elif not isinstance(profile, bytes):
        return _without_gamma(image.convert("RGB"), info)
    elif len(profile) > _MAX_PROFILE_BYTES:
        return image.convert("RGB")
    conversion = _conversion(profile)
    return conversion.apply(image) if conversion else image.convert("RGB")


@dataclass(frozen=True, slots=True)
class _Conversion:
    """From the colours of a profile to sRGB.

    Attributes:
        mode: Of the pictures that it is meant for.
        transform: What maps them.
    """

    mode: str
    transform: ImageCms.ImageCmsTransform

    def apply(self, image: Image.Image) -> Image.Image:
        """Convert a picture; of another colour space, the profile says nothing of it."""
        if image.mode != self.mode and (image.mode, self.mode) != ("L", "RGB"):
            return image.convert("RGB")
        return self.transform.apply(image.convert(self.mode))


@lru_cache(maxsize=8)
def _conversion(profile: bytes | None) -> _Conversion | None:
    """Return how colours of a profile, None for CIELAB, become sRGB.

    Returns:
        None if the profile is damaged, or if it is sRGB itself, of which there are many near-equal
        copies: then pixels stay as they are.
    """
    try:
        source = ImageCms.createProfile("LAB")
        if profile is not None:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile
        mode = _MODES[source.xcolor_space.strip()]
        target = ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(source, target, mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, KeyError):
        return None
    return None if _moves_nothing(transform, mode) else _Conversion(mode, transform)


def _moves_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Tell whether no colour of a grid changes by more than one level of 255."""
    if mode not in ("L", "RGB"):
        return False
    colours = np.indices((9, 9, 9)).reshape(3, 1, -1).T.astype(np.uint8) * 31
    grid = Image.fromarray(colours).convert(mode)
    moved = np.asarray(transform.apply(grid), int) - np.asarray(grid.convert("RGB"), int)
    return bool(np.abs(moved).max() <= 1)


def _without_gamma(image: Image.Image, info: Mapping[str | tuple[int, int], object]) -> Image.Image:
    """Follow the gAMA of a PNG that does not also say to be sRGB.

    Source: PNG specification (third edition), 11.3.2.2 and 13.13; a display's gamma is about 2.2.
    """
    gamma = info.get("gamma")
    if "srgb" in info or not isinstance(gamma, float) or not 0.1 <= gamma <= 10:
        return image
    exponent = 1 / (2.2 * gamma)
    if abs(exponent - 1) < 0.05:  # that of sRGB, as most files have it
        return image
    return image.point([round(255 * (level / 255) ** exponent) for level in range(256)] * 3)
