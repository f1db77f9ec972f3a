"""What answers give away: the meter against thieves who really solve for the map."""

import numpy as np
import pytest
from numpy.typing import NDArray

from paris_ray.errors import ParisError
from paris_ray.zklora.fixed_point import QuantisedModule, evaluate, quantise, quantise_rows
from paris_ray.zklora.leakage import (
    Span,
    chosen_rows,
    draw_last_bits,
    predicted_error,
    row_seeds,
    stolen,
)

D_OUT, R = 48, 4
FRESH = 8192
SECRET = b"nobody else has it"

Floats = NDArray[np.float64]


def random_module(rng: np.random.Generator, d_in: int) -> QuantisedModule:
    return quantise(rng.standard_normal((d_in, R)), rng.standard_normal((R, D_OUT)))


def inputs_like_activations(
    rng: np.random.Generator, d_in: int, power: float, rows: int, rotation: Floats
) -> Floats:
    """Rows with a falling spectrum in rotated directions, and tails heavier than normal."""
    tails = np.sqrt(8.0 / rng.chisquare(8.0, (rows, 1)))
    spectrum = np.arange(1, d_in + 1) ** -power
    return np.asarray(rng.standard_normal((rows, d_in)) * spectrum @ rotation * tails)


def least_squares_error(module: QuantisedModule, asked: NDArray[np.int16], fresh: Floats) -> float:
    """What a thief is off by, who solves for the map with the answers it got."""
    guess = np.linalg.lstsq(
        asked.astype(np.float64), evaluate(module, asked).astype(np.float64), rcond=None
    )[0]
    truth = fresh @ module.a.astype(np.float64) @ module.b.astype(np.float64)
    return float(np.linalg.norm(fresh @ guess - truth) / np.linalg.norm(truth))


