"""Classes of fault that audits of such systems found: each has a test here, or this says where.

- Unabsorbed messages: the statement here, a prover's messages in `test_zklora_proof.py`, provers
  whose challenges forget one among the vectors (`tests/zklora_vectors.py`).
- Missing range checks: scalars, points, blinders and rows in `test_zklora_proof.py` and the
  vectors, weights and outputs in `test_zklora_fixed_point.py`.
- Multiplicity: empty sets and errors that cancel in `test_zklora_proof.py`; here, one proof for two
  modules.
- Other spellings (signs, infinities, moduli) and points outside of the group: the vectors, and
  `test_zklora_cfrg.py`.
- Order and length: the vectors; here, a folding of another shape.
- A context used again: the vectors and `test_zklora_transcript.py`. A mask used again:
  `test_zklora_zero_knowledge.py`.
- Checks that are compiled out: here.
"""

import ast
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from paris_ray import zklora
from paris_ray.errors import VerificationError
from paris_ray.zklora.commitment import commit
from paris_ray.zklora.curve import BLINDING, encode
from paris_ray.zklora.fiat_shamir import FiatShamir
from paris_ray.zklora.fixed_point import QuantisedModule, evaluate, quantise
from paris_ray.zklora.proof import Claim, Proof, _equation, _start, prove, verify_named
from paris_ray.zklora.transcript import proof_context

D_IN, R, D_OUT, ROWS = 4, 2, 3, 2
CORE = ("field", "curve", "fiat_shamir", "commitment", "folding", "proof", "fixed_point")


def module_of(d_in: int = D_IN) -> QuantisedModule:
    rng = np.random.default_rng(0)
    return quantise(rng.normal(size=(d_in, R)), rng.normal(size=(R, D_OUT)))


def rows_of(module: QuantisedModule) -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(1).integers(-(2**15), 2**15, (ROWS, module.d_in), np.int16)
    return x, evaluate(module, x)


def claim_of(d_in: int = D_IN) -> Claim:
    commitment, opening = commit(module_of(d_in))
    x, y = rows_of(opening.module)
    return commitment, x, y, b"session", prove(opening, x, y, b"session")


def test_the_first_challenge_depends_on_every_part_of_the_statement(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Flip one bit of each message: context, sizes, every point, the digests of x and y."""
    commitment, x, y, context, _ = claim_of()
    said: list[list[bytes]] = [[]]

    class Flipping(FiatShamir):
        """Counts the messages of a statement, and flips a bit of one of them."""

        flipped = -1

        def absorb(self, name: str, *sent: bytes) -> None:
            count = len(said[-1])
            said[-1].extend(sent)
            if 0 <= self.flipped - count < len(sent):
                changed = sent[self.flipped - count]
                start = self.flipped - count
                flipped = bytes([changed[0] ^ 1]) + changed[1:]
                sent = (*sent[:start], flipped, *sent[start + 1 :])
            super().absorb(name, *sent)

    monkeypatch.setattr("paris_ray.zklora.proof.FiatShamir", Flipping)
    challenges = {_start(commitment, x, y, context).challenge("alpha")}
    count = len(said[0])
    assert count == 1 + 4 + 2 * R + 2  # context, sizes, points, digests
    for number in range(count):
        said.append([])
        monkeypatch.setattr(Flipping, "flipped", number)
        challenges.add(_start(commitment, x, y, context).challenge("alpha"))
    assert len(challenges) == count + 1


def test_one_proof_does_not_serve_two_modules_of_the_same_weights() -> None:
    """Same commitment, rows and session: the name of the module is in what is hashed."""
    commitment, opening = commit(module_of())
    x, y = rows_of(opening.module)
    digest = "0f" * 32
    contexts = {
        name: proof_context(digest, digest, digest, name, digest) for name in ("first", "second")
    }
    proof = prove(opening, x, y, contexts["first"])
    claims = {name: (commitment, x, y, context, proof) for name, context in contexts.items()}
    with pytest.raises(VerificationError, match=r"^the proof of second does not hold$"):
        verify_named(claims)


def test_a_folding_of_another_shape_is_refused() -> None:
    """As an object: bytes of another length are no proof at all."""
    commitment, x, y, context, proof = claim_of(130)
    messages = Proof.from_bytes(proof, commitment)
    honest, point = messages.folded, encode(BLINDING)
    for folded in (
        replace(honest, left=(*honest.left, point), right=(*honest.right, point)),
        replace(honest, left=(*honest.left, point)),
        replace(honest, remainder=honest.remainder[:-1]),
        replace(honest, remainder=(*honest.remainder, 0)),
    ):
        bad, oracle = replace(messages, folded=folded), _start(commitment, x, y, context)
        with pytest.raises(VerificationError, match="the folding has"):
            _equation(commitment, x, y, bad, oracle)


@pytest.mark.parametrize("module", CORE)
def test_no_check_of_the_core_goes_away_under_python_o(module: str) -> None:
    tree = ast.parse((Path(zklora.__file__).parent / f"{module}.py").read_text())
    assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)]
