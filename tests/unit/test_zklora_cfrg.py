"""Sigma proofs over BLS12-381 by others: our curve accepts and refuses what the CFRG's vectors do.

The drafts draft-irtf-cfrg-sigma-protocols and draft-irtf-cfrg-fiat-shamir speak of linear relations
`image = sum scalar * element`; ours is a bilinear statement over 16-bit rows, so that a proof of
ours is none of theirs. What both have in common is tried here: points and scalars in their only
encoding, lengths, a challenge that hashes everything before it, and the equation in the group.
The transcript is theirs (SHAKE128, suite `sigma-proofs_Shake128_BLS12381`), everything in the group
is `paris_ray.zklora.curve`. Left out are E0 to E4, which are about relations that are no relations.

Source of the numbers: github.com/mmaker/draft-irtf-cfrg-sigma-protocols, poc/vectors (MIT), ids as
there; of the Pedersen commitment, an earlier commit, which counts elements from the generator on.
"""

import hashlib
from dataclasses import dataclass, replace

import pytest
from py_arkworks_bls12381 import G1Point

from paris_ray.errors import VerificationError
from paris_ray.zklora.curve import Equation, decode, encode, multiply
from paris_ray.zklora.field import ORDER
from paris_ray.zklora.proof import _read_scalars

Terms = tuple[tuple[int, int], ...]  # of scalars and elements
RATE, SESSION = 168, b"irtf-cfrg-fiat-shamir/session-id"


@dataclass(frozen=True)
class Relation:
    """Equations `element[image] = sum scalar * element`, and the elements after the generator."""

    equations: tuple[tuple[int, Terms], ...]
    elements: str
    generator: int = 1  # its place; what is before it is the neutral element

    def to_bytes(self) -> bytes:
        one, parts = (1).to_bytes(32, "big"), [u32(len(self.equations))]
        for image, terms in self.equations:
            parts += [u32(1), u32(image), one, u32(len(terms))]
            parts += [u32(scalar) + u32(element) + one for scalar, element in terms]
        return b"".join(parts) + bytes.fromhex(self.elements)

    def points(self) -> list[G1Point]:
        data = bytes.fromhex(self.elements)
        sent = [decode(data[i : i + 48], "an element") for i in range(0, len(data), 48)]
        return [G1Point.identity()] * self.generator + [G1Point(), *sent]


@dataclass(frozen=True)
class Proof:
    tag: str
    relation: Relation
    proof: str
    num_scalars: int = 1

    @property
    def is_compact(self) -> bool:
        return "-CMPT-" in self.tag


def u32(value: int) -> bytes:
    return value.to_bytes(4, "little")


def sponge(start: bytes, said: bytes, size: int) -> bytes:
    return hashlib.shake_128(start + bytes(RATE - len(start)) + said).digest(size)


def challenge_of(proof: Proof, commitments: bytes) -> int:
    session = sponge(SESSION, proof.tag.encode(), 32)
    squeezed = sponge(session, proof.relation.to_bytes() + commitments, 48)
    return int.from_bytes(squeezed, "little") % ORDER


def scalars_of(data: bytes) -> list[int]:
    """The draft has the highest byte first, we the lowest."""
    return _read_scalars(b"".join(data[i : i + 32][::-1] for i in range(0, len(data), 32)))


def verify(claim: Proof) -> None:
    data, points = bytes.fromhex(claim.proof), claim.relation.points()
    head = 32 if claim.is_compact else 48 * len(claim.relation.equations)
    if len(data) != head + 32 * claim.num_scalars:
        raise VerificationError("the length")
    responses = scalars_of(data[head:])
    if claim.is_compact:
        (stated,) = scalars_of(data[:head])
        if challenge_of(claim, simulated(claim.relation, points, responses, stated)) != stated:
            raise VerificationError("the challenge")
        return
    challenge = challenge_of(claim, data[:head])
    for number, (image, terms) in enumerate(claim.relation.equations):
        equation = Equation()
        equation.add(decode(data[48 * number : 48 * number + 48], "a commitment"), 1)
        equation.add(points[image], challenge)
        for scalar, element in terms:
            equation.add(points[element], -responses[scalar])
        if not equation.holds():
            raise VerificationError("the equation")


def simulated(
    relation: Relation, points: list[G1Point], responses: list[int], challenge: int
) -> bytes:
    """Return the commitments that make any challenge and responses hold."""
    found = []
    for image, terms in relation.equations:
        bases = [points[element] for _, element in terms] + [points[image]]
        scalars = [responses[scalar] for scalar, _ in terms] + [-challenge % ORDER]
        found.append(encode(multiply(bases, scalars)))
    return b"".join(found)