@pytest.mark.parametrize("session", range(20))
def test_the_predicted_error_is_that_of_a_real_thief(session: int) -> None:
    rng = np.random.default_rng(session)
    d_in = int(rng.integers(32, 160))
    rows = int(rng.integers(1, d_in // 2))
    power = float(rng.choice([0.0, 0.5, 1.0]))
    rotation = np.linalg.qr(rng.standard_normal((d_in, d_in)))[0]
    module = random_module(rng, d_in)
    known, fresh, asked = (
        inputs_like_activations(rng, d_in, power, count, rotation) for count in (FRESH, FRESH, rows)
    )
    for x in (quantise_rows(asked)[0], chosen_rows(known, rows)):
        predicted = predicted_error(Span(d_in, [x]), known, module)
        assert predicted == pytest.approx(least_squares_error(module, x, fresh), rel=0.1)


def test_chosen_rows_teach_more_than_real_ones() -> None:
    rng = np.random.default_rng(0)
    known, asked = (
        inputs_like_activations(rng, 64, 0.5, count, np.eye(64)) for count in (FRESH, 8)
    )
    errors = [
        predicted_error(Span(64, [x]), known)
        for x in (quantise_rows(asked)[0], chosen_rows(known, 8))
    ]
    assert errors[1] < 0.9 * errors[0] < 0.9


def test_only_new_directions_are_counted() -> None:
    rng = np.random.default_rng(1)
    x = rng.integers(-(2**14), 2**14, (5, 32), np.int16)
    span = Span(32)
    again, combined = x, (x[:1] - x[1:2]) // np.int16(1)
    for part in (x, again, combined, np.zeros((2, 32), np.int16)):
        span.add(part)
        assert span.dimensions == 5
    nearly = x[:1].copy()
    nearly[0, 7] += 1  # tells row 7 of A exactly
    span.add(nearly)
    assert span.dimensions == 6
    assert np.abs(span.outside(np.eye(32)[7:8])).max() < 1e-6
    span.add(rng.integers(-(2**14), 2**14, (40, 32), np.int16))
    assert span.dimensions == 32
    assert predicted_error(span, rng.standard_normal((9, 32))) < 1e-9


def test_rows_of_another_module_are_refused() -> None:
    with pytest.raises(ParisError, match=r"x must be int16 with shape \(rows, 8\)"):
        Span(8).add(np.zeros((1, 9), np.int16))


def test_a_stolen_map_answers_what_was_answered_and_nothing_else() -> None:
    rng = np.random.default_rng(2)
    module = random_module(rng, 24)
    x, _ = quantise_rows(rng.standard_normal((6, 24)))
    span = Span(24, [x])
    theirs = stolen(module, span)
    exponents = module.exponent_a + module.exponent_b, theirs.exponent_a + theirs.exponent_b
    known, guessed = evaluate(module, x), np.ldexp(evaluate(theirs, x), exponents[0] - exponents[1])
    assert np.abs(guessed - known).max() < 1e-3 * np.abs(known).max()
    other, _ = quantise_rows(span.outside(rng.standard_normal((6, 24))))
    assert np.abs(evaluate(theirs, other)).max() < 1e-3 * np.abs(evaluate(module, other)).max()


def drawn_rows(x: NDArray[np.int16], secret: bytes = SECRET) -> NDArray[np.int16]:
    return draw_last_bits(x, row_seeds(secret, "module", x))


def packed_row(d_in: int) -> NDArray[np.int16]:
    row = np.zeros((1, d_in), np.int16)
    row[0, 0], row[0, 1] = 1, -(2**15)
    return row


def unpack(y: NDArray[np.int64], b: NDArray[np.int16]) -> tuple[NDArray[np.int64], ...]:
    """Two rows of A from the answer to `e_0 - 2^15 e_1`, once B is known."""
    z = np.rint(np.linalg.lstsq(b.T.astype(float), y[0].astype(float), rcond=None)[0])
    second = -np.rint(z / 2.0**15).astype(np.int64)
    return z.astype(np.int64) + 2**15 * second, second


def test_a_packed_row_tells_two_rows_of_a_unless_its_last_bits_are_drawn() -> None:
    rng = np.random.default_rng(3)
    a = rng.integers(-(2**13), 2**13, (64, R), np.int16)
    module = QuantisedModule(a, rng.integers(-(2**13), 2**13, (R, D_OUT), np.int16), 14, 14)
    first, second = unpack(evaluate(module, packed_row(64)), module.b)
    assert np.array_equal(first, a[0]) and np.array_equal(second, a[1])
    drawn = drawn_rows(packed_row(64))
    first, second = unpack(evaluate(module, drawn), module.b)
    # What was packed below is drowned; the rest is known as from any other row.
    assert np.abs(first - a[0]).mean() > 2**11
    assert np.abs(second - a[1]).max() < 8


def test_drawn_bits_change_real_rows_by_one_unit_at_most_and_are_balanced() -> None:
    rng = np.random.default_rng(4)
    for values in (
        rng.standard_normal((64, 256)),
        rng.standard_t(2.5, (64, 256)),
        rng.laplace(size=(64, 256)) * np.arange(1, 257) ** -0.5,
    ):
        x, _ = quantise_rows(values)
        drawn = drawn_rows(x)
        change = drawn.astype(int) - x
        assert drawn.dtype == np.int16 and np.abs(change).max() == 1
        assert abs(change.mean()) < 0.05
        assert np.mean(drawn & 1) == pytest.approx(0.5, abs=0.02)
    extreme = np.array([[-(2**15), 2**15 - 1, -1, 0]], np.int16)
    assert np.abs(drawn_rows(extreme).astype(int) - extreme).max() <= 1


def test_a_row_that_is_asked_again_has_the_same_last_bits() -> None:
    """Else each repetition would teach another direction."""
    rng = np.random.default_rng(5)
    x = rng.integers(-(2**14), 2**14, (3, 128), np.int16)
    drawn = drawn_rows(x)
    assert np.array_equal(drawn_rows(x[1:]), drawn[1:])
    assert Span(128, [drawn, drawn_rows(x[::-1])]).dimensions == 3
    for others in (drawn_rows(x, b"another secret"), draw_last_bits(x, row_seeds(SECRET, "b", x))):
        assert np.abs(others - drawn).any(axis=1).all()
    assert np.array_equal(drawn_rows(x ^ np.int16(1)), drawn)  # it was not to be chosen
    other = x.copy()
    other[0, 0] ^= 2
    assert np.abs(drawn_rows(other)[0, 1:] - drawn[0, 1:]).any()
    assert np.array_equal(drawn_rows(other)[1:], drawn[1:])
