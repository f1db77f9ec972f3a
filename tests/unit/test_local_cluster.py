"""A cluster of one machine is ended by pid; tests/ray/test_quickstart.py does it with Ray."""

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

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
