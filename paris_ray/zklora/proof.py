"""The proof that hidden, committed weights gave these outputs for these inputs: `Y = X A B`.

One proof speaks for all rows of a module in a session. A random bilinear form turns the matrix
equation into one number, and a sigma protocol proves that number under the commitments: both
factors as one vector under one linear form, whose long response is folded (`folding.py`).
docs/zklora.md has the statement, the argument for soundness and zero-knowledge, and what is not
proved. Notation follows it:

    x~ = X^T alpha, y~ = alpha^T Y beta         alpha, beta: powers of two challenges
    u = A^T x~, v = B beta, <u, v> = y~         committed as U, V
    a = A gamma, b = B^T gamma                  gamma: powers of a challenge
    p = (<x~, b>, <beta, a>)                    committed as C
    c = a + xi b, f = x~ + mu beta              xi, mu: challenges
    <f, c> = <gamma, u> + xi p_1 + mu (p_2 + xi <gamma, v>)

Sources: Freivalds 1977 (the random form); Wahby et al., S&P 2018 ("Hyrax": the inner product of
committed vectors); Attema and Cramer, CRYPTO 2020 (compressed sigma protocols).
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np

from paris_ray.errors import ParisError, VerificationError, naming
from paris_ray.zklora import curve
from paris_ray.zklora.commitment import ModuleCommitment, ModuleOpening
from paris_ray.zklora.curve import BLINDING, FORM, POINT_BYTES, VALUE, Equation, check_equations
from paris_ray.zklora.fiat_shamir import FiatShamir, Oracle
from paris_ray.zklora.field import ORDER, SCALAR_BYTES, combine, dot, plus, powers
from paris_ray.zklora.fixed_point import Int16, Int64, check_statement, evaluate
from paris_ray.zklora.folding import Folded, fold, folding_equation, folding_shape

LABEL = "paris_ray zklora proof 2"
Claim = tuple[ModuleCommitment, Int16, Int64, bytes, bytes]

POINT_NAMES = ("U", "V", "C", "Rc", "Rs", "Rt", "Rp", "M0", "M1")
NUM_POINTS, NUM_CROSSED, NUM_BLINDERS = len(POINT_NAMES), 2, 5


@dataclass(frozen=True, slots=True)
class Proof:
    """The messages of the prover, in the order in which they are absorbed.

    Attributes:
        points: Encoded commitments, as `POINT_NAMES`: the intermediate vectors and the masks.
        lacking: What the linear claim lacks at the masks.
        zu: The r masked entries of u.
        zv: The r masked entries of v.
        zp: The two masked numbers p.
        blinders: The masked blinders of c, u, v, p and of the inner product.
        folded: The masked entries of c.
    """

    points: tuple[bytes, ...]
    lacking: int
    zu: tuple[int, ...]
    zv: tuple[int, ...]
    zp: tuple[int, ...]
    blinders: tuple[int, ...]
    folded: Folded

    def to_bytes(self) -> bytes:
        """Return the messages, one after the other."""
        rounds = zip(self.folded.left, self.folded.right, strict=True)
        points = [*self.points, *(point for pair in rounds for point in pair)]
        responses = (*self.zu, *self.zv, *self.zp, *self.blinders)
        scalars = [self.lacking, *responses, *self.folded.remainder]
        return b"".join([*points, *map(_scalar, scalars)])

    @classmethod
    def from_bytes(cls, data: bytes, commitment: ModuleCommitment) -> "Proof":
        """Return the messages of a proof for this commitment; points are not looked at yet.

        Raises:
            VerificationError: if it has another length, or a scalar is not reduced.
        """
        rounds, remainder = folding_shape(max(commitment.d_in, commitment.d_out))
        lengths = (commitment.r, commitment.r, NUM_CROSSED, NUM_BLINDERS, remainder)
        end = (NUM_POINTS + 2 * rounds) * POINT_BYTES
        size = end + (1 + sum(lengths)) * SCALAR_BYTES
        if len(data) != size:
            raise VerificationError(f"the proof has {len(data)} bytes, {size} are expected")
        points, scalars = _cut(data[:end], POINT_BYTES), iter(_read_scalars(data[end:]))
        lacking = next(scalars)
        zu, zv, zp, blinders, vector = (tuple(islice(scalars, length)) for length in lengths)
        left, right = points[NUM_POINTS::2], points[NUM_POINTS + 1 :: 2]
        folded = Folded(tuple(left), tuple(right), vector)
        return cls(tuple(points[:NUM_POINTS]), lacking, zu, zv, zp, blinders, folded)


@dataclass(frozen=True, slots=True)
class _Hidden:
    """A vector and the blinder of its commitment."""

    values: list[int]
    blinder: int

    @classmethod
    def of(cls, values: list[int]) -> "_Hidden":
        return cls(values, curve.random_scalar())

    @classmethod
    def mask(cls, length: int) -> "_Hidden":
        return cls.of([curve.random_scalar() for _ in range(length)])

    def plus(self, factor: int, other: "_Hidden") -> "_Hidden":
        blinder = (self.blinder + factor * other.blinder) % ORDER
        return _Hidden(plus(self.values, factor, other.values), blinder)

    def encoded(self) -> bytes:
        """Return the commitment on G_1, G_2, ..."""
        return curve.encode(curve.commit_scalars(self.values, self.blinder))

    def encoded_number(self) -> bytes:
        """Return the commitment of a single number, on g."""
        (value,) = self.values
        return curve.encode(curve.multiply([VALUE, BLINDING], [value, self.blinder]))


@dataclass(frozen=True, slots=True)
class _Form:
    """The random bilinear form of a statement: `<x~, A B beta> = y~`."""

    x: list[int]
    beta: list[int]
    y: int

    def crossed(self, a: list[int], b: list[int]) -> list[int]:
        """Return `<x~, b>, <beta, a>`, of vectors as long as the shorter one of each pair."""
        shared = min(len(self.x), len(self.beta))
        return [dot(self.x[:shared], b[:shared]), dot(self.beta[:shared], a[:shared])]


@dataclass(frozen=True, slots=True)
class _Joint:
    """Both linear claims as one: `<f, c> = <gamma, u> + xi p_1 + mu (p_2 + xi <gamma, v>)`."""

    gamma: list[int]
    xi: int
    mu: int

    def value(self, u: Sequence[int], v: Sequence[int], p: Sequence[int]) -> int:
        """Return the claim's right side."""
        of_a = dot(self.gamma, u) + self.xi * p[0]
        return (of_a + self.mu * (p[1] + self.xi * dot(self.gamma, v))) % ORDER


