"""Outcomes of trials, left by one process for the next; each process here is a real one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from paris_ray import trials

TRIAL = """
from paris_ray import trials
print(trials.outcome({kind!r}, lambda: print("tried") or {found}))
"""


def told_by_a_process(folder: Path, kind: str = "a", *, found: bool = True, **more: str) -> str:
    """Return what a process says that tries something, if it does."""
    command = [sys.executable, "-c", TRIAL.format(kind=kind, found=found)]
    environment = os.environ | {"TMPDIR": str(folder), trials.SHARED: "1"} | more
    return subprocess.run(
        command, env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def test_what_one_process_found_out_the_next_one_knows(tmp_path: Path) -> None:
    assert told_by_a_process(tmp_path) == "tried\nTrue\n"
    assert told_by_a_process(tmp_path) == "True\n"
    assert told_by_a_process(tmp_path, found=False) == "True\n"
    assert told_by_a_process(tmp_path, "b", found=False) == "tried\nFalse\n"
    assert told_by_a_process(tmp_path, "b") == "False\n"
    assert told_by_a_process(tmp_path, ONEDNN_MAX_CPU_ISA="AVX2") == "tried\nTrue\n"


@pytest.mark.parametrize("content", [b"", b"y"])
def test_half_an_outcome_is_none(tmp_path: Path, content: bytes) -> None:
    told_by_a_process(tmp_path)
    (file,) = (tmp_path / f"paris_ray-{os.getuid()}" / "trials").iterdir()
    file.write_bytes(content)
    assert told_by_a_process(tmp_path) == "tried\nTrue\n"
    assert file.read_bytes() == b"yes"


def test_whoever_is_in_the_way_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / f"paris_ray-{os.getuid()}").touch()
    for _ in range(2):
        assert told_by_a_process(tmp_path) == "tried\nTrue\n"


def test_a_folder_where_others_write_is_not_believed(tmp_path: Path) -> None:
    folder = tmp_path / f"paris_ray-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    for _ in range(2):
        assert told_by_a_process(tmp_path) == "tried\nTrue\n"
    assert not list(folder.iterdir())


def test_a_process_that_was_not_told_to_shares_nothing() -> None:
    assert trials.SHARED not in os.environ
    assert trials.outcome("a", lambda: True)
    assert not trials.outcome("a", lambda: False)
