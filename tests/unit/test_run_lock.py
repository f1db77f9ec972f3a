"""One writer a run folder: real processes that hold, die, and race for a lock, on both storages."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from s3_server import BUCKET, s3_server

from paris_ray import run_lock
from paris_ray.artifacts import Folder
from paris_ray.errors import ArtifactError, LockError
from paris_ray.run_lock import Claim, locked

REPOSITORY = Path(__file__).resolve().parents[2]
HOLD = """
import sys, time
from paris_ray import run_lock
from paris_ray.artifacts import Folder
run_lock.HEARTBEAT_S = 0.1
with run_lock.locked(Folder(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
RACE = """
import sys
from pathlib import Path
from paris_ray import run_lock
from paris_ray.artifacts import Folder
from paris_ray.errors import LockError
run_lock.HEARTBEAT_S, run_lock.POLL_S = 0.01, 0.005
inside, won = Path(sys.argv[2]), 0
for _ in range(30):
    try:
        with run_lock.locked(Folder(sys.argv[1])):
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
    return (folder / "locks").files()


def elsewhere() -> Claim:
    """The claim of a process of another machine, of which nothing can be known."""
    return Claim(user="eve", host="gpu-7", pid=os.getpid(), machine="other", begun_at=time.time())


def leave(folder: Folder, claim: Claim) -> None:
    (folder / "locks").write_json("left.json", asdict(claim))


def test_a_second_job_is_refused_and_told_who_has_the_folder(folder: Folder) -> None:
    with holder(folder) as process:
        words = (
            rf"{re.escape(folder.uri)} is in use by .+ on .+ \(process {process.pid}, begun \d+ s"
        )
        with pytest.raises(LockError, match=words), locked(folder):
            pytest.fail("two hold it")
        assert len(claims_in(folder)) == 1


def test_the_lock_of_a_killed_job_is_taken_over_at_once(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(run_lock, "DEAD_S", float("inf"))  # it is not waited for
    with holder(folder) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(claims_in(folder)) == 1
    with locked(folder):
        assert len(claims_in(folder)) == 1
    assert claims_in(folder) == []
    assert f"(process {process.pid}, " in caplog.text


def test_of_another_machine_a_job_is_dead_if_it_shows_no_sign_of_life(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "DEAD_S", 0.3)
    leave(folder, elsewhere())
    with locked(folder):
        assert "left.json" not in claims_in(folder)


def test_of_another_machine_a_job_lives_if_it_renews_its_claim(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with holder(folder):
        monkeypatch.setattr(run_lock, "_this_machine", lambda: "another")
        with pytest.raises(LockError, match="is in use by"), locked(folder):
            pytest.fail("two hold it")


def test_a_job_whose_lock_was_taken_over_stops(folder: Folder) -> None:
    def work() -> None:
        with locked(folder):
            leave(folder, replace(elsewhere(), took_over=claims_in(folder)))
            time.sleep(60)

    with pytest.raises(LockError, match="another one took it over"):
        work()


def test_an_interrupt_by_the_user_stays_one(folder: Folder) -> None:
    with pytest.raises(KeyboardInterrupt), locked(folder):
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


@pytest.mark.parametrize("change", [lambda d: d.pop("pid"), lambda d: d.update(more=1)])
def test_what_is_no_lock_is_named(
    tmp_path: Path, change: Callable[[dict[str, object]], object]
) -> None:
    folder = Folder(tmp_path)
    leave(folder, elsewhere())
    document = json.loads((folder / "locks").read("left.json"))
    change(document)
    (folder / "locks").write_json("left.json", document)
    words = r"locks/left.json is not a lock .*delete it"
    with pytest.raises(ArtifactError, match=words), locked(folder):
        pytest.fail("it is held")
