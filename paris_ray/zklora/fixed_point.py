"""A LoRA module in integers: what is evaluated, committed, proved, sold and served.

All arithmetic between quantisation and dequantisation is exact, so that a proof can speak of the
very numbers that the parties saw.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paris_ray.errors import ParisError

MAX_ENTRY = 2**15 - 1  # of the factors: an offset of 2^15 makes each a 16-bit scalar
MAX_WIDTH = 2**18
MAX_RANK = 2**10
# |y_j| <= 2^15 sum_k |B_kj| sum_i |A_ik| must stay below 2^63, whatever the inputs are.
MAX_REACH = 2**48
HALF = 2**24  # half of the 48 binary digits that `x A` has
MAX_EXPONENT = 1000  # 2^-1000 is still a float64

Int16 = NDArray[np.int16]
Int64 = NDArray[np.int64]
Floats = NDArray[np.floating]


@dataclass(frozen=True, eq=False, slots=True)
class QuantisedModule:
    """The low-rank update `x A B` of one linear module; A is `a * 2^-exponent_a`, B likewise.

    The scale of the adapter (`lora_alpha / r`) is not part of it.

    Attributes:
        a: `(d_in, r)` int16.
        b: `(r, d_out)` int16.
        exponent_a: See above.
        exponent_b: See above.

    Raises:
        ParisError: if shapes, types or values are not allowed.
    """

    a: Int16
    b: Int16
    exponent_a: int
    exponent_b: int

    def __post_init__(self) -> None:
        for name, factor in (("A", self.a), ("B", self.b)):
            if factor.dtype != np.int16 or factor.ndim != 2:
                raise ParisError(
                    f"{name} must be an int16 matrix, not {factor.dtype} with shape {factor.shape}"
                )
            if factor.size and factor.min() < -MAX_ENTRY:
                raise ParisError(f"{name} has {factor.min()}, allowed: -{MAX_ENTRY} to {MAX_ENTRY}")
        check_dimensions(self.d_in, self.r, self.d_out)
        if self.b.shape[0] != self.r:
            raise ParisError(f"A has shape {self.a.shape}, B {self.b.shape}: the rank differs")
        for name, exponent in (("exponent_a", self.exponent_a), ("exponent_b", self.exponent_b)):
            if not -MAX_EXPONENT <= exponent <= MAX_EXPONENT:
                raise ParisError(
                    f"{name}={exponent} is not allowed: at most {MAX_EXPONENT} either way"
                )
        if (found := reach(self.a, self.b)) >= MAX_REACH:
            raise ParisError(
                f"these weights reach {found}, allowed: below {MAX_REACH}, so that every output "
                "fits in int64"
            )

    @property
    def d_in(self) -> int:
        """Width of the inputs."""
        return self.a.shape[0]

    @property
    def r(self) -> int:
        """Rank of the update."""
        return self.a.shape[1]

    @property
    def d_out(self) -> int:
        """Width of the outputs."""
        return self.b.shape[1]

    @property
    def digest(self) -> str:
        """SHA-256 of shapes, exponents and all integers, in hexadecimal."""
        header = f"{self.d_in} {self.r} {self.d_out} {self.exponent_a} {self.exponent_b}\n"
        return hashlib.sha256(
            header.encode() + self.a.astype("<i2").tobytes() + self.b.astype("<i2").tobytes()
        ).hexdigest()


def check_dimensions(d_in: int, r: int, d_out: int) -> None:
    """Raise ParisError unless a module may have these dimensions."""
    if min(d_in, r, d_out) < 1 or max(d_in, d_out) > MAX_WIDTH or r > MAX_RANK:
        raise ParisError(
            f"d_in={d_in}, r={r}, d_out={d_out} is not allowed: each at least 1, widths at most "
            f"{MAX_WIDTH}, r at most {MAX_RANK}"
        )


def reach(a: Int16, b: Int16) -> int:
    """Return the largest `sum_k |B_kj| sum_i |A_ik|`: what inputs of size 1 can add up to."""
    return int((np.abs(a).sum(axis=0, dtype=np.int64) @ np.abs(b)).max(initial=0))


def quantise(A: Floats, B: Floats) -> QuantisedModule:
    """Round the factors of a LoRA module to 16 bits, each with one power of two as its unit.

    Modules so wide that an output might not fit in int64 lose bits, in turn of B and of A. Below
    `d_in * r = 2^18` none does, nor do normally distributed weights of rank 256 at width 16,384.
    For a PEFT folder, A is `lora_A.weight.T` and B is `lora_B.weight.T`.

    Args:
        A: `(d_in, r)`.
        B: `(r, d_out)`.

    Raises:
        ParisError: if a value is not finite, or the shapes are not allowed.
    """
    lost = [0, 0]
    while True:
        (a, exponent_a), (b, exponent_b) = _to_int16(A, "A", lost[0]), _to_int16(B, "B", lost[1])
        if a.shape[1] != b.shape[0] or reach(a, b) < MAX_REACH:
            return QuantisedModule(a, b, exponent_a, exponent_b)
        lost[lost[0] == lost[1]] += 1


def quantise_rows(x: Floats) -> tuple[Int16, int]:
    """Return inputs `(rows, d_in)` as int16, and the exponent: x is the integers * 2^-exponent.

    Zeros get the smallest unit: whoever answers may draw last bits, which must mean nothing then.

    Raises:
        ParisError: if a value is not finite.
    """
    integers, exponent = _to_int16(x, "x")
    return integers, exponent if integers.any() else MAX_EXPONENT


def _to_int16(values: Floats, name: str, lost: int = 0) -> tuple[Int16, int]:
    """Return integers and their exponent; the largest uses 15 bits, less those `lost`."""
    wide = np.asarray(values, np.float64)
    if wide.ndim != 2:
        raise ParisError(f"{name} must be a matrix, it has shape {wide.shape}")
    if not np.isfinite(wide).all():
        raise ParisError(f"{name} has values that are not finite")
    peak = float(np.abs(wide).max(initial=0.0))
    if peak == 0.0:
        return np.zeros(wide.shape, np.int16), 0
    # peak = m * 2^e with 0.5 <= m < 1, so 15 - e puts it in [2^14, 2^15); one less if it rounds up.
    exponent = 15 - int(np.frexp(peak)[1])
    if round(np.ldexp(peak, exponent)) > MAX_ENTRY:
        exponent -= 1
    exponent -= lost
    if abs(exponent) > MAX_EXPONENT:
        raise ParisError(f"the largest entry of {name} is {peak}: out of range")
    return np.rint(np.ldexp(wide, exponent)).astype(np.int16), exponent


def evaluate(module: QuantisedModule, x: Int16) -> Int64:
    """Return `x A B` in exact integers.

    Args:
        module: The module.
        x: `(rows, d_in)` int16.

    Returns:
        `(rows, d_out)` int64.

    Raises:
        ParisError: if `x` has another type or width.
    """
    check_rows(x, np.int16, module.d_in, "x")
    # The first product is at most 2^48, and half of its digits times B at most 2^49: float64 holds
    # them exactly, and BLAS may compute them. The sum of the halves fits, since the module does.
    narrow, b = x.astype(np.float64) @ module.a.astype(np.float64), module.b.astype(np.float64)
    high = np.floor(narrow / HALF)
    low = (narrow - high * HALF) @ b
    return (high @ b).astype(np.int64) * HALF + low.astype(np.int64)


def check_rows(rows: NDArray[np.generic], dtype: type[np.generic], width: int, name: str) -> None:
    """Raise ParisError unless `rows` is a matrix of that type and width."""
    if rows.dtype != dtype or rows.ndim != 2 or rows.shape[1] != width:
        raise ParisError(
            f"{name} must be {np.dtype(dtype).name} with shape (rows, {width}), "
            f"not {rows.dtype} with shape {rows.shape}"
        )


def check_statement(d_in: int, d_out: int, x: Int16, y: Int64) -> None:
    """Raise ParisError unless rows `y` may be the outputs of a module for rows `x`."""
    check_rows(x, np.int16, d_in, "x")
    check_rows(y, np.int64, d_out, "y")
    if not 0 < len(x) == len(y):
        raise ParisError(f"x has {len(x)} rows, y has {len(y)}: at least one, and as many")


def dequantise(y: Int64, exponent: int, scale: float) -> NDArray[np.float32]:
    """Return outputs as floats: `y * 2^-exponent * scale`.

    Args:
        y: `(rows, d_out)` int64.
        exponent: That of the inputs plus those of both factors.
        scale: `lora_alpha / r`, or what the adapter says instead.
    """
    return (np.ldexp(y.astype(np.float64), -exponent) * scale).astype(np.float32)
