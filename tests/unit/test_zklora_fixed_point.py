"""Integers are exact, refuse what they cannot hold, and stay close to the floats they stand for."""

import numpy as np
import pytest

from paris_ray.errors import ParisError
from paris_ray.zklora.field import ORDER, ROWS_AT_ONCE, combine
from paris_ray.zklora.fixed_point import (
    MAX_EXPONENT,
    MAX_REACH,
    QuantisedModule,
    check_dimensions,
    dequantise,
    evaluate,
    quantise,
    quantise_rows,
    reach,
)

INT64 = np.iinfo(np.int64)


def exact_product(x: np.ndarray, module: QuantisedModule) -> np.ndarray:
    """`x A B` in Python's integers, which have no size."""
    return x.astype(object) @ module.a.astype(object) @ module.b.astype(object)


def module_of(d_in: int, r: int, d_out: int, seed: int = 0) -> QuantisedModule:
    rng = np.random.default_rng(seed)
    return quantise(rng.normal(size=(d_in, r)), rng.normal(size=(r, d_out)))


def full(shape: tuple[int, int], value: int) -> np.ndarray:
    return np.full(shape, value, np.int16)


def test_evaluation_is_exact() -> None:
    module = module_of(48, 4, 33)
    x = np.random.default_rng(1).integers(-(2**15), 2**15, (9, 48)).astype(np.int16)
    y = evaluate(module, x)
    assert y.dtype == np.int64
    assert (y.astype(object) == exact_product(x, module)).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_outputs_that_are_allowed_are_exact(sign: int) -> None:
    d_in, r = 2**12, 2**6
    module = QuantisedModule(full((d_in, r), 2**15 - 1), full((r, 2), sign * (2**15 - 1)), 0, 0)
    y = evaluate(module, full((1, d_in), -(2**15)))
    expected = -sign * d_in * r * 2**15 * (2**15 - 1) ** 2
    assert [int(value) for value in y[0]] == [expected, expected]
    assert 2**62 < abs(expected) < 2**63


def test_weights_whose_outputs_could_overflow_are_refused() -> None:
    """One more row of A than the largest that are allowed: 2^63 would be passed."""
    a, b = full((2**12 + 1, 2**6), 2**15 - 1), full((2**6, 1), -(2**15 - 1))
    with pytest.raises(
        ParisError, match=r"these weights reach \d+, allowed: below 281474976710656"
    ):
        QuantisedModule(a, b, 0, 0)
    # The same dimensions, and one entry of a thousand less: it is the weights that count.
    QuantisedModule(a, full((2**6, 1), -(2**15 - 2**7)), 0, 0)


def test_the_bound_is_that_of_int64_itself() -> None:
    """The first reach that is refused is the first whose output is no int64."""
    assert 2**15 * MAX_REACH == 2**63
    a, b = full((2**18, 1), 2**15 - 1), full((1, 1), 2**15 - 1)
    largest = QuantisedModule(a, b, 0, 0)
    assert MAX_REACH - reach(largest.a, largest.b) < 2**35
    x = full((1, 2**18), -(2**15))
    assert evaluate(largest, x)[0, 0] == -(2**15) * reach(a, b)


def wide(sign: int) -> tuple[np.ndarray, np.ndarray]:
    """Return factors of one sign, of rank 256 and width 16,384: they add up as no others do."""
    return np.ones((2**14, 2**8)), np.full((2**8, 3), sign * 0.7)


@pytest.mark.parametrize("sign", [1, -1])
def test_factors_that_add_up_lose_bits_until_outputs_fit(sign: int) -> None:
    factors = wide(sign)
    module = quantise(*factors)
    reached = reach(module.a, module.b)
    assert MAX_REACH / 4 < reached < MAX_REACH
    lost = [15 - int(np.abs(factor).max()).bit_length() for factor in (module.a, module.b)]
    assert sum(lost) in (3, 4)
    assert abs(lost[0] - lost[1]) <= 1
    x = full((2, 2**14), -(2**15))
    y = evaluate(module, x)
    assert (y.astype(object) == -(2**15) * sign * reached).all()
    update = y[0] * 2.0 ** -(module.exponent_a + module.exponent_b)
    assert np.allclose(update, x[0].astype(float) @ factors[0] @ factors[1], rtol=2**-12)


def test_normal_weights_of_rank_256_at_width_16384_keep_all_bits() -> None:
    rng = np.random.default_rng(0)
    module = quantise(rng.normal(size=(2**14, 2**8)), rng.normal(size=(2**8, 8)))
    assert min(np.abs(module.a).max(), np.abs(module.b).max()) >= 2**14
    x = rng.integers(-(2**15), 2**15, (1, 2**14)).astype(np.int16)
    assert (evaluate(module, x) == exact_product(x, module)).all()


