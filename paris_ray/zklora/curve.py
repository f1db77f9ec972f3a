"""The group of BLS12-381 (G1): generators that nobody knows a relation of, and equations in them.

`py_arkworks_bls12381` does the arithmetic; what it does not check is checked here: lengths of
multi-scalar multiplications, canonical scalars, and the only encoding of each point.
"""

import hashlib
import os
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from itertools import chain, islice, zip_longest
from itertools import count as numbers
from pathlib import Path
from tempfile import NamedTemporaryFile

import numpy as np
from numpy.typing import NDArray
from py_arkworks_bls12381 import G1Point, Scalar

from paris_ray.errors import VerificationError
from paris_ray.zklora.field import ORDER, SCALAR_BYTES

POINT_BYTES = 48
AFFINE_BYTES = 96

# RFC 9380 hash-to-curve of these strings: no trapdoor, and anyone can recompute them.
DOMAIN = b"PARIS_RAY-ZKLORA-V1-BLS12381G1_XMD:SHA-256_SSWU_RO_"
BLOCK = 4608  # generators of a file
BLOCK_DIGESTS = (  # SHA-256 of the files: enough for modules 18,432 wide
    "5c948f44a65999276e5fea7175f2fc1717c9da1ef9e7193d55f004ab434d7f9d",
    "b7efb11785e62dcabec7f2fc1cab45c0471cee57bf7c1c9196cba36535ea8131",
    "0395b35f740339f2fedd5562f92b82e06f5406d21cefcf5a63655c2d6d437ca9",
    "9d60ac2c0478d25e03e9a52ee59e31e3dd77268dbec0a990eb1ee6e583e03399",
)
WEIGHT_BITS = 128  # of the random weights that fold equations into one: a lie survives at 2^-128


def _hash_to_curve(name: str) -> G1Point:
    return G1Point.hash_to_curve(name.encode(), DOMAIN)


BLINDING = _hash_to_curve("blinding")  # H: what hides
VALUE = _hash_to_curve("value")  # g: commits to a single number
FORM = _hash_to_curve("form")  # Q: carries the value of a linear form through the folding


def generators(count: int) -> list[G1Point]:
    """Return `G_1, ..., G_count`."""
    return list(islice(chain.from_iterable(map(_block, numbers())), count))


@cache
def _block(block: int) -> list[G1Point]:
    """Return the generators of a block: the first ones are kept in files, for they take seconds."""
    if block < len(BLOCK_DIGESTS):
        return _read_block(block) or _make_block(block)
    return _hash_block(block)


def _hash_block(block: int) -> list[G1Point]:
    indices = range(block * BLOCK, (block + 1) * BLOCK)
    return [_hash_to_curve(f"generator {index}") for index in indices]


def _block_file(block: int) -> Path:
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "paris_ray" / f"zklora-generators-{BLOCK_DIGESTS[block][:16]}.bin"


def _read_block(block: int) -> list[G1Point] | None:
    try:
        data = _block_file(block).read_bytes()
    except OSError:
        return None
    if hashlib.sha256(data).hexdigest() != BLOCK_DIGESTS[block]:
        return None  # half a file, or somebody's: computed anew
    parts = (data[i : i + AFFINE_BYTES] for i in range(0, len(data), AFFINE_BYTES))
    return [G1Point.from_xy_bytes_unchecked_le(part) for part in parts]


def _make_block(block: int) -> list[G1Point]:
    points = _hash_block(block)
    data = b"".join(point.to_xy_bytes_le() for point in points)
    if hashlib.sha256(data).hexdigest() != BLOCK_DIGESTS[block]:
        raise RuntimeError("hash-to-curve differs from RFC 9380")
    path = _block_file(block)
    with suppress(OSError):  # a read-only home: the next process takes that second again
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=path.parent) as part:
            part.write(data)
            part.flush()
            path.unlink(missing_ok=True)
            path.hardlink_to(part.name)
    return points


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
        scalars: Those of other points, which are uncompressed, and known to be in the group.
    """

    generators: list[int] = field(default_factory=list)
    scalars: dict[bytes, int] = field(default_factory=dict)

    @classmethod
    def of(cls, generators: Sequence[int], *terms: tuple[G1Point, int]) -> "Equation":
        """Return the equation with scalars of the first generators, and of other points."""
        equation = cls(list(generators))
        for point, scalar in terms:
            equation.add(point, scalar)
        return equation

    def add(self, point: G1Point, scalar: int) -> None:
        """Add a term."""
        self._add(bytes(point.to_xy_bytes_le()), scalar)

    def _add(self, point: bytes, scalar: int) -> None:
        self.scalars[point] = (self.scalars.get(point, 0) + scalar) % ORDER

    def add_generators(self, scalars: Sequence[int]) -> None:
        """Add terms of the first generators."""
        sums = zip_longest(self.generators, scalars, fillvalue=0)
        self.generators = [a + b for a, b in sums]

    def merge(self, other: "Equation", factor: int = 1) -> None:
        """Add another equation, `factor` times."""
        self.add_generators([factor * scalar % ORDER for scalar in other.generators])
        for point, scalar in other.scalars.items():
            self._add(point, factor * scalar)

    def holds(self) -> bool:
        """Return whether the sum is zero: one multi-scalar multiplication."""
        points = [*generators(len(self.generators))]
        points += map(G1Point.from_xy_bytes_unchecked_le, self.scalars)
        scalars = [*(scalar % ORDER for scalar in self.generators), *self.scalars.values()]
        return multiply(points, scalars) == G1Point.identity()


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
