"""Attacks on commitments and proofs, and what they must equal bit for bit."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from py_arkworks_bls12381 import G1Point

from paris_ray.errors import ParisError, VerificationError
from paris_ray.zklora import curve, folding
from paris_ray.zklora.commitment import (
    ModuleCommitment,
    ModuleOpening,
    commit,
    open_commitment,
    open_commitments,
)
from paris_ray.zklora.curve import (
    BLINDING,
    FORM,
    VALUE,
    check_equations,
    decode,
    encode,
    generators,
)
from paris_ray.zklora.fiat_shamir import FiatShamir, Oracle
from paris_ray.zklora.field import ORDER, dot, padded, plus, powers
from paris_ray.zklora.fixed_point import QuantisedModule, evaluate, quantise
from paris_ray.zklora.proof import (
    Claim,
    Proof,
    _equation,
    _random_form,
    _scalar,
    _start,
    proof_equation,
    prove,
    verify,
    verify_batch,
    verify_named,
)
from tests.curve_oracle import Z1, add, compress_G1, decompress_G1, hash_to_G1
from tests.curve_oracle import multiply as times

D_IN, R, D_OUT, ROWS = 12, 3, 10, 7
CONTEXT = b"this session"
NUM_SCALARS = 1 + 2 * R + 2 + 5 + D_IN  # without rounds of folding
REFUSED = "the proof of the module does not hold"

# What the first challenge for `golden_statement()` is: another value is another protocol.
GOLDEN_ALPHA = 0x634C0E5C1ADAFC8618676CC13BC1960408B799BDEA30E66742008750323F3EB2


def module_of(seed: int = 0, d_in: int = D_IN, r: int = R, d_out: int = D_OUT) -> QuantisedModule:
    rng = np.random.default_rng(seed)
    return quantise(rng.normal(size=(d_in, r)), rng.normal(size=(r, d_out)))


def rows_of(seed: int = 0, rows: int = ROWS, d_in: int = D_IN) -> np.ndarray:
    return np.random.default_rng([seed, 1]).integers(-(2**15), 2**15, (rows, d_in), np.int16)


def claim_of(seed: int = 0, rows: int = ROWS) -> Claim:
    """Commitment, x, y, context and an honest proof."""
    commitment, opening = commit(module_of(seed))
    x = rows_of(seed, rows)
    y = evaluate(opening.module, x)
    return commitment, x, y, CONTEXT, prove(opening, x, y, CONTEXT)


@pytest.fixture(params=[0, 2], ids=["no round", "two rounds"])
def rounds(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How often the long responses are folded: at small widths never, unless asked to."""
    if request.param:
        monkeypatch.setattr(folding, "LONGEST_REMAINDER", D_IN >> request.param)
    return request.param


@pytest.fixture
def claim(rounds: int) -> Claim:
    return claim_of()


def refuse(claim: Claim, message: str = REFUSED) -> None:
    with pytest.raises(VerificationError, match=message):
        verify(*claim)


def edited(claim: Claim, **changes: object) -> Claim:
    names = ("commitment", "x", "y", "context", "proof")
    return tuple((dict(zip(names, claim, strict=True)) | changes).values())


def messages_of(claim: Claim) -> Proof:
    return Proof.from_bytes(claim[4], claim[0])


# Honest


def test_honest_proofs_hold(claim: Claim, rounds: int) -> None:
    verify(*claim)
    assert len(messages_of(claim).folded.left) == rounds


@pytest.mark.parametrize("rows", [1, 1000])
def test_one_row_and_a_thousand_are_proved_alike(rows: int) -> None:
    claim = claim_of(rows=rows)
    verify(*claim)
    assert len(claim[4]) == 9 * 48 + NUM_SCALARS * 32


def test_wide_modules_are_folded() -> None:
    module = module_of(0, 300, 2, 129)
    commitment, opening = commit(module)
    x = rows_of(0, 3, 300)
    y = evaluate(module, x)
    proof = prove(opening, x, y, CONTEXT)
    verify(commitment, x, y, CONTEXT, proof)
    assert len(proof) == (9 + 2 * 2) * 48 + (1 + 2 * 2 + 2 + 5 + 75) * 32
    y[2, 128] += 1
    refuse((commitment, x, y, CONTEXT, proof))


def test_a_module_is_proved_whose_size_alone_would_not_keep_outputs_in_int64() -> None:
    """d_in r > 2^18: that this module's outputs fit is known from its weights."""
    module = module_of(0, 1100, 240, 2)
    commitment, opening = commit(module)
    open_commitment(commitment, opening)
    x = rows_of(0, 2, 1100)
    y = evaluate(module, x)
    verify(commitment, x, y, CONTEXT, prove(opening, x, y, CONTEXT))


def test_modules_of_two_contributors_are_verified_together() -> None:
    module = module_of(3, 5, 1, 20)
    commitment, opening = commit(module)
    x = rows_of(3, 2, 5)
    y = evaluate(module, x)
    verify_batch([claim_of(), (commitment, x, y, b"other", prove(opening, x, y, b"other"))])


def test_the_extremes_of_int16_are_proved() -> None:
    full = np.full((D_IN, R), 2**15 - 1, np.int16)
    module = QuantisedModule(full, -full.T.copy(), 0, 0)
    commitment, opening = commit(module)
    open_commitment(commitment, opening)
    x = np.full((2, D_IN), -(2**15), np.int16)
    y = evaluate(module, x)
    verify(commitment, x, y, CONTEXT, prove(opening, x, y, CONTEXT))


