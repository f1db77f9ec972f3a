"""Verdicts that are kept with a bundle: of these very weights, signed, small, copied along."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from paris_ray.artifacts import MANIFEST, VerifiedFolder, publish
from paris_ray.bundle import load_bundle
from paris_ray.errors import BundleError
from paris_ray.export import write_bundle
from paris_ray.folders import Folder
from paris_ray.identity import Identity
from paris_ray.model_card import with_roster
from paris_ray.model_folder.admissions import (
    ADMISSIONS,
    KIND,
    MAX_BYTES,
    Admission,
    AdmissionCheck,
    AdmissionReading,
    admission_document,
    admission_names,
    parse_admission,
    read_admission,
    read_verdict,
    require_admitted,
    verdict_name,
)
from paris_ray.model_folder.history import EXPORTED
from paris_ray.run import BUNDLE, EXPERT_WEIGHTS, MODEL_CONFIG
from paris_ray.signatures import SignedDocument

READING = AdmissionReading(name="own_loss", measure="loss", value=0.5, limit=1.0, detail="t = 1.0")
PASSED = AdmissionCheck(name="held-out losses", outcome="passed", note="", readings=[READING])
LEFT_OUT = AdmissionCheck(name="copies", outcome="not checked", note="no shard", readings=[])
FLAGGED = AdmissionCheck(
    name="triggers", outcome="flagged", note="", readings=[replace(READING, value=None)]
)


@pytest.fixture(scope="module")
def identity(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    return Identity.create(tmp_path_factory.mktemp("identity"))


@pytest.fixture
def bundle_path(tiny_bundle_path: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_bundle_path, tmp_path / "bundle")
    return tmp_path / "bundle"


def admission(bundle: Path, index: int, **changes: Any) -> Admission:
    expert = Folder(bundle / f"expert_{index}")
    facts: dict[str, Any] = {
        "outcome": "admitted",
        "cluster": index,
        "config_sha256": expert.sha256(MODEL_CONFIG),
        "weights_sha256": expert.sha256(EXPERT_WEIGHTS),
        "bundle": None,
        "checks": [PASSED, LEFT_OUT],
        "seed": 7,
        "software": "paris_ray 0",
        "made_at": "2026-11-30T12:00:00Z",
    }
    return Admission(**facts | changes)


def verdict(identity: Identity, stated: Admission | dict[str, Any]) -> bytes:
    document = stated if isinstance(stated, dict) else admission_document(stated)
    return json.dumps(SignedDocument.sign(KIND, document, identity).to_json()).encode()


def attach(payload: bytes, bundle: Path, index: int) -> None:
    Folder(bundle / ADMISSIONS).write(verdict_name(index), payload)
    republish(bundle)


def republish(path: Path) -> None:
    (path / MANIFEST).unlink(missing_ok=True)
    publish(Folder(path), BUNDLE, config_digest="", parents={}, facts={})


def test_a_verdict_is_attached_read_copied_and_told(
    bundle_path: Path, identity: Identity, tmp_path: Path
) -> None:
    payload = verdict(identity, admission(bundle_path, 1))
    attach(payload, bundle_path, 1)
    bundle = load_bundle(str(bundle_path))
    assert list(bundle.admissions) == [1]
    assert bundle.admissions[1].admission == admission(bundle_path, 1)
    write_bundle(bundle, Folder(tmp_path / "copy"), model_card="# copy\n")
    copied = tmp_path / "copy" / ADMISSIONS / "expert_1.json"
    assert copied.read_bytes() == payload
    card = with_roster("# copy\n", EXPORTED, bundle.admissions, None)
    row = f"| 1 | admitted | copies | 2026-11-30T12:00:00Z | {identity.public_key} |"
    assert row in card.splitlines()


def test_a_bundle_without_verdicts_has_none(tiny_bundle_path: Path) -> None:
    assert load_bundle(str(tiny_bundle_path)).admissions == {}


def test_a_verdict_stays_with_its_weights_when_experts_are_renumbered(
    bundle_path: Path, identity: Identity
) -> None:
    attach(verdict(identity, admission(bundle_path, 1, cluster=5)), bundle_path, 1)
    assert load_bundle(str(bundle_path)).admissions[1].admission.cluster == 5


@pytest.mark.parametrize("with_manifest", [True, False])
def test_a_verdict_on_other_weights_is_refused_when_the_bundle_is_opened(
    bundle_path: Path, identity: Identity, with_manifest: bool
) -> None:
    payload = verdict(identity, admission(bundle_path, 0))
    Folder(bundle_path / ADMISSIONS).write("expert_1.json", payload)
    (bundle_path / MANIFEST).unlink()
    if with_manifest:
        republish(bundle_path)
    with pytest.raises(BundleError, match=r"expert_1\.json is the verdict on another expert"):
        load_bundle(str(bundle_path))


def test_a_flagged_expert_may_not_enter_but_its_verdict_can_be_read(
    bundle_path: Path, identity: Identity
) -> None:
    stated = admission(bundle_path, 1, outcome="flagged", checks=[PASSED, FLAGGED])
    payload = verdict(identity, stated)
    expert = VerifiedFolder(Folder(bundle_path / "expert_1"), None)
    with pytest.raises(BundleError, match="it: the expert may not enter: flagged by triggers"):
        require_admitted(payload, "it", expert)
    assert read_admission(payload, "it", expert).admission == stated


@pytest.mark.parametrize("name", ["expert_3.json", "expert_01.json", "a.json", "expert_0.json/x"])
def test_no_other_file_stands_beside_verdicts(bundle_path: Path, name: str) -> None:
    Folder(bundle_path / ADMISSIONS).write(name, b"{}")
    republish(bundle_path)
    with pytest.raises(BundleError, match=r"is not allowed: expert_K.json with K from 0 to 2"):
        load_bundle(str(bundle_path))


def test_numbers_in_names_are_of_ascii_digits(tmp_path: Path) -> None:
    Folder(tmp_path).write("expert_1\u0661.json", b"{}")  # ARABIC-INDIC DIGIT ONE
    with pytest.raises(BundleError, match=r"is not allowed: expert_K\.json with K from 0 to 19"):
        admission_names(Folder(tmp_path), 20)


def changed(path: Path, **changes: Any) -> dict[str, Any]:
    return admission_document(admission(path, 1)) | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"more": 1}, "more: Unexpected keyword"),
        ({"cluster": "1"}, "cluster: Input should be a valid integer"),
        ({"weights_sha256": "A" * 64}, "weights_sha256: String should match"),
        ({"made_at": "now | <b>"}, "made_at: String should match"),
        ({"made_at": "\u0662026-11-30T12:00:00Z"}, "made_at: String should match"),
        ({"checks": []}, "checks: List should have at least 1"),
        ({"outcome": "flagged"}, "outcome='flagged', but its checks say otherwise"),
        ({"software": "x" * 301}, "software: String should have at most 300"),
        ({"checks": [{"name": "x"}]}, r"checks\.0\.outcome"),
    ],
)
def test_a_strangers_verdict_is_read_strictly(
    tiny_bundle_path: Path, identity: Identity, changes: dict[str, Any], message: str
) -> None:
    payload = verdict(identity, changed(tiny_bundle_path, **changes))
    with pytest.raises(BundleError, match=message):
        parse_admission(payload, "it")


def test_what_is_not_signed_not_json_or_too_long_is_no_verdict(
    tiny_bundle_path: Path, identity: Identity
) -> None:
    payload = verdict(identity, admission(tiny_bundle_path, 1))
    for damaged in (
        payload.replace(b"admitted", b"flagged!"),
        payload.replace(b'"kind": "admission"', b'"kind": "manifest"'),
        b"[]",
        b"{",
        b"[" * 10_000,
    ):
        with pytest.raises(BundleError, match="it is no verdict"):
            parse_admission(damaged, "it")
    with pytest.raises(BundleError, match=f"at most {MAX_BYTES}"):
        parse_admission(payload + b" " * MAX_BYTES, "it")


def test_a_verdict_that_is_too_long_is_not_read(
    bundle_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = VerifiedFolder(Folder(bundle_path / ADMISSIONS), None)
    attach(b" " * MAX_BYTES, bundle_path, 1)
    assert len(read_verdict(part, "expert_1.json")) == MAX_BYTES
    attach(b" " * (MAX_BYTES + 1), bundle_path, 1)
    monkeypatch.setattr(VerifiedFolder, "read", refuse_long(VerifiedFolder.read))
    with pytest.raises(BundleError, match=rf"expert_1\.json has {MAX_BYTES + 1} bytes, at most"):
        load_bundle(str(bundle_path))


def refuse_long(read: Callable[[VerifiedFolder, str], bytes]) -> Callable[..., bytes]:
    def checked(part: VerifiedFolder, name: str) -> bytes:
        assert not part.folder.uri.endswith(ADMISSIONS), "it was read"
        return read(part, name)

    return checked