def prove(opening: ModuleOpening, x: Int16, y: Int64, context: bytes) -> bytes:
    """Return a proof that the committed module gives `y` for `x`.

    All masks are drawn afresh from the system's randomness, so a proof may be made again after
    a crash; two proofs of one statement differ.

    Args:
        opening: The secret weights.
        x: `(rows, d_in)` int16, all rows of a session.
        y: `(rows, d_out)` int64, what `evaluate` gave for them.
        context: What else the proof is bound to: session, base model, transcript.

    Returns:
        4 to 12 kB at ranks to 128, 21 kB at 256, whatever the number of rows.

    Raises:
        ParisError: if `x` or `y` have other types or shapes, there is no row, or `y` is wrong.
    """
    commitment = opening.commitment
    check_statement(commitment.d_in, commitment.d_out, x, y)
    if not np.array_equal(evaluate(opening.module, x), y):
        raise ParisError("y is not what the module gives for x: there is nothing to prove")
    return _prove(opening, x, y, _start(commitment, x, y, context)).to_bytes()


def _prove(opening: ModuleOpening, x: Int16, y: Int64, oracle: Oracle) -> Proof:
    module = opening.module
    form = _random_form(x, y, oracle)
    u, v = _Hidden.of(combine(form.x, module.a)), _Hidden.of(combine(form.beta, module.b.T))
    first = [u.encoded(), v.encoded()]
    gamma = powers(_challenge(oracle, "gamma", *first), module.r)
    a, b = combine(gamma, module.a.T), combine(gamma, module.b)
    p = _Hidden.of(form.crossed(a, b))
    crossed = p.encoded()
    joint = _join(oracle, gamma, crossed)
    blinder = dot(gamma, opening.blinders_a) + joint.xi * dot(gamma, opening.blinders_b)
    c, f = _Hidden(plus(a, joint.xi, b), blinder % ORDER), plus(form.x, joint.mu, form.beta)

    # One mask under two challenges would give the weights away.
    masks = [_Hidden.mask(length) for length in (len(f), module.r, module.r, 2)]
    mask_c, mask_u, mask_v, mask_p = (mask.values for mask in masks)
    mixed = (dot(mask_u, v.values) + dot(mask_v, u.values)) % ORDER
    m0, m1 = _Hidden.of([dot(mask_u, mask_v)]), _Hidden.of([mixed])
    lacking = (dot(f, mask_c) - joint.value(mask_u, mask_v, mask_p)) % ORDER
    announced = [*(mask.encoded() for mask in masks), m0.encoded_number(), m1.encoded_number()]
    e = _challenge(oracle, "e", *announced, _scalar(lacking))

    pairs = zip(masks, (c, u, v, p), strict=True)
    zc, zu, zv, zp = (mask.plus(e, hidden) for mask, hidden in pairs)
    z5 = (m0.blinder + e * m1.blinder) % ORDER
    blinders = (zc.blinder, zu.blinder, zv.blinder, zp.blinder, z5)
    opened = (tuple(zu.values), tuple(zv.values), tuple(zp.values), blinders)
    chi = _challenge(oracle, "chi", *map(_scalar, chain.from_iterable(opened)))
    folded = fold(zc.values, [chi * value % ORDER for value in f], oracle)
    return Proof((*first, crossed, *announced), lacking, *opened, folded)


