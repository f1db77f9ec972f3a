"""Make the proofs that both verifiers of ZKLoRA are tried on.

    python -m tests.zklora_vectors        writes tests/vectors/zklora_proofs.json, always the same

Everything that a prover draws comes from one seeded stream here, and here alone: the library draws
from the system. A vector that is refused says which accepted one it is, what was changed, and at
which stage that must show. What it does not name is as in its base; a `patch` is written over the
hexadecimal digits of its proof, from a place on.

Stages, in the order in which they are passed: statement (sizes and ranges of the rows), length,
scalar (canonical), point (canonical, in the group), equation.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from paris_ray.zklora import curve
from paris_ray.zklora.commitment import ModuleCommitment, ModuleOpening, commit
from paris_ray.zklora.fiat_shamir import FiatShamir
from paris_ray.zklora.field import ORDER, SCALAR_BYTES
from paris_ray.zklora.fixed_point import QuantisedModule, evaluate
from paris_ray.zklora.folding import folding_shape
from paris_ray.zklora.proof import LABEL, POINT_NAMES, _prove, _start

VECTORS = Path(__file__).parent / "vectors" / "zklora_proofs.json"
POINT, LARGEST = curve.POINT_BYTES, 2**15 - 1
CONTEXT = b"session 1"
Vector = dict[str, Any]


class Stream:
    """Numbers that look random and are always the same."""

    def __init__(self, seed: str) -> None:
        self._seed, self._drawn = seed, 0

    def below(self, limit: int) -> int:
        self._drawn += 1
        data = hashlib.shake_256(f"{self._seed} {self._drawn}".encode()).digest(64)
        return int.from_bytes(data, "little") % limit

    def matrix(self, shape: tuple[int, int], low: int) -> np.ndarray:
        """Return int16 numbers from `low` to 2^15 - 1."""
        values = [low + self.below(2**15 - low) for _ in range(shape[0] * shape[1])]
        return np.array(values, np.int16).reshape(shape)


# What is proved

SHAPES = {  # d_in, r, d_out, rows
    "one number": (1, 1, 1, 1),
    "one input": (1, 1, 3, 2),
    "one output": (3, 1, 1, 2),
    "one row": (4, 2, 4, 1),
    "plain": (5, 2, 4, 3),
    "another module": (5, 2, 4, 3),
    "outputs are wider": (3, 2, 6, 2),
    "rank above both widths": (2, 5, 3, 2),
    "many rows": (3, 2, 3, 40),
    "as wide as is sent whole": (128, 1, 2, 1),
    "one round": (129, 1, 3, 2),
    "one round, for the outputs": (2, 1, 130, 1),
    "two rounds": (257, 1, 2, 1),
}


def module_of(stream: Stream, d_in: int, r: int, d_out: int) -> QuantisedModule:
    a, b = (stream.matrix(shape, -LARGEST) for shape in ((d_in, r), (r, d_out)))
    return QuantisedModule(a, b, 0, 0)


def claims() -> Iterator[tuple[str, ModuleOpening, np.ndarray, bytes]]:
    """Return name, weights, inputs and context of everything that is proved honestly."""
    stream = Stream("modules")
    modules = {}
    for name, (d_in, r, d_out, rows) in SHAPES.items():
        _, opening = commit(module_of(stream, d_in, r, d_out))
        modules[name] = opening, stream.matrix((rows, d_in), -(2**15))
        yield name, *modules[name], CONTEXT
    opening, x = modules["plain"]
    yield "the same again", opening, x, CONTEXT
    yield "no context", opening, x, b""
    yield "a long context", opening, x, bytes(range(256)) * 2
    yield "inputs of zero", opening, 0 * x, CONTEXT
    yield "equal rows", opening, np.repeat(x[:1], 4, axis=0), CONTEXT
    yield "rows in another order", opening, x[::-1], CONTEXT
    yield "lowest inputs", opening, np.full_like(x, -(2**15)), CONTEXT
    largest = np.full((5, 2), LARGEST, np.int16), np.full((2, 4), -LARGEST, np.int16)
    yield "largest weights", commit(QuantisedModule(*largest, 0, 0))[1], x, CONTEXT
    zeros = np.zeros((5, 2), np.int16), np.zeros((2, 4), np.int16)
    yield "weights of zero", commit(QuantisedModule(*zeros, 0, 0))[1], x, CONTEXT
    untrained = modules["plain"][0].module.a, zeros[1]
    yield "untrained: B is zero", commit(QuantisedModule(*untrained, 0, 0))[1], x, CONTEXT


def vector_of(
    name: str, opening: ModuleOpening, x: np.ndarray, context: bytes, y: np.ndarray | None = None
) -> Vector:
    """Return the vector of what an honest prover answers, or one that believes y."""
    commitment = opening.commitment
    y = evaluate(opening.module, x) if y is None else y
    proof = _prove(opening, x, y, _start(commitment, x, y, context)).to_bytes()
    sizes = {"d_in": commitment.d_in, "r": commitment.r, "d_out": commitment.d_out}
    points = {name: [point.hex() for point in getattr(commitment, name)] for name in "ab"}
    rows = {"x": x.tolist(), "y": y.tolist()}
    sent = {"context": context.hex(), "proof": proof.hex()}
    return {"name": name, "verdict": "accept", **sizes, **points, **rows, **sent}


# What is refused


class Changed:
    """Makes vectors that differ from an accepted one."""

    def __init__(self, base: Vector, vectors: list[Vector]) -> None:
        self.base, self._vectors = base, vectors
        self.proof = bytes.fromhex(base["proof"])
        self.rounds = folding_shape(max(base["d_in"], base["d_out"]))[0]
        self.num_points = len(POINT_NAMES) + 2 * self.rounds
        folds = [f"{side} of round {k}" for k in range(self.rounds) for side in "LR"]
        self.points = [*POINT_NAMES, *folds]
        r, start = base["r"], self.num_points * POINT
        numbered = [f"{name}[{k}]" for name in ("zu", "zv") for k in range(r)]
        fixed = ["l", *numbered, "zp[0]", "zp[1]", "z1", "z2", "z3", "z4", "z5"]
        last = (len(self.proof) - start) // SCALAR_BYTES - len(fixed)
        self.scalars = [*fixed, *(f"z[{i}]" for i in range(last))]

    def add(self, reason: str, stage: str, **changes: Any) -> None:
        assert any(self.base[name] != value for name, value in changes.items()), reason
        name = f"{self.base['name']}: {reason}"
        kept = {"name": name, "base": self.base["name"], "verdict": stage, "reason": reason}
        if len(changes.get("proof", "")) == len(self.base["proof"]):
            changes["patch"] = patch(self.base["proof"], changes.pop("proof"))
        self._vectors.append(kept | changes)

    def part(self, name: str) -> slice:
        if name in self.points:
            start = POINT * self.points.index(name)
            return slice(start, start + POINT)
        start = self.num_points * POINT + SCALAR_BYTES * self.scalars.index(name)
        return slice(start, start + SCALAR_BYTES)

    def replaced(self, name: str, data: bytes) -> str:
        part = self.part(name)
        return (self.proof[: part.start] + data + self.proof[part.stop :]).hex()

    def point(self, name: str, what: str, stage: str, change: Callable[[bytes], bytes]) -> None:
        proof = self.replaced(name, change(self.proof[self.part(name)]))
        self.add(f"{name} is {what}", stage, proof=proof)

    def scalar(self, name: str, what: str, stage: str, change: Callable[[int], int]) -> None:
        value = change(int.from_bytes(self.proof[self.part(name)], "little"))
        data = value.to_bytes(SCALAR_BYTES, "little")
        self.add(f"{name} is {what}", stage, proof=self.replaced(name, data))

    def swapped(self, one: str, other: str) -> None:
        first, second = self.proof[self.part(one)], self.proof[self.part(other)]
        proof = bytearray(self.proof)
        proof[self.part(one)], proof[self.part(other)] = second, first
        self.add(f"{one} and {other} are swapped", "equation", proof=proof.hex())


def patch(before: str, after: str) -> tuple[int, str]:
    """Return where two texts of one length begin to differ, and the second from there on."""
    differ = [i for i, pair in enumerate(zip(before, after, strict=True)) if pair[0] != pair[1]]
    return differ[0], after[differ[0] : differ[-1] + 1]


SMALL = curve.G1Point.from_xy_bytes_unchecked_le(bytes(48) + (2).to_bytes(48, "little"))
NO_POINTS = {
    "infinity by another name": b"\xc0" + bytes(46) + b"\x01",
    "infinity with a sign": b"\xe0" + bytes(47),
    "an x that is not below the modulus": b"\x80" + b"\xff" * 47,
    "without the flag of compression": bytes(48),
    "an x that is not on the curve": b"\x80" + bytes(46) + b"\x01",
    "of order three": curve.encode(SMALL),
}


def moved(point: bytes, by: Any) -> bytes:
    return curve.encode(curve.decode(point, "a vector") + by)


def negated(point: bytes) -> bytes:
    return curve.encode(-curve.decode(point, "a vector"))


def change_points(changed: Changed, names: list[str]) -> None:
    infinity = curve.encode(curve.G1Point.identity())
    for name in names:
        changed.point(name, "the neutral element", "equation", lambda _: infinity)
        changed.point(name, "of the other sign", "equation", negated)
        changed.point(name, "moved by H", "equation", lambda data: moved(data, curve.BLINDING))
        changed.point(name, "moved out of the group", "point", lambda data: moved(data, SMALL))
    for what, data in NO_POINTS.items():
        changed.point(names[-1], what, "point", lambda _, data=data: data)
    for one, other in pairwise(names):
        changed.swapped(one, other)


def change_scalars(changed: Changed) -> None:
    for name in dict.fromkeys([*changed.scalars[:16], *changed.scalars[-2:]]):
        changed.scalar(name, "one more", "equation", lambda value: (value + 1) % ORDER)
        changed.scalar(name, "not reduced", "scalar", lambda value: value + ORDER)
    changed.scalar("l", "of the other sign", "equation", lambda value: ORDER - value)
    changed.scalar("zu[0]", "the order", "scalar", lambda _: ORDER)
    changed.scalar("z[0]", "all ones", "scalar", lambda _: 2**256 - 1)
    for one, other in (("zu[0]", "zu[1]"), ("zu[0]", "zv[0]"), ("zp[0]", "zp[1]"), ("z1", "z2")):
        changed.swapped(one, other)


def change_lengths(changed: Changed) -> None:
    proof = changed.base["proof"]
    for what, other in {
        "the proof is empty": "",
        "the last byte is missing": proof[:-2],
        "the last scalar is missing": proof[:-64],
        "the first point is missing": proof[96:],
        "a byte of zero follows": proof + "00",
        "a scalar of zero follows": proof + "00" * 32,
        "the proof is there twice": proof * 2,
    }.items():
        changed.add(what, "length", proof=other)


def change_rows(changed: Changed) -> None:
    x, y = changed.base["x"], changed.base["y"]
    edited = np.array(x), np.array(y)
    edited[0][-1, -1] ^= 1
    edited[1][0, 0] += 1
    moved_y = np.array(y)
    moved_y[0, 0], moved_y[-1, 0] = moved_y[0, 0] + 1, moved_y[-1, 0] - 1
    changed.add("one bit of x is another", "equation", x=edited[0].tolist())
    changed.add("one number of y is one more", "equation", y=edited[1].tolist())
    changed.add("two errors of y cancel", "equation", y=moved_y.tolist())
    changed.add("the rows of y are in another order", "equation", y=y[::-1])
    changed.add("all rows are in another order", "equation", x=x[::-1], y=y[::-1])
    changed.add("y has another sign", "equation", y=(-np.array(y)).tolist())
    changed.add("the last row is missing", "equation", x=x[:-1], y=y[:-1])
    changed.add("a row of zeros follows", "equation", x=[*x, [0] * 5], y=[*y, [0] * 4])
    changed.add("the last row is there twice", "equation", x=[*x, x[-1]], y=[*y, y[-1]])
    changed.add("a number of y is q more", "statement", y=[[y[0][0] + ORDER, *y[0][1:]], *y[1:]])
    changed.add("a number of y is 2^64 more", "statement", y=[[y[0][0] + 2**64, *y[0][1:]], *y[1:]])
    changed.add("a number of x has 17 bits", "statement", x=[[2**15, *x[0][1:]], *x[1:]])
    changed.add("there is no row", "statement", x=[], y=[])
    changed.add("y has a row less", "statement", y=y[:-1])
    changed.add("a row of x is too short", "statement", x=[row[1:] for row in x])
    changed.add("a row of y is too long", "statement", y=[[*row, 0] for row in y])


def change_statement(changed: Changed, other: Vector) -> None:
    base = changed.base
    for what, context in {
        "of no context": b"",
        "of another session": b"session 2",
        "a byte longer": CONTEXT + b"\0",
    }.items():
        changed.add(f"the context is {what}", "equation", context=context.hex())
    a, b = base["a"], base["b"]
    infinity = curve.encode(curve.G1Point.identity()).hex()
    changed.add("columns of A are swapped", "equation", a=a[::-1])
    changed.add("columns and rows are swapped alike", "equation", a=a[::-1], b=b[::-1])
    changed.add("A and B are swapped", "equation", a=b, b=a)
    changed.add("a column of A is committed to twice", "equation", a=[a[0], a[0]])
    changed.add("a column of A is the neutral element", "equation", a=[infinity, a[1]])
    changed.add(
        "a row of B has another sign", "equation", b=[negated(bytes.fromhex(b[0])).hex(), b[1]]
    )
    shifted = [moved(bytes.fromhex(point), SMALL).hex() for point in (a[0], b[0])]
    changed.add("a column of A is outside of the group", "point", a=[shifted[0], a[1]])
    changed.add("a row of B is outside of the group", "point", b=[shifted[1], b[1]])
    changed.add("a column of A is missing", "statement", a=a[:1])
    changed.add("B has a row too many", "statement", b=[*b, b[0]])
    changed.add("the rank is one more", "length", r=3)
    changed.add("the rank is none", "length", r=0)
    changed.add("the commitment is another module's", "equation", a=other["a"], b=other["b"])
    changed.add("the proof is another module's", "equation", proof=other["proof"])


class Forgetful(FiatShamir):
    """An oracle that does not absorb the messages of one name."""

    forgotten = ""

    def absorb(self, name: str, *messages: bytes) -> None:
        if name != self.forgotten:
            super().absorb(name, *messages)


def dishonest_proofs(changed: Changed, opening: ModuleOpening, other: QuantisedModule) -> None:
    """Proofs by provers who follow the protocol but for one thing."""
    x, y = np.array(changed.base["x"], np.int16), np.array(changed.base["y"], np.int64)
    context = bytes.fromhex(changed.base["context"])
    statement = ["context", "sizes", "commitment", "rows"]
    # An honest vector that is sent whole fits every chi; one that is folded is folded with it.
    last = ["chi"] if changed.rounds else []
    messages = [f"before {challenge}" for challenge in ("gamma", "xi", "e", *last)]
    for name in [*statement, *messages, *(f"round {k}" for k in range(changed.rounds))]:
        with mock.patch.object(Forgetful, "forgotten", name):
            proof = _prove(opening, x, y, start_forgetful(opening.commitment, x, y, context))
        reason = f"its challenges do not depend on: {name}"
        changed.add(reason, "equation", proof=proof.to_bytes().hex())
    false = y.copy()
    false[0, 0] += 1
    lie = vector_of("", opening, x, context, false)
    changed.add("y is false, and its prover knows", "equation", y=lie["y"], proof=lie["proof"])
    mixed = ModuleOpening(other, opening.blinders_a, opening.blinders_b)
    mixed.__dict__["commitment"] = opening.commitment
    false = evaluate(other, x)
    lie = vector_of("", mixed, x, context, false)
    reason = "other weights answer than the committed ones"
    changed.add(reason, "equation", y=lie["y"], proof=lie["proof"])


def start_forgetful(
    commitment: ModuleCommitment, x: np.ndarray, y: np.ndarray, context: bytes
) -> FiatShamir:
    with mock.patch("paris_ray.zklora.proof.FiatShamir", Forgetful):
        return _start(commitment, x, y, context)


def make() -> str:
    """Return the text of the file."""
    with mock.patch("secrets.randbelow", Stream("masks").below):
        proved = {claim[0]: (claim[1], vector_of(*claim)) for claim in claims()}
        vectors = [vector for _, vector in proved.values()]
        plain, folded = (Changed(proved[name][1], vectors) for name in ("plain", "one round"))
        change_lengths(plain)
        change_points(plain, plain.points)
        change_scalars(plain)
        change_rows(plain)
        change_statement(plain, proved["another module"][1])
        change_points(folded, folded.points[-3:])  # before the folding, and of it
        change_lengths(folded)
        for changed in (plain, folded):
            opening = proved[changed.base["name"]][0]
            sizes = (changed.base[name] for name in ("d_in", "r", "d_out"))
            dishonest_proofs(changed, opening, module_of(Stream("other weights"), *sizes))
    width = 65 << 2  # of two rounds
    points = {
        "G": [curve.encode(point).hex() for point in curve.generators(width)],
        "H": [curve.encode(curve.BLINDING).hex()],
        "g": [curve.encode(curve.VALUE).hex()],
        "Q": [curve.encode(curve.FORM).hex()],
    }
    lines = ",\n".join(json.dumps(vector) for vector in vectors)
    head = {"label": LABEL, "generators": points}
    return f'{json.dumps(head)[:-1]}, "vectors": [\n{lines}\n]}}\n'


if __name__ == "__main__":
    VECTORS.parent.mkdir(exist_ok=True)
    VECTORS.write_text(make())