def test_all_zero_weights_and_inputs_are_proved() -> None:
    module = QuantisedModule(np.zeros((D_IN, R), np.int16), np.zeros((R, D_OUT), np.int16), 0, 0)
    commitment, opening = commit(module)
    open_commitment(commitment, opening)
    for x in (rows_of(), np.zeros((1, D_IN), np.int16)):
        y = np.zeros((len(x), D_OUT), np.int64)
        verify(commitment, x, y, CONTEXT, prove(opening, x, y, CONTEXT))


def test_arrays_may_lie_in_memory_in_any_order() -> None:
    commitment, x, y, context, proof = claim_of()
    verify(commitment, np.asfortranarray(x), np.asfortranarray(y), context, proof)
    verify(commitment, np.repeat(x, 2, axis=0)[::2], y[::-1].copy()[::-1], context, proof)


# Another statement


def test_one_changed_number_is_refused(claim: Claim) -> None:
    for place in (0, ROWS * D_OUT // 2, ROWS * D_OUT - 1):
        for change in (1, -1, 2**62):
            y = claim[2].copy()
            y.flat[place] += change
            refuse(edited(claim, y=y))
    x = claim[1].copy()
    x[-1, -1] ^= 1
    refuse(edited(claim, x=x))


def test_permuted_rows_are_refused(claim: Claim) -> None:
    order = [1, 0, *range(2, ROWS)]
    refuse(edited(claim, y=claim[2][order]))
    refuse(edited(claim, x=claim[1][order]))
    refuse(edited(claim, x=claim[1][order], y=claim[2][order]))


def test_dropped_and_extra_rows_are_refused(claim: Claim) -> None:
    _, x, y, _, _ = claim
    refuse(edited(claim, x=x[:-1], y=y[:-1]))
    refuse(edited(claim, x=np.vstack([x, 0 * x[:1]]), y=np.vstack([y, 0 * y[:1]])))


def test_another_context_is_refused(claim: Claim) -> None:
    for context in (b"", b"this sessioo", CONTEXT + b"\0", CONTEXT[:-1]):
        refuse(edited(claim, context=context))


def test_other_weights_under_the_pinned_commitment_are_refused(claim: Claim) -> None:
    commitment, x, _, _, _ = claim
    _, opening = commit(module_of(1))
    y = evaluate(opening.module, x)
    refuse((commitment, x, y, CONTEXT, prove(opening, x, y, CONTEXT)))


def test_weights_that_differ_in_one_number_are_refused(claim: Claim) -> None:
    """Even with the blinders of the pinned commitment, and an input that does not see it."""
    commitment, opening = commit(module_of())
    a = opening.module.a.copy()
    a[4, 2] += 1
    module = QuantisedModule(a, opening.module.b, 0, 0)
    other = ModuleOpening(module, opening.blinders_a, opening.blinders_b)
    x = claim[1].copy()
    x[:, 4] = 0
    y = evaluate(opening.module, x)
    assert (y == evaluate(module, x)).all()
    refuse((commitment, x, y, CONTEXT, prove(other, x, y, CONTEXT)))


def test_another_commitment_to_the_same_weights_is_refused(claim: Claim) -> None:
    refuse(edited(claim, commitment=commit(module_of())[0]))


def test_permuted_commitments_are_refused(claim: Claim) -> None:
    commitment = claim[0]
    refuse(
        edited(claim, commitment=replace(commitment, a=commitment.a[::-1], b=commitment.b[::-1]))
    )
    refuse(edited(claim, commitment=replace(commitment, a=commitment.b, b=commitment.a)))


def test_the_proof_of_one_module_does_not_hold_for_another(rounds: int) -> None:
    first, second = claim_of(0), claim_of(1)
    refuse(edited(first, proof=second[4]))
    refuse(edited(second, proof=first[4]))
    with pytest.raises(VerificationError, match="the proof of first, second does not hold"):
        verify_named(
            {"first": edited(first, proof=second[4]), "second": edited(second, proof=first[4])}
        )


# Another proof


def scalars_start(claim: Claim) -> int:
    return 48 * (9 + 2 * len(messages_of(claim).folded.left))


def with_scalar(claim: Claim, number: int, change: Callable[[int], int]) -> Claim:
    """Return the claim with one scalar of its proof changed."""
    proof, start = claim[4], scalars_start(claim) + 32 * number
    value = change(int.from_bytes(proof[start : start + 32], "little"))
    changed = value.to_bytes(32, "little")
    return edited(claim, proof=proof[:start] + changed + proof[start + 32 :])


def with_point(claim: Claim, number: int, change: Callable[[bytes], bytes]) -> Claim:
    """Return the claim with one point of its proof changed."""
    proof, start = claim[4], 48 * number
    return edited(
        claim, proof=proof[:start] + change(proof[start : start + 48]) + proof[start + 48 :]
    )


def num_points(claim: Claim) -> int:
    return scalars_start(claim) // 48


def num_scalars(claim: Claim) -> int:
    return (len(claim[4]) - scalars_start(claim)) // 32


def test_every_scalar_plus_one_is_refused(claim: Claim, rounds: int) -> None:
    assert num_scalars(claim) == NUM_SCALARS - D_IN + (D_IN >> rounds)
    for number in range(num_scalars(claim)):
        refuse(with_scalar(claim, number, lambda value: (value + 1) % ORDER))


def test_every_scalar_at_zero_or_negated_is_refused(claim: Claim) -> None:
    for number in range(num_scalars(claim)):
        refuse(with_scalar(claim, number, lambda value: 0))
        refuse(with_scalar(claim, number, lambda value: ORDER - value))


def test_scalars_that_are_not_reduced_are_refused(claim: Claim) -> None:
    """The same element under another name: `value + q` fits in 32 bytes."""
    for number in range(num_scalars(claim)):
        refuse(
            with_scalar(claim, number, lambda value: value + ORDER),
            f"scalar {number} of the proof is not below the group's order",
        )
    refuse(with_scalar(claim, 0, lambda value: ORDER), "scalar 0 of the proof")
    refuse(with_scalar(claim, 0, lambda value: 2**256 - 1), "scalar 0 of the proof")


def test_every_point_that_is_another_is_refused(claim: Claim, rounds: int) -> None:
    assert num_points(claim) == 9 + 2 * rounds
    others = (encode(BLINDING), encode(G1Point.identity()))
    for number in range(num_points(claim)):
        refuse(with_point(claim, number, lambda point: others[0]))
        refuse(with_point(claim, number, lambda point: others[1]))
        refuse(with_point(claim, number, lambda point: encode(decode(point, "") + BLINDING)))
        refuse(with_point(claim, number, lambda point: encode(-decode(point, ""))))


def test_every_swapped_pair_of_points_is_refused(claim: Claim) -> None:
    cut = [claim[4][48 * i : 48 * i + 48] for i in range(num_points(claim))]
    for i in range(len(cut)):
        for j in range(i):
            swapped = with_point(claim, i, lambda point, j=j: cut[j])
            refuse(with_point(swapped, j, lambda point, i=i: cut[i]))


def test_every_swapped_pair_of_scalars_is_refused() -> None:
    claim = claim_of()
    proof, start = claim[4], scalars_start(claim)
    cut = [proof[i : i + 32] for i in range(start, len(proof), 32)]
    for i in range(0, len(cut) - 1):
        swapped = [*cut[:i], cut[i + 1], cut[i], *cut[i + 2 :]]
        refuse(edited(claim, proof=proof[:start] + b"".join(swapped)))


def small_order_point() -> G1Point:
    """(0, 2), of order three: on the curve y^2 = x^3 + 4, outside of the group."""
    encoded = (0).to_bytes(48, "little") + (2).to_bytes(48, "little")
    point = G1Point.from_xy_bytes_unchecked_le(encoded)
    assert not point.is_in_subgroup() and point + point + point == G1Point.identity()
    return point


def test_points_outside_of_the_group_are_refused(claim: Claim) -> None:
    """A component of order three would vanish under a third of all random weights."""
    small = small_order_point()
    for number in range(num_points(claim)):
        refuse(with_point(claim, number, lambda point: encode(small)), "is no point of the group")
        refuse(
            with_point(claim, number, lambda point: encode(decode(point, "") + small)),
            "is no point of the group",
        )


def test_points_outside_of_the_group_are_refused_in_commitments() -> None:
    claim, small = claim_of(), small_order_point()
    commitment, opening = commit(module_of())
    for name in ("a", "b"):
        points = getattr(commitment, name)
        for k in range(R):
            shifted = encode(decode(points[k], "") + small)
            bad = replace(commitment, **{name: (*points[:k], shifted, *points[k + 1 :])})
            refuse(edited(claim, commitment=bad), rf"{name}\[{k}\] is no point of the group")
            with pytest.raises(VerificationError, match=rf"{name}\[{k}\] is no point of the group"):
                open_commitment(bad, opening)


@pytest.mark.parametrize(
    "encoding",
    [
        b"\xff" * 48,  # the library takes these two for infinity
        b"\xc0" + bytes(46) + b"\x01",
        b"\xe0" + bytes(47),  # infinity with a sign
        b"\x80" + b"\xff" * 47,  # x is not below the modulus
        bytes(48),  # without the flag of compression
        b"\x80" + bytes(46) + b"\x01",  # no such x on the curve
    ],
)
def test_encodings_of_no_point_or_of_infinity_by_another_name_are_refused(
    encoding: bytes, claim: Claim
) -> None:
    with pytest.raises(VerificationError, match="here is no point of the group"):
        decode(encoding, "here")
    for number in range(num_points(claim)):
        refuse(with_point(claim, number, lambda point: encoding), "is no point of the group")


@pytest.mark.parametrize("size", [0, 47, 49, 96])
def test_encodings_of_another_length_are_refused(size: int) -> None:
    with pytest.raises(VerificationError, match="here is no point of the group"):
        decode((encode(BLINDING) * 2)[:size], "here")


def test_proofs_of_another_length_are_refused(claim: Claim) -> None:
    proof, size = claim[4], len(claim[4])
    for other in (b"", proof[:-1], proof[:-32], proof[1:], proof + b"\0", proof + bytes(32), b"\0"):
        refuse(edited(claim, proof=other), f"the proof has {len(other)} bytes, {size} are expected")


def test_a_proof_of_all_zeros_or_of_infinities_is_refused(claim: Claim) -> None:
    infinities = encode(G1Point.identity()) * num_points(claim)
    zeros = bytes(32 * num_scalars(claim))
    refuse(edited(claim, proof=infinities + zeros))
    refuse(edited(claim, proof=bytes(len(claim[4]))), "is no point of the group")


def test_all_infinities_do_not_even_prove_zero() -> None:
    """The statement 0 = X 0 0 with the trivial proof: points must bind, not just fit."""
    points = (encode(G1Point.identity()),) * R
    commitment = ModuleCommitment(D_IN, R, D_OUT, points, points)
    x, y = rows_of(), np.zeros((ROWS, D_OUT), np.int64)
    y[0, 0] = 1
    refuse((commitment, x, y, CONTEXT, points[0] * 9 + bytes(32 * NUM_SCALARS)))


# Malformed statements


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (rows_of().astype(np.int64), None, "x must be int16"),
        (None, np.zeros((ROWS, D_OUT), np.int16), "y must be int64"),
        (rows_of().astype(np.int64), np.zeros((ROWS, D_OUT), np.int16), "x must be int16"),
        (rows_of().astype(">i2"), None, "x must be int16"),
        (rows_of()[:0], np.zeros((0, D_OUT), np.int64), "x has 0 rows, y has 0"),
        (rows_of()[:3], None, "x has 3 rows, y has 7"),
        (None, np.zeros((ROWS + 1, D_OUT), np.int64), "x has 7 rows, y has 8"),
        (rows_of()[:, 1:], None, r"x must be int16 with shape \(rows, 12\)"),
        (rows_of()[0], None, "x must be int16"),
        (None, np.zeros((ROWS, D_OUT + 1), np.int64), r"y must be int64 with shape \(rows, 10\)"),
    ],
)
def test_rows_of_other_types_and_shapes_are_refused(
    x: np.ndarray | None, y: np.ndarray | None, message: str
) -> None:
    claim = claim_of()
    changes = {name: rows for name, rows in (("x", x), ("y", y)) if rows is not None}
    refuse(edited(claim, **changes), message)
    opening = commit(module_of())[1]
    arguments = {"x": claim[1], "y": claim[2]} | changes
    with pytest.raises(ParisError, match=message):
        prove(opening, arguments["x"], arguments["y"], CONTEXT)


