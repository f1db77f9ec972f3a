"""Artefacts: what exists to readers, what is refused, and what is verified."""

import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from paris_ray.artifacts import (
    MANIFEST,
    PROGRESS,
    RESOLVED_CONFIG,
    TIMINGS,
    Manifest,
    VerifiedFolder,
    find_finished,
    open_finished,
    publish,
    read_manifest,
)
from paris_ray.errors import ArtifactError
from paris_ray.folders import Folder

IDENTITY: dict[str, Any] = {"config_digest": "c", "parents": {"corpus": "p"}}


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    folder = Folder(tmp_path / "artefact")
    folder.write("data.bin", b"payload")
    folder.write("deep/er/more.bin", b"more")
    return folder


def publish_things(folder: Folder, **changes: Any) -> Manifest:
    return publish(folder, "things", **IDENTITY | {"facts": {"rows": 2}} | changes)


def test_a_folder_without_manifest_does_not_exist(folder: Folder) -> None:
    assert find_finished(folder, "things", **IDENTITY) is None
    with pytest.raises(ArtifactError, match=f"no finished things at .* no {MANIFEST}"):
        read_manifest(folder, "things")
    manifest = publish_things(folder)
    assert find_finished(folder, "things", **IDENTITY) == manifest
    assert set(manifest.files) == {"data.bin", "deep/er/more.bin"}


@pytest.mark.parametrize(
    ("identity", "fragment"),
    [
        (IDENTITY | {"config_digest": "other"}, "another configuration"),
        (IDENTITY | {"parents": {"corpus": "other"}}, "another corpus"),
        (IDENTITY | {"parents": {}}, "another corpus"),
        (IDENTITY | {"parents": {"corpus": "p", "encoders": "e"}}, "another encoders"),
    ],
)
def test_another_identity_is_refused(
    folder: Folder, identity: dict[str, Any], fragment: str
) -> None:
    publish_things(folder)
    with pytest.raises(ArtifactError, match=fragment):
        find_finished(folder, "things", **identity)


def test_the_digest_is_of_the_result_not_of_the_run(folder: Folder) -> None:
    first = publish_things(folder)
    for name in (TIMINGS, RESOLVED_CONFIG, f"deep/{TIMINGS}"):
        folder.write(name, b"differs from run to run")
    assert publish_things(folder, facts={"rows": 3}).digest == first.digest
    folder.write("data.bin", b"Payload")
    assert publish_things(folder).digest != first.digest


def test_publishing_ends_progress(folder: Folder) -> None:
    folder.write_json(PROGRESS, {"step": 3})
    publish_things(folder)
    assert not folder.exists(PROGRESS)


def leave_folder(path: Path) -> None:
    """Leave what a killed writer leaves that had temporary files of its own."""
    path.mkdir()
    (path / ".tmpOfALibrary").write_bytes(b"half")


def leave_file(path: Path) -> None:
    """Leave what a killed writer of an earlier version left."""
    path.write_bytes(b"half")


def test_temporary_files_are_never_listed(folder: Folder, tmp_path: Path) -> None:
    for left in ("data.bin.tmp-123", "deep/late.bin.tmp-9"):
        leave_folder(tmp_path / "artefact" / left)
    for left in ("data.bin.tmp-124", "deep/late.bin.tmp-8"):  # as earlier versions left
        (tmp_path / "artefact" / left).write_bytes(b"half")
    assert folder.files() == ["data.bin", "deep/er/more.bin"]
    assert set(publish_things(folder).files) == {"data.bin", "deep/er/more.bin"}


def test_writing_leaves_no_temporary_file(folder: Folder, tmp_path: Path) -> None:
    folder.write("data.bin", b"new")
    assert folder.read("data.bin") == b"new"
    assert [path.name for path in (tmp_path / "artefact").glob("*.tmp*")] == []


def test_a_write_that_fails_leaves_the_old_file_alone(folder: Folder, tmp_path: Path) -> None:
    def write_half() -> None:
        with folder.writing("data.bin") as path:
            path.write_bytes(b"half")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        write_half()
    assert {path.name for path in (tmp_path / "artefact").iterdir()} == {"data.bin", "deep"}
    assert folder.read("data.bin") == b"payload"


NUMBERS = np.random.default_rng(0).random(10_000)
WRITERS: dict[str, Callable[[Path], object]] = {
    "bytes": lambda path: path.write_bytes(NUMBERS.tobytes()),
    "parquet": lambda path: pq.write_table(pa.table({"numbers": NUMBERS}), path),
    "safetensors": lambda path: save_file({"numbers": NUMBERS}, path),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_an_error_that_names_the_folder(folder: Folder, writer: str) -> None:
    def fill() -> None:
        with folder.writing("data.bin") as path:
            WRITERS[writer](path)

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(ArtifactError) as caught:
            fill()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    message = str(caught.value)
    assert message.startswith(f"{folder.uri}/data.bin cannot be written: ")
    assert message.endswith(f"; make room in {folder.uri} and run again: what is finished is kept")
    assert folder.read("data.bin") == b"payload"
    assert folder.files() == ["data.bin", "deep/er/more.bin"]


def test_a_place_that_may_not_be_written_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match=r"file/run/x cannot be written: [^;]*$"):
        Folder(tmp_path / "file" / "run").write("x", b"")


@pytest.mark.parametrize("leave", [leave_file, leave_folder])
@pytest.mark.parametrize("name", ["data.bin", "data[1]*.bin"])
def test_what_a_killed_writer_left_is_removed_by_the_next(
    folder: Folder, tmp_path: Path, name: str, leave: Callable[[Path], None]
) -> None:
    same = f"{name}.tmp-{os.getpid()}"  # in containers numbers come again
    for other in (f"{name}.tmp-1", f"{name}.tmp-22", same, "data1.bin.tmp-1", f"{name}2.tmp-1"):
        leave(tmp_path / "artefact" / other)
    folder.write(name, b"new")
    assert folder.read(name) == b"new"
    found = {path.name for path in (tmp_path / "artefact").glob("*.tmp-*")}
    assert found == {"data1.bin.tmp-1", f"{name}2.tmp-1"}


