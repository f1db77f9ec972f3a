"""How fast outputs give an adapter away."""

import math

import numpy as np
import pytest

from paris_ray.zklora.leakage import attacker_error, leakage_table


def test_white_inputs_leak_as_theory_says() -> None:
    # n random directions of d hold n/d of a random vector: sqrt(1 - n/d) of its length is missing.
    for rows in (8, 32, 64, 96):
        expected = math.sqrt(1 - rows / 128)
        assert attacker_error(128, 40, 40, rows, power=0.0) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_the_error_falls_and_as_many_rows_as_inputs_give_all_away(power: float) -> None:
    errors = [attacker_error(64, 24, 4, rows, power) for rows in (4, 16, 32, 63)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] > 1e-3
    for rows in (64, 100):
        assert attacker_error(64, 24, 4, rows, power) < 1e-9


def test_the_more_the_inputs_are_alike_the_more_they_tell() -> None:
    errors = [attacker_error(128, 24, 4, 16, power) for power in (0.0, 0.5, 1.0, 2.0)]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.6 < 0.9 < errors[0]


def test_the_rank_does_not_matter() -> None:
    errors = [
        np.mean([attacker_error(64, 64, r, 16, 0.5, seed) for seed in range(16)])
        for r in (2, 8, 64)
    ]
    assert max(errors) < 1.05 * min(errors)


def test_the_seed_decides() -> None:
    errors = [attacker_error(32, 8, 2, 8, 0.5, seed) for seed in (0, 0, 1)]
    assert errors[0] == errors[1] != errors[2]


def test_the_table_has_a_line_a_spectrum() -> None:
    lines = leakage_table(32, 8, 2, rows=(4, 16), powers=(0.0, 1.0), seed=3).splitlines()
    assert lines[:2] == ["| rows seen | 4 | 16 |", "| --- | --- | --- |"]
    cells = [line.strip("| ").split(" | ") for line in lines[2:]]
    assert [row[0] for row in cells] == ["inputs i^-0", "inputs i^-1"]
    for row, power in zip(cells, (0.0, 1.0), strict=True):
        for cell, rows in zip(row[1:], (4, 16), strict=True):
            assert float(cell) == pytest.approx(attacker_error(32, 8, 2, rows, power, 3), rel=0.05)