def test_nothing_false_is_proved_by_mistake() -> None:
    _, x, y, _, _ = claim_of()
    y[3, 3] += 1
    with pytest.raises(ParisError, match="y is not what the module gives for x"):
        prove(commit(module_of())[1], x, y, CONTEXT)


@pytest.mark.parametrize("change", [1, -1])
@pytest.mark.parametrize("name", ["a", "b"])
def test_commitments_with_another_number_of_points_are_refused(name: str, change: int) -> None:
    claim = claim_of()
    commitment, opening = commit(module_of())
    points = getattr(commitment, name)
    bad = replace(commitment, **{name: (points * 2)[: R + change]})
    message = f"the commitment has {R + change} points {name}, its rank is {R}"
    refuse(edited(claim, commitment=bad), message)
    with pytest.raises(VerificationError, match=message):
        open_commitment(bad, opening)


def test_commitments_with_other_dimensions_are_refused() -> None:
    claim = claim_of()
    commitment = claim[0]
    refuse(edited(claim, commitment=replace(commitment, d_in=D_IN + 1)), "x must be int16")
    refuse(edited(claim, commitment=replace(commitment, d_out=D_OUT - 1)), "y must be int64")
    refuse(edited(claim, commitment=replace(commitment, r=R + 1)), "bytes, 1328 are expected")
    refuse(edited(claim, commitment=replace(commitment, r=0)), "bytes, 1072 are expected")


