"""The verifier of docs/zklora.md once more, in plain integers and without paris_ray: slow.

It reads `tests/vectors/zklora_proofs.json` and follows the argument line by line: it checks the
four equations one after the other, without random weights, and folds generators, form and claim
round by round, where `paris_ray.zklora` unrolls all rounds into one multiplication.

    python tests/second_verifier.py tests/vectors/zklora_proofs.json
"""

import hashlib
import json
import struct
import sys
from functools import cache
from pathlib import Path

# BLS12-381: y^2 = x^3 + 4 over the field of P elements; the group is its part of order Q.
P = int(
    "1A0111EA397FE69A4B1BA7B6434BACD764774B84F38512BF6730D2A0F6B0F624"
    "1EABFFFEB153FFFFB9FEFFFFFFFFAAAB",
    16,
)
Q = 0x73EDA753299D7D483339D80809A1D80553BDA402FFFE5BFEFFFFFFFF00000001
POINT_BYTES, SCALAR_BYTES = 48, 32
COMPRESSED, INFINITY, LARGER_Y = 0x80, 0x40, 0x20

LABEL = b"paris_ray zklora proof 2"
LONGEST_REMAINDER = 128
INT16, INT64 = 2**15, 2**63

Point = tuple[int, int, int]  # X / Z^2, Y / Z^3; Z = 0 at infinity
ZERO: Point = (1, 1, 0)


class Refused(Exception):
    """A proof that does not hold, and the stage at which that showed."""


def refuse_unless(condition: bool, stage: str) -> None:
    if not condition:
        raise Refused(stage)


# The group


def double(point: Point) -> Point:
    x, y, z = point
    yy = y * y % P
    s, m = 4 * x * yy % P, 3 * x * x % P
    x3 = (m * m - 2 * s) % P
    return x3, (m * (s - x3) - 8 * yy * yy) % P, 2 * y * z % P


def add(a: Point, b: Point) -> Point:
    if not a[2]:
        return b
    if not b[2]:
        return a
    zz1, zz2 = a[2] * a[2] % P, b[2] * b[2] % P
    u1, u2 = a[0] * zz2 % P, b[0] * zz1 % P
    s1, s2 = a[1] * zz2 * b[2] % P, b[1] * zz1 * a[2] % P
    if u1 == u2:
        return double(a) if s1 == s2 else ZERO
    h, r = u2 - u1, s2 - s1
    hh = h * h % P
    hhh, v = h * hh % P, u1 * hh % P
    x3 = (r * r - hhh - 2 * v) % P
    return x3, (r * (v - x3) - s1 * hhh) % P, h * a[2] * b[2] % P


def combination(scalars: list[int], points: list[Point]) -> Point:
    """`sum_i scalars[i] points[i]`, bit by bit, with the doublings shared."""
    assert len(scalars) == len(points)
    total = ZERO
    scalars = [scalar % Q for scalar in scalars]
    for bit in reversed(range(Q.bit_length())):
        total = double(total)
        for scalar, point in zip(scalars, points, strict=True):
            if scalar >> bit & 1:
                total = add(total, point)
    return total


def equal(a: Point, b: Point) -> bool:
    return add(a, (b[0], -b[1] % P, b[2]))[2] == 0


