"""A cluster of one machine is ended by pid; tests/ray/test_quickstart.py does it with Ray."""

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from jobs import local_cluster
from jobs.local_cluster import LocalCluster

# A head whose worker saves what it has when it is told to end, and a process that does not listen.
WORKER = """
import pathlib, signal, sys, time
def save(*_):
    pathlib.Path(sys.argv[1], "saved").touch()
    sys.exit()
signal.signal(signal.SIGTERM, save)
print(flush=True)
time.sleep(600)
"""
DEAF = "import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(600)"
HEAD = """
import subprocess, sys, time
for code in sys.argv[2:]:
    command = [sys.executable, "-c", code, sys.argv[1]]
    subprocess.Popen(command, stdout=subprocess.PIPE).stdout.readline()
print(flush=True)
time.sleep(600)
"""


def test_whatever_was_started_can_save_and_is_gone(tmp_path: Path) -> None:
    ray_folder = tmp_path / "ray"
    ray_folder.mkdir()
    head = subprocess.Popen(
        [sys.executable, "-c", HEAD, str(tmp_path), WORKER, DEAF], stdout=subprocess.PIPE
    )
    assert head.stdout is not None
    head.stdout.readline()
    cluster = LocalCluster(tmp_path)
    created = psutil.Process(head.pid).create_time()
    state = {"temp_dir": str(ray_folder), "pid": head.pid, "created": created}
    cluster.state_file.write_text(json.dumps(state))
    family = psutil.Process(head.pid).children()
    assert len(family) == 2
    assert cluster.stop()
    head.wait()
    assert (tmp_path / "saved").exists()
    assert not any(process.is_running() for process in family)
    assert not ray_folder.exists()
    assert not cluster.stop()


def start_head(folder: Path, named: Path, *children: str) -> tuple[LocalCluster, psutil.Process]:
    """Start a head whose children name a folder, as that of a cluster."""
    head = subprocess.Popen(
        [sys.executable, "-c", HEAD, str(named), *children], stdout=subprocess.PIPE
    )
    assert head.stdout is not None
    head.stdout.readline()
    process, cluster = psutil.Process(head.pid), LocalCluster(folder)
    state = {"temp_dir": str(named), "pid": head.pid, "created": process.create_time()}
    cluster.state_file.write_text(json.dumps(state))
    return cluster, process


def test_each_process_is_told_to_end_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that is both a child of the head and names its folder."""
    ray_folder = tmp_path / "ray"
    ray_folder.mkdir()
    cluster, head = start_head(tmp_path, ray_folder, WORKER)
    expected = sorted([head.pid, *(child.pid for child in head.children())])
    told: list[int] = []
    terminate = psutil.Process.terminate

    def counted(process: psutil.Process) -> None:
        told.append(process.pid)
        terminate(process)

    monkeypatch.setattr(psutil.Process, "terminate", counted)
    assert cluster.stop()
    assert sorted(told) == expected


def test_a_process_of_somebody_else_keeps_no_other_from_ending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray_folder = tmp_path / "ray"
    ray_folder.mkdir()
    cluster, head = start_head(tmp_path, ray_folder, WORKER, DEAF)
    children = head.children()
    foreign = children[0].pid
    terminate, kill = psutil.Process.terminate, psutil.Process.kill

    def refused(process: psutil.Process) -> None:
        if process.pid == foreign:
            raise psutil.AccessDenied(process.pid)
        terminate(process)

    def refused_too(process: psutil.Process) -> None:
        if process.pid == foreign:
            raise psutil.AccessDenied(process.pid)
        kill(process)

    monkeypatch.setattr(local_cluster, "STOP_TIMEOUT_S", 1)
    monkeypatch.setattr(psutil.Process, "terminate", refused)
    monkeypatch.setattr(psutil.Process, "kill", refused_too)
    try:
        assert cluster.stop()
        assert not psutil.wait_procs([head, children[1]], timeout=20)[1]
        assert children[0].is_running()
    finally:
        kill(children[0])


def test_a_stop_may_end_while_another_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = LocalCluster(tmp_path)
    cluster.state_file.write_text(json.dumps({"temp_dir": str(tmp_path / "ray")}))
    read_text = Path.read_text

    def read_last(path: Path) -> str:
        text = read_text(path)
        path.unlink()
        return text

    monkeypatch.setattr(Path, "read_text", read_last)
    assert not cluster.stop()