def test_a_commitment_of_too_large_dimensions_is_refused() -> None:
    d_in, points = 2**18 + 1, (encode(BLINDING),) * 2
    commitment = ModuleCommitment(d_in, 2, 1, points, points)
    x, y = np.zeros((1, d_in), np.int16), np.zeros((1, 1), np.int64)
    rounds, remainder = folding.folding_shape(d_in)
    proof = bytes(48 * (9 + 2 * rounds) + 32 * (1 + 2 * 2 + 2 + 5 + remainder))
    refuse((commitment, x, y, CONTEXT, proof), "widths at most 262144")


# Batches


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(VerificationError, match="there is nothing to check: the proof"):
        verify_batch([])
    with pytest.raises(VerificationError, match="there is nothing to check: the proof"):
        verify_named({})
    with pytest.raises(VerificationError, match="there is nothing to check: the opening"):
        open_commitments({})


@pytest.mark.parametrize("bad", [(0,), (3,), (4,), (0, 4), (2, 3), (0, 1, 2, 3, 4)])
def test_the_bad_proofs_of_a_batch_are_named(bad: tuple[int, ...]) -> None:
    claims = [claim_of(seed) for seed in range(5)]
    verify_batch(claims)
    for number in bad:
        claims[number] = with_scalar(claims[number], 9, lambda value: (value + 1) % ORDER)
    names = ", ".join(f"claim {number}" for number in bad)
    with pytest.raises(VerificationError, match=f"^the proof of {names} does not hold$"):
        verify_batch(claims)
    named = {f"layer.{number}": claim for number, claim in enumerate(claims)}
    names = ", ".join(f"layer.{number}" for number in bad)
    with pytest.raises(VerificationError, match=f"^the proof of {names} does not hold$"):
        verify_named(named)


