"""Random generators derived from (seed, purpose, indices), never from global state.

Order of execution, restarts and batch composition therefore cannot change what a seed means, and
a checkpoint needs no generator state: `samples_seen` says which generator comes next.
"""

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    import torch


def derive_seed(seed: int, purpose: str, *indices: int) -> int:
    """Return a 63-bit seed that depends on every argument and on nothing else."""
    text = "/".join([str(seed), purpose, *map(str, indices)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


Model = TypeVar("Model")


def build_seeded(build: Callable[[], Model], seed: int) -> Model:
    """Return a model with the initial weights of a seed; the global generator is left alone."""
    import torch  # here, as below

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "initialise"))
        return build()


def torch_generator(seed: int, purpose: str, *indices: int) -> "torch.Generator":
    """Return a CPU generator; noise is drawn on the CPU so that every device sees the same."""
    import torch  # here, so that tasks without torch need not spend seconds on importing it

    return torch.Generator().manual_seed(derive_seed(seed, purpose, *indices))


def numpy_generator(seed: int, purpose: str, *indices: int) -> np.random.Generator:
    """Return a numpy generator for the same derivation."""
    return np.random.default_rng(derive_seed(seed, purpose, *indices))
