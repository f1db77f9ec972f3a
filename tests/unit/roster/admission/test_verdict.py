"""All checks together, and what is signed."""

import shutil
from pathlib import Path

import pytest
import torch

from paris_ray.artifacts import canonical_json
from paris_ray.bundle import Bundle, load_bundle
from paris_ray.errors import BundleError
from paris_ray.folders import Folder
from paris_ray.identity import Identity
from paris_ray.model_folder.admissions import parse_admission
from paris_ray.roster.admission.page import verdict_page
from paris_ray.roster.admission.verdict import (
    Candidate,
    examine,
    open_panel,
    read_candidate,
    sign_verdict,
)
from paris_ray.run import EXPERT_WEIGHTS, MODEL_CONFIG
from tests.admission_panels import changed, held_out, look, panel, specialist, write_expert

NAMES = [
    "form",
    "held-out losses",
    "agreement with the others",
    "drawings",
    "copies of training pictures",
    "planted triggers",
]


@pytest.fixture
def identity(tmp_path: Path) -> Identity:
    return Identity.create(tmp_path / "me")


def test_an_honest_expert_is_admitted_and_the_verdict_says_what_was_not_checked(
    tiny_bundle: Bundle, identity: Identity
) -> None:
    honest, told = panel(tiny_bundle, specialist(0)), []
    findings = examine(honest, look, num_words=20, on_check=told.append)
    assert [check.name for check in findings.checks] == NAMES
    assert tuple(told) == findings.checks
    outcomes = [check.outcome for check in findings.checks]
    assert outcomes == ["passed"] * 4 + ["not checked", "passed"]
    candidate = Candidate(honest.candidate, {MODEL_CONFIG: "0" * 64, EXPERT_WEIGHTS: "1" * 64})
    signed = sign_verdict(findings, candidate, honest, None, identity)
    admission, key = parse_admission(canonical_json(signed.to_json()), "it")
    assert key == identity.public_key
    assert admission.outcome == "admitted"
    assert (admission.cluster, admission.weights_sha256) == (0, "1" * 64)
    assert [check.name for check in admission.checks] == NAMES
    page = verdict_page(admission, key, findings.pictures, "by nobody").decode()
    assert "admitted" in page
    assert "docs/admission.md" in page
    assert "by nobody" in page
    assert page.count("<img") == 1


def test_weights_that_are_not_finite_end_the_examination(
    tiny_bundle: Bundle, identity: Identity
) -> None:
    broken = changed(specialist(0), lambda e: e.final_layer.linear.bias.fill_(torch.nan))
    findings = examine(panel(tiny_bundle, broken), look, num_words=20)
    assert [check.outcome for check in findings.checks] == ["flagged"]
    candidate = Candidate(broken, {MODEL_CONFIG: "0" * 64, EXPERT_WEIGHTS: "1" * 64})
    signed = sign_verdict(findings, candidate, panel(tiny_bundle, broken), None, identity)
    admission, key = parse_admission(canonical_json(signed.to_json()), "it")
    assert admission.outcome == "flagged"
    assert b"flagged" in verdict_page(admission, key, findings.pictures, None)


@pytest.mark.parametrize("index", [-1, 4])
def test_an_index_is_one_of_an_expert_or_the_next(tiny_bundle: Bundle, index: int) -> None:
    candidate = Candidate(specialist(0), {})
    with pytest.raises(BundleError, match=f"index={index} is not allowed: 0 to 2 replaces"):
        open_panel(candidate, index, tiny_bundle, held_out(tiny_bundle), seed=0)


def test_a_replacement_has_one_neighbour_less_than_one_more(tiny_bundle: Bundle) -> None:
    def neighbours(index: int) -> list[int]:
        rows = held_out(tiny_bundle)
        return list(
            open_panel(Candidate(specialist(0), {}), index, tiny_bundle, rows, 0).neighbours
        )

    assert neighbours(1) == [0, 2]
    assert neighbours(3) == [0, 1, 2]


def test_a_bundle_of_one_expert_is_too_small(single_bundle_path: Path, tiny_bundle: Bundle) -> None:
    bundle = load_bundle(str(single_bundle_path))
    with pytest.raises(BundleError, match="1 experts to compare with: 2 are needed"):
        open_panel(Candidate(specialist(0), {}), 1, bundle, held_out(tiny_bundle), seed=0)


def test_a_candidate_is_read_as_hostile_files_are(tiny_bundle: Bundle, tmp_path: Path) -> None:
    write_expert(specialist(0), tmp_path / "it")
    candidate = read_candidate(str(tmp_path / "it"), tiny_bundle)
    assert candidate.digests[EXPERT_WEIGHTS] == Folder(tmp_path / "it").sha256(EXPERT_WEIGHTS)
    weights = tmp_path / "it" / EXPERT_WEIGHTS
    shutil.copy(weights, tmp_path / "weights")
    weights.write_bytes((tmp_path / "weights").read_bytes()[:-4])
    with pytest.raises(BundleError, match="is damaged"):
        read_candidate(str(tmp_path / "it"), tiny_bundle)
    weights.unlink()
    weights.symlink_to(tmp_path / "weights")
    with pytest.raises(BundleError, match="is a link that leaves the folder"):
        read_candidate(str(tmp_path / "it"), tiny_bundle)


def test_a_candidate_of_other_latents_is_refused(tiny_bundle: Bundle, tmp_path: Path) -> None:
    write_expert(specialist(0, text_embed_dim=8), tmp_path)
    with pytest.raises(BundleError, match="text_embed_dim=8, the bundle's experts have 16"):
        read_candidate(str(tmp_path), tiny_bundle)
