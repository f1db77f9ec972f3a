"""What answers give away: directions in which the map is known, and how far that gets a thief.

No proof can help here. Each answered row is one linear equation for every column of A, exact to the
last bit. Whoever solves them by least squares knows the map on the span of the rows, and nothing of
it outside; that it has rank r does not help, since A has d_in unknowns a column all the same. So
what counts is not rows but directions, and of them those in which real inputs have their energy.
"""

import hashlib
import hmac
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from paris_ray.folders import Folder
from paris_ray.zklora.fixed_point import (
    Floats,
    Int16,
    QuantisedModule,
    check_rows,
    quantise,
    quantise_rows,
)
from paris_ray.zklora.manifest import AdapterManifest
from paris_ray.zklora.sessions import SessionJournal

NEW = 1e-7  # of a row's length must lie outside the span, or it is a combination of earlier rows
FRESH_ROWS = 512  # that an error is predicted for
INPUTS = "inputs.safetensors"  # a sample of real ones, in the folder of an offer
LAST_BITS = b"paris_ray zklora last bits\n"

SEED_BYTES = 32

Directions = NDArray[np.float64]
Seeds = NDArray[np.uint8]


class Span:
    """The directions of a module's inputs in which its map was answered.

    Args:
        d_in: Width of the inputs.
        parts: Answered rows, `(rows, d_in)` each.

    Raises:
        ParisError: as `add`.
    """

    def __init__(self, d_in: int, parts: Iterable[Int16] = ()) -> None:
        self._basis: Directions = np.empty((0, d_in))
        for part in parts:
            self.add(part)

    @property
    def dimensions(self) -> int:
        """How many directions are known; d_in of them are the whole map."""
        return len(self._basis)

    def add(self, x: Int16) -> None:
        """Add answered rows `(rows, d_in)`.

        A row that was answered before, or is a combination of such rows, brings no new direction.

        Raises:
            ParisError: if `x` has another type or width.
        """
        check_rows(x, np.int16, self._basis.shape[1], "x")
        rows = x[x.any(axis=1)].astype(np.float64)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        # Once is not enough: what cancels would leave rounding errors along the basis.
        rest = self.outside(self.outside(rows))
        energies, directions = np.linalg.eigh(rest @ rest.T)
        found = directions[:, energies > NEW**2].T @ rest
        self._basis = np.linalg.qr(np.vstack([self._basis, found]).T)[0].T

    def outside(self, x: Floats | Int16) -> Directions:
        """Return the part of rows `(rows, d_in)` that is orthogonal to the span."""
        return x - (x @ self._basis.T) @ self._basis


def predicted_error(
    span: Span, inputs: Floats | Int16, module: QuantisedModule | None = None
) -> float:
    """Return how far off a thief is on inputs that it never asked for.

    It is the energy outside the span: least squares gives the smallest map that fits the answers,
    which is the true one after a projection on the span.

    Args:
        span: What it saw answered.
        inputs: `(rows, d_in)`, real ones of the module, as many as make a fair sample of it.
        module: The map, if one has it; None: any direction of the inputs counts the same.

    Returns:
        Error of the predicted updates, relative to the true ones (both as Frobenius norms).
    """
    true, missed = np.asarray(inputs, np.float64), span.outside(inputs)
    if module is not None:
        factors = module.a.astype(np.float64), module.b.astype(np.float64)
        true, missed = (rows @ factors[0] @ factors[1] for rows in (true, missed))
    return float(np.linalg.norm(missed) / np.linalg.norm(true))


def stolen(module: QuantisedModule, span: Span) -> QuantisedModule:
    """Return the map that a least-squares thief has of a module: zero outside the span."""
    a = np.ldexp(module.a.astype(np.float64), -module.exponent_a)
    b = np.ldexp(module.b.astype(np.float64), -module.exponent_b)
    return quantise(a - span.outside(a.T).T, b)


def chosen_rows(inputs: Floats | Int16, count: int) -> Int16:
    """Return the rows that teach most: directions of the largest energy of real inputs, in order.

    Whoever has the base has such inputs, so that any user can ask for these.

    Args:
        inputs: `(rows, d_in)`.
        count: How many are wanted.

    Returns:
        `(min(count, rows, d_in), d_in)` int16.
    """
    rows = np.asarray(inputs, np.float64)
    directions = np.linalg.eigh(rows.T @ rows)[1].T[::-1]
    return quantise_rows(directions[: min(count, len(rows))])[0]


