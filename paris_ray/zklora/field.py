"""Linear algebra over the scalar field of BLS12-381, fast enough for whole activations.

Elements are Python integers in [0, ORDER). Products of many elements with matrices of machine
integers go through float64 BLAS, on limbs so small that every sum is exact.
"""

import operator
from collections.abc import Iterator, Sequence
from itertools import zip_longest

import numpy as np
from numpy.typing import NDArray

ORDER = 0x73EDA753299D7D483339D80809A1D80553BDA402FFFE5BFEFFFFFFFF00000001
SCALAR_BYTES = 32

LIMB_BITS = 16
LIMBS = 16  # of an element
# Of a sum of elements times int64: 16 + 4 limbs, room for the sum itself, and a sign.
RESULT_LIMBS = 24
# A limb product is below 2^32 in size: the sum over 2^18 rows stays below 2^53.
ROWS_AT_ONCE = 2**18
# At most 4 such sums meet in a limb of the result: with 2^28 rows it stays below 2^63.
MAX_ROWS = 2**28


def powers(base: int, count: int) -> list[int]:
    """Return `1, base, base^2, ...`."""
    power = 1
    return [1, *[power := power * base % ORDER for _ in range(count - 1)]][:count]


def dot(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the inner product of two vectors of one length."""
    if len(a) != len(b):
        raise ValueError(f"vectors of {len(a)} and {len(b)} numbers have no inner product")
    return sum(map(operator.mul, a, b)) % ORDER


def padded(vector: Sequence[int], length: int) -> list[int]:
    """Return a vector with zeros added up to a length."""
    return [*vector, *[0] * (length - len(vector))]


def plus(a: Sequence[int], factor: int, b: Sequence[int]) -> list[int]:
    """Return `a + factor * b`; the shorter one is padded with zeros."""
    return [(x + factor * y) % ORDER for x, y in zip_longest(a, b, fillvalue=0)]


def combine(coefficients: Sequence[int], matrix: NDArray[np.signedinteger]) -> list[int]:
    """Return the combination `sum_t coefficients[t] * matrix[t]` of a matrix's rows.

    Args:
        coefficients: T elements.
        matrix: `(T, n)` int16 or int64.

    Returns:
        n elements.
    """
    if not len(coefficients) == len(matrix) <= MAX_ROWS:
        raise ValueError(
            f"{len(coefficients)} coefficients, {len(matrix)} rows: at most {MAX_ROWS}"
        )
    total = np.zeros((RESULT_LIMBS, matrix.shape[1]), np.int64)
    for start in range(0, len(matrix), ROWS_AT_ONCE):
        stop = start + ROWS_AT_ONCE
        limbs = _element_limbs(coefficients[start:stop])
        for shift, part in enumerate(_matrix_limbs(matrix[start:stop])):
            products = limbs @ part.astype(np.float64)
            total[shift : shift + LIMBS] += products.astype(np.int64)
    return _from_limbs(total)


def _element_limbs(elements: Sequence[int]) -> NDArray[np.float64]:
    """Return `(LIMBS, T)` limbs, lowest first."""
    data = b"".join([element.to_bytes(SCALAR_BYTES, "little") for element in elements])
    return np.frombuffer(data, "<u2").reshape(-1, LIMBS).T.astype(np.float64)


def _matrix_limbs(matrix: NDArray[np.signedinteger]) -> Iterator[NDArray[np.integer]]:
    """Yield the limbs of a matrix, lowest first; the last is signed, and no more than it needs."""
    if matrix.dtype == np.int16:
        yield matrix
        return
    largest = max(int(matrix.max(initial=0)), ~int(matrix.min(initial=0)))
    last = largest.bit_length() // LIMB_BITS
    # Of a transposed matrix the columns lie together in memory, as the rows do otherwise.
    is_flipped = not matrix.flags.c_contiguous
    rows = np.ascontiguousarray(matrix.T if is_flipped else matrix, "<i8")
    digits = rows.view("<u2").reshape(*rows.shape, -1)
    for position in range(last + 1):
        limb = digits[..., position].view("<i2" if position == last else "<u2")
        yield limb.T if is_flipped else limb


def _from_limbs(total: NDArray[np.int64]) -> list[int]:
    """Carry, so that every limb has 16 bits, and read each column as one signed integer."""
    digits = np.empty((total.shape[1], RESULT_LIMBS), "<u2")
    carry = np.zeros(total.shape[1], np.int64)
    for position, limb in enumerate(total):
        value = limb + carry
        digits[:, position] = value & 0xFFFF
        carry = value >> LIMB_BITS
    data, size = digits.tobytes(), 2 * RESULT_LIMBS
    return [
        int.from_bytes(data[i : i + size], "little", signed=True) % ORDER
        for i in range(0, len(data), size)
    ]
