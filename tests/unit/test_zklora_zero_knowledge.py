"""What a proof tells of the weights: nothing, unless a mask is used twice."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
from py_arkworks_bls12381 import G1Point

from paris_ray.errors import VerificationError
from paris_ray.zklora import curve, folding
from paris_ray.zklora.commitment import ModuleCommitment, ModuleOpening, commit
from paris_ray.zklora.curve import BLINDING, VALUE, check_equations, encode, multiply
from paris_ray.zklora.field import ORDER, dot, plus, powers
from paris_ray.zklora.fixed_point import QuantisedModule, evaluate, quantise
from paris_ray.zklora.proof import (
    POINT_NAMES,
    Proof,
    _equation,
    _Joint,
    _prove,
    _random_form,
    prove,
    verify,
)

D_IN, R, D_OUT, ROWS = 12, 3, 10, 7
CONTEXT = b"this session"
NAMES = ("alpha", "beta", "gamma", "xi", "mu", "e", "chi", "x")
UNLIKELY = 1e-9  # how often a test of randomness may fail by chance


class ScriptedOracle:
    """An oracle whose challenges are written down before anything is said."""

    def __init__(self, seed: int = 0, **script: int) -> None:
        rng = random.Random(seed)
        self.script = {name: rng.randrange(1, ORDER) for name in NAMES} | script

    def absorb(self, name: str, *messages: bytes) -> None:
        pass

    def challenge(self, name: str) -> int:
        return self.script[name]


def module_of(seed: int = 0) -> QuantisedModule:
    rng = np.random.default_rng(seed)
    return quantise(rng.normal(size=(D_IN, R)), rng.normal(size=(R, D_OUT)))


def rows_of(seed: int = 0, rows: int = ROWS) -> np.ndarray:
    return np.random.default_rng([seed, 1]).integers(-(2**15), 2**15, (rows, D_IN), np.int16)


def draw(count: int) -> list[int]:
    return [curve.random_scalar() for _ in range(count)]


def random_point() -> G1Point:
    return multiply([BLINDING], draw(1))


@pytest.fixture(params=[0, 2], ids=["no round", "two rounds"])
def rounds(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How often the long responses are folded: at small widths never, unless asked to."""
    if request.param:
        monkeypatch.setattr(folding, "LONGEST_REMAINDER", D_IN >> request.param)
    return request.param


# Simulated proofs: who may choose the challenges first needs no weights


def simulate(
    commitment: ModuleCommitment, x: np.ndarray, y: np.ndarray, oracle: ScriptedOracle
) -> Proof:
    """Return a proof of any statement: the responses first, then what they must answer."""
    columns, rows = commitment.points()
    form = _random_form(x, y, oracle)
    gamma, e = powers(oracle.challenge("gamma"), commitment.r), oracle.challenge("e")
    joint = _Joint(gamma, oracle.challenge("xi"), oracle.challenge("mu"))
    f = plus(form.x, joint.mu, form.beta)
    zc, zu, zv, zp = map(draw, (len(f), commitment.r, commitment.r, 2))
    z1, z2, z3, z4, z5 = draw(5)
    U, V, C, M1 = (random_point() for _ in range(4))
    scaled = [e * power % ORDER for power in gamma]
    both = [*scaled, *(joint.xi * scalar % ORDER for scalar in scaled)]
    announced = [
        curve.commit_scalars(zc, z1) - multiply([*columns, *rows], both),
        curve.commit_scalars(zu, z2) - multiply([U], [e]),
        curve.commit_scalars(zv, z3) - multiply([V], [e]),
        curve.commit_scalars(zp, z4) - multiply([C], [e]),
        multiply([VALUE, BLINDING, M1], [(dot(zu, zv) - e * e * form.y) % ORDER, z5, ORDER - e]),
        M1,
    ]
    lacking = (dot(f, zc) - joint.value(zu, zv, zp)) % ORDER
    opened = (tuple(zu), tuple(zv), tuple(zp), (z1, z2, z3, z4, z5))
    folded = folding.fold(zc, [oracle.challenge("chi") * value % ORDER for value in f], oracle)
    return Proof(tuple(map(encode, (U, V, C, *announced))), lacking, *opened, folded)