def test_errors_of_two_proofs_do_not_cancel() -> None:
    """z5 of two equal claims, one too large, one too small: their plain sum would hold."""
    claim, z5 = claim_of(), 1 + 2 * R + 2 + 4
    claims = [
        with_scalar(claim, z5, lambda value, sign=sign: (value + sign) % ORDER) for sign in (1, -1)
    ]
    with pytest.raises(VerificationError, match="claim 0, claim 1"):
        verify_batch(claims)


def test_a_malformed_proof_of_a_batch_is_named() -> None:
    claims = {f"layer.{seed}": claim_of(seed) for seed in range(3)}
    claims["layer.1"] = edited(claims["layer.1"], proof=b"")
    with pytest.raises(VerificationError, match=r"^layer\.1: the proof has 0 bytes"):
        verify_named(claims)


def test_equations_travel_between_processes() -> None:
    equations = {f"claim {seed}": proof_equation(*claim_of(seed)) for seed in range(3)}
    for equation in equations.values():
        parts = (equation.generators, equation.scalars.keys(), equation.scalars.values())
        assert all(type(item) in (int, bytes) for part in parts for item in part)
    check_equations(equations, "the proof")


# Openings


def test_the_opening_is_accepted_and_any_other_refused() -> None:
    commitment, opening = commit(module_of())
    open_commitment(commitment, opening)
    module, rho, sigma = opening.module, opening.blinders_a, opening.blinders_b
    one_more = module.b.copy()
    one_more[1, 2] += 1
    others = [
        ModuleOpening(module_of(1), rho, sigma),
        ModuleOpening(QuantisedModule(module.a, one_more, 0, 0), rho, sigma),
        ModuleOpening(module, (rho[0] + 1, *rho[1:]), sigma),
        ModuleOpening(module, rho, (*sigma[:-1], sigma[-1] - 1)),
        ModuleOpening(module, sigma, rho),
        ModuleOpening(module, rho[::-1], sigma),
    ]
    for other in others:
        with pytest.raises(VerificationError, match="the opening of the module does not hold"):
            open_commitment(commitment, other)


def test_openings_of_another_form_are_refused() -> None:
    commitment, opening = commit(module_of())
    module, rho, sigma = opening.module, opening.blinders_a, opening.blinders_b
    for blinders in (
        rho[:-1],
        (*rho, 1),
        (-1, *rho[1:]),
        (ORDER, *rho[1:]),
        (rho[0] + ORDER, *rho[1:]),
    ):
        with pytest.raises(VerificationError, match="blinders must be 3 numbers below"):
            open_commitment(commitment, ModuleOpening(module, blinders, sigma))
        with pytest.raises(VerificationError, match="blinders must be 3 numbers below"):
            open_commitment(commitment, ModuleOpening(module, sigma, blinders))
    for dimensions in ((D_IN + 1, R, D_OUT), (D_IN, R, D_OUT - 1)):
        other = ModuleOpening(module_of(0, *dimensions), rho, sigma)
        with pytest.raises(VerificationError, match=r"were delivered, \(12, 3, 10\) committed"):
            open_commitment(commitment, other)


def test_bad_openings_of_an_adapter_are_named() -> None:
    pairs = {f"layer.{seed}": commit(module_of(seed)) for seed in range(5)}
    open_commitments(pairs)
    pairs["layer.1"] = (pairs["layer.1"][0], pairs["layer.2"][1])
    pairs["layer.4"] = (pairs["layer.4"][0], pairs["layer.0"][1])
    message = r"^the opening of layer\.1, layer\.4 does not hold$"
    with pytest.raises(VerificationError, match=message):
        open_commitments(pairs)


def test_two_commitments_to_the_same_weights_share_no_point() -> None:
    (first, _), (second, _) = commit(module_of()), commit(module_of())
    assert len({*first.a, *first.b, *second.a, *second.b}) == 4 * R


# Attacks that need a prover of one's own


def commit_field(vectors: Sequence[Sequence[int]], blinders: Sequence[int]) -> list[G1Point]:
    pairs = zip(vectors, blinders, strict=True)
    return [
        curve.commit_scalars([value % ORDER for value in vector], blinder)
        for vector, blinder in pairs
    ]


def commitment_to(
    columns: list[list[int]], rows: list[list[int]], rho: list[int], sigma: list[int]
) -> ModuleCommitment:
    """Return a commitment to any field elements: columns of A, rows of B."""
    a, b = (tuple(map(encode, commit_field(*pair))) for pair in ((columns, rho), (rows, sigma)))
    return ModuleCommitment(len(columns[0]), len(columns), len(rows[0]), a, b)


