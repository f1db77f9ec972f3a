"""From the bytes of a picture file to upright sRGB pixels of one size."""

import contextlib
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from paris_ray.config import CorpusConfig
from paris_ray.corpora.colours import to_rgb
from paris_ray.corpora.filters import check_size
from paris_ray.corpora.formats import open_picture
from paris_ray.corpora.quarantine import BadRow


def decode(encoded: bytes | None, config: CorpusConfig) -> NDArray[np.uint8]:
    """Return the centre of a picture, as a viewer shows it.

    EXIF orientation is followed, colours are converted to sRGB, transparent pixels show
    `config.background`, the shorter side is resized to `config.image_size` and the centre is
    cropped. Of animations and of files with several pictures the first is taken.

    Args:
        encoded: The bytes of its file; None if there is none.
        config: `image_size`, `resize`, `background`, `max_image_bytes`, `max_pixels` and what
            `filters` say of sizes are used.

    Returns:
        uint8 RGB of shape (image_size, image_size, 3).

    Raises:
        BadRow: if the bytes are no picture, none that can be used, or one that is not wanted.
    """
    if encoded is None:
        raise BadRow("missing_file", "the row has no picture")
    if not encoded:
        raise BadRow("empty_image", "the picture has 0 bytes")
    if len(encoded) > config.max_image_bytes:
        detail = f"{len(encoded)} bytes, corpus.max_image_bytes={config.max_image_bytes}"
        raise BadRow("too_many_bytes", detail)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns where we quarantine
        image = open_picture(encoded, config.max_pixels)
        check_size(image.size, config.filters)  # now: nothing of it has been decoded yet
        return np.array(_load(image, config))


def _load(image: Image.Image, config: CorpusConfig) -> Image.Image:
    """Decode the pixels and return their centre, upright, as RGB."""
    resample = Image.Resampling.LANCZOS
    try:
        image.load()
        picture = to_rgb(_upright(image), config.background)
        if config.resize == "adm":
            picture, resample = _halve(picture, config.image_size), Image.Resampling.BICUBIC
        return ImageOps.fit(picture, (config.image_size, config.image_size), resample)
    except Exception as error:  # decoders of arbitrary bytes raise almost anything
        detail = f"{image.format}: {type(error).__name__}: {error}"
        raise BadRow("truncated_image", detail) from None


def _halve(image: Image.Image, side: int) -> Image.Image:
    """Halve by averaging while the shorter side stays at least `side`, as ADM and DiT do.

    Source: Dhariwal and Nichol 2021 (arXiv 2105.05233), the preprocessing of their training data.
    """
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    return image


def _upright(image: Image.Image) -> Image.Image:
    """Turn a picture as its EXIF says. That of JPEG XL only repeats what its decoder has followed.

    A JPEG in a JPEG XL file is taken out of it as it was.
    """
    if image.format == "JXL" and not getattr(image, "jpeg", False):
        return image
    with contextlib.suppress(Exception):  # damaged EXIF says nothing; the pixels are fine
        ImageOps.exif_transpose(image, in_place=True)
    return image
