"""What tensors of files, which may come from strangers, have to be before we compute with them."""

import torch
from torch import Tensor

from paris_ray.errors import BundleError

# Torch has more that a file may name, with which it computes little: eight bits, or integers.
STORED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_stored(what: str, tensor: Tensor) -> None:
    """Raise BundleError, naming what it is, unless a tensor holds finite floats of a known type."""
    check_dtype(what, tensor)
    if not tensor.isfinite().all():
        raise BundleError(f"{what} has values that are not finite")


def check_dtype(what: str, tensor: Tensor) -> None:
    """Raise BundleError unless a tensor is of a known floating-point type."""
    if tensor.dtype not in STORED_DTYPES:
        allowed = ", ".join(map(str, STORED_DTYPES))
        raise BundleError(f"{what} has dtype {tensor.dtype}, allowed: {allowed}")