def prove_by_hand(
    columns: list[list[int]],
    rows: list[list[int]],
    rho: list[int],
    sigma: list[int],
    x: np.ndarray,
    y: np.ndarray,
    oracle: Oracle,
    shift: Sequence[int] = (0, 0, 0),
    repair: Sequence[int] = (0, 0),
) -> Proof:
    """Follow the protocol with any field elements as weights, whatever is true of y.

    An honest prover has no use for the last two: `shift` is subtracted from u = A^T x~, and
    `repair` times what the linear claim then lacks is added to the numbers p.
    """
    draw = curve.random_scalar
    r, width = len(columns), max(len(columns[0]), len(rows[0]))
    form = _random_form(x, y, oracle)
    u = [(dot(column, form.x) - s) % ORDER for column, s in zip(columns, shift, strict=True)]
    v = [dot(row, form.beta) for row in rows]
    w_u, w_v, w_p, r1, r2, r3, r4, m0, m1 = (draw() for _ in range(9))
    first = [encode(curve.commit_scalars(u, w_u)), encode(curve.commit_scalars(v, w_v))]
    oracle.absorb("before gamma", *first)
    gamma = powers(oracle.challenge("gamma"), r)
    a = padded([dot(gamma, entries) for entries in zip(*columns, strict=True)], width)
    b = padded([dot(gamma, entries) for entries in zip(*rows, strict=True)], width)
    x_wide, beta = padded(form.x, width), padded(form.beta, width)
    true = dot(x_wide, b), dot(beta, a)
    lacks = dot(gamma, shift)
    p = [(value + factor * lacks) % ORDER for value, factor in zip(true, repair, strict=True)]
    crossed = encode(curve.commit_scalars(p, w_p))
    oracle.absorb("before xi", crossed)
    xi, mu = oracle.challenge("xi"), oracle.challenge("mu")
    c, f = plus(a, xi, b), plus(x_wide, mu, beta)

    mask_c, s, t, mask_p = ([draw() for _ in range(n)] for n in (width, r, r, 2))
    masks = ((mask_c, r1), (s, r2), (t, r3), (mask_p, r4))
    numbers = ((dot(s, t), m0), (dot(s, v) + dot(t, u), m1))
    announced = [encode(curve.commit_scalars(mask, blinder)) for mask, blinder in masks]
    announced += [encode(curve.multiply([VALUE, BLINDING], [n % ORDER, z])) for n, z in numbers]
    value = dot(gamma, s) + xi * mask_p[0] + mu * (mask_p[1] + xi * dot(gamma, t))
    lacking = (dot(f, mask_c) - value) % ORDER
    oracle.absorb("before e", *announced, _scalar(lacking))
    e = oracle.challenge("e")

    zc, zu, zv, zp = plus(mask_c, e, c), plus(s, e, u), plus(t, e, v), plus(mask_p, e, p)
    of_c = dot(gamma, rho) + xi * dot(gamma, sigma)
    hidden = ((r1, of_c), (r2, w_u), (r3, w_v), (r4, w_p), (m0, m1))
    z1, z2, z3, z4, z5 = ((mask + e * value) % ORDER for mask, value in hidden)
    opened = (tuple(zu), tuple(zv), tuple(zp), (z1, z2, z3, z4, z5))
    oracle.absorb("before chi", *(_scalar(value) for values in opened for value in values))
    chi = oracle.challenge("chi")
    folded = folding.fold(zc, [chi * value % ORDER for value in f], oracle)
    return Proof((*first, crossed, *announced), lacking, *opened, folded)


def field_weights(module: QuantisedModule) -> tuple[list[list[int]], list[list[int]]]:
    return module.a.T.tolist(), module.b.tolist()


def blinders() -> tuple[list[int], list[int]]:
    return [curve.random_scalar() for _ in range(R)], [curve.random_scalar() for _ in range(R)]


def test_a_prover_written_for_these_attacks_is_believed_when_honest(rounds: int) -> None:
    columns, rows = field_weights(module_of())
    rho, sigma = blinders()
    commitment = commitment_to(columns, rows, rho, sigma)
    assert commitment == ModuleOpening(module_of(), tuple(rho), tuple(sigma)).commitment
    x = rows_of()
    y = evaluate(module_of(), x)
    oracle = _start(commitment, x, y, CONTEXT)
    proof = prove_by_hand(columns, rows, rho, sigma, x, y, oracle)
    verify(commitment, x, y, CONTEXT, proof.to_bytes())


def test_a_false_output_is_refused_whatever_its_prover_does(rounds: int) -> None:
    """A prover who skips its own check, with u moved so that <u, v> = y~ holds, or not."""
    columns, rows = field_weights(module_of())
    rho, sigma = blinders()
    commitment = commitment_to(columns, rows, rho, sigma)
    x = rows_of()
    for shift in ([0, 0, 0], [1, 2, 3]):
        y = evaluate(module_of(), x)
        y[0] -= np.array(shift) @ module_of().b
        y[1, 0] += shift == [0, 0, 0]
        proof = prove_by_hand(
            columns, rows, rho, sigma, x, y, _start(commitment, x, y, CONTEXT), shift
        )
        refuse((commitment, x, y, CONTEXT, proof.to_bytes()))


def test_field_valued_weights_pass_the_proof_and_fail_the_opening(rounds: int) -> None:
    """(3A, B/3) is the same map. The proof cannot see it; who opens sees no 16-bit integers."""
    module, third = module_of(), pow(3, -1, ORDER)
    columns, rows = field_weights(module)
    columns = [[3 * value for value in column] for column in columns]
    rows = [[value * third % ORDER for value in row] for row in rows]
    rho, sigma = blinders()
    commitment = commitment_to(columns, rows, rho, sigma)
    x = rows_of()
    y = evaluate(module, x)
    proof = prove_by_hand(columns, rows, rho, sigma, x, y, _start(commitment, x, y, CONTEXT))
    verify(commitment, x, y, CONTEXT, proof.to_bytes())
    for delivered in (module, module_of(1)):
        with pytest.raises(VerificationError, match="the opening of the module does not hold"):
            open_commitment(commitment, ModuleOpening(delivered, tuple(rho), tuple(sigma)))


FORESEEN = 0xC41