def true_statement() -> tuple[ModuleCommitment, np.ndarray, np.ndarray]:
    commitment, opening = commit(module_of())
    return commitment, rows_of(), evaluate(opening.module, rows_of())


def false_output() -> tuple[ModuleCommitment, np.ndarray, np.ndarray]:
    commitment, x, y = true_statement()
    y[2, 5] += 1
    return commitment, x, y


def nothing_known() -> tuple[ModuleCommitment, np.ndarray, np.ndarray]:
    """Points that nobody knows an opening of, and outputs of no low rank."""
    points = [tuple(encode(curve._hash_to_curve(f"{name} {k}")) for k in range(R)) for name in "ab"]
    y = np.random.default_rng(5).integers(-(2**62), 2**62, (ROWS, D_OUT))
    return ModuleCommitment(D_IN, R, D_OUT, points[0], points[1]), rows_of(), y


@pytest.mark.parametrize("statement", [true_statement, false_output, nothing_known])
def test_proofs_are_simulated_without_weights_by_who_programs_the_oracle(
    statement: Callable[[], tuple[ModuleCommitment, np.ndarray, np.ndarray]], rounds: int
) -> None:
    commitment, x, y = statement()
    simulated = simulate(commitment, x, y, ScriptedOracle())
    assert len(simulated.folded.left) == rounds
    equation = _equation(commitment, x, y, simulated, ScriptedOracle())
    check_equations({"the simulated proof": equation}, "the equation")
    # Another script, or the hash, is not fooled.
    assert not _equation(commitment, x, y, simulated, ScriptedOracle(1)).holds()
    with pytest.raises(VerificationError, match="the proof of the module does not hold"):
        verify(commitment, x, y, CONTEXT, simulated.to_bytes())


@pytest.mark.parametrize("name", NAMES[:6])
def test_a_simulated_proof_holds_for_no_other_challenge(name: str) -> None:
    """The rest (chi) only keeps the value of the form from being wrong; here it is not."""
    commitment, x, y = false_output()
    simulated = simulate(commitment, x, y, ScriptedOracle())
    changed = ScriptedOracle(**{name: ScriptedOracle().script[name] ^ 1})
    assert not _equation(commitment, x, y, simulated, changed).holds()


def test_every_part_of_a_proof_is_checked_by_itself(rounds: int) -> None:
    """With challenges that do not notice: each field is in an equation that fails without it."""
    commitment, x, y = true_statement()
    simulated = simulate(commitment, x, y, ScriptedOracle())
    data, fields = simulated.to_bytes(), 9 + 2 * rounds

    def holds(changed: bytes) -> bool:
        messages = Proof.from_bytes(changed, commitment)
        return _equation(commitment, x, y, messages, ScriptedOracle()).holds()

    assert holds(data)
    for start in range(0, 48 * fields, 48):
        moved = encode(curve.decode(data[start : start + 48], "") + BLINDING)
        assert not holds(data[:start] + moved + data[start + 48 :])
    for start in range(48 * fields, len(data), 32):
        value = (int.from_bytes(data[start : start + 32], "little") + 1) % ORDER
        assert not holds(data[:start] + value.to_bytes(32, "little") + data[start + 32 :])


@pytest.mark.parametrize(
    "errors",
    [
        (0, 1, -1, 0, 0),  # of u and of v
        (0, 1, 0, -1, 0),  # of u and of p
        (0, 1, 0, 0, -1),  # of u and of the product
        (0, 0, 1, -1, 0),
        (0, 0, 1, 0, -1),
        (0, 0, 0, 1, -1),
        (1, 1, 0, 0, 0),  # the folded claim has z1 on its other side
        (1, 0, 1, 0, 0),
        (1, 0, 0, 1, 0),
        (1, 0, 0, 0, 1),
    ],
)
def test_errors_of_two_equations_do_not_cancel(errors: tuple[int, ...]) -> None:
    """Blinders that are wrong by as much in one equation as in another: plain sums would hold."""
    commitment, x, y = true_statement()
    simulated = simulate(commitment, x, y, ScriptedOracle())
    pairs = zip(simulated.blinders, errors, strict=True)
    changed = replace(simulated, blinders=tuple((z + error) % ORDER for z, error in pairs))
    assert not _equation(commitment, x, y, changed, ScriptedOracle()).holds()


