"""The group of BLS12-381 (G1): generators that nobody knows a relation of, and equations in them.

`py_arkworks_bls12381` does the arithmetic; what it does not check is checked here: lengths of
multi-scalar multiplications, canonical scalars, and the only encoding of each point.
"""

import hashlib
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from itertools import zip_longest
from pathlib import Path
from tempfile import NamedTemporaryFile
from threading import Lock

import numpy as np
from numpy.typing import NDArray
from py_arkworks_bls12381 import G1Point, Scalar

from paris_ray.errors import VerificationError
from paris_ray.zklora.field import ORDER, SCALAR_BYTES

POINT_BYTES = 48
AFFINE_BYTES = 96

# RFC 9380 hash-to-curve of these strings: no trapdoor, and anyone can recompute them.
DOMAIN = b"PARIS_RAY-ZKLORA-V1-BLS12381G1_XMD:SHA-256_SSWU_RO_"
CACHED_GENERATORS = 4608
CACHE_DIGEST = "5c948f44a65999276e5fea7175f2fc1717c9da1ef9e7193d55f004ab434d7f9d"
WEIGHT_BITS = 128  # of the random weights that fold equations into one: a lie survives at 2^-128


def _hash_to_curve(name: str) -> G1Point:
    return G1Point.hash_to_curve(name.encode(), DOMAIN)


BLINDING = _hash_to_curve("blinding")  # H: what hides
VALUE = _hash_to_curve("value")  # g: commits to a single number
FORM = _hash_to_curve("form")  # Q: carries the value of a linear form through the folding


class _Generators:
    """G_1, G_2, ...: the first few thousand are kept in a file, which saves a second a process."""

    def __init__(self) -> None:
        self._points: list[G1Point] = []
        self._lock = Lock()

    def first(self, count: int) -> list[G1Point]:
        with self._lock:
            if not self._points:
                self._points = _read_cache() or _fill_cache()
            for index in range(len(self._points), count):
                self._points.append(_generator(index))
            return self._points[:count]


def _generator(index: int) -> G1Point:
    return _hash_to_curve(f"generator {index}")


def _cache_file() -> Path:
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "paris_ray" / f"zklora-generators-{CACHE_DIGEST[:16]}.bin"


def _read_cache() -> list[G1Point] | None:
    try:
        data = _cache_file().read_bytes()
    except OSError:
        return None
    if hashlib.sha256(data).hexdigest() != CACHE_DIGEST:
        return None  # half a file, or somebody's: computed anew
    parts = (data[i : i + AFFINE_BYTES] for i in range(0, len(data), AFFINE_BYTES))
    return [G1Point.from_xy_bytes_unchecked_le(part) for part in parts]


def _fill_cache() -> list[G1Point]:
    points = [_generator(index) for index in range(CACHED_GENERATORS)]
    data = b"".join(point.to_xy_bytes_le() for point in points)
    if hashlib.sha256(data).hexdigest() != CACHE_DIGEST:
        raise RuntimeError("hash-to-curve differs from RFC 9380")
    path = _cache_file()
    with suppress(OSError):  # a read-only home: the next process takes that second again
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=path.parent) as part:
            part.write(data)
            part.flush()
            path.unlink(missing_ok=True)
            path.hardlink_to(part.name)
    return points


generators: Callable[[int], list[G1Point]] = _Generators().first


def random_scalar() -> int:
    """Return a uniform element of the scalar field, from the system's randomness."""
    return secrets.randbelow(ORDER)


def random_weight() -> int:
    """Return a random weight for folding equations; drawn only when what is folded is fixed."""
    return secrets.randbits(WEIGHT_BITS)


def multiply(points: Sequence[G1Point], scalars: Sequence[int]) -> G1Point:
    """Return the multi-scalar multiplication `sum_i scalars[i] * points[i]`; scalars reduced."""
    if len(points) != len(scalars):  # the library would leave out what is too many
        raise ValueError(f"{len(points)} points, {len(scalars)} scalars")
    return G1Point.multiexp_unchecked(list(points), _to_library(scalars))


def _to_library(scalars: Sequence[int]) -> list[Scalar]:
    # Several times faster than `Scalar(int)`, and it refuses what is not reduced.
    return [Scalar.from_le_bytes(scalar.to_bytes(SCALAR_BYTES, "little")) for scalar in scalars]


