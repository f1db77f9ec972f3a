"""One writer an artefact: real processes that hold, die, and race for a lock, on both storages."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from paris_ray import run_lock
from paris_ray.errors import ArtifactError, LockError
from paris_ray.folders import Folder
from paris_ray.run_lock import Claim, locked
from tests.s3_server import BUCKET, s3_server
from tests.serve.waiting import wait_until

REPOSITORY = Path(__file__).resolve().parents[2]
HOLD = """
import sys, time
from paris_ray import run_lock
from paris_ray.folders import Folder
run_lock.HEARTBEAT_S = 0.1
with run_lock.locked(Folder(sys.argv[1]), sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""
FOLLOW = """
import signal, sys, time
from paris_ray import run_lock
from paris_ray.folders import Folder
from paris_ray.errors import LockError
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
run_lock.HEARTBEAT_S = 0.1
try:
    with run_lock.locked(Folder(sys.argv[1]), sys.argv[1]) as held:
        print("held", flush=True)
        while True:
            held.check()
            time.sleep(0.05)
except LockError as error:
    print(error)
"""
RACE = """
import sys
from pathlib import Path
from paris_ray import run_lock
from paris_ray.folders import Folder
from paris_ray.errors import LockError
run_lock.HEARTBEAT_S, run_lock.POLL_S = 0.01, 0.005
inside, won = Path(sys.argv[2]), 0
for _ in range(30):
    try:
        with run_lock.locked(Folder(sys.argv[1]), sys.argv[1]):
            inside.touch(exist_ok=False)
            won += 1
            inside.unlink()
    except LockError:
        pass
print(won)
"""


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield f"s3://{BUCKET}"


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    if request.param == "local":
        return Folder(tmp_path / "run")
    return Folder(f"{request.getfixturevalue('bucket')}/{tmp_path.name}")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(run_lock, "POLL_S", 0.05)


def start(code: str, *arguments: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)


@contextmanager
def holder(folder: Folder) -> Iterator["subprocess.Popen[str]"]:
    """A process that holds the lock."""
    with start(HOLD, folder.uri) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def claims_in(folder: Folder) -> list[str]:
    return folder.files()


def elsewhere() -> Claim:
    """The claim of a process of another machine, of which nothing can be known."""
    return Claim(user="eve", host="gpu-7", pid=os.getpid(), machine="other", begun_at=time.time())


def leave(folder: Folder, claim: Claim) -> None:
    folder.write_json("left.json", asdict(claim))


def test_a_second_job_is_refused_and_told_who_has_the_folder(folder: Folder) -> None:
    with holder(folder) as process:
        words = (
            rf"{re.escape(folder.uri)} is in use by .+ on .+ \(process {process.pid}, begun \d+ s"
        )
        with pytest.raises(LockError, match=words), locked(folder, folder.uri):
            pytest.fail("two hold it")
        assert len(claims_in(folder)) == 1


def test_the_lock_of_a_killed_job_is_taken_over_at_once(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("DEAD_S", "STORE_DEAD_S"):  # it is not waited for
        monkeypatch.setattr(run_lock, name, float("inf"))
    with holder(folder) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(claims_in(folder)) == 1
    with locked(folder, folder.uri):
        assert len(claims_in(folder)) == 1
    assert claims_in(folder) == []
    assert f"(process {process.pid}, " in caplog.text


def test_of_another_machine_a_job_is_dead_if_it_shows_no_sign_of_life(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "DEAD_S" if folder.is_local else "STORE_DEAD_S", 0.3)
    leave(folder, elsewhere())
    with locked(folder, folder.uri):
        assert "left.json" not in claims_in(folder)


def test_of_another_machine_a_job_lives_if_it_renews_its_claim(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with holder(folder):
        monkeypatch.setattr(run_lock, "_this_machine", lambda: "another")
        with pytest.raises(LockError, match="is in use by"), locked(folder, folder.uri):
            pytest.fail("two hold it")


def test_a_job_whose_lock_was_taken_over_is_told_so_though_no_signal_reaches_it(
    folder: Folder,
) -> None:
    """As drivers of `ray job submit`, where SIGINT is blocked, and background jobs of a shell."""
    with start(FOLLOW, folder.uri) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            leave(folder, replace(elsewhere(), took_over=claims_in(folder)))
            told = process.stdout.read()
        finally:
            process.kill()
    assert "another one took it over" in told


def test_a_job_that_does_not_ask_is_told_at_the_end(folder: Folder) -> None:
    def work() -> None:
        with locked(folder, folder.uri):
            leave(folder, replace(elsewhere(), took_over=claims_in(folder)))
            time.sleep(1)

    with pytest.raises(LockError, match="another one took it over"):
        work()


def test_a_claim_that_is_withdrawn_while_it_is_watched_was_no_dead_ones(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    leave(folder, elsewhere())
    sleep = time.sleep

    def withdraw(seconds: float) -> None:
        sleep(seconds)
        folder.delete("left.json")

    monkeypatch.setattr(run_lock.time, "sleep", withdraw)
    with locked(folder, folder.uri):
        (own,) = claims_in(folder)
        assert folder.read_json(own)["took_over"] == []
    assert "taking over" not in caplog.text


def test_a_process_that_proc_hides_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    claim = Claim.own()
    monkeypatch.setattr(run_lock, "_process", lambda _pid: None)
    assert not claim.is_gone()
    assert not replace(claim, pid=1).is_gone(), "nor does it matter whose it is"


def test_a_process_that_has_the_number_of_another_is_not_that() -> None:
    claim = Claim.own()
    assert claim.started is not None
    assert not claim.is_gone()
    assert replace(claim, started=claim.started - 1).is_gone()
    assert not replace(claim, started=None).is_gone(), "it is not known"


@pytest.mark.parametrize("error", [RuntimeError("a store's own"), OSError("no route")])
def test_a_lock_that_could_not_be_renewed_is_renewed_later(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    folder = Folder(tmp_path)
    with locked(folder, folder.uri):
        (own,) = claims_in(folder)

        def fail(*_arguments: object) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(Folder, "write_json", fail)
            wait_until(lambda: f"was not renewed: {error}" in caplog.text)
        renewed = folder.read_json(own)["renewed"]
        wait_until(lambda: folder.read_json(own)["renewed"] > renewed)


def test_a_dead_ones_claim_that_another_deleted_first_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Folder(tmp_path)
    held = run_lock.HeldLock(folder, "own.json", folder.uri)
    for error in (FileNotFoundError(), ArtifactError("gone")):

        def delete(_folder: Folder, _name: str, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(Folder, "delete", delete)
        held.take_over(["left.json"])


def test_an_interrupt_by_the_user_stays_one(folder: Folder) -> None:
    with pytest.raises(KeyboardInterrupt), locked(folder, folder.uri):
        raise KeyboardInterrupt
    assert claims_in(folder) == []


def test_of_processes_that_race_for_a_dead_ones_lock_never_two_have_it(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "run")
    with holder(folder) as process:
        process.kill()
        process.wait()
    racers = [start(RACE, folder.uri, tmp_path / "inside") for _ in range(4)]
    won = [racer.communicate()[0] for racer in racers]
    assert [racer.returncode for racer in racers] == [0] * len(racers)
    assert sum(map(int, won)) > 0
    assert claims_in(folder) == []


@pytest.mark.parametrize(
    "change",
    [
        {"pid": None},
        {"pid": 0},
        {"pid": 1 << 40},
        {"begun_at": "today"},
        {"begun_at": float("1e300")},
        {"took_over": "all"},
        {"renewed": 1.5},
        {"user": ["eve"]},
    ],
)
def test_what_is_no_lock_is_named(tmp_path: Path, change: dict[str, object]) -> None:
    folder = Folder(tmp_path)
    folder.write_json("left.json", asdict(elsewhere()) | change)
    words = rf"left.json is not a lock \({next(iter(change))}=.*delete it"
    with pytest.raises(ArtifactError, match=words), locked(folder, folder.uri):
        pytest.fail("it is held")


@pytest.mark.parametrize("document", [[], {}, {"pid": 1}])
def test_nor_is_a_document_without_the_fields(tmp_path: Path, document: object) -> None:
    folder = Folder(tmp_path)
    folder.write_json("left.json", document)
    with pytest.raises(ArtifactError, match="is not a lock"), locked(folder, folder.uri):
        pytest.fail("it is held")


def test_what_later_versions_add_to_a_claim_is_passed_over() -> None:
    claim = elsewhere()
    assert Claim.parse(asdict(claim) | {"queue": "night"}) == claim
