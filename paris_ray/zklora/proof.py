"""The proof that hidden, committed weights gave these outputs for these inputs: `Y = X A B`.

One proof speaks for all rows of a module in a session. A random bilinear form turns the matrix
equation into one number, a sigma protocol proves that number under the commitments, and its two
long responses are folded (`folding.py`). docs/zklora.md has the statement, the argument for
soundness and zero-knowledge, and what is not proved. Notation follows it:

    x~ = X^T alpha, y~ = alpha^T Y beta         alpha, beta: powers of two challenges
    u = A^T x~, v = B beta, <u, v> = y~         committed as U, V
    a = A gamma, b = B^T gamma                  gamma: powers of a challenge
    <x~, a> = <gamma, u>, <b, beta> = <gamma, v>

Sources: Freivalds 1977 (the random form); Wahby et al., S&P 2018 ("Hyrax": the inner product of
committed vectors); Attema and Cramer, CRYPTO 2020 (compressed sigma protocols).
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from paris_ray.errors import ParisError, VerificationError
from paris_ray.zklora import curve
from paris_ray.zklora.commitment import ModuleCommitment, ModuleOpening
from paris_ray.zklora.curve import BLINDING, POINT_BYTES, VALUE, Equation, check_equations
from paris_ray.zklora.fiat_shamir import FiatShamir, Oracle
from paris_ray.zklora.field import ORDER, SCALAR_BYTES, combine, dot, padded, plus, powers
from paris_ray.zklora.fixed_point import Int16, Int64, check_statement, evaluate
from paris_ray.zklora.folding import Folded, fold, folding_equation, folding_shape

LABEL = "paris_ray zklora proof 1"
Claim = tuple[ModuleCommitment, Int16, Int64, bytes, bytes]

POINT_NAMES = ("U", "V", "Ra", "Rb", "Rs", "Rt", "M0", "M1")


@dataclass(frozen=True, slots=True)
class Proof:
    """The messages of the prover, in the order in which they are absorbed.

    Attributes:
        points: Encoded commitments, as `POINT_NAMES`: the intermediate vectors and the masks.
        forms: `la, lb`, the values of both linear claims at the masks.
        zu: The r masked entries of u.
        zv: The r masked entries of v.
        blinders: The masked blinders of a, b, u, v and of the inner product.
        crossed: `<x~, zb>, <beta, za>`: with them both long responses fold as one vector.
        folded: The two long responses, `za + xi zb`.
    """

    points: tuple[bytes, ...]
    forms: tuple[int, int]
    zu: tuple[int, ...]
    zv: tuple[int, ...]
    blinders: tuple[int, int, int, int, int]
    crossed: tuple[int, int]
    folded: Folded

    def to_bytes(self) -> bytes:
        """Return the messages, one after the other."""
        rounds = zip(self.folded.left, self.folded.right, strict=True)
        points = [*self.points, *(point for pair in rounds for point in pair)]
        scalars = [*self.forms, *self.zu, *self.zv, *self.blinders, *self.crossed]
        return b"".join(points) + _scalar_bytes([*scalars, *self.folded.remainder])

    @classmethod
    def from_bytes(cls, data: bytes, commitment: ModuleCommitment) -> "Proof":
        """Return the messages of a proof for this commitment; points are not looked at yet.

        Raises:
            VerificationError: if it has another length, or a scalar is not reduced.
        """
        r = commitment.r
        rounds, remainder = folding_shape(max(commitment.d_in, commitment.d_out))
        num_points, num_scalars = 8 + 2 * rounds, 2 + 2 * r + 5 + 2 + remainder
        size = num_points * POINT_BYTES + num_scalars * SCALAR_BYTES
        if len(data) != size:
            raise VerificationError(f"the proof has {len(data)} bytes, {size} are expected")
        points = _cut(data[: num_points * POINT_BYTES], POINT_BYTES)
        scalars = _read_scalars(data[num_points * POINT_BYTES :])
        zu, zv, rest = scalars[2 : 2 + r], scalars[2 + r : 2 + 2 * r], scalars[2 + 2 * r :]
        return cls(
            points=tuple(points[:8]),
            forms=(scalars[0], scalars[1]),
            zu=tuple(zu),
            zv=tuple(zv),
            blinders=(rest[0], rest[1], rest[2], rest[3], rest[4]),
            crossed=(rest[5], rest[6]),
            folded=Folded(tuple(points[8::2]), tuple(points[9::2]), tuple(rest[7:])),
        )


@dataclass(frozen=True, slots=True)
class _Hidden:
    """A vector and the blinder of its commitment."""

    values: list[int]
    blinder: int

    @classmethod
    def of(cls, values: list[int]) -> "_Hidden":
        return cls(values, curve.random_scalar())

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


@dataclass(frozen=True, slots=True)
class _Masks:
    """What hides a, b, u and v. One mask under two challenges would give the weights away."""

    a: _Hidden
    b: _Hidden
    u: _Hidden
    v: _Hidden

    @classmethod
    def draw(cls, d_in: int, r: int, d_out: int) -> "_Masks":
        lengths = (d_in, d_out, r, r)
        return cls(*(_Hidden.of([curve.random_scalar() for _ in range(n)]) for n in lengths))

    def encoded(self) -> list[bytes]:
        return [mask.encoded() for mask in (self.a, self.b, self.u, self.v)]

    def forms(self, form: _Form, gamma: list[int]) -> tuple[int, int]:
        """Return what both linear claims are at the masks."""
        return (
            (dot(form.x, self.a.values) - dot(gamma, self.u.values)) % ORDER,
            (dot(form.beta, self.b.values) - dot(gamma, self.v.values)) % ORDER,
        )

    def products(self, u: list[int], v: list[int]) -> tuple[_Hidden, _Hidden]:
        """Return the coefficients of 1 and e in `<mask_u + e u, mask_v + e v>`."""
        mixed = dot(self.u.values, v) + dot(self.v.values, u)
        return _Hidden.of([dot(self.u.values, self.v.values)]), _Hidden.of([mixed % ORDER])


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
        4 to 12 kB at usual widths and ranks, whatever the number of rows.

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
    points = [u.encoded(), v.encoded()]
    gamma = _challenge_powers(oracle, "gamma", module.r, points)
    a = _Hidden(combine(gamma, module.a.T), dot(gamma, opening.blinders_a))
    b = _Hidden(combine(gamma, module.b), dot(gamma, opening.blinders_b))

    masks = _Masks.draw(module.d_in, module.r, module.d_out)
    m0, m1 = masks.products(u.values, v.values)
    forms = masks.forms(form, gamma)
    announced = [*masks.encoded(), m0.encoded_number(), m1.encoded_number()]
    e = _challenge(oracle, "e", *announced, *map(_scalar, forms))

    za, zb = masks.a.plus(e, a), masks.b.plus(e, b)
    zu, zv = masks.u.plus(e, u), masks.v.plus(e, v)
    z5 = (m0.blinder + e * m1.blinder) % ORDER
    blinders = (za.blinder, zb.blinder, zu.blinder, zv.blinder, z5)
    width = max(module.d_in, module.d_out)
    long_a, long_b = padded(za.values, width), padded(zb.values, width)
    crossed = dot(form.x, long_b[: module.d_in]), dot(form.beta, long_a[: module.d_out])
    xi, mu, chi = _folding_challenges(oracle, zu.values, zv.values, blinders, crossed)
    return Proof(
        points=(*points, *announced),
        forms=forms,
        zu=tuple(zu.values),
        zv=tuple(zv.values),
        blinders=blinders,
        crossed=crossed,
        folded=fold(plus(long_a, xi, long_b), _joint_form(form, mu, chi), oracle),
    )


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
        try:
            equations[name] = proof_equation(*claim)
        except ParisError as error:
            raise VerificationError(f"{name}: {error}") from None
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
    gamma = _challenge_powers(oracle, "gamma", commitment.r, proof.points[:2])
    e = _challenge(oracle, "e", *proof.points[2:], *map(_scalar, proof.forms))
    xi, mu, chi = _folding_challenges(oracle, proof.zu, proof.zv, proof.blinders, proof.crossed)
    z1, z2, z3, z4, z5 = proof.blinders

    # za is committed in Ra + e sum_k gamma_k CA_k, zb likewise; the folding opens za + xi zb.
    claim = Equation(blinding=-z1 - xi * z2)
    claim.add(point["Ra"], 1)
    claim.add(point["Rb"], xi)
    for k, power in enumerate(gamma):
        claim.add(columns[k], e * power)
        claim.add(rows[k], xi * e * power)
    value_a, value_b = proof.forms[0] + dot(gamma, proof.zu), proof.forms[1] + dot(gamma, proof.zv)
    crossed_a, crossed_b = proof.crossed
    claim.form = chi * (value_a + xi * crossed_a + mu * (crossed_b + xi * value_b))
    folding = folding_equation(claim, _joint_form(form, mu, chi), proof.folded, oracle)

    opened_u = Equation(generators=list(proof.zu), blinding=z3)
    opened_u.add(point["Rs"], -1)
    opened_u.add(point["U"], -e)
    opened_v = Equation(generators=list(proof.zv), blinding=z4)
    opened_v.add(point["Rt"], -1)
    opened_v.add(point["V"], -e)
    product = Equation(value=dot(proof.zu, proof.zv) - e * e * form.y, blinding=z5)
    product.add(point["M0"], -1)
    product.add(point["M1"], -e)

    total = Equation()
    for part in (folding, opened_u, opened_v, product):
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


def _challenge_powers(
    oracle: Oracle, name: str, count: int, messages: Sequence[bytes]
) -> list[int]:
    return powers(_challenge(oracle, name, *messages), count)


def _folding_challenges(
    oracle: Oracle,
    zu: Sequence[int],
    zv: Sequence[int],
    blinders: Sequence[int],
    crossed: Sequence[int],
) -> tuple[int, int, int]:
    """Return xi, which joins the two responses, mu, which joins their forms, and chi.

    Everything that the folded claim is made of is absorbed before: were chi known earlier, a
    multiple of Q hidden in Ra would forge the value of the form.
    """
    oracle.absorb("responses", *map(_scalar, (*zu, *zv, *blinders, *crossed)))
    return oracle.challenge("xi"), oracle.challenge("mu"), oracle.challenge("chi")


def _joint_form(form: _Form, mu: int, chi: int) -> list[int]:
    """Return `chi (x~ + mu beta)`, both padded with zeros."""
    width = max(len(form.x), len(form.beta))
    both = zip(padded(form.x, width), padded(form.beta, width), strict=True)
    return [chi * (x + mu * b) % ORDER for x, b in both]


def _scalar(value: int) -> bytes:
    return value.to_bytes(SCALAR_BYTES, "little")


def _scalar_bytes(values: Sequence[int]) -> bytes:
    return b"".join(map(_scalar, values))


def _read_scalars(data: bytes) -> list[int]:
    values = [int.from_bytes(part, "little") for part in _cut(data, SCALAR_BYTES)]
    for number, value in enumerate(values):
        if value >= ORDER:
            raise VerificationError(f"scalar {number} of the proof is not below the group's order")
    return values


def _cut(data: bytes, size: int) -> list[bytes]:
    return [data[i : i + size] for i in range(0, len(data), size)]
