"""Between uint8 pictures and the floats that networks read and write."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def to_unit_range(images: NDArray[np.uint8]) -> Tensor:
    """Map uint8 `(B, S, S, 3)` to float32 in [-1, 1]."""
    return torch.from_numpy(np.array(images)).float() / 127.5 - 1


def to_uint8(pixels: Tensor) -> NDArray[np.uint8]:
    """Map floats in [-1, 1] to uint8."""
    scaled = ((pixels + 1) * 127.5).round().clamp(0, 255)
    array: NDArray[np.uint8] = scaled.to(torch.uint8).cpu().numpy()
    return array
