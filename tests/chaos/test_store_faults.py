"""An object store that fails: a clear error or a correct recovery, and never other bytes.

pyarrow asks again for a long time, so this takes minutes; `tests/unit/test_storage_faults.py` has
the short form.
"""

import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from paris_ray.artifacts import MANIFEST, open_finished, publish, read_manifest
from paris_ray.errors import ArtifactError
from tests.faulty_store import Fault, FaultyStore, faulty_store, folder_at
from tests.long_tests import chaos
from tests.s3_server import KEY, SECRET, S3Server, s3_server

IDENTITY = {"config_digest": "c", "parents": {"corpus": "p"}, "facts": {}}
SMALL = b"small" * 1000
LARGE = np.random.default_rng(0).integers(0, 256, 24 << 20, np.uint8).tobytes()  # in parts
ROUNDS = 10  # from every second request on that fails
pytestmark = chaos
FAULTS: tuple[Fault, ...] = ("500", "503", "reset", "cut")


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def store(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyStore]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    with faulty_store(server.port) as store:
        yield store


@pytest.mark.parametrize("payload", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_written_is_there_as_a_whole_or_not(
    server: S3Server, store: FaultyStore, fault: Fault, payload: bytes
) -> None:
    """However often a request fails; and read as it was written, or not at all."""
    name = f"whole-{fault}-{len(payload)}"
    through, direct = folder_at(store.port, name), folder_at(server.port, name)
    before = b"before"
    for n in range(2, 2 + ROUNDS):
        store.never()
        direct.write("data.bin", before)
        store.every(n, fault)
        is_written = False
        with suppress(ArtifactError):
            through.write("data.bin", payload)
            is_written = True
        found = direct.read("data.bin")
        assert found == payload or (not is_written and found == before)
        store.every(n, fault)
        with suppress(ArtifactError):
            assert through.read("data.bin") == found


def test_a_store_that_is_lost_for_a_while_is_told_and_nothing_is_published(
    server: S3Server, store: FaultyStore
) -> None:
    through, direct = folder_at(store.port, "lost"), folder_at(server.port, "lost")
    through.write("data.bin", SMALL)
    store.always("500", "PUT", "POST")
    with pytest.raises(ArtifactError, match=rf"{MANIFEST} cannot be written: .*500"):
        publish(through, "things", **IDENTITY)
    assert direct.files() == ["data.bin"]
    store.always("500")
    with pytest.raises(ArtifactError, match=r"cannot be read: .*500"):
        read_manifest(through, "things")
    store.never()
    publish(through, "things", **IDENTITY)
    assert open_finished(through, "things").read("data.bin") == SMALL


@pytest.mark.parametrize("fault", FAULTS)
def test_a_download_that_fails_is_told_and_leaves_nothing(
    store: FaultyStore, fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = folder_at(store.port, f"download-{fault}")
    folder.write("data.bin", LARGE)
    publish(folder, "things", **IDENTITY)
    store.always(fault, "GET")
    with pytest.raises(ArtifactError, match=r"cannot be read"), folder.reading("data.bin"):
        pass
    assert not list(tmp_path.glob("paris_ray*"))
    store.never()
    assert open_finished(folder, "things").verified_file("data.bin").read_bytes() == LARGE


def test_two_writers_of_a_name_leave_what_one_of_them_wrote(
    server: S3Server, store: FaultyStore
) -> None:
    folders = [folder_at(port, "race") for port in (server.port, store.port)]
    payloads = [bytes([number]) * (12 << 20) for number in (1, 2)]
    store.always("slow")
    for _ in range(2):
        threads = [
            threading.Thread(target=folder.write, args=("data.bin", payload))
            for folder, payload in zip(folders, payloads, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert folders[0].read("data.bin") in payloads


def test_a_store_that_hangs_is_told(server: S3Server, store: FaultyStore) -> None:
    folder = folder_at(store.port, "hangs")
    folder.write("data.bin", SMALL)
    store.always("hang")
    with pytest.raises(ArtifactError, match=r"cannot be read"):
        folder.read("data.bin")
    store.never()
    assert folder.read("data.bin") == SMALL