@pytest.mark.parametrize("remote", [False, True])
def test_a_file_that_is_not_there_cannot_be_read(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, remote: bool
) -> None:
    monkeypatch.setattr(Folder, "is_local", not remote)
    with folder.reading("data.bin") as path:
        assert path.read_bytes() == b"payload"
    with pytest.raises(ArtifactError, match=r"absent\.bin does not exist"):
        folder.reading("absent.bin").__enter__()


def test_who_holds_a_lock_in_a_folder_that_is_cleared_keeps_it(folder: Folder) -> None:
    folder.write("locks/claim.json", b"{}")
    folder.clear()
    assert folder.files() == ["locks/claim.json"]


def test_an_absent_folder_has_no_files(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "nowhere")
    assert folder.files() == []
    assert not folder.exists()
    with pytest.raises(ArtifactError, match="nowhere/x does not exist"):
        folder.read("x")


@pytest.mark.parametrize("name", ["data.bin", "deep/er/more.bin"])
def test_flipped_bytes_are_refused(folder: Folder, name: str) -> None:
    publish_things(folder)
    source = open_finished(folder, "things")
    intact = source.read(name)
    folder.write(name, bytes([intact[0] ^ 1]) + intact[1:])
    with pytest.raises(ArtifactError, match=f"{name} does not have the digest"):
        source.read(name)


def test_parts_are_verified_too(folder: Folder) -> None:
    publish_things(folder)
    part = open_finished(folder, "things").part("deep")
    assert part.read("er/more.bin") == b"more"
    folder.write("deep/er/more.bin", b"less")
    with pytest.raises(ArtifactError, match="digest"):
        part.local_path(["er/more.bin"])


def test_files_that_nobody_published_are_refused(folder: Folder) -> None:
    publish_things(folder)
    folder.write("late.bin", b"late")
    with pytest.raises(ArtifactError, match="digest"):
        open_finished(folder, "things").read("late.bin")
    assert VerifiedFolder(folder, None).read("late.bin") == b"late"


@pytest.mark.parametrize("name", ["plain", "with space"])
def test_a_file_uri_works_like_a_path(tmp_path: Path, name: str) -> None:
    by_uri, by_path = Folder((tmp_path / name).as_uri()), Folder(tmp_path / name)
    by_uri.write("a/b.bin", b"payload")
    assert by_uri.is_local
    assert by_path.read("a/b.bin") == (by_uri / "a").read("b.bin") == b"payload"
    assert by_uri.files() == by_path.files() == ["a/b.bin"]
    publish_things(by_uri)
    source = open_finished(by_uri, "things")
    assert (source.local_path(["a/b.bin"]) / "a" / "b.bin").read_bytes() == b"payload"


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"kind": "others"}, "holds 'others', expected 'things'"),
        ({"schema_version": 99}, "schema_version 99"),
        ({"surprise": 1}, "is not a manifest"),
        ({"files": None}, "is not a manifest"),
        ({"files": {"data.bin": 1}}, "is not a manifest"),
        ({"parents": {"corpus": float("nan")}}, "is not a manifest"),
        ({"config_digest": ["c"]}, "is not a manifest"),
    ],
)
def test_other_manifests_are_refused(
    folder: Folder, changes: dict[str, Any], fragment: str
) -> None:
    publish_things(folder)
    folder.write_json(MANIFEST, folder.read_json(MANIFEST) | changes)
    with pytest.raises(ArtifactError, match=fragment):
        read_manifest(folder, "things")


@pytest.mark.parametrize("payload", [b"{", b"[]", b"{}", b"\xff\xfe"])
def test_damaged_manifests_are_refused(folder: Folder, payload: bytes) -> None:
    folder.write(MANIFEST, payload)
    with pytest.raises(ArtifactError, match=MANIFEST):
        read_manifest(folder, "things")


@pytest.mark.parametrize("text", ["[" * 100_000, "[" * 65 + "]" * 65, "9" * 5_000, "{", "\ud800"])
def test_hostile_json_is_an_error_that_names_the_file(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(ArtifactError, match=r"config\.json is not JSON"):
        Folder(tmp_path).read_json("config.json")


def test_a_folder_in_the_place_of_a_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    with pytest.raises(ArtifactError, match="weights cannot be read"):
        Folder(tmp_path).read("weights")


@pytest.mark.parametrize("remote", [False, True])
def test_a_file_is_verified_in_pieces_wherever_it_is(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, remote: bool
) -> None:
    payload = bytes(range(256)) * 20_000
    folder.write("deep/large.bin", payload)
    publish_things(folder)
    part = open_finished(folder, "things").part("deep")
    if remote:
        monkeypatch.setattr(Folder, "is_local", False)
    path = part.verified_file("large.bin")
    assert path.read_bytes() == payload
    assert path.is_relative_to(folder.uri) is not remote
    monkeypatch.undo()
    folder.write("deep/large.bin", payload[:-1] + b"x")
    if remote:
        monkeypatch.setattr(Folder, "is_local", False)
    with pytest.raises(ArtifactError, match=r"deep/large.bin does not have the digest"):
        part.verified_file("large.bin")
    with pytest.raises(ArtifactError, match=r"deep/absent.bin does not exist"):
        part.verified_file("absent.bin")
    with pytest.raises(ArtifactError, match="digest"):
        part.local_path(["er/more.bin", "large.bin"])
