"""Squared maximum mean discrepancy of features, unbiased: KID and CMMD.

    MMD^2 = mean over i != j of k(x_i, x_j) + the same of y - 2 mean over i, j of k(x_i, y_j)

Unbiased means that equal distributions give 0 on average at any count, so single values may be
slightly negative. No shape of the distributions is assumed.

Source: Gretton et al. 2012 (JMLR 13), equation 3.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paris_ray.errors import EvaluationError
from paris_ray.evaluation.features import Features, check_features, row_blocks
from paris_ray.seeding import numpy_generator

CMMD_SIGMA = 10.0  # for unit-length CLIP embeddings
CMMD_SCALE = 1000.0

Kernel = Callable[[Features, Features], Features]


@dataclass(frozen=True, slots=True)
class KernelDistance:
    """Squared MMD over pairs of subsets.

    Attributes:
        mean: Over the subsets, in powers of the features' own unit.
        standard_deviation: Over the subsets; it shrinks with their size, not with their number.
    """

    mean: float
    standard_deviation: float


def kid(
    drawn: Features,
    real: Features,
    *,
    seed: int,
    num_subsets: int = 100,
    subset_size: int = 1000,
) -> KernelDistance:
    """Return the kernel distance with k(x, y) = (x . y / D + 1)^3.

    Args:
        drawn: `(N, D)` features of drawn pictures, of Inception for numbers like those of papers.
        real: `(M, D)` features of real ones.
        seed: Decides the subsets.
        num_subsets: How many pairs of subsets are compared.
        subset_size: Rows of each, drawn without replacement; at most N and M.

    Raises:
        EvaluationError: if shapes differ, or an option is not allowed.

    Source: KID, Binkowski et al. 2018 (arXiv:1801.01401).
    """
    check_features({"drawn": drawn, "real": real}, min_rows=2)
    largest = min(len(drawn), len(real))
    if not 2 <= subset_size <= largest:
        raise EvaluationError(
            f"subset_size={subset_size} is not allowed: 2 <= subset_size <= {largest} rows"
        )
    if num_subsets < 1:
        raise EvaluationError(f"num_subsets={num_subsets} is not allowed: 1 or more")
    values = []
    for i in range(num_subsets):
        generator = numpy_generator(seed, "kid subset", i)
        x, y = (f[generator.choice(len(f), subset_size, replace=False)] for f in (drawn, real))
        values.append(_squared_mmd(x.astype(np.float64), y.astype(np.float64), _cubic))
    return KernelDistance(float(np.mean(values)), float(np.std(values)))


def cmmd(drawn: Features, real: Features) -> float:
    """Return 1000 times the squared MMD with k(x, y) = exp(-|x - y|^2 / (2 sigma^2)), sigma = 10.

    The authors' code includes i = j, which their paper does not: it is larger by about
    1000 (1 - k) (1 / N + 1 / M), where k is the mean of the kernel.

    Args:
        drawn: `(N, D)` unit-length CLIP embeddings of drawn pictures.
        real: `(M, D)` those of real ones.

    Raises:
        EvaluationError: if shapes differ.

    Source: CMMD, Jayasumana et al. 2024 (arXiv:2401.09603).
    """
    check_features({"drawn": drawn, "real": real}, min_rows=2)
    centre = real.mean(axis=0, dtype=np.float64)  # distances stay, products lose fewer digits
    x, y = ((f - centre).astype(np.float32) for f in (drawn, real))
    return CMMD_SCALE * _squared_mmd(x, y, _gaussian)


def _squared_mmd(x: Features, y: Features, kernel: Kernel) -> float:
    """Return the unbiased estimate; temporary memory does not grow with the number of rows."""
    return _mean_within(x, kernel) + _mean_within(y, kernel) - 2 * _mean_between(x, y, kernel)


def _mean_within(x: Features, kernel: Kernel) -> float:
    total = 0.0
    for block in row_blocks(len(x), len(x)):
        values = kernel(x[block], x)
        diagonal = np.trace(values, offset=block.start, dtype=np.float64)
        total += float(values.sum(dtype=np.float64) - diagonal)
    return total / (len(x) * (len(x) - 1))


def _mean_between(x: Features, y: Features, kernel: Kernel) -> float:
    blocks = row_blocks(len(x), len(y))
    total = sum(float(kernel(x[block], y).sum(dtype=np.float64)) for block in blocks)
    return total / (len(x) * len(y))


def _cubic(x: Features, y: Features) -> Features:
    products = x @ y.T / x.shape[1] + 1
    cubes: Features = products * products * products  # NumPy's power takes many times as long
    return cubes


def _gaussian(x: Features, y: Features) -> Features:
    """Return the kernel less 1, which no MMD depends on: small numbers keep their digits."""
    exponent = x @ y.T
    exponent -= 0.5 * _squared_norms(x)[:, None]
    exponent -= 0.5 * _squared_norms(y)
    exponent /= CMMD_SIGMA**2
    return np.expm1(exponent, out=exponent)


def _squared_norms(x: Features) -> NDArray[np.floating]:
    norms: NDArray[np.floating] = np.einsum("nd,nd->n", x, x)
    return norms
