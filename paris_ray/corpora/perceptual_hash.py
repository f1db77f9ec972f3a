"""A 64-bit hash of what a picture looks like: similar pictures differ in few of its bits."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 32  # of the small grey picture that is transformed
BITS_A_SIDE = 8


def _cosines() -> NDArray[np.float64]:
    """Return the first rows of the DCT-II of 32 numbers, `(8, 32)`; row 0 is their sum."""
    frequency, place = np.arange(BITS_A_SIDE), np.arange(SIDE)
    angles: NDArray[np.float64] = np.pi * np.outer(frequency, 2 * place + 1) / (2 * SIDE)
    return np.cos(angles)


_COSINES = _cosines()


def perceptual_hashes(images: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Return the hashes `(B,)` of RGB pictures `(B, S, S, 3)`.

    A bit tells whether a low frequency of the grey picture is stronger than their median; the mean
    has none. So brightness and colour do not count, all pictures of one colour have the hash 0, and
    those that vary in one direction alone, as stripes, have 7 bits to differ in.

    Source: the DCT hash of Zauner 2010, "Implementation and Benchmarking of Perceptual Image Hash
    Functions"; made small here by averaging.
    """
    small = np.stack([_small_grey(image) for image in images]).astype(np.float64)
    # Rounded: what is zero but for its last bits is no frequency that a picture has.
    frequencies = np.round(_COSINES @ small @ _COSINES.T, 6).reshape(len(images), -1)
    frequencies[:, 0] = 0
    bits = frequencies > np.median(frequencies[:, 1:], axis=1, keepdims=True)
    bits[:, 0] = False
    return np.packbits(bits, axis=1).view(">u8").astype(np.uint64)[:, 0]


def _small_grey(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    grey = Image.fromarray(image).convert("L")
    return np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.BOX))
