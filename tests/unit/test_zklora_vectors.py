"""Two verifiers that share no code judge every vector alike, and as the vector says."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paris_ray.errors import VerificationError
from paris_ray.zklora import curve
from paris_ray.zklora.commitment import ModuleCommitment
from paris_ray.zklora.proof import verify, verify_named
from tests import second_verifier, zklora_vectors
from tests.curve_oracle import compress_G1, hash_to_G1

GENERATORS, VECTORS = second_verifier.load(zklora_vectors.VECTORS)
STAGES = {
    "statement": "must be int16|must be int64|x has|the commitment has",
    "length": "bytes, .* are expected",
    "scalar": "is not below the group's order",
    "point": "is no point of the group",
    "equation": "the proof of the module does not hold",
}


def array(values: list[list[int]], dtype: type[np.signedinteger]) -> np.ndarray:
    try:
        return np.array(values, dtype)
    except OverflowError:
        return np.array(values, object)


def claim_of(vector: dict[str, Any]) -> tuple[Any, ...]:
    a, b = (tuple(bytes.fromhex(point) for point in vector[name]) for name in "ab")
    commitment = ModuleCommitment(vector["d_in"], vector["r"], vector["d_out"], a, b)
    x, y = array(vector["x"], np.int16), array(vector["y"], np.int64)
    return commitment, x, y, *(bytes.fromhex(vector[name]) for name in ("context", "proof"))


def verdict(vector: dict[str, Any]) -> str:
    try:
        verify(*claim_of(vector))
    except VerificationError as error:
        (stage,) = (stage for stage, text in STAGES.items() if re.search(text, str(error)))
        return stage
    return "accept"


def test_our_verifier_judges_every_vector_as_it_says() -> None:
    judged = {vector["name"]: verdict(vector) for vector in VECTORS}
    assert judged == {vector["name"]: vector["verdict"] for vector in VECTORS}


def test_the_second_verifier_judges_every_vector_as_it_says() -> None:
    judged = {vector["name"]: second_verifier.verdict(vector, GENERATORS) for vector in VECTORS}
    assert judged == {vector["name"]: vector["verdict"] for vector in VECTORS}


def test_a_batch_of_all_accepted_vectors_holds_and_names_the_one_that_does_not() -> None:
    accepted = {v["name"]: claim_of(v) for v in VECTORS if v["verdict"] == "accept"}
    verify_named(accepted)
    bad = next(v for v in VECTORS if v["verdict"] == "equation")
    with pytest.raises(VerificationError, match=f"^the proof of {re.escape(bad['name'])} does not"):
        verify_named(accepted | {bad["name"]: claim_of(bad)})


def test_the_file_is_made_again_byte_for_byte() -> None:
    assert zklora_vectors.make() == zklora_vectors.VECTORS.read_text()


def test_there_are_enough_and_every_refused_one_has_an_accepted_base() -> None:
    accepted = {vector["name"] for vector in VECTORS if vector["verdict"] == "accept"}
    refused = [vector for vector in VECTORS if vector["verdict"] != "accept"]
    assert len(accepted) >= 20
    assert len(refused) >= 100
    assert {vector["verdict"] for vector in refused} == STAGES.keys()
    assert {vector["base"] for vector in refused} <= accepted
    assert all(vector["reason"] for vector in refused)
    written = json.loads(zklora_vectors.VECTORS.read_text())["vectors"]
    assert len(written) == len(VECTORS)  # no name twice


def test_the_generators_of_the_file_are_hashed_to_the_curve_by_a_third_library() -> None:
    names = {"H": ["blinding"], "g": ["value"], "Q": ["form"]}
    names["G"] = [f"generator {index}" for index in range(len(GENERATORS["G"]))]
    for letter, strings in names.items():
        for string, point in zip(strings, GENERATORS[letter], strict=True):
            hashed = hash_to_G1(string.encode(), curve.DOMAIN, hashlib.sha256)
            assert point == compress_G1(hashed).to_bytes(48, "big"), string


def test_the_second_verifier_imports_nothing_but_the_standard_library() -> None:
    text = Path(second_verifier.__file__).read_text()
    imported = set(re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE))
    assert imported == {"hashlib", "json", "struct", "sys", "functools", "pathlib"}


def test_masks_come_from_the_system_again_once_the_file_is_made() -> None:
    zklora_vectors.make()
    drawn = [zklora_vectors.Stream("masks").below(curve.ORDER), curve.random_scalar()]
    assert len({*drawn, curve.random_scalar()}) == 3