class Foreseen(FiatShamir):
    """An oracle of which one challenge is known before anything is said; the rest is the hash."""

    name = ""

    def challenge(self, name: str) -> int:
        value = super().challenge(name)
        return FORESEEN if name == self.name else value


def foreseeing(name: str, commitment: ModuleCommitment, x: np.ndarray, y: np.ndarray) -> FiatShamir:
    """Return the oracle of a statement with one challenge foreseen."""
    oracle = _start(commitment, x, y, CONTEXT)
    oracle.__class__, oracle.name = Foreseen, name
    return oracle


@pytest.mark.parametrize("name", ["xi", "mu", "chi"])
def test_a_linear_form_is_forged_where_a_challenge_is_foreseen(name: str, rounds: int) -> None:
    """What the linear claim lacks is hidden in one of the numbers p, or as multiples of Q.

    Row 0 (alpha^0 = 1) of y is moved by a vector in the row space of B, so that what is proved is
    no linear map. With all challenges hashed after what they must not be known for, it fails.
    """
    module, q, inverse = module_of(), [5, -7, 11], pow(FORESEEN, -1, ORDER)
    columns, rows = field_weights(module)
    rho, sigma = blinders()
    commitment = commitment_to(columns, rows, rho, sigma)
    if name == "chi":
        forms = [multiple_of_form(FORESEEN * scalar) for scalar in q]
        honest = commit_field(columns, rho)
        points = (encode(point + form) for point, form in zip(honest, forms, strict=True))
        commitment = replace(commitment, a=tuple(points))
    repair = {"xi": (inverse, 0), "mu": (0, inverse), "chi": (0, 0)}[name]
    x = rows_of()
    y = evaluate(module, x)
    y[0] -= np.array(q) @ module.b.astype(np.int64)
    assert (y[0] != evaluate(module, x)[0]).all()

    def forge(oracle: FiatShamir) -> Proof:
        return prove_by_hand(columns, rows, rho, sigma, x, y, oracle, q, repair)

    forged = forge(foreseeing(name, commitment, x, y))
    assert _equation(commitment, x, y, forged, foreseeing(name, commitment, x, y)).holds()
    refuse((commitment, x, y, CONTEXT, forged.to_bytes()))
    refuse((commitment, x, y, CONTEXT, forge(_start(commitment, x, y, CONTEXT)).to_bytes()))


def multiple_of_form(scalar: int) -> G1Point:
    return curve.multiply([FORM], [scalar % ORDER])


# Equalities


def to_py_ecc(point: G1Point) -> tuple[object, object, object]:
    return decompress_G1(int.from_bytes(encode(point), "big"))


def compressed(point: tuple[object, object, object]) -> bytes:
    return compress_G1(point).to_bytes(48, "big")


def test_generators_are_those_of_another_library() -> None:
    named = {"blinding": BLINDING, "value": VALUE, "form": FORM}
    last = curve.BLOCK
    points = generators(last + 1)
    named |= {f"generator {i}": points[i] for i in (0, 1, last - 1, last)}
    for name, point in named.items():
        assert encode(point) == compressed(hash_to_G1(name.encode(), curve.DOMAIN, hashlib.sha256))
    assert len({*map(encode, points), *map(encode, (BLINDING, VALUE, FORM))}) == last + 4


def test_multiplications_are_those_of_another_library() -> None:
    points = [*generators(4), BLINDING, G1Point.identity()]
    scalars = [0, 1, ORDER - 1, 2**254 + 12345, curve.random_scalar(), 7]
    expected = Z1
    for point, scalar in zip(points, scalars, strict=True):
        expected = add(expected, times(to_py_ecc(point), scalar))
    assert encode(curve.multiply(points, scalars)) == compressed(expected)
    assert compressed(Z1) == encode(G1Point.identity())


def test_commitments_to_small_integers_are_those_of_another_library() -> None:
    values, blinder = np.array([-(2**15), 2**15 - 1, 0, -1], np.int16), curve.random_scalar()
    expected = times(to_py_ecc(BLINDING), blinder)
    for point, value in zip(generators(4), values.tolist(), strict=True):
        expected = add(expected, times(to_py_ecc(point), value % ORDER))
    assert encode(curve.commit_small(values, blinder)) == compressed(expected)


def test_multiplications_need_as_many_scalars_as_points() -> None:
    for points, scalars in ((3, [1, 2]), (2, [1, 2, 3])):
        with pytest.raises(ValueError, match=f"{points} points, {len(scalars)} scalars"):
            curve.multiply(generators(points), scalars)
    with pytest.raises(ValueError, match="no inner product"):
        dot([1], [1, 2])


def test_scalars_outside_of_the_field_are_refused_by_multiplications() -> None:
    for scalar in (ORDER, 2**256 - 1):
        with pytest.raises(ValueError, match=r"."):
            curve.multiply(generators(1), [scalar])


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return curve._block_file(0)


def as_in_a_new_process(count: int) -> list[bytes]:
    curve._block.cache_clear()
    return list(map(encode, generators(count)))


def test_generators_come_from_their_file_only_if_its_digest_is_right(cache: Path) -> None:
    expected = list(map(encode, generators(3)))
    assert curve._read_block(0) is None
    assert as_in_a_new_process(3) == expected
    data = cache.read_bytes()
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]
    assert len(data) == 96 * curve.BLOCK
    assert hashlib.sha256(data).hexdigest() == curve.BLOCK_DIGESTS[0]

    flipped = data[:100] + bytes([data[100] ^ 1]) + data[101:]
    swapped = data[96:192] + data[:96] + data[192:]
    for damaged in (flipped, swapped, data[:-96], data + data[:96], b""):
        cache.write_bytes(damaged)
        assert curve._read_block(0) is None
    assert as_in_a_new_process(3) == expected
    assert cache.read_bytes() == data  # repaired