X = (
    "ac2de2d5ca1310a43b8c5adee4632e69c117edbc6c0e9a259efbefd6e5aedc86"
    "a4185f06e74a63bfa648c1c4e8b4b444"
)
OTHER_X = (
    "b94ba65546846b439edbfc9da84c1c2d2af3d0ede8c88ec50fce2e1c3f782e93"
    "2205982683f0802a4dce313610bbb2db"
)
COMMITMENT = (
    "a21df433ede15a7e0bb0d8501e24c6c41ba6c36f387bd9961bcbc1acddda5ece"
    "0abe8338bef0293d96d924dafd80ddcb"
)
RESPONSE = "3115f5dd64d080b1cee8d9f92cbc835887a3cee2397635479bbaad745d5041d8"
SUITE = "with-sigma-proofs_Shake128_BLS12381"
LOGARITHM = Relation(((2, ((0, 1),)),), X)
BATCHABLE = Proof(f"discrete_logarithm-DSFS-{SUITE}", LOGARITHM, COMMITMENT + RESPONSE)
COMPACT = Proof(
    f"discrete_logarithm-CMPT-{SUITE}",
    LOGARITHM,
    "2b549a418dc8ac359b946ca91d869653f06058aeab9647f57e1f56251cd3e7a3"
    "49a94d7454a6bbaab6124a4573fb684983886d1d876989f5d218700c99de8195",
)
EQUAL = Relation(
    ((2, ((0, 1),)), (4, ((0, 3),))),
    "b8a52d4f929a5fc9a27b16941d102b632bac0b0661265ed04ec9e59d35480f93"
    "d4ebefc5af6a06090964444a5ed9abfdac2a3348158e801ab8f31490543b66dd"
    "f04a103dd0bc7f41194f72b575b62d08900aaf6e7ba8f3672c1b7064b19ecf96"
    "8f3af22d60210b724fc400f8b8e8547a3f82ba017d24199087b0bd1941c21f4c"
    "6afa8e1d636914790ee4b80e44908926",
)
EQUAL_BATCHABLE = Proof(
    f"dleq-DSFS-{SUITE}",
    EQUAL,
    "b13432cd2a44f3287e1ee64986f77cfd30bc6e27cb5bb245e5e0d5cd74d7ea59"
    "d64b17f3e612b0a5790bad93d77ea46291f38f62b25f78dae74200765604f560"
    "b5b0459b45404eb953e498497a94757841739571c4fa83ba5b27fb2cd9c01c20"
    "1a4ac38aaf591abd139d65113c0b2a3cb3a7ee334333c3aeb276be865bc882ff",
)
EQUAL_COMPACT = Proof(
    f"dleq-CMPT-{SUITE}",
    EQUAL,
    "54486ea1d23b4ed1d4f95ac91f40fa886d21e7a1e713995985317a4ca4527948"
    "0fc8441bb086ca503e23c9f822b929cd95300380f3c8317f1055307be6f9317f",
)
PEDERSEN = Relation(
    ((2, ((0, 0), (1, 1))),),
    "98a75ce3f191eebaed9f6a49b445f423ac6ba6dd2caad41ff2d5a05db9531f35"
    "0d9125914ddacd670af9e851d44c05239482122220076c1aa251a964e649aec8"
    "3af91fb2660b1e1dd1932353a88020c3ef09a805be4d8af09a094eaf2263695f",
    generator=0,
)
PEDERSEN_BATCHABLE = Proof(
    f"pedersen_commitment-DSFS-{SUITE}",
    PEDERSEN,
    "a35cdeff7ecb8c09e2527e98c6da38d23d8f9ac25affe1be3fec9976428f0b83"
    "7b8b9c62b8726f4ee3522e59a64e6b402e26ba8823477689798c38ba703692f5"
    "156f5d39febaa33eacf1a0ecbc2973a813e0e02d5c72770b6397cfab9315e5cf"
    "3c2402516220b2ac1ec139c9bfdc020f",
    num_scalars=2,
)
PEDERSEN_COMPACT = Proof(
    f"pedersen_commitment-CMPT-{SUITE}",
    PEDERSEN,
    "0af9ef56a2968b32d07654a7de630732e9cad9625c51f7b7975cd3056ef71021"
    "1be5f52ee640769f3fd276008102aa8ee5041f859aa509d2bf8bc35224eb2841"
    "36a8475ab594387b75de3af7e2ff51464c6b518172604308ede2dac3fc97f9bc",
    num_scalars=2,
)