def commit_small(values: NDArray[np.int16], blinder: int) -> G1Point:
    """Return the Pedersen commitment `sum_i values[i] G_i + blinder H` of 16-bit integers.

    With 2^15 added to each value the multiplication sees 16-bit scalars, which is ten times
    faster than the full-size ones that negative values are.
    """
    count = len(values)
    scalars = np.zeros((count, SCALAR_BYTES // 2), "<u2")
    scalars[:, 0] = values.astype(np.int32) + 2**15
    data = scalars.tobytes()
    small = [
        Scalar.from_le_bytes(data[i : i + SCALAR_BYTES]) for i in range(0, len(data), SCALAR_BYTES)
    ]
    total = G1Point.multiexp_unchecked(generators(count), small)
    return total - _offset(count) + multiply([BLINDING], [blinder])


@cache
def _offset(count: int) -> G1Point:
    total = G1Point.identity()
    for point in generators(count):
        total = total + point
    return multiply([total], [2**15])


def commit_scalars(values: Sequence[int], blinder: int) -> G1Point:
    """Return the Pedersen commitment `sum_i values[i] G_i + blinder H` of field elements."""
    return multiply([*generators(len(values)), BLINDING], [*values, blinder])


def encode(point: G1Point) -> bytes:
    """Return the 48 bytes of a point."""
    return bytes(point.to_compressed_bytes())


def decode(data: bytes, name: str) -> G1Point:
    """Return the point of an encoding.

    Raises:
        VerificationError: if it is no point of the group, or not its only encoding.
    """
    try:
        point = G1Point.from_compressed_bytes(data)
    except ValueError:
        point = None
    # The library takes several encodings of infinity.
    if point is None or encode(point) != data:
        raise VerificationError(f"{name} is no point of the group")
    return point


@dataclass(slots=True)
class Equation:
    """A sum in the group that must be zero: scalars on the generators and on other points.

    It holds plain bytes and integers, so it can travel between processes.

    Attributes:
        generators: Scalars of G_1, G_2, ...
        blinding: Scalar of H.
        value: Scalar of g.
        form: Scalar of Q.
        points: Other points, uncompressed, known to be in the group.
        scalars: Their scalars.
    """

    generators: list[int] = field(default_factory=list)
    blinding: int = 0
    value: int = 0
    form: int = 0
    points: list[bytes] = field(default_factory=list)
    scalars: list[int] = field(default_factory=list)

    def add(self, point: G1Point, scalar: int) -> None:
        """Add a term."""
        self.points.append(bytes(point.to_xy_bytes_le()))
        self.scalars.append(scalar % ORDER)

    def add_generators(self, scalars: Sequence[int]) -> None:
        """Add terms of the first generators."""
        pairs = zip_longest(self.generators, scalars, fillvalue=0)
        self.generators = [(a + b) % ORDER for a, b in pairs]

    def merge(self, other: "Equation", factor: int = 1) -> None:
        """Add another equation, `factor` times."""
        self.add_generators([factor * scalar for scalar in other.generators])
        self.blinding += factor * other.blinding
        self.value += factor * other.value
        self.form += factor * other.form
        self.points += other.points
        self.scalars += [factor * scalar % ORDER for scalar in other.scalars]

    def holds(self) -> bool:
        """Return whether the sum is zero: one multi-scalar multiplication."""
        bases = [*generators(len(self.generators)), BLINDING, VALUE, FORM]
        bases += map(G1Point.from_xy_bytes_unchecked_le, self.points)
        fixed = [self.blinding % ORDER, self.value % ORDER, self.form % ORDER]
        return multiply(bases, [*self.generators, *fixed, *self.scalars]) == G1Point.identity()


def check_equations(equations: Mapping[str, Equation], what: str) -> None:
    """Check all equations by one multi-scalar multiplication.

    Args:
        equations: By the name of what each is about; each has random weights, so that a sum of
            them holds only if all do.
        what: What failed, for the error.

    Raises:
        VerificationError: if there are none, or naming all that do not hold, found by bisection.
    """
    if not equations:
        raise VerificationError(f"there is nothing to check: {what} of no module")
    bad = _failing(list(equations.items()))
    if bad:
        raise VerificationError(f"{what} of {', '.join(bad)} does not hold")


def _failing(equations: list[tuple[str, Equation]]) -> list[str]:
    total = Equation()
    for _, equation in equations:
        total.merge(equation)
    if total.holds():
        return []
    if len(equations) == 1:
        return [equations[0][0]]
    middle = len(equations) // 2
    return _failing(equations[:middle]) + _failing(equations[middle:])