def assumed_inputs(d_in: int, rows: int, power: float, random: np.random.Generator) -> Directions:
    """Return inputs `(rows, d_in)` of which nothing is known but how their spectrum falls.

    Args:
        d_in: Their width.
        rows: How many.
        power: Input i, from 1, has the standard deviation `i ** -power`: 0 is white noise, 1
            resembles activations.
        random: Where they come from.
    """
    return random.standard_normal((rows, d_in)) * np.arange(1, d_in + 1) ** -power


def assumed_errors(modules: Mapping[str, QuantisedModule], rows: int) -> tuple[float, float]:
    """Return the relative errors of thieves, where no real inputs are at hand.

    Each has seen so many rows answered, of inputs that resemble activations.

    Returns:
        Of one who asks for inputs as they come, and of one who chooses; means over the modules.
    """
    random = np.random.default_rng(0)
    asked, chosen = [], []
    for module in modules.values():
        width = module.d_in
        inputs = assumed_inputs(width, FRESH_ROWS, 1.0, random)
        seen, _ = quantise_rows(assumed_inputs(width, rows, 1.0, random))
        asked.append(predicted_error(Span(width, [seen]), inputs, module))
        best = np.eye(width)[: min(rows, width)]  # the spectrum falls along the axes
        chosen.append(predicted_error(Span(width, [quantise_rows(best)[0]]), inputs, module))
    return float(np.mean(asked)), float(np.mean(chosen))


def save_inputs(path: Path, inputs: Mapping[str, Int16]) -> None:
    """Keep a sample of real inputs, as many of each module as a fair prediction needs."""
    kept = {
        name: np.ascontiguousarray(x[:: max(1, len(x) // FRESH_ROWS)]) for name, x in inputs.items()
    }
    with Folder(str(path.parent)).writing(path.name) as temporary:
        save_file(kept, temporary)


def describe_leak(journal: SessionJournal, manifest: AdapterManifest, inputs: Path) -> str:
    """Return in a line for people what all users together have learned of an adapter so far.

    Without a file of real inputs, as `save_inputs` writes it, only directions are counted.
    """
    real = load_file(inputs) if inputs.exists() else {}
    most, errors = (0.0, 0, 0), []
    for name, terms in manifest.terms.items():
        d_in, _, _ = terms.dimensions
        span = Span(d_in, journal.calls.inputs(manifest.adapter_id, name))
        most = max(most, (span.dimensions / d_in, span.dimensions, d_in))
        if name in real:
            errors.append(predicted_error(span, real[name]))
    _, known, d_in = most
    line = f"learned by all users so far: at most {known} of {d_in} directions of a module"
    if not errors:
        return line
    return f"{line}; a thief's updates are off by {np.mean(errors):.2f}, relative to the true ones"


def row_seeds(secret: bytes, module: str, x: Int16) -> Seeds:
    """Return what the last bits of rows are drawn from: the same if all others are the same.

    Args:
        secret: The contributor's alone, for as long as it answers.
        module: Name of the module.
        x: `(rows, d_in)` int16, as sent.

    Returns:
        `(rows, SEED_BYTES)`.
    """
    name = hashlib.sha256(module.encode()).digest()
    chosen = (x & np.int16(-2)).astype("<i2")
    seeds = [hmac.digest(secret, name + row.tobytes(), "sha256") for row in chosen]
    return np.frombuffer(b"".join(seeds), np.uint8).reshape(-1, SEED_BYTES)


def draw_last_bits(x: Int16, seeds: Seeds) -> Int16:
    """Return rows with the last bit of every entry drawn anew: these are answered, logged, proved.

    Chosen integers could carry two rows of A in one answer, as `e_i - 2^15 e_j` does: A has 15
    bits, and so has the factor. That needs each entry of the row to be what was chosen. A drawn bit
    in all of them adds a sum over a random half of A, which is larger than what was packed below
    it, and differs from answer to answer. Real inputs lose what rounding to one bit less costs.

    Args:
        x: `(rows, d_in)` int16, as sent.
        seeds: `(rows, SEED_BYTES)`, unknown to whoever chose `x`, until then.
    """
    size = (x.shape[1] + 7) // 8
    streams = [hashlib.shake_256(LAST_BITS + seed.tobytes()).digest(size) for seed in seeds]
    packed = np.frombuffer(b"".join(streams), np.uint8).reshape(len(x), size)
    bits = np.unpackbits(packed, axis=1, count=x.shape[1])
    drawn: Int16 = (x & np.int16(-2)) | bits.astype(np.int16)
    return drawn
