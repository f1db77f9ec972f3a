"""The main job in small: a Ray of its own, `ray job submit`, `serve deploy`, HTTP, stop by pid."""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from jobs.local_cluster import LocalCluster, free_port
from tests.ray.ports import protections

pytestmark = [pytest.mark.ray, pytest.mark.serve]

REPOSITORY = Path(__file__).resolve().parents[2]


def test_quickstart_draws_over_http_and_stops_what_it_started(
    tmp_path: Path, shapes_corpus: Path, tiny_overrides: list[str]
) -> None:
    run_dir, port = tmp_path / "quick", free_port()
    cluster = LocalCluster(run_dir)
    # The tests' own Ray has another token, in this environment, which must not be picked up.
    environment = dict(os.environ)
    command = [sys.executable, "-m", "jobs.quickstart", f"--port={port}", *tiny_overrides]
    try:
        result = subprocess.run(
            [*command, f"run_dir={run_dir}"],
            cwd=REPOSITORY,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
        for printed in (
            "samples.png",
            "report.html",
            "Ray dashboard",
            "caption recall",
            "never shown",
            "stop",
        ):
            assert printed in result.stdout
        assert (run_dir / "samples.png").read_bytes().startswith(b"\x89PNG")
        served = yaml.safe_load((run_dir / "serve.yaml").read_text())
        assert served["applications"][0]["args"]["colocated"] is False
        _check_http(port, cluster)
        head = cluster._process()
        assert head is not None
        family = [head, *head.children(recursive=True)]
        assert _listening_on(family) <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
        found, documented = protections(family), _documented_protections()
        assert found <= documented.keys()
        assert found >= {row for row, port in documented.items() if "if free" not in port}
    finally:
        stopped = subprocess.run(
            [sys.executable, "-m", "jobs.stop", str(run_dir)],
            cwd=REPOSITORY,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    assert stopped.stdout == "stopped\n"
    assert not [process for process in family if _is_alive(process)]


def _check_http(port: int, cluster: LocalCluster) -> None:
    body = {"prompt": "a red circle number 1", "seed": 3, "n": 2}
    response = httpx.post(f"http://127.0.0.1:{port}/v1/images/generations", json=body, timeout=60)
    assert response.status_code == 200
    assert len(response.json()["data"]) == 2
    # The Ray behind it refuses whoever has no token.
    assert httpx.get(f"{cluster.dashboard_url}/api/jobs/").status_code == 401


def _listening_on(family: list[psutil.Process]) -> set[str]:
    """Return the addresses that are listened on.

    Serve's replicas stand apart: Ray opens their internal port on all interfaces, and asks for the
    token there.
    """
    found = set()
    for process in family:
        with suppress(psutil.NoSuchProcess):  # Ray ends workers that are idle
            if "ServeReplica" not in "".join(process.cmdline()):
                connections = process.net_connections("tcp")
                found |= {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}
    return found


def _documented_protections() -> dict[tuple[str, str], str]:
    """Return process, answer and port of the rows of the table of ports in docs/operations.md."""
    text = (REPOSITORY / "docs/operations.md").read_text()
    table = text.partition("| process | port |")[2].partition("\n\n")[0]
    rows = [[cell.strip("` ") for cell in line.split("|")] for line in table.splitlines()[2:]]
    return {(process, answer): port for _, process, port, answer, *_ in rows}


def _is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