# Masks: fresh they hide everything, used twice they give the weights away


@pytest.fixture
def fixed_masks(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Rewind the randomness of provers: what a broken generator or a forked process would do."""

    def rewind() -> None:
        rng = random.Random(3)
        monkeypatch.setattr(curve, "random_scalar", lambda: rng.randrange(ORDER))

    return rewind


def divided(difference: Sequence[int], by: int) -> list[int]:
    inverse = pow(by, -1, ORDER)
    return [value * inverse % ORDER for value in difference]


def minus(a: Sequence[int], b: Sequence[int]) -> list[int]:
    return plus(a, -1, b)


def interpolate(points: Sequence[int], values: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return the coefficients of the polynomials that take the values at the points (Lagrange)."""
    coefficients = [[0] * len(values[0]) for _ in points]
    for i, point in enumerate(points):
        basis, scale = [1], 1
        for other in (*points[:i], *points[i + 1 :]):
            shifted = [0, *basis]
            basis = plus(shifted, -other, [*basis, 0])
            scale = scale * (point - other) % ORDER
        for k, coefficient in enumerate(divided(basis, scale)):
            coefficients[k] = plus(coefficients[k], coefficient, values[i])
    return coefficients


def test_masks_that_are_used_twice_reveal_the_weights(fixed_masks: Callable[[], None]) -> None:
    """The extractor of special soundness: two values of e and xi, and r of gamma."""
    _, opening = commit(module_of())
    x, module = rows_of(), opening.module
    y = evaluate(module, x)

    def respond(**challenges: int) -> Proof:
        fixed_masks()
        return _prove(opening, x, y, ScriptedOracle(**challenges))

    # The second moves of two proofs are equal, their responses differ by a multiple of u and v.
    first, second = respond(e=10), respond(e=13)
    assert first.points == second.points and first.lacking == second.lacking
    form = _random_form(x, y, ScriptedOracle())
    pairs = ((first.zu, second.zu), (first.zv, second.zv), (first.zp, second.zp))
    u, v, p = (divided(minus(b, a), 3) for a, b in pairs)
    assert u == [dot(form.x, column) for column in module.a.T.tolist()]
    assert v == [dot(form.beta, row) for row in module.b.tolist()]
    assert dot(u, v) == form.y
    gamma = powers(ScriptedOracle().challenge("gamma"), R)
    crossing = (
        [dot(gamma, row) for row in module.a.tolist()],
        [dot(gamma, column) for column in module.b.T.tolist()],
    )
    assert p == form.crossed(*crossing)

    def combinations(gamma: int) -> tuple[list[int], list[int]]:
        """Return `A gamma` and `B^T gamma`."""
        joined = {}
        for xi in (20, 21):
            low, high = (respond(gamma=gamma, e=e, xi=xi).folded.remainder for e in (10, 13))
            joined[xi] = divided(minus(high, low), 3)  # a + xi b
        b = minus(joined[21], joined[20])
        return plus(joined[20], -20, b), b[:D_OUT]

    gammas = [2, 3, 5]
    a, b = zip(*map(combinations, gammas), strict=True)
    assert interpolate(gammas, a) == (module.a.T.astype(object) % ORDER).tolist()
    assert interpolate(gammas, b) == (module.b.astype(object) % ORDER).tolist()


def announced(proof: bytes, commitment: ModuleCommitment) -> Iterator[object]:
    """Yield everything in a proof that must be fresh: all of it."""
    messages = Proof.from_bytes(proof, commitment)
    yield from messages.points
    yield from (messages.lacking, *messages.zu, *messages.zv, *messages.zp, *messages.blinders)
    yield from (*messages.folded.left, *messages.folded.right, *messages.folded.remainder)


def test_proofs_of_one_statement_share_nothing(rounds: int) -> None:
    commitment, opening = commit(module_of())
    x = rows_of()
    y = evaluate(opening.module, x)
    proofs = [prove(opening, x, y, CONTEXT) for _ in range(5)]
    items = [item for proof in proofs for item in announced(proof, commitment)]
    assert len(set(items)) == len(items)


def test_proofs_under_the_same_challenges_share_nothing(rounds: int) -> None:
    """What is not masked would be the same multiple of a secret in both."""
    commitment, opening = commit(module_of())
    x = rows_of()
    y = evaluate(opening.module, x)
    proofs = [_prove(opening, x, y, ScriptedOracle()).to_bytes() for _ in range(2)]
    first, second = (set(announced(proof, commitment)) for proof in proofs)
    assert not first & second


def test_every_mask_and_blinder_is_drawn_and_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without that of M0 alone, z5 / e would be the blinder of M1, which no statistic sees."""
    _, opening = commit(module_of())
    x = rows_of()
    y = evaluate(opening.module, x)

    def prove_with(changed: int | None) -> tuple[bytes, int]:
        rng, drawn = random.Random(3), 0

        def draw_next() -> int:
            nonlocal drawn
            drawn += 1
            return (rng.randrange(ORDER) + (drawn - 1 == changed)) % ORDER

        monkeypatch.setattr(curve, "random_scalar", draw_next)
        return _prove(opening, x, y, ScriptedOracle()).to_bytes(), drawn

    original, drawn = prove_with(None)
    assert drawn == max(D_IN, D_OUT) + 2 * R + 2 + len(POINT_NAMES)
    assert prove_with(None)[0] == original
    proofs = {prove_with(number)[0] for number in range(drawn)}
    assert len(proofs | {original}) == drawn + 1


def test_even_zero_weights_are_masked() -> None:
    """Nothing in a proof or commitment shows that there is nothing behind it."""
    module = QuantisedModule(np.zeros((D_IN, R), np.int16), np.zeros((R, D_OUT), np.int16), 0, 0)
    commitment, opening = commit(module)
    x, y = rows_of(rows=1), np.zeros((1, D_OUT), np.int64)
    items = {*commitment.a, *commitment.b}
    items |= set(announced(prove(opening, x, y, CONTEXT), commitment))
    assert len(items) == 2 * R + 9 + 1 + 2 * R + 2 + 5 + D_IN
    assert not items & {0, encode(G1Point.identity())}


# Trivial statistics; a response is uniform for any mask, which is why masks are looked at alone


def other_weights(module: QuantisedModule) -> QuantisedModule:
    """Return other weights of the same map: A and B negated, their ranks in another order."""
    return QuantisedModule(
        -module.a[:, ::-1], -module.b[::-1], module.exponent_a, module.exponent_b
    )


def scalars_of(opening: ModuleOpening, x: np.ndarray, y: np.ndarray, proofs: int) -> list[int]:
    found = []
    for _ in range(proofs):
        proof = prove(opening, x, y, CONTEXT)
        found += [item for item in announced(proof, opening.commitment) if isinstance(item, int)]
    return found


def quantile(degrees: int) -> float:
    """Return what chi-square exceeds with probability UNLIKELY (Wilson and Hilferty 1931)."""
    spread = 2 / (9 * degrees)
    return degrees * (1 - spread + NormalDist().inv_cdf(1 - UNLIKELY) * spread**0.5) ** 3


def top_bytes(scalars: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return how often each top byte was found, and how often it is expected."""
    top = ORDER >> 248
    elements = [1 << 248] * top + [ORDER - (top << 248)]
    expected = np.array([len(scalars) * (number / ORDER) for number in elements])
    return np.bincount([scalar >> 248 for scalar in scalars], minlength=top + 1), expected


def test_masks_and_blinders_are_uniform() -> None:
    found, expected = top_bytes(draw(10_000))
    assert ((found - expected) ** 2 / expected).sum() < quantile(len(found) - 1)


def test_proofs_with_two_sets_of_weights_look_alike_and_uniform() -> None:
    module, x = module_of(), rows_of()
    y = evaluate(module, x)
    other = other_weights(module)
    assert (evaluate(other, x) == y).all() and not (other.a == module.a).any()
    samples = [scalars_of(commit(m)[1], x, y, proofs=100) for m in (module, other)]
    counts = [top_bytes(sample) for sample in samples]
    limit = quantile(len(counts[0][0]) - 1)
    for found, expected in counts:
        assert ((found - expected) ** 2 / expected).sum() < limit
    first, second = (found for found, _ in counts)  # equally many: the variance is their sum
    both = first + second
    assert ((first - second)[both > 0] ** 2 / both[both > 0]).sum() < limit
