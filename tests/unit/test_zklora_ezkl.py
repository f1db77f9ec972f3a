"""EZKL beside our own scheme, as the benchmark compares them: its holes are closed."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paris_ray import zklora
from paris_ray.errors import ParisError, VerificationError
from paris_ray.zklora.fixed_point import Int16, Int64, QuantisedModule, evaluate
from tests.benchmarks.ezkl_backend import (
    PROOF_BYTES,
    BindingEzkl,
    EzklCommitment,
    EzklOpening,
)

pytest.importorskip("ezkl")
pytest.importorskip("onnx")

D_IN, R, D_OUT = 16, 2, 16
CONTEXT = b"a session"
LARGEST = 2**15 - 1
LOWEST = -(2**15)  # allowed in rows, not in weights


def module_of(d_in: int, r: int, d_out: int, seed: int = 0) -> QuantisedModule:
    rng = np.random.default_rng(seed)
    a, b = (
        rng.integers(-LARGEST, LARGEST, shape, np.int16, endpoint=True)
        for shape in ((d_in, r), (r, d_out))
    )
    return QuantisedModule(a, b, 20, 20)


def rows_of(module: QuantisedModule, count: int) -> tuple[Int16, Int64]:
    rng = np.random.default_rng(count)
    x = rng.integers(LOWEST, LARGEST, (count, module.d_in), np.int16, endpoint=True)
    return x, evaluate(module, x)


def two_parties(folder: Path, d_in: int, r: int, d_out: int) -> tuple[BindingEzkl, BindingEzkl]:
    """Return a contributor and a verifier who share nothing but the verifier's SRS."""
    verifier, contributor = BindingEzkl(folder / "verifier"), BindingEzkl(folder / "contributor")
    shutil.copy(verifier.create_srs(d_in, r, d_out), folder / "contributor")
    return contributor, verifier


@pytest.fixture(scope="module")
def ezkl_parties(tmp_path_factory: pytest.TempPathFactory) -> tuple[BindingEzkl, BindingEzkl]:
    return two_parties(tmp_path_factory.mktemp("ezkl"), D_IN, R, D_OUT)


@pytest.fixture(scope="module", params=["zero knowledge", "ezkl"])
def parties(
    request: pytest.FixtureRequest, ezkl_parties: tuple[BindingEzkl, BindingEzkl]
) -> tuple[Any, Any]:
    if request.param == "ezkl":
        return ezkl_parties
    return zklora, zklora


@pytest.fixture(scope="module")
def ezkl_proof(ezkl_parties: tuple[BindingEzkl, BindingEzkl]) -> tuple[EzklCommitment, bytes]:
    """An honest proof for three rows of the module with seed 0."""
    contributor, _ = ezkl_parties
    module = module_of(D_IN, R, D_OUT)
    commitment, opening = contributor.commit(module)
    return commitment, contributor.prove(opening, *rows_of(module, 3), CONTEXT)


@pytest.mark.parametrize("rows", [1, 20])
def test_an_honest_proof_holds_for_its_rows_and_context_alone(
    parties: tuple[Any, Any], rows: int
) -> None:
    contributor, verifier = parties
    module = module_of(D_IN, R, D_OUT)
    commitment, opening = contributor.commit(module)
    x, y = rows_of(module, rows)
    proof = contributor.prove(opening, x, y, CONTEXT)
    verifier.verify(commitment, x, y, CONTEXT, proof)

    other_x, other_y = x.copy(), y.copy()
    other_x[-1, 3] ^= 1
    other_y[-1, 3] += 1
    for claim in (
        (commitment, other_x, y, CONTEXT, proof),
        (commitment, x, other_y, CONTEXT, proof),
        (commitment, -x, -y, CONTEXT, proof),
        (commitment, x[::-1] if rows > 1 else 2 * x, y, CONTEXT, proof),
        (commitment, x[:0], y[:0], CONTEXT, proof),
        (commitment, x, y.astype(np.float64), CONTEXT, proof),
        (commitment, x, y, b"another session", proof),
        (commitment, x, y, CONTEXT, proof[:-1]),
        (commitment, x, y, CONTEXT, proof + b"\0"),
        (commitment, x, y, CONTEXT, b""),
        (replace(commitment, d_out=D_OUT - 1), x, y, CONTEXT, proof),
    ):
        with pytest.raises(VerificationError):
            verifier.verify(*claim)


def test_another_module_does_not_pass_under_the_commitment(
    parties: tuple[Any, Any],
) -> None:
    contributor, verifier = parties
    pinned, _ = contributor.commit(module_of(D_IN, R, D_OUT))
    other = module_of(D_IN, R, D_OUT, seed=1)
    x, y = rows_of(other, 3)
    commitment, opening = contributor.commit(other)
    proof = contributor.prove(opening, x, y, CONTEXT)
    verifier.verify(commitment, x, y, CONTEXT, proof)
    with pytest.raises(VerificationError):
        verifier.verify(pinned, x, y, CONTEXT, proof)


def test_wrong_outputs_are_not_even_proved(
    parties: tuple[Any, Any],
) -> None:
    contributor, _ = parties
    module = module_of(D_IN, R, D_OUT)
    x, y = rows_of(module, 2)
    _, opening = contributor.commit(module)
    with pytest.raises(ParisError, match="nothing to prove"):
        contributor.prove(opening, x, y + 1, CONTEXT)