@pytest.mark.parametrize("dimensions", [(2**18 + 1, 1, 1), (1, 1, 2**18 + 1), (1, 2**10 + 1, 1)])
def test_dimensions_beyond_any_model_are_refused(dimensions: tuple[int, int, int]) -> None:
    with pytest.raises(ParisError, match="widths at most 262144, r at most 1024"):
        check_dimensions(*dimensions)
    check_dimensions(*(size - 1 if size > 1 else 1 for size in dimensions))


@pytest.mark.parametrize("dimensions", [(0, 1, 1), (1, 0, 1), (1, 1, 0), (-1, -1, 1)])
def test_dimensions_below_one_are_refused(dimensions: tuple[int, int, int]) -> None:
    with pytest.raises(ParisError, match="each at least 1"):
        check_dimensions(*dimensions)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (full((4, 2), 1).astype(np.int32), full((2, 3), 1), "A must be an int16 matrix, not int32"),
        (full((4, 2), 1), np.ones((2, 3)), "B must be an int16 matrix, not float64"),
        (full((4, 2), 1)[0], full((2, 3), 1), "A must be an int16 matrix"),
        (full((4, 2), 1), full((3, 3), 1), r"A has shape \(4, 2\), B \(3, 3\): the rank differs"),
        (full((4, 2), -(2**15)), full((2, 3), 1), "A has -32768, allowed: -32767 to 32767"),
        (full((4, 2), 1), full((2, 3), -(2**15)), "B has -32768"),
        (full((0, 2), 1), full((2, 3), 1), "d_in=0"),
    ],
)
def test_factors_of_other_types_shapes_or_values_are_refused(
    a: np.ndarray, b: np.ndarray, message: str
) -> None:
    with pytest.raises(ParisError, match=message):
        QuantisedModule(a, b, 0, 0)


@pytest.mark.parametrize("exponents", [(MAX_EXPONENT + 1, 0), (0, -MAX_EXPONENT - 1)])
def test_exponents_out_of_range_are_refused(exponents: tuple[int, int]) -> None:
    with pytest.raises(ParisError, match=r"exponent_[ab]=-?1001 is not allowed"):
        QuantisedModule(full((4, 2), 1), full((2, 3), 1), *exponents)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    good, spoilt = np.ones((3, 3)), np.ones((3, 3))
    spoilt[1, 2] = bad
    with pytest.raises(ParisError, match="A has values that are not finite"):
        quantise(spoilt, good)
    with pytest.raises(ParisError, match="B has values that are not finite"):
        quantise(good, spoilt)
    with pytest.raises(ParisError, match="x has values that are not finite"):
        quantise_rows(spoilt)


@pytest.mark.parametrize("peak", [1e308, 1e-305])
def test_values_whose_exponent_is_out_of_range_are_refused(peak: float) -> None:
    with pytest.raises(ParisError, match=r"the largest entry of x is 1e[+-]30[58]: out of range"):
        quantise_rows(np.full((1, 2), peak))


@pytest.mark.parametrize(
    "x",
    [
        full((2, 5), 1),
        full((2, 4), 1)[0],
        full((2, 4), 1).astype(np.int32),
        full((2, 4), 1).astype(">i2"),
        np.ones((2, 4)),
    ],
)
def test_inputs_of_another_type_or_width_are_refused(x: np.ndarray) -> None:
    with pytest.raises(ParisError, match=r"x must be int16 with shape \(rows, 4\)"):
        evaluate(module_of(4, 2, 3), x)


def test_inputs_may_have_the_lowest_integer() -> None:
    module = module_of(6, 2, 5)
    x = full((1, 6), -(2**15))
    assert (evaluate(module, x).astype(object) == exact_product(x, module)).all()


def test_no_rows_give_no_outputs() -> None:
    assert evaluate(module_of(4, 2, 3), full((0, 4), 0)).shape == (0, 3)


@pytest.mark.parametrize(
    ("peak", "integer", "exponent"),
    [
        (1.0, 2**14, 14),
        (1.9999, 32766, 14),  # 32766.4
        (1.99998, 2**14, 13),  # 32767.7 would round up to 2^15
        (-1.99998, -(2**14), 13),
        (3 * 2.0**-20, 3 * 2**13, 33),
        (0.0, 0, MAX_EXPONENT),  # whatever is drawn as the last bit means nothing
    ],
)
def test_the_largest_entry_uses_fifteen_bits(peak: float, integer: int, exponent: int) -> None:
    x, found = quantise_rows(np.array([[0.0, peak]]))
    assert (x.tolist(), found) == ([[0, integer]], exponent)


