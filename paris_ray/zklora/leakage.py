"""How much of an adapter its own outputs give away: the reason for a budget of rows.

No proof can help here. Each answered row is one linear equation for every column of A, exact to
the last bit, so that as many independent rows as the module is wide give the whole map away.
"""

from collections.abc import Sequence

import numpy as np

POWERS = (0.0, 0.5, 1.0)
FRESH_ROWS = 512


def attacker_error(d_in: int, d_out: int, r: int, rows: int, power: float, seed: int = 0) -> float:
    """Return how far off an attacker is on inputs that it never asked for.

    It solves `X W = Y` for the smallest W by least squares. That W has rank r does not help it:
    the row space of B shows after r rows, but A has d_in unknowns a column all the same.

    Args:
        d_in: Width of the inputs.
        d_out: Width of the outputs.
        r: Rank of the adapter, which is random.
        rows: Inputs that it chose at random and saw answered.
        power: Input i, from 1, has the standard deviation `i ** -power`: 0 is white noise,
            1 resembles activations.
        seed: Decides everything random.

    Returns:
        Error of the predicted outputs, relative to the true ones (both as Frobenius norms).
    """
    random = np.random.default_rng(seed)
    adapter = random.standard_normal((d_in, r)) @ random.standard_normal((r, d_out))
    deviations = np.arange(1, d_in + 1) ** -power
    seen, fresh = (random.standard_normal((n, d_in)) * deviations for n in (rows, FRESH_ROWS))
    guess = np.linalg.lstsq(seen, seen @ adapter)[0]
    truth = fresh @ adapter
    return float(np.linalg.norm(fresh @ guess - truth) / np.linalg.norm(truth))


def leakage_table(
    d_in: int,
    d_out: int,
    r: int,
    rows: Sequence[int],
    powers: Sequence[float] = POWERS,
    seed: int = 0,
) -> str:
    """Return the errors of attackers as a Markdown table: spectra down, rows seen across.

    Args:
        d_in: Width of the inputs.
        d_out: Width of the outputs.
        r: Rank of the adapter.
        rows: How many rows each attacker saw.
        powers: See `attacker_error`.
        seed: Likewise.
    """
    lines = [["rows seen", *map(str, rows)], ["---"] * (len(rows) + 1)]
    for power in powers:
        errors = [attacker_error(d_in, d_out, r, count, power, seed) for count in rows]
        lines.append([f"inputs i^-{power:g}", *(f"{error:.2g}" for error in errors)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