def test_a_guess_of_the_weights_can_be_checked_with_ezkl_and_not_with_ours(
    parties: tuple[Any, Any],
) -> None:
    contributor, _ = parties
    module = module_of(D_IN, R, D_OUT)
    first, second = (contributor.commit(module)[0] for _ in range(2))
    assert (first == second) == (contributor is not zklora)


def test_the_pinned_point_cannot_be_pasted_over_other_weights(
    ezkl_parties: tuple[BindingEzkl, BindingEzkl],
) -> None:
    contributor, verifier = ezkl_parties
    pinned, _ = contributor.commit(module_of(D_IN, R, D_OUT))
    other = module_of(D_IN, R, D_OUT, seed=1)
    x, y = rows_of(other, 3)
    # The challenge is that of the pinned commitment: only the weights' column is another.
    proof = contributor.prove(EzklOpening(other, pinned), x, y, CONTEXT)
    with pytest.raises(VerificationError, match="other weights"):
        verifier.verify(pinned, x, y, CONTEXT, proof)
    pasted = pinned.point + proof[len(pinned.point) :]
    with pytest.raises(VerificationError, match="does not hold"):
        verifier.verify(pinned, x, y, CONTEXT, pasted)


def test_every_part_of_an_ezkl_proof_counts(
    ezkl_parties: tuple[BindingEzkl, BindingEzkl], ezkl_proof: tuple[EzklCommitment, bytes]
) -> None:
    _, verifier = ezkl_parties
    commitment, proof = ezkl_proof
    x, y = rows_of(module_of(D_IN, R, D_OUT), 3)
    verifier.verify(commitment, x, y, CONTEXT, proof)
    for word in range(PROOF_BYTES // 32):
        for changed in (b"\xff" * 32, _plus_one(proof, word)):
            forged = proof[: 32 * word] + changed + proof[32 * (word + 1) :]
            with pytest.raises(VerificationError):
                verifier.verify(commitment, x, y, CONTEXT, forged)


def _plus_one(proof: bytes, word: int) -> bytes:
    value = int.from_bytes(proof[32 * word : 32 * (word + 1)], "big")
    return (value + 1).to_bytes(32, "big")


def test_a_proof_is_worth_nothing_under_another_verifiers_srs(
    ezkl_proof: tuple[EzklCommitment, bytes], tmp_path: Path
) -> None:
    stranger = BindingEzkl(tmp_path)
    stranger.create_srs(D_IN, R, D_OUT)
    commitment, proof = ezkl_proof
    x, y = rows_of(module_of(D_IN, R, D_OUT), 3)
    with pytest.raises(VerificationError):
        stranger.verify(commitment, x, y, CONTEXT, proof)


@pytest.mark.parametrize(
    ("d_in", "r", "d_out"), [(5, 1, 3), (1, 4, 7), (40, 3, 40), (20, 2, 20), (1, 1, 2)]
)
def test_odd_shapes_and_extreme_values(d_in: int, r: int, d_out: int, tmp_path: Path) -> None:
    contributor, verifier = two_parties(tmp_path, d_in, r, d_out)
    extreme = QuantisedModule(
        np.full((d_in, r), LARGEST, np.int16), np.full((r, d_out), -LARGEST, np.int16), 0, 0
    )
    empty = QuantisedModule(extreme.a, np.zeros((r, d_out), np.int16), 0, 0)  # untrained: B = 0
    x = np.full((2, d_in), LOWEST, np.int16)
    for module in (extreme, empty, module_of(d_in, r, d_out)):
        commitment, opening = contributor.commit(module)
        y = evaluate(module, x)
        verifier.verify(commitment, x, y, CONTEXT, contributor.prove(opening, x, y, CONTEXT))


def test_parameters_are_the_verifiers_and_are_made_once(tmp_path: Path) -> None:
    contributor = BindingEzkl(tmp_path)
    module = module_of(D_IN, R, D_OUT)
    with pytest.raises(ParisError, match="verifier makes it"):
        contributor.commit(module)
    path = contributor.create_srs(D_IN, R, D_OUT)
    made = path.read_bytes()
    _, opening = contributor.commit(module)
    contributor.prove(opening, *rows_of(module, 1), CONTEXT)
    files = set(tmp_path.iterdir())
    assert contributor.create_srs(D_IN, R, D_OUT) == path
    contributor.commit(module)
    # Nor is anything left of the weights.
    assert set(tmp_path.iterdir()) == files == {path, tmp_path / f"keys_{D_IN}_{R}_{D_OUT}"}
    assert path.read_bytes() == made


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((1, 1, 1), "does not commit to all weights"),
        ((0, 1, 4), "at least 1"),
        ((2**18, 4, 2**18), "weights are not allowed"),
        ((2**18 + 1, 1, 1), "widths at most"),
        ((2**16, 3, 2**18), "rows is not allowed"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    sizes: tuple[int, int, int], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ParisError, match=message):
        BindingEzkl(tmp_path).create_srs(*sizes)
    assert not list(tmp_path.iterdir())


def test_without_the_extra_the_error_names_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "ezkl", None)
    with pytest.raises(ParisError, match=r"pip install 'paris_ray\[ezkl\]'"):
        BindingEzkl(tmp_path)