def verify(commitment: ModuleCommitment, x: Int16, y: Int64, context: bytes, proof: bytes) -> None:
    """Check one proof.

    Args:
        commitment: The pinned commitment of the module.
        x: `(rows, d_in)` int16, as the verifier sent them.
        y: `(rows, d_out)` int64, as the verifier received them.
        context: The verifier's own idea of what the proof must be bound to.
        proof: What the prover sent.

    Raises:
        VerificationError: unless the proof holds.
    """
    check_equations({"the module": proof_equation(commitment, x, y, context, proof)}, "the proof")


def verify_batch(claims: Sequence[Claim]) -> None:
    """Check many proofs with one multi-scalar multiplication.

    Args:
        claims: The arguments of `verify`, for each.

    Raises:
        VerificationError: if there are none, or naming those that do not hold, found by bisection.
    """
    verify_named({f"claim {i}": claim for i, claim in enumerate(claims)})


def verify_named(claims: Mapping[str, Claim]) -> None:
    """Check many proofs as `verify_batch` does; the error says the names of those that fail."""
    equations = {}
    for name, claim in claims.items():
        with naming(name, VerificationError):
            equations[name] = proof_equation(*claim)
    check_equations(equations, "the proof")


def proof_equation(
    commitment: ModuleCommitment, x: Int16, y: Int64, context: bytes, proof: bytes
) -> Equation:
    """Return the equation that holds if the proof does, and with probability 2^-128 otherwise.

    The equations of many proofs, made in whatever processes, are checked together by
    `curve.check_equations`. The arguments are those of `verify`.

    Raises:
        VerificationError: if the proof is malformed, or rows have other types or shapes.
    """
    try:
        check_statement(commitment.d_in, commitment.d_out, x, y)
    except ParisError as error:
        raise VerificationError(str(error)) from None
    messages = Proof.from_bytes(proof, commitment)
    return _equation(commitment, x, y, messages, _start(commitment, x, y, context))