def test_integers_that_are_quantised_again_stay_the_same() -> None:
    module = module_of(20, 3, 17)
    a, b = (
        np.ldexp(factor.astype(np.float32), -exponent)
        for factor, exponent in ((module.a, module.exponent_a), (module.b, module.exponent_b))
    )
    again = quantise(a, b)
    assert again.digest == module.digest
    assert (again.a == module.a).all() and (again.b == module.b).all()


def test_the_digest_speaks_of_everything() -> None:
    module = module_of(4, 2, 3)
    a, b = module.a.copy(), module.b.copy()
    a[3, 1] ^= 1
    b[0, 0] ^= 1
    others = [
        QuantisedModule(a, module.b, module.exponent_a, module.exponent_b),
        QuantisedModule(module.a, b, module.exponent_a, module.exponent_b),
        QuantisedModule(module.a, module.b, module.exponent_a + 1, module.exponent_b - 1),
        QuantisedModule(module.a.reshape(2, 4).T.copy(), module.b, 0, 0),
    ]
    assert len({module.digest, *(other.digest for other in others)}) == 5
    assert QuantisedModule(module.a.copy(), module.b, *exponents_of(module)).digest == module.digest


def exponents_of(module: QuantisedModule) -> tuple[int, int]:
    return module.exponent_a, module.exponent_b


def test_outputs_as_floats_have_the_unit_of_all_three_factors() -> None:
    y = np.array([[3 * 2**40, -(2**62)]], np.int64)
    assert dequantise(y, 40, 0.5).tolist() == [[1.5, -(2.0**21)]]
    assert dequantise(y, 40, 0.5).dtype == np.float32


@pytest.mark.parametrize(
    "matrix",
    [
        np.array([[INT64.min, INT64.max, 0, -1]] * 3),
        np.array([[INT64.min] * 4, [INT64.max] * 4, [2**47, -(2**47), 2**31, -(2**16)]]),
        np.array([[2**15, -(2**15) - 1, 2**16 - 1, -(2**16)]] * 3),
        np.array([[-(2**15), 2**15 - 1, 0, 1]] * 3, np.int16),
        np.zeros((3, 4), np.int64),
    ],
)
@pytest.mark.parametrize("coefficient", [0, 1, ORDER - 1, 2**252 - 1, 0xFFFF * (2**240)])
def test_combinations_are_exact_at_the_extremes(matrix: np.ndarray, coefficient: int) -> None:
    coefficients = [coefficient, ORDER - 1, coefficient]
    expected = np.array(coefficients, object) @ matrix.astype(object) % ORDER
    assert combine(coefficients, matrix) == expected.tolist()


@pytest.mark.parametrize("value", [INT64.min, INT64.max, -(2**15)])
def test_combinations_of_very_many_rows_are_exact(value: int) -> None:
    rows = 2**18 + 5
    assert rows > ROWS_AT_ONCE and ROWS_AT_ONCE * 2**32 < 2**53  # several sums, each exact
    dtype = np.int16 if value == -(2**15) else np.int64
    matrix = np.full((rows, 1), value, dtype)
    assert combine([ORDER - 1] * rows, matrix) == [-value * rows % ORDER]
    # All limbs at their largest: an element may be any number of 255 bits here.
    assert combine([2**256 - 1] * rows, matrix) == [(2**256 - 1) * value * rows % ORDER]


@pytest.mark.parametrize("bits", [1, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63])
def test_transposed_matrices_and_parts_of_others_are_combined_alike(bits: int) -> None:
    """Whatever the number of limbs, and however the numbers lie in memory."""
    rng = np.random.default_rng(bits)
    matrix = rng.integers(-(2 ** (bits - 1)) * 2, 2**bits - 1, (5, 7), endpoint=True)
    matrix[0, 0], matrix[1, 1] = -(2**bits), 2**bits - 1
    coefficients = [ORDER - 1, 2**254 + 3, 5, 0, 7, ORDER // 3, 2**100]
    for rows in (matrix.T, matrix.T.copy(), matrix.T[:, ::2], np.asfortranarray(matrix.T)):
        expected = [
            sum(c * int(v) for c, v in zip(coefficients, column, strict=True)) % ORDER
            for column in rows.T
        ]
        assert combine(coefficients, rows) == expected


def test_a_combination_of_no_rows_is_zero() -> None:
    assert combine([], np.zeros((0, 3), np.int64)) == [0, 0, 0]


def test_a_combination_needs_as_many_coefficients_as_rows() -> None:
    with pytest.raises(ValueError, match="2 coefficients, 3 rows"):
        combine([1, 2], np.zeros((3, 1), np.int64))
