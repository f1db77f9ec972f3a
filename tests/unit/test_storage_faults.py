"""Full, read-only or damaged storage, failing stores, jumping clocks: an error of ours, or no harm.

What can be damaged is damaged on a disk and in a store. The long form is in `tests/chaos/`.
"""

import itertools
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFile

from paris_ray.artifacts import CHECKPOINT, VerifiedFolder, publish
from paris_ray.bundle import load_bundle
from paris_ray.corpora import QuarantinedRow
from paris_ray.embeddings import opened_part, part_names, read_table, to_table, write_part
from paris_ray.errors import ArtifactError, ParisError, TrainingError
from paris_ray.export import write_bundle
from paris_ray.folders import Folder
from paris_ray.pipeline.accounts import Account, write_account
from paris_ray.training.data import load_dataset
from tests.faulty_store import Fault, faulty_store, folder_at
from tests.s3_server import KEY, SECRET, S3Server, s3_server
from tests.training_shards import TRAINING, Stop, carry_on, stop_at, train, write_shard

IDENTITY = {"config_digest": "c", "parents": {"corpus": "p"}, "facts": {}}
RANDOM = np.random.default_rng(0).integers(0, 256, 1 << 20, np.uint8).tobytes()
NUMBERS = itertools.count()
SIZE = 8 << 20  # of a small disk


@contextmanager
def small_disk(path: Path, size: int = SIZE) -> Iterator[Path]:
    """A file system of its own, of a given number of bytes."""
    path.mkdir()
    if os.getuid() or not Path("/proc/self/mounts").exists():
        pytest.skip("mounting a small disk needs root")
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk") as path:
        yield path