@cache
def decode(data: bytes) -> Point:
    """The point that has this encoding: 48 bytes, canonical, in the group of order Q."""
    refuse_unless(len(data) == POINT_BYTES and bool(data[0] & COMPRESSED), "point")
    if data[0] & INFINITY:
        refuse_unless(data == bytes([COMPRESSED | INFINITY]) + bytes(POINT_BYTES - 1), "point")
        return ZERO
    x = int.from_bytes(data, "big") & (1 << 381) - 1
    refuse_unless(x < P, "point")
    square = (x**3 + 4) % P
    y = pow(square, (P + 1) // 4, P)
    refuse_unless(y * y % P == square, "point")
    if (2 * y > P) != bool(data[0] & LARGER_Y):
        y = -y % P
    # Not `combination`, which reduces scalars modulo Q.
    multiple = ZERO
    for bit in f"{Q:b}":
        multiple = double(multiple)
        if bit == "1":
            multiple = add(multiple, (x, y, 1))
    refuse_unless(multiple[2] == 0, "point")
    return x, y, 1


# Vectors over the field


def powers(base: int, count: int) -> list[int]:
    return [pow(base, exponent, Q) for exponent in range(count)]


def dot(a: list[int], b: list[int]) -> int:
    return sum(x * y for x, y in zip(a, b, strict=True)) % Q


def padded(vector: list[int], length: int) -> list[int]:
    return vector + [0] * (length - len(vector))


# The transcript


class Transcript:
    """SHAKE-256 of everything said so far, each field with its length, each message counted."""

    def __init__(self) -> None:
        self.said = b""
        self.say(LABEL)

    def say(self, name: bytes, *messages: bytes) -> None:
        for part in (name, len(messages).to_bytes(8, "little"), *messages):
            self.said += len(part).to_bytes(8, "little") + part

    def challenge(self, name: bytes) -> int:
        while True:
            self.say(b"challenge " + name)
            if value := int.from_bytes(hashlib.shake_256(self.said).digest(64), "little") % Q:
                return value


# The proof


class Proof:
    """The messages of a proof, by the names of docs/zklora.md; points are not looked at yet."""

    def __init__(self, data: bytes, r: int, width: int) -> None:
        rounds, self.remainder = 0, width
        while self.remainder > LONGEST_REMAINDER:
            rounds += 1
            self.remainder = -(-width // 2**rounds)
        start = (9 + 2 * rounds) * POINT_BYTES
        size = start + (2 * r + 8 + self.remainder) * SCALAR_BYTES
        refuse_unless(len(data) == size, "length")
        points = cut(data[:start], POINT_BYTES)
        self.first, self.crossed, self.announced = points[:2], points[2], points[3:9]
        self.folds = list(zip(points[9::2], points[10::2], strict=True))
        scalars = cut(data[start:], SCALAR_BYTES)
        self.encoded_lacking, self.responses = scalars[0], scalars[1 : 2 * r + 8]
        values = [int.from_bytes(scalar, "little") for scalar in scalars]
        refuse_unless(all(value < Q for value in values), "scalar")
        self.lacking, values = values[0], values[1:]
        self.zu, self.zv, values = values[:r], values[r : 2 * r], values[2 * r :]
        self.zp, self.z = values[:2], values[7:]
        self.z1, self.z2, self.z3, self.z4, self.z5 = values[2:7]


def cut(data: bytes, size: int) -> list[bytes]:
    return [data[i : i + size] for i in range(0, len(data), size)]


def check_statement(claim: dict) -> None:
    """Sizes that agree, and numbers in the range of their types."""
    x, y = claim["x"], claim["y"]
    refuse_unless(0 < len(x) == len(y), "statement")
    for rows, width, limit in ((x, claim["d_in"], INT16), (y, claim["d_out"], INT64)):
        refuse_unless(all(len(row) == width for row in rows), "statement")
        refuse_unless(all(-limit <= value < limit for row in rows for value in row), "statement")


def start_transcript(claim: dict) -> Transcript:
    """Say the statement."""
    said = Transcript()
    said.say(b"context", bytes.fromhex(claim["context"]))
    sizes = (claim["d_in"], claim["r"], claim["d_out"], len(claim["x"]))
    said.say(b"sizes", *(size.to_bytes(8, "little") for size in sizes))
    said.say(b"commitment", *map(bytes.fromhex, claim["a"] + claim["b"]))
    x = b"".join(struct.pack(f"<{len(row)}h", *row) for row in claim["x"])
    y = b"".join(struct.pack(f"<{len(row)}q", *row) for row in claim["y"])
    said.say(b"rows", hashlib.sha256(x).digest(), hashlib.sha256(y).digest())
    return said


class Challenges:
    """Each drawn from everything before it; vectors are powers."""

    def __init__(self, claim: dict, proof: Proof) -> None:
        said = start_transcript(claim)
        self.alpha = powers(said.challenge(b"alpha"), len(claim["x"]))
        self.beta = powers(said.challenge(b"beta"), claim["d_out"])
        said.say(b"before gamma", *proof.first)
        self.gamma = powers(said.challenge(b"gamma"), claim["r"])
        said.say(b"before xi", proof.crossed)
        self.xi, self.mu = said.challenge(b"xi"), said.challenge(b"mu")
        said.say(b"before e", *proof.announced, proof.encoded_lacking)
        self.e = said.challenge(b"e")
        said.say(b"before chi", *proof.responses)
        self.chi = said.challenge(b"chi")
        self.rounds = []
        for number, fold in enumerate(proof.folds):
            said.say(b"round %d" % number, *fold)
            self.rounds.append(said.challenge(b"x"))


def verify(claim: dict, generators: dict[str, list[bytes]]) -> None:
    """Check one proof.

    Raises:
        Refused: unless it holds.
    """
    check_statement(claim)
    r, width = claim["r"], max(claim["d_in"], claim["d_out"])
    proof = Proof(bytes.fromhex(claim["proof"]), r, width)
    refuse_unless(len(claim["a"]) == len(claim["b"]) == r, "statement")
    columns, rows = ([decode(bytes.fromhex(point)) for point in claim[name]] for name in "ab")
    u, v, crossed = map(decode, (*proof.first, proof.crossed))
    rc, rs, rt, rp, m0, m1 = map(decode, proof.announced)
    ch = Challenges(claim, proof)
    e = ch.e
    bases = [decode(point) for point in generators["G"]]
    h, g, q = (decode(generators[name][0]) for name in ("H", "g", "Q"))

    # (1) to (4)
    x = [dot(ch.alpha, list(column)) for column in zip(*claim["x"], strict=True)]
    y = dot(ch.alpha, [dot(ch.beta, row) for row in claim["y"]])
    claims = [
        (([*proof.zu, proof.z2], [*bases[:r], h]), ([1, e], [rs, u])),
        (([*proof.zv, proof.z3], [*bases[:r], h]), ([1, e], [rt, v])),
        (([*proof.zp, proof.z4], [*bases[:2], h]), ([1, e], [rp, crossed])),
        (([dot(proof.zu, proof.zv), proof.z5], [g, h]), ([1, e, e * e * y], [m0, m1, g])),
    ]
    for left, right in claims:
        refuse_unless(equal(combination(*left), combination(*right)), "equation")

    # (5): what is folded, and then the folding
    pa, pb = combination(ch.gamma, columns), combination(ch.gamma, rows)
    value = proof.lacking + dot(ch.gamma, proof.zu) + ch.xi * proof.zp[0]
    value += ch.mu * (proof.zp[1] + ch.xi * dot(ch.gamma, proof.zv))
    claimed = combination([1, e, ch.xi * e, -proof.z1, ch.chi * value], [rc, pa, pb, h, q])
    n = proof.remainder << len(proof.folds)
    both = zip(padded(x, n), padded(ch.beta, n), strict=True)
    form, bases = [ch.chi * (a + ch.mu * b) % Q for a, b in both], bases[:n]
    for c, (left, right) in zip(ch.rounds, proof.folds, strict=True):
        half = len(form) // 2
        claimed = combination([1, c, c * c], [decode(left), claimed, decode(right)])
        form = [(b + c * a) % Q for a, b in zip(form[:half], form[half:], strict=True)]
        halves = zip(bases[:half], bases[half:], strict=True)
        bases = [add(combination([c], [lower]), upper) for lower, upper in halves]
    opened = combination([*proof.z, dot(form, proof.z)], [*bases, q])
    refuse_unless(equal(claimed, opened), "equation")


def load(path: Path) -> tuple[dict[str, list[bytes]], list[dict]]:
    """The generators and vectors of a file; a vector has what it does not say from its base."""
    document = json.loads(path.read_text())
    generators = {
        name: [bytes.fromhex(point) for point in points]
        for name, points in document["generators"].items()
    }
    by_name: dict[str, dict] = {}
    for vector in document["vectors"]:
        claim = by_name.get(vector.get("base", ""), {}) | vector
        start, digits = claim.pop("patch", (0, ""))
        claim["proof"] = claim["proof"][:start] + digits + claim["proof"][start + len(digits) :]
        by_name[vector["name"]] = claim
    return generators, list(by_name.values())


def verdict(claim: dict, generators: dict[str, list[bytes]]) -> str:
    """`accept`, or the stage at which a proof is refused."""
    try:
        verify(claim, generators)
    except Refused as refused:
        return str(refused)
    return "accept"


if __name__ == "__main__":
    points, vectors = load(Path(sys.argv[1]))
    wrong = [vector["name"] for vector in vectors if verdict(vector, points) != vector["verdict"]]
    refused = sum(vector["verdict"] != "accept" for vector in vectors)
    print(f"{len(vectors)} vectors, {refused} of them refused; judged otherwise: {wrong}")
    sys.exit(bool(wrong))