def _equation(
    commitment: ModuleCommitment, x: Int16, y: Int64, proof: Proof, oracle: Oracle
) -> Equation:
    columns, rows = commitment.points()
    named = dict(zip(POINT_NAMES, proof.points, strict=True))
    point = {name: curve.decode(data, name) for name, data in named.items()}
    form = _random_form(x, y, oracle)
    gamma = powers(_challenge(oracle, "gamma", named["U"], named["V"]), commitment.r)
    joint = _join(oracle, gamma, named["C"])
    e = _challenge(oracle, "e", *proof.points[3:], _scalar(proof.lacking))
    zu, zv, zp, (z1, z2, z3, z4, z5) = opened = (proof.zu, proof.zv, proof.zp, proof.blinders)
    chi = _challenge(oracle, "chi", *map(_scalar, chain.from_iterable(opened)))

    # c is committed in sum_k gamma_k (CA_k + xi CB_k); the folding opens the mask plus e times it.
    claim = Equation.of((), (point["Rc"], 1), (BLINDING, -z1))
    for k, power in enumerate(gamma):
        claim.add(columns[k], e * power)
        claim.add(rows[k], joint.xi * e * power)
    claim.add(FORM, chi * (proof.lacking + joint.value(zu, zv, zp)))
    scaled = [chi * value % ORDER for value in plus(form.x, joint.mu, form.beta)]
    product = dot(zu, zv) - e * e * form.y
    parts = (
        folding_equation(claim, scaled, proof.folded, oracle),
        Equation.of(zu, (BLINDING, z2), (point["Rs"], -1), (point["U"], -e)),
        Equation.of(zv, (BLINDING, z3), (point["Rt"], -1), (point["V"], -e)),
        Equation.of(zp, (BLINDING, z4), (point["Rp"], -1), (point["C"], -e)),
        Equation.of((), (VALUE, product), (BLINDING, z5), (point["M0"], -1), (point["M1"], -e)),
    )
    total = Equation()
    for part in parts:
        total.merge(part, curve.random_weight())
    return total


def _start(commitment: ModuleCommitment, x: Int16, y: Int64, context: bytes) -> FiatShamir:
    """Return an oracle that has absorbed the statement."""
    oracle = FiatShamir(LABEL)
    sizes = (commitment.d_in, commitment.r, commitment.d_out, len(x))
    oracle.absorb("context", context)
    oracle.absorb("sizes", *(size.to_bytes(8, "little") for size in sizes))
    oracle.absorb("commitment", *commitment.a, *commitment.b)
    oracle.absorb("rows", _digest(x, "<i2"), _digest(y, "<i8"))
    return oracle


def _digest(rows: Int16 | Int64, dtype: str) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(rows, dtype).data).digest()


def _random_form(x: Int16, y: Int64, oracle: Oracle) -> _Form:
    alpha = powers(oracle.challenge("alpha"), len(x))
    beta = powers(oracle.challenge("beta"), y.shape[1])
    # Y beta first: it has a number a row, alpha^T Y would have one for every output.
    return _Form(combine(alpha, x), beta, dot(combine(beta, y.T), alpha))


def _challenge(oracle: Oracle, name: str, *messages: bytes) -> int:
    oracle.absorb(f"before {name}", *messages)
    return oracle.challenge(name)


def _join(oracle: Oracle, gamma: list[int], crossed: bytes) -> _Joint:
    """Draw xi, which joins the two vectors, and mu, which joins their forms."""
    return _Joint(gamma, _challenge(oracle, "xi", crossed), oracle.challenge("mu"))


def _scalar(value: int) -> bytes:
    return value.to_bytes(SCALAR_BYTES, "little")


def _read_scalars(data: bytes) -> list[int]:
    values = [int.from_bytes(part, "little") for part in _cut(data, SCALAR_BYTES)]
    for number, value in enumerate(values):
        if value >= ORDER:
            raise VerificationError(f"scalar {number} of the proof is not below the group's order")
    return values


def _cut(data: bytes, size: int) -> list[bytes]:
    return [data[i : i + size] for i in range(0, len(data), size)]