def fill(disk: Path, left: int = 0) -> Path:
    """Leave so many bytes free; returns the file to delete to make room."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - left
        file.write(bytes(max(0, free)))
    return ballast


def write_payload(folder: Folder) -> None:
    folder.write("data.bin", RANDOM[: 64 << 10])


def write_rows(folder: Folder) -> None:
    latents = np.frombuffer(RANDOM[: 64 << 10], np.uint8).reshape(-1, 4, 4, 4)
    write_part(folder, "part-0.parquet", to_table({"latents": latents}))


def write_quarantine(folder: Folder) -> None:
    bad = [QuarantinedRow(f"{i}", "empty_image", RANDOM[i : i + 99].hex()) for i in range(999)]
    write_account(folder, "shard", Account(quarantined={"empty_image": 999}), bad)


def write_manifest(folder: Folder) -> None:
    publish(folder, "things", **IDENTITY, files={f"{i}.bin": "0" * 64 for i in range(1000)})


WRITERS: dict[str, Callable[[Folder], None]] = {
    "payload": write_payload,
    "rows": write_rows,
    "quarantine": write_quarantine,
    "manifest": write_manifest,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_keeps_what_was_there(disk: Path, writer: str) -> None:
    folder = Folder(disk / "artefact")
    folder.write("before.bin", b"before")
    ballast = fill(disk, left=8 << 10)
    with pytest.raises(ArtifactError, match=r"cannot be written: .*; make room in .*/artefact"):
        WRITERS[writer](folder)
    assert folder.files() == ["before.bin"]
    assert not list(disk.rglob("*.tmp-*"))
    ballast.unlink()
    WRITERS[writer](folder)
    assert len(folder.files()) == 2


@pytest.mark.parametrize("writer", WRITERS)
def test_a_read_only_disk_is_an_error_that_names_it(disk: Path, writer: str) -> None:
    folder = Folder(disk / "artefact")
    WRITERS[writer](folder)
    intact = {name: folder.read(name) for name in folder.files()}
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(ArtifactError, match=r"/artefact/.* cannot be written: .*[Rr]ead-only"):
        WRITERS[writer](folder)
    assert {name: folder.read(name) for name in folder.files()} == intact


@pytest.mark.parametrize("left", [0, 12 << 10, 28 << 10, 48 << 10])
def test_training_that_ran_out_of_room_goes_on_as_if_it_had_not(
    disk: Path, tmp_path: Path, left: int
) -> None:
    """Wherever the room ends: in a checkpoint, in metrics or in the weights."""
    shard = write_shard(Folder(tmp_path / "shard"), 16)
    expected = train(shard, Folder(tmp_path / "other"))
    folder = Folder(disk / "expert")
    with pytest.raises(Stop):
        train(shard, folder, on_progress=stop_at(TRAINING.checkpoint_every + 2))
    ballast = fill(disk, left=left)
    with pytest.raises(ArtifactError, match=r"cannot be written: .*; make room in"):
        train(shard, folder)
    assert folder.exists(CHECKPOINT)
    ballast.unlink()
    assert train(shard, folder, on_progress=carry_on) == expected
    assert not list(disk.rglob("*.tmp-*"))


def test_a_bundle_that_has_no_room_is_not_one(
    disk: Path, tiny_bundle_path: Path, tmp_path: Path
) -> None:
    bundle, folder = load_bundle(str(tiny_bundle_path)), Folder(disk / "bundle")
    ballast = fill(disk, left=64 << 10)
    with pytest.raises(ArtifactError, match=r"cannot be written: .*; make room in"):
        write_bundle(bundle, folder, model_card="# tiny\n")
    with pytest.raises(ParisError):
        load_bundle(folder.uri)
    ballast.unlink()
    write_bundle(bundle, folder, model_card="# tiny\n")
    load_bundle(folder.uri)


def test_columns_that_do_not_fit_into_the_temporary_folder(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = write_shard(Folder(tmp_path / "shard"), 2000)
    monkeypatch.setattr(tempfile, "tempdir", str(disk))
    fill(disk, left=8 << 10)
    with pytest.raises(TrainingError, match=r"does not fit into .*set TMPDIR"):
        load_dataset([shard])


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a client of the server has in its environment."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)


@pytest.fixture(params=["disk", "store"])
def place(request: pytest.FixtureRequest, tmp_path: Path, keys: None) -> Folder:
    """An empty folder on a disk, and in a store."""
    if request.param == "disk":
        return Folder(tmp_path / "place")
    return folder_at(request.getfixturevalue("server").port, f"place-{next(NUMBERS)}")


def test_an_upload_and_a_download_without_room_name_the_temporary_folder(
    server: S3Server, keys: None, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_at(server.port, "no-room")
    folder.write("data.bin", RANDOM)
    monkeypatch.setattr(tempfile, "tempdir", str(disk))
    ballast = fill(disk, left=64 << 10)
    with pytest.raises(ArtifactError, match=r"new.bin cannot be written: .*disk \(TMPDIR\)"):
        folder.write("new.bin", RANDOM)
    with (
        pytest.raises(ArtifactError, match=r"data.bin cannot be read: .*disk \(TMPDIR\)"),
        folder.reading("data.bin"),
    ):
        pass
    with pytest.raises(ArtifactError, match=r"data.bin cannot be read: .*disk \(TMPDIR\)"):
        VerifiedFolder(folder, None).verified_file("data.bin")
    assert folder.files() == ["data.bin"]
    ballast.unlink()
    assert VerifiedFolder(folder, None).verified_file("data.bin").read_bytes() == RANDOM


@pytest.mark.parametrize("fault", ["500", "reset"])
def test_a_store_that_fails_now_and_then_never_gives_other_bytes(
    server: S3Server, keys: None, fault: Fault
) -> None:
    payload = RANDOM * 12  # in parts
    with faulty_store(server.port) as store:
        folder = folder_at(store.port, f"now-and-then-{fault}")
        store.every(2, fault)
        folder.write("data.bin", payload)
        assert folder.read("data.bin") == payload
        assert len(store.asked) > 4


def test_an_upload_that_a_signal_interrupts_leaves_no_part(server: S3Server, keys: None) -> None:
    """As when a machine is taken away: a stream that is closed on the way would appear cut."""

    def interrupt(*_: object) -> None:
        raise Stop

    folder, payload = folder_at(server.port, "interrupted"), RANDOM * 32
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with faulty_store(server.port) as store:
            store.always("slow")
            for wait_s in (0.3, 0.6, 0.9):
                folder.write("data.bin", b"before")
                signal.setitimer(signal.ITIMER_REAL, wait_s)
                with suppress(Stop):
                    folder_at(store.port, "interrupted").write("data.bin", payload)
                    signal.pause()
                assert folder.read("data.bin") in (b"before", payload)
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_damaged_rows_are_never_read(place: Folder, damage: str) -> None:
    """Of every byte of the pages: compression alone would pass some changes on."""
    shard = write_shard(place, 64)
    name = part_names(shard)[0]
    intact, rows = shard.read(name), read_table(shard, ["latents"])
    begin = len(intact) - 8 - int.from_bytes(intact[-8:-4], "little")
    for place in (
        range(4, begin, 29 if shard.is_local else 997)
        if damage == "flip"
        else (0, begin, len(intact) - 9)
    ):
        changed = {
            "flip": intact[:place] + bytes([intact[place] ^ 16]) + intact[place + 1 :],
            "cut": intact[:place],
            "empty": b"",
        }[damage]
        shard.write(name, changed)
        try:
            found = read_table(shard, ["latents"])
        except ArtifactError:
            continue
        assert found.equals(rows)  # what changed is of another column, or of none


def test_a_damaged_footer_is_an_error_of_ours(tmp_path: Path) -> None:
    """Or the file says something else that is right for itself: footers have no checksum."""
    shard = write_shard(Folder(tmp_path), 64)
    name = part_names(shard)[0]
    intact = shard.read(name)
    begin = len(intact) - 8 - int.from_bytes(intact[-8:-4], "little")
    errors = []
    for place in range(begin, len(intact)):
        changed = intact[:place] + bytes([intact[place] ^ 16]) + intact[place + 1 :]
        shard.local_path.joinpath(name).write_bytes(changed)
        try:
            assert read_table(shard, ["latents"]).column_names == ["latents"]
        except ArtifactError as error:
            errors.append(str(error))
    assert any("is damaged" in error for error in errors)
    assert any("has no column latents" in error for error in errors)


def test_a_column_that_is_not_there_is_told(tmp_path: Path) -> None:
    shard = write_shard(Folder(tmp_path), 2)
    with pytest.raises(ArtifactError, match=rf"{part_names(shard)[0]} has no column other"):
        read_table(shard, ["latents", "other"])


def test_a_store_that_fails_while_rows_are_read_has_no_damaged_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = Folder(f"memory://place-{next(NUMBERS)}")
    write_rows(folder)

    def fail(*_: object) -> bytes:
        raise OSError("500 Internal Server Error")

    def read_and_fail() -> None:
        with opened_part(folder, "part-0.parquet") as file:
            monkeypatch.setattr(MemoryFile, "read", fail)
            file.read()

    with pytest.raises(ArtifactError, match=r"part-0.parquet cannot be read: 500 Internal"):
        read_and_fail()


def test_a_file_that_is_gone_is_deleted(place: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another deleted it after it was looked up."""
    place.write("other.bin", b"")
    monkeypatch.setattr(Folder, "exists", lambda *_: True)
    place.delete("data.bin")