def test_more_generators_are_in_more_files_and_the_last_ones_in_none(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = curve.BLOCK + 1
    expected = list(map(encode, generators(last)))
    assert as_in_a_new_process(last) == expected
    files = {path: path.read_bytes() for path in cache.parent.iterdir()}
    assert files.keys() == {cache, curve._block_file(1)}
    assert as_in_a_new_process(last) == expected
    monkeypatch.setattr(curve, "BLOCK_DIGESTS", curve.BLOCK_DIGESTS[:1])
    assert as_in_a_new_process(last) == expected


def test_generators_do_not_need_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    expected = list(map(encode, generators(2)))
    assert as_in_a_new_process(2) == expected


def golden_statement() -> tuple[ModuleCommitment, np.ndarray, np.ndarray]:
    points = [encode(point) for point in generators(4)]
    commitment = ModuleCommitment(3, 2, 2, tuple(points[:2]), tuple(points[2:]))
    x = np.array([[1, -2, 3], [-(2**15), 0, 2**15 - 1]], np.int16)
    return commitment, x, np.array([[2**62, -1], [0, -(2**62)]], np.int64)


def test_the_first_challenge_has_not_changed() -> None:
    commitment, x, y = golden_statement()
    assert _start(commitment, x, y, CONTEXT).challenge("alpha") == GOLDEN_ALPHA


def test_the_first_challenge_is_the_hash_that_is_documented() -> None:
    """Once more, from the description: every field with its length, every message counted."""

    def field(message: bytes) -> bytes:
        return len(message).to_bytes(8, "little") + message

    def absorbed(name: bytes, *messages: bytes) -> bytes:
        count = field(len(messages).to_bytes(8, "little"))
        return field(name) + count + b"".join(map(field, messages))

    commitment, x, y = golden_statement()
    transcript = b"".join(
        [
            absorbed(b"paris_ray zklora proof 2"),
            absorbed(b"context", CONTEXT),
            absorbed(b"sizes", *(n.to_bytes(8, "little") for n in (3, 2, 2, 2))),
            absorbed(b"commitment", *commitment.a, *commitment.b),
            absorbed(b"rows", *(hashlib.sha256(rows.tobytes()).digest() for rows in (x, y))),
            absorbed(b"challenge alpha"),
        ]
    )
    digest = hashlib.shake_256(transcript).digest(64)
    expected = int.from_bytes(digest, "little") % ORDER
    assert _start(commitment, x, y, CONTEXT).challenge("alpha") == expected


def test_no_two_sequences_of_messages_share_a_challenge() -> None:
    sequences: list[list[tuple[str, list[bytes]]]] = [
        [("ab", [b"c"])],
        [("a", [b"bc"])],
        [("a", [b"b", b"c"])],
        [("a", [b"b"]), ("c", [])],
        [("a", [b"bc", b""])],
        [("a", [])],
        [],
    ]
    challenges = set()
    for sequence in sequences:
        oracle = FiatShamir("test")
        for name, messages in sequence:
            oracle.absorb(name, *messages)
        challenges |= {oracle.challenge("e"), oracle.challenge("e")}
    challenges |= {FiatShamir("test").challenge("f"), FiatShamir("other").challenge("e")}
    assert len(challenges) == 2 * len(sequences) + 2


def test_every_challenge_depends_on_all_that_was_said_before(
    monkeypatch: pytest.MonkeyPatch, rounds: int
) -> None:
    """Flip one bit of each message of a proof: every later challenge changes, no earlier one."""
    commitment, x, y, _, proof = claim_of()
    messages = Proof.from_bytes(proof, commitment)
    order = ["alpha", "beta", "gamma", "xi", "mu", "e", "chi", *["x"] * rounds]

    class Recording(FiatShamir):
        """Flips a bit of one of the messages, and remembers every challenge."""

        def __init__(self, changed: int | None) -> None:
            self.changed, self.absorbed, self.since = changed, 0, 0
            self.said: list[tuple[str, int]] = []
            super().__init__("test")

        def absorb(self, name: str, *sent: bytes) -> None:
            received = []
            for message in sent:
                if self.absorbed == self.changed:
                    message = bytes([message[0] ^ 1]) + message[1:]
                    self.since = len(self.said)
                received.append(message)
                self.absorbed += 1
            super().absorb(name, *received)

        def challenge(self, name: str) -> int:
            self.said.append((name, super().challenge(name)))
            return self.said[-1][1]

    original = Recording(None)
    _equation(commitment, x, y, messages, original)
    assert [name for name, _ in original.said] == order
    # Points, what lacks, zu, zv, zp, blinders and both points of every round.
    assert original.absorbed == 9 + 1 + 2 * R + 2 + 5 + 2 * rounds
    for number in range(original.absorbed):
        changed = Recording(number)
        _equation(commitment, x, y, messages, changed)
        same = [a == b for a, b in zip(original.said, changed.said, strict=True)]
        assert same == [i < changed.since for i in range(len(order))]
        assert changed.since < len(order)