ACCEPTED = {
    "batchable/F1": BATCHABLE,
    "compact/F1": COMPACT,
    "batchable/F2": EQUAL_BATCHABLE,
    "compact/F2": EQUAL_COMPACT,
    "pedersen_commitment, batchable": PEDERSEN_BATCHABLE,
    "pedersen_commitment, compact": PEDERSEN_COMPACT,
}
WRONG_SESSION = "discrete_logarithm/wrong-session"
NO_POINT, NOT_REDUCED = "is no point of the group", "is not below the group's order"


def with_commitment(commitment: str) -> Proof:
    return replace(BATCHABLE, proof=commitment + RESPONSE)


def other_session(claim: Proof) -> Proof:
    return replace(claim, tag=claim.tag.replace("discrete_logarithm", WRONG_SESSION))


def other_element(claim: Proof) -> Proof:
    return replace(claim, relation=replace(LOGARITHM, elements=OTHER_X))


def swapped_equations(claim: Proof) -> Proof:
    return replace(claim, relation=replace(EQUAL, equations=EQUAL.equations[::-1]))


REFUSED = {
    "batchable/A1": (with_commitment("2" + COMMITMENT[1:]), NO_POINT),
    "batchable/A3": (
        with_commitment(
            "9a0111ea397fe69a4b1ba7b6434bacd764774b84f38512bf6730d2a0f6b0f624"
            "1eabfffeb153ffffb9feffffffffaaaf"
        ),
        NO_POINT,
    ),
    "batchable/A4": (with_commitment("c" + "0" * 95), "the equation"),
    "batchable/A5": (with_commitment("8" + "0" * 95), NO_POINT),
    "batchable/A6": (with_commitment("8" + "0" * 94 + "1"), NO_POINT),
    "batchable/B1": (
        replace(
            BATCHABLE,
            proof=COMMITMENT + "a5039d308e6dfdfa0222b201365e5b5ddb6172e5397491469bbaad735d5041d9",
        ),
        NOT_REDUCED,
    ),
    "compact/B2": (
        replace(
            COMPACT,
            proof="9f424194b766297dcece44b127286e59441dfcb1ab94a3f47e1f56241cd3e7a4"
            + COMPACT.proof[64:],
        ),
        NOT_REDUCED,
    ),
    "batchable/C1": (replace(BATCHABLE, proof=BATCHABLE.proof + "00"), "the length"),
    "batchable/C2": (replace(BATCHABLE, proof=BATCHABLE.proof[:-2]), "the length"),
    "compact/C1": (replace(COMPACT, proof=COMPACT.proof + "00"), "the length"),
    "compact/C2": (replace(COMPACT, proof=COMPACT.proof[:-2]), "the length"),
    "compact/D1": (replace(COMPACT, proof="00" * 64), "the challenge"),
    "batchable/F1b": (other_session(BATCHABLE), "the equation"),
    "compact/F1b": (other_session(COMPACT), "the challenge"),
    "batchable/F2b": (swapped_equations(EQUAL_BATCHABLE), "the equation"),
    "compact/F2b": (swapped_equations(EQUAL_COMPACT), "the challenge"),
    "batchable/F3": (other_element(BATCHABLE), "the equation"),
    "compact/F3": (other_element(COMPACT), "the challenge"),
    "compact/F4": (
        replace(
            COMPACT,
            proof="4db5f29ea248a1ad0a3c952da4f772d6c79feaa1fb574a09cd526ecdf4feacef" + RESPONSE,
        ),
        "the challenge",
    ),
    "batchable/F4b": (
        replace(
            BATCHABLE,
            proof="b87d072b8238866651b08da8276e9ea30125617a5ac1b7fcb6934f43bdfed513"
            "4624ffe8040caccc46560bd101c64888" + COMPACT.proof[64:],
        ),
        "the equation",
    ),
    "batchable/H1": (replace(BATCHABLE, proof=BATCHABLE.proof[:-1] + "9"), "the equation"),
    "batchable/H2": (with_commitment(encode(G1Point()).hex()), "the equation"),
    "compact/H3": (
        replace(COMPACT, proof=COMPACT.proof[:63] + "4" + COMPACT.proof[64:]),
        "the challenge",
    ),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_the_vectors_accept_holds(name: str) -> None:
    verify(ACCEPTED[name])


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_vectors_refuse_is_refused_for_the_reason_that_they_name(name: str) -> None:
    claim, reason = REFUSED[name]
    assert claim not in ACCEPTED.values()
    with pytest.raises(VerificationError, match=reason):
        verify(claim)


def test_the_relations_are_serialised_as_in_the_vectors() -> None:
    """The beginning and end of F1's instance, written out."""
    head = "010000000100000002000000" + "00" * 31 + "01010000000000000001000000"
    assert LOGARITHM.to_bytes().hex() == head + "00" * 31 + "01" + X
