"""Pedersen commitments to the factors of a LoRA module, and the check of what is delivered.

Each column of A and each row of B is committed on its own: `CA_k = sum_i A[i,k] G_i + rho_k H`,
`CB_k = sum_j B[k,j] G_j + sigma_k H`. They hide perfectly, so that two commitments to the same
weights cannot be told from commitments to others, and bind as long as discrete logarithms in G1 of
BLS12-381 are hard. Source: Pedersen, CRYPTO 1991; docs/zklora.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from py_arkworks_bls12381 import G1Point

from paris_ray.errors import VerificationError, naming
from paris_ray.zklora.curve import (
    BLINDING,
    Equation,
    check_equations,
    commit_small,
    decode,
    encode,
    random_scalar,
    random_weight,
)
from paris_ray.zklora.field import ORDER, combine, dot
from paris_ray.zklora.fixed_point import QuantisedModule, check_dimensions


@dataclass(frozen=True, slots=True)
class ModuleCommitment:
    """What the contributor publishes of a module before anyone tries it.

    Attributes:
        d_in: Width of the inputs.
        r: Rank.
        d_out: Width of the outputs.
        a: The r commitments to columns of A, 48 bytes each.
        b: The r commitments to rows of B.
    """

    d_in: int
    r: int
    d_out: int
    a: tuple[bytes, ...]
    b: tuple[bytes, ...]

    def points(self) -> tuple[list[G1Point], list[G1Point]]:
        """Return the points of A's columns and of B's rows.

        Raises:
            VerificationError: if dimensions, numbers or encodings are not allowed.
        """
        with naming("the commitment", VerificationError):
            check_dimensions(self.d_in, self.r, self.d_out)
        decoded = []
        for name, encodings in (("a", self.a), ("b", self.b)):
            if len(encodings) != self.r:
                raise VerificationError(
                    f"the commitment has {len(encodings)} points {name}, its rank is {self.r}"
                )
            decoded.append([decode(data, f"{name}[{k}]") for k, data in enumerate(encodings)])
        return decoded[0], decoded[1]


@dataclass(frozen=True, eq=False)
class ModuleOpening:
    """What is committed: only the contributor has it, until it is sold.

    Attributes:
        module: The integers.
        blinders_a: The r blinders rho of A's columns.
        blinders_b: The r blinders sigma of B's rows.
    """

    module: QuantisedModule
    blinders_a: tuple[int, ...]
    blinders_b: tuple[int, ...]

    @cached_property
    def commitment(self) -> ModuleCommitment:
        """The commitment that this opens; computed once."""
        module = self.module
        columns = zip(module.a.T, self.blinders_a, strict=True)
        rows = zip(module.b, self.blinders_b, strict=True)
        return ModuleCommitment(
            module.d_in,
            module.r,
            module.d_out,
            tuple(encode(commit_small(column, rho)) for column, rho in columns),
            tuple(encode(commit_small(row, sigma)) for row, sigma in rows),
        )

    def of(self, commitment: ModuleCommitment) -> "ModuleOpening":
        """Return the opening of a commitment that is known, and so need not be computed again."""
        opening = replace(self)
        vars(opening)["commitment"] = commitment  # where `cached_property` looks
        return opening


def commit(module: QuantisedModule) -> tuple[ModuleCommitment, ModuleOpening]:
    """Return a fresh commitment to a module, and what opens it."""
    blinders = [tuple(random_scalar() for _ in range(module.r)) for _ in "ab"]
    opening = ModuleOpening(module, blinders[0], blinders[1])
    return opening.commitment, opening


def open_commitment(commitment: ModuleCommitment, opening: ModuleOpening) -> None:
    """Check that an opening is the committed one, in 16-bit integers.

    Raises:
        VerificationError: if it is not.
    """
    open_commitments({"the module": (commitment, opening)})


def open_commitments(pairs: Mapping[str, tuple[ModuleCommitment, ModuleOpening]]) -> None:
    """Check the openings of a whole adapter, by name, with one multi-scalar multiplication.

    Raises:
        VerificationError: naming the modules that are not the committed ones.
    """
    equations = {}
    for name, (commitment, opening) in pairs.items():
        with naming(name, VerificationError):
            equations[name] = _opening_equation(commitment, opening)
    check_equations(equations, "the opening")


def _opening_equation(commitment: ModuleCommitment, opening: ModuleOpening) -> Equation:
    """Return `sum_k w_k (CA_k - Com(A_k)) + w'_k (CB_k - Com(B_k)) = 0` for random weights.

    That the integers have 16 bits is checked where a `QuantisedModule` is made.
    """
    module = opening.module
    delivered, committed = ((part.d_in, part.r, part.d_out) for part in (module, commitment))
    if delivered != committed:
        raise VerificationError(f"dimensions {delivered} were delivered, {committed} committed")
    equation = Equation()
    factors = ((module.a.T, opening.blinders_a), (module.b, opening.blinders_b))
    for points, (vectors, blinders) in zip(commitment.points(), factors, strict=True):
        if len(blinders) != module.r or not all(0 <= blinder < ORDER for blinder in blinders):
            raise VerificationError(f"blinders must be {module.r} numbers below the group's order")
        weights = [random_weight() for _ in points]
        for point, weight in zip(points, weights, strict=True):
            equation.add(point, weight)
        equation.add_generators([-value for value in combine(weights, vectors)])
        equation.add(BLINDING, -dot(weights, blinders))
    return equation
