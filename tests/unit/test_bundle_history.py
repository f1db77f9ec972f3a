"""The history of a bundle: what is written can be read, what was changed or made up is refused."""

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
from paris_ray.folders import Folder
from paris_ray.identity import Identity
from paris_ray.model_folder.history import (
    EXPORTED,
    FILE,
    MAX_BYTES,
    MAX_ENTRIES,
    Entry,
    History,
    Rows,
    origins,
    read_history,
    write_history,
)
from paris_ray.run import BUNDLE


def digest(number: int) -> str:
    return f"{number:064x}"


CHANGED = {"at": "2026-11-30T12:00:00Z", "router": digest(9)}
ADDED = Entry(
    event="added",
    expert=3,
    parent=digest(1),
    weights_after=digest(30),
    rows_after=Rows(shard=digest(31), count=50, whose="Museum of Cats, CC BY 4.0"),
    **CHANGED,
)
RETIRED = Entry(event="retired", expert=1, parent=digest(2), weights_before=digest(10), **CHANGED)
REPLACED = Entry(
    event="replaced",
    expert=2,
    parent=digest(3),
    weights_before=digest(30),
    rows_before=ADDED.rows_after,
    weights_after=digest(40),
    rows_after=Rows(shard=digest(41), count=7),
    **CHANGED,
)
HISTORY: History = (*EXPORTED, ADDED, RETIRED, REPLACED)
WEIGHTS = [None, digest(20), digest(40)]


def read(folder: Path, payload: bytes, weights: list[str | None] = WEIGHTS) -> History:
    (folder / FILE).write_bytes(payload)
    return read_history(VerifiedFolder(Folder(folder), None), weights, None)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert read(tmp_path, write_history(HISTORY)) == HISTORY
    assert origins(HISTORY, 3) == [None, None, REPLACED]


def test_a_bundle_without_one_was_exported(tiny_bundle_path: Path) -> None:
    assert not (tiny_bundle_path / FILE).exists()
    assert load_bundle(str(tiny_bundle_path)).history == EXPORTED


def test_whoever_signs_is_held_to_every_word(tmp_path: Path) -> None:
    signer = Identity.create(tmp_path / "me")
    signed = ADDED.sign(signer)
    history: History = (*EXPORTED, signed, RETIRED, REPLACED)
    assert read(tmp_path, write_history(history))[1].signed_by == signer.public_key
    assert signed.rows_after is not None
    changes: list[dict[str, Any]] = [
        {"at": "2026-11-30T12:00:01Z"},
        {"parent": digest(7)},
        {"rows_after": replace(signed.rows_after, whose="Nobody")},
        {"signed_by": Identity.create(tmp_path / "other").public_key},
        {"signature": None},
    ]
    for change in changes:
        with pytest.raises(BundleError, match=r"history.json: 1.signature is not allowed"):
            write_history((*EXPORTED, replace(signed, **change)))


def changed(number: int, **fields: Any) -> Callable[[list[Any]], None]:
    return lambda entries: entries[number].update(fields)


def without(number: int, field: str) -> Callable[[list[Any]], None]:
    return lambda entries: entries[number].pop(field)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(1, event="sold"), "1.event: Input should be 'exported', "),
        (changed(1, expert="3"), "1.expert: Input should be a valid integer"),
        (changed(1, expert=-1), "1.expert: Input should be greater than or equal to 0"),
        (changed(1, expert=2), "1.expert=2 is not allowed: there were 3"),
        (changed(2, expert=4), "2.expert=4 is not allowed: there were 4"),
        (changed(1, at="yesterday"), "1.at: String should match pattern"),
        (changed(1, router="0" * 63), "1.router: String should match pattern"),
        (changed(1, color="red"), "1.color: Unexpected keyword argument"),
        (changed(1, event="exported"), "1.event='exported' is not allowed"),
        (changed(0, event="added"), "0.event='added' is not allowed: the first is 'exported'"),
        (changed(0, at=CHANGED["at"]), "0.at is not allowed with 'exported'"),
        (without(1, "at"), "1.at is missing: 'added' needs it"),
        (without(2, "weights_before"), "2.weights_before is missing: 'retired' needs it"),
        (changed(2, weights_after=digest(5)), "2.weights_after is not allowed with 'retired'"),
        (changed(3, weights_before=digest(5)), "3.weights_before is not of expert 2"),
        (changed(3, weights_after=digest(5)), "expert 2 has other weights"),
        (lambda e: e[1]["rows_after"].update(count=0), "1.rows_after.count: Input should be"),
        (lambda e: e[1]["rows_after"].update(whose="a | b"), "1.rows_after.whose: String should"),
        (lambda e: e[1]["rows_after"].update(whose="a\nb"), "1.rows_after.whose: String should"),
        (lambda e: e.clear(), "it: List should have at least 1 item"),
        (lambda e: e.extend(e[1:2] * MAX_ENTRIES), f"at most {MAX_ENTRIES} items"),
        (lambda e: e.pop(), "expert 2 has other weights"),
        (lambda e: e.pop(2), "1.expert=3 is not allowed: there were 2"),
    ],
)
def test_a_hostile_history_is_refused_with_the_field(
    change: Callable[[list[Any]], object], message: str, tmp_path: Path
) -> None:
    entries = json.loads(write_history(HISTORY))
    change(entries)
    with pytest.raises(BundleError) as caught:
        read(tmp_path, json.dumps(entries).encode())
    assert str(caught.value).startswith(f"{tmp_path}/{FILE} is ") or FILE in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize("payload", [b"", b"{}", b"[" * 100_000, b"[null]", b"\xff"])
def test_what_is_no_history_is_refused(payload: bytes, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"history.json is damaged: "):
        read(tmp_path, payload)


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / FILE).open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(BundleError, match=f"has {1 << 40} bytes, allowed: {MAX_BYTES}"):
        read_history(VerifiedFolder(Folder(tmp_path), None), WEIGHTS, None)


def test_a_history_of_other_experts_is_not_the_bundles(
    tiny_bundle_path: Path, tmp_path: Path
) -> None:
    path = tmp_path / "bundle"
    shutil.copytree(tiny_bundle_path, path)
    digests = json.loads((path / MANIFEST).read_text())["files"]
    (path / MANIFEST).unlink()
    before = replace(RETIRED, expert=0, weights_before=digest(5))
    weights = "expert_2/diffusion_pytorch_model.safetensors"
    router = digests["router/pytorch_model.safetensors"]
    right = replace(ADDED, expert=2, weights_after=digests[weights], router=router)
    others = {
        replace(right, weights_after=digest(6)): "expert 2 has other weights",
        replace(right, router=digest(6)): "its router has other weights",
    }
    for added in (right, *others):
        (path / FILE).write_bytes(write_history((*EXPORTED, before, added)))
        publish(Folder(path), BUNDLE, config_digest="", parents={}, facts={})
        if added == right:
            assert load_bundle(str(path)).history[-1] == added
            continue
        with pytest.raises(BundleError, match=others[added]):
            load_bundle(str(path))


def test_more_experts_cannot_have_come_than_there_are(tmp_path: Path) -> None:
    payload = write_history((*EXPORTED, replace(ADDED, expert=0), ADDED))
    with pytest.raises(BundleError, match="does not lead to 1 experts, but from -1"):
        read(tmp_path, payload, [ADDED.weights_after])
