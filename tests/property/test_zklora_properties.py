"""Properties of the integers, the field and the proof, for any numbers and dimensions."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from paris_ray.errors import ParisError, SignatureError, VerificationError
from paris_ray.identity import Identity
from paris_ray.signatures import SignedDocument
from paris_ray.zklora import curve
from paris_ray.zklora.commitment import commit, open_commitment
from paris_ray.zklora.curve import FORM, Equation, check_equations, multiply
from paris_ray.zklora.fiat_shamir import FiatShamir
from paris_ray.zklora.field import ORDER, combine, dot
from paris_ray.zklora.fixed_point import (
    QuantisedModule,
    dequantise,
    evaluate,
    quantise,
    quantise_rows,
)
from paris_ray.zklora.folding import fold, folding_equation, folding_shape
from paris_ray.zklora.proof import Proof, prove, verify
from tests.zklora_fuzz import TARGETS, Target, fuzz

ELEMENTS = st.integers(0, ORDER - 1)
FEW = st.integers(1, 5)
SEEDS = st.integers(0, 2**32)


def integers(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-(2**15) + 1, 2**15, shape).astype(np.int16)


def module_of(d_in: int, r: int, d_out: int, seed: int) -> QuantisedModule:
    return QuantisedModule(integers((d_in, r), seed), integers((r, d_out), seed + 1), 10, 12)


def with_peak(shape: tuple[int, int], peak: float, seed: int) -> np.ndarray:
    """A matrix with one entry so large that it is `peak` times the RMS of all."""
    matrix = np.random.default_rng(seed).uniform(-1, 1, shape)
    others = float((matrix.ravel()[1:] ** 2).sum())
    # peak^2 = p^2 (others + p^2) / n, solved for the entry p.
    matrix.flat[0] = peak * np.sqrt(others / (matrix.size - peak**2))
    return matrix


@given(
    arrays(
        np.float64, st.tuples(FEW, FEW), elements=st.floats(-1e200, 1e200, allow_subnormal=False)
    )
)
def test_rounding_is_to_the_nearest_and_never_clips(values: np.ndarray) -> None:
    peak = np.abs(values).max()
    if 0 < peak < 1e-200:
        return  # refused, or zero beside what is not
    x, exponent = quantise_rows(values)
    assert np.abs(np.ldexp(values, exponent) - x).max() <= 0.5
    assert peak == 0 or 2**14 <= np.abs(x.astype(int)).max() <= 2**15 - 1


@given(arrays(np.int16, st.tuples(FEW, FEW), elements=st.integers(-32767, 32767)))
def test_quantising_quantised_numbers_changes_nothing(integers: np.ndarray) -> None:
    x, exponent = quantise_rows(integers.astype(np.float32))
    again, same = quantise_rows(np.ldexp(x.astype(np.float32), -exponent))
    assert (again == x).all() and same == exponent
    assert (np.ldexp(x.astype(float), -exponent) == integers).all()


@given(FEW, FEW, FEW, FEW, SEEDS)
def test_outputs_are_those_of_python(d_in: int, r: int, d_out: int, rows: int, seed: int) -> None:
    module, x = module_of(d_in, r, d_out, seed), integers((rows, d_in), seed + 2)
    product = x.astype(object) @ module.a.astype(object) @ module.b.astype(object)
    assert evaluate(module, x).astype(object).tolist() == product.tolist()


@given(st.tuples(*[st.floats(2, 16)] * 3), SEEDS)
@settings(deadline=None)
def test_the_delta_is_within_5e4_of_the_float_one(
    peaks: tuple[float, float, float], seed: int
) -> None:
    shapes = (32, 64), (64, 8), (8, 64)
    x, a, b = (
        with_peak(shape, peak, seed + i)
        for i, (shape, peak) in enumerate(zip(shapes, peaks, strict=True))
    )
    for matrix, peak in zip((x, a, b), peaks, strict=True):
        assert np.abs(matrix).max() / np.sqrt((matrix**2).mean()) == pytest.approx(peak)
    module, (rows, exponent) = quantise(a, b), quantise_rows(x)
    exponent += module.exponent_a + module.exponent_b
    delta, exact = dequantise(evaluate(module, rows), exponent, 2.0), 2 * x @ a @ b
    assert np.sqrt(((delta - exact) ** 2).mean() / (exact**2).mean()) < 5e-4


@given(st.data(), st.integers(0, 6), FEW, st.sampled_from([np.int16, np.int64]))
def test_combinations_are_those_of_python(
    data: st.DataObject, rows: int, columns: int, dtype: type[np.signedinteger]
) -> None:
    matrix = data.draw(arrays(dtype, (rows, columns)))
    coefficients = data.draw(st.lists(ELEMENTS, min_size=rows, max_size=rows))
    pairs = [zip(coefficients, column, strict=True) for column in matrix.T.tolist()]
    assert combine(coefficients, matrix) == [sum(c * m for c, m in pair) % ORDER for pair in pairs]


@given(FEW, st.integers(1, 3), FEW, st.integers(1, 4), SEEDS, st.binary(max_size=8))
@settings(deadline=None, max_examples=25)
def test_any_honest_proof_holds_and_is_read_as_it_was_written(
    d_in: int, r: int, d_out: int, rows: int, seed: int, context: bytes
) -> None:
    module, x = module_of(d_in, r, d_out, seed), integers((rows, d_in), seed + 2)
    commitment, opening = commit(module)
    open_commitment(commitment, opening)
    y = evaluate(module, x)
    proof = prove(opening, x, y, context)
    verify(commitment, x, y, context, proof)
    assert Proof.from_bytes(proof, commitment).to_bytes() == proof


@given(st.data(), FEW, st.integers(1, 3), FEW, st.integers(1, 4), SEEDS)
@settings(deadline=None, max_examples=25)
def test_no_proof_holds_for_another_number(
    data: st.DataObject, d_in: int, r: int, d_out: int, rows: int, seed: int
) -> None:
    module, x = module_of(d_in, r, d_out, seed), integers((rows, d_in), seed + 2)
    commitment, opening = commit(module)
    y = evaluate(module, x)
    proof = prove(opening, x, y, b"")
    matrix = data.draw(st.sampled_from([x, y]))
    place = data.draw(st.integers(0, matrix.size - 1))
    matrix.flat[place] += data.draw(st.sampled_from([1, -1, 77]))
    with pytest.raises(VerificationError, match="the proof of the module does not hold"):
        verify(commitment, x, y, b"", proof)


@given(st.data(), st.integers(1, 40), st.integers(1, 6))
@settings(deadline=None, max_examples=40)
def test_a_folded_form_opens_to_its_value_and_to_no_other(
    data: st.DataObject, length: int, longest: int
) -> None:
    vector = data.draw(st.lists(ELEMENTS, min_size=length, max_size=length))
    form = data.draw(st.lists(ELEMENTS, min_size=length, max_size=length))
    wrong = data.draw(st.integers(1, ORDER - 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("paris_ray.zklora.folding.LONGEST_REMAINDER", longest)
        folded = fold(vector, form, FiatShamir("test"))
        rounds, remainder = folding_shape(length)
        assert len(folded.left) == rounds and len(folded.remainder) == remainder <= longest
        for value, holds in ((dot(vector, form), True), (dot(vector, form) + wrong, False)):
            claim = Equation()
            claim.add(FORM, value)
            claim.add(curve.commit_scalars(vector, 0), 1)
            assert folding_equation(claim, form, folded, FiatShamir("test")).holds() == holds


@given(st.lists(st.booleans(), min_size=1, max_size=9))
@settings(deadline=None)
def test_exactly_the_equations_that_do_not_hold_are_named(truths: list[bool]) -> None:
    equations = {}
    for number, truth in enumerate(truths):
        weight = curve.random_weight() + 1
        equations[f"<{number}>"] = Equation()
        equations[f"<{number}>"].add(FORM, weight)
        equations[f"<{number}>"].add(multiply([FORM], [1 if truth else 2]), -weight)
    bad = [f"<{number}>" for number, truth in enumerate(truths) if not truth]
    if not bad:
        check_equations(equations, "it")
        return
    with pytest.raises(VerificationError) as refusal:
        check_equations(equations, "it")
    assert str(refusal.value) == f"it of {', '.join(bad)} does not hold"


@pytest.mark.parametrize("name", TARGETS)
def test_no_changed_byte_is_accepted_or_breaks_a_reader(name: str, tmp_path: Path) -> None:
    """The short form of `make fuzz`."""
    report = fuzz(TARGETS[name](tmp_path), mutations=300)
    assert report.mutations == 300 and not report.failures


def test_a_transcript_that_is_only_spelt_otherwise_is_the_same(tmp_path: Path) -> None:
    """Found by `make fuzz`: another space between two values was called a failure."""
    target = TARGETS["transcript"](tmp_path)
    other = target.payload.replace(b" ", b"\n", 1)
    assert other != target.payload and target.is_harmless(other, target.read(other))


@pytest.mark.parametrize("field", ["signature", "public_key"])
def test_a_signed_document_has_one_spelling(field: str, tmp_path: Path) -> None:
    """Found by `make fuzz`: readers of hexadecimal take capitals and spaces."""
    signed = SignedDocument.sign("close", {"a": 1}, Identity.create(tmp_path))
    text = getattr(signed, field)
    for other in (text.upper(), f" {text}", f"{text[:64]} {text[64:]}"):
        with pytest.raises(SignatureError):
            replace(signed, **{field: other}).check("close")


def test_the_fuzzer_finds_readers_that_accept_or_break() -> None:
    def refuse_all_but(accepted: bytes) -> Target:
        def read(changed: bytes) -> None:
            if changed[0] != accepted[0]:
                raise ParisError("refused")
            if changed[1] != accepted[1]:
                raise KeyError("not ours")

        return Target(accepted, read, lambda changed, _: changed[3] != accepted[3])

    report = fuzz(refuse_all_but(b"abcd"), 100)
    accepted = [failure for failure in report.failures if failure.endswith("accepted")]
    broken = [failure for failure in report.failures if "KeyError: 'not ours'" in failure]
    assert min(report.refused, report.harmless, len(accepted), len(broken)) > 10
    assert report.refused + report.harmless + len(accepted) + len(broken) == 100
