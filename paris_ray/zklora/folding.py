"""A linear form of a committed vector, opened in a logarithmic number of rounds.

Claim: the prover knows y with `P = <y, G> + <form, y> Q`. Each round halves y, form and G. Nothing
is hidden here: the proof calls it with a vector that is masked already. It stops early, when what
is left is short enough to be sent, because each round costs the prover a multiplication of full
length.

Source: Bootle et al., EUROCRYPT 2016, and Bünz et al., S&P 2018 ("Bulletproofs"), in the form of
Attema and Cramer, CRYPTO 2020 ("Compressed sigma-protocol theory", section 4), which needs no
inverses.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from paris_ray.errors import VerificationError
from paris_ray.zklora.curve import FORM, Equation, decode, encode, generators, multiply
from paris_ray.zklora.fiat_shamir import Oracle
from paris_ray.zklora.field import ORDER, dot, padded, plus

LONGEST_REMAINDER = 128


@dataclass(frozen=True, slots=True)
class Folded:
    """What the prover sends.

    Attributes:
        left: One encoded point a round.
        right: One encoded point a round.
        remainder: The folded vector.
    """

    left: tuple[bytes, ...]
    right: tuple[bytes, ...]
    remainder: tuple[int, ...]


def folding_shape(length: int) -> tuple[int, int]:
    """Return the number of rounds for a vector, and the length that remains after them."""
    rounds = 0
    while -(-length >> rounds) > LONGEST_REMAINDER:
        rounds += 1
    return rounds, -(-length >> rounds)


def fold(y: Sequence[int], form: Sequence[int], oracle: Oracle) -> Folded:
    """Return the proof for a vector and a form of one length.

    The generators are never folded, which would take a scalar multiplication for each: both
    points of a round are multiplications over the original ones.
    """
    rounds, remainder = folding_shape(len(y))
    y, form = padded(y, remainder << rounds), padded(form, remainder << rounds)
    bases = generators(len(y))
    # Generator i of this round is the sum over blocks b of `blocks[b] * G[b * len(y) + i]`.
    blocks, lefts, rights = [1], [], []
    for number in range(rounds):
        half = len(y) // 2
        (y1, y2), (form1, form2) = (y[:half], y[half:]), (form[:half], form[half:])
        lower, upper = _halves(bases, half)
        lefts.append(encode(multiply([*upper, FORM], [*_spread(blocks, y1), dot(form2, y1)])))
        rights.append(encode(multiply([*lower, FORM], [*_spread(blocks, y2), dot(form1, y2)])))
        x = _challenge(oracle, number, lefts[-1], rights[-1])
        y = plus(y1, x, y2)
        form = plus(form2, x, form1)
        blocks = _next_blocks(blocks, x)
    return Folded(tuple(lefts), tuple(rights), tuple(y))


def folding_equation(
    claim: Equation, form: Sequence[int], folded: Folded, oracle: Oracle
) -> Equation:
    """Return the equation that holds if the folding proves the claim.

    Args:
        claim: The point P, as terms.
        form: The linear form.
        folded: What the prover sent, of the shape that `folding_shape` says.
        oracle: The prover's, at the same point.

    Raises:
        VerificationError: if it has another shape, or a point is none.
    """
    rounds, remainder = folding_shape(len(form))
    sizes = (len(folded.left), len(folded.right), len(folded.remainder))
    if sizes != (rounds, rounds, remainder):
        raise VerificationError(
            f"the folding has {sizes} messages, not {(rounds, rounds, remainder)}"
        )
    sent = list(zip(folded.left, folded.right, strict=True))
    challenges = [_challenge(oracle, number, *points) for number, points in enumerate(sent)]
    equation, scale, blocks = Equation(), 1, [1]
    # The folded point is x_k (... x_1 P + L_1 + x_1^2 R_1 ...) + L_k + x_k^2 R_k.
    for number in reversed(range(rounds)):
        x, (left, right) = challenges[number], sent[number]
        equation.add(decode(left, f"left[{number}]"), scale)
        equation.add(decode(right, f"right[{number}]"), scale * x * x)
        scale = scale * x % ORDER
    equation.merge(claim, scale)
    for x in challenges:
        blocks = _next_blocks(blocks, x)
    form = padded(form, remainder << rounds)
    last_form = [dot(blocks, form[i::remainder]) for i in range(remainder)]
    equation.add_generators([-scalar for scalar in _spread(blocks, folded.remainder)])
    equation.add(FORM, -dot(last_form, folded.remainder))
    return equation


def _challenge(oracle: Oracle, number: int, left: bytes, right: bytes) -> int:
    oracle.absorb(f"round {number}", left, right)
    return oracle.challenge("x")


def _halves(bases: Sequence[Any], half: int) -> tuple[list[Any], list[Any]]:
    """Return the first and the second half of every block of `2 * half`, in order."""
    starts = range(0, len(bases), 2 * half)
    lower = [base for start in starts for base in bases[start : start + half]]
    upper = [base for start in starts for base in bases[start + half : start + 2 * half]]
    return lower, upper


def _spread(blocks: Sequence[int], vector: Sequence[int]) -> list[int]:
    """Return the outer product of the blocks' coefficients and a vector, flattened."""
    return [coefficient * value % ORDER for coefficient in blocks for value in vector]


def _next_blocks(blocks: Sequence[int], x: int) -> list[int]:
    """Halve every block: the first half is multiplied by the challenge."""
    return [part for coefficient in blocks for part in (coefficient * x % ORDER, coefficient)]