def test_a_damaged_checkpoint_is_not_resumed_from(place: Folder, tmp_path: Path) -> None:
    shard, folder = write_shard(Folder(tmp_path / "shard"), 16), place
    with pytest.raises(Stop):
        train(shard, folder, on_progress=stop_at(TRAINING.checkpoint_every + 2))
    intact = folder.read(CHECKPOINT)
    header = 8 + int.from_bytes(intact[:8], "little")
    for place in (header, (header + len(intact)) // 2, len(intact) - 1):
        folder.write(CHECKPOINT, intact[:place] + bytes([intact[place] ^ 1]) + intact[place + 1 :])
        with pytest.raises(ArtifactError, match=rf"{CHECKPOINT} is damaged"):
            train(shard, folder)
    for end in (0, 7, header, len(intact) - 1):
        folder.write(CHECKPOINT, intact[:end])
        with pytest.raises(ArtifactError, match=rf"{CHECKPOINT} is damaged"):
            train(shard, folder)


def test_nothing_depends_on_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = write_shard(Folder(tmp_path / "shard"), 16)
    expected = train(shard, Folder(tmp_path / "other"))
    now, looks = time.time(), itertools.count()
    monkeypatch.setattr(time, "time", lambda: now - 86_400 * (next(looks) % 7))
    folder = Folder(tmp_path / "expert")
    with pytest.raises(Stop):
        train(shard, folder, on_progress=stop_at(TRAINING.checkpoint_every + 2))
    assert train(shard, folder) == expected
    assert next(looks) > 0
