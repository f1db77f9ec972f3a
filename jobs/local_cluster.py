"""A Ray head on this machine that belongs to one run folder, and is stopped by its own pid.

`ray stop` matches process names on the whole machine, so it is never used here.
"""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil
import requests

from paris_ray.artifacts import RAY_HEAD
from paris_ray.errors import ParisError
from paris_ray.storage import replacing

LOOPBACK = "127.0.0.1"
# Ray swaps a loopback --node-ip-address for the machine's own address, and opens its ports on that
# or on all interfaces. Despite its name this switch works on Linux too: every port, Prometheus
# included, then listens on loopback only. Ray reads it when it is imported.
LOOPBACK_ONLY = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
# Ray's HTTP proxy reads it when it starts; serve/gate.py says what for.
SERVE_EDGE = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.gate:edge"}
# On a busy machine the proxy takes longer to start than the 5 s after which Serve would kill it.
SERVE_PATIENCE = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60"}
DASHBOARD_PORT = 8265
START_TIMEOUT_S = 60
STOP_TIMEOUT_S = 10  # for trainings to save; what serves would take longer, and has nothing to lose
OBJECT_STORE_BYTES = 500_000_000
# On a busy machine any process may end meanwhile, and what names our folder may be somebody else's.
OUT_OF_REACH = (psutil.NoSuchProcess, psutil.AccessDenied)


class LocalCluster:
    """One Ray head: token authentication, loopback only, ports and temporary folder of its own.

    Args:
        run_dir: Where the cluster's state, token and log are kept.
    """

    def __init__(self, run_dir: Path) -> None:
        self.state_file = run_dir / RAY_HEAD
        self.token_file = run_dir / "ray_token"
        self.log_file = run_dir / "ray_head.log"

    @property
    def dashboard_url(self) -> str:
        """Address of the dashboard, the Jobs API and the Serve API."""
        return f"http://{LOOPBACK}:{self._state()['dashboard_port']}"

    def environment(self) -> dict[str, str]:
        """Return the environment of a process that may talk to this cluster."""
        # What a user set for another cluster, above all its token, must not reach this one.
        others = {name: v for name, v in os.environ.items() if not name.startswith("RAY_")}
        ours = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token_file),
            "RAY_ADDRESS": self.dashboard_url,
        }
        return others | LOOPBACK_ONLY | SERVE_EDGE | SERVE_PATIENCE | ours

    def headers(self) -> dict[str, str]:
        """Return the HTTP headers that the dashboard's APIs ask for."""
        return {"Authorization": f"Bearer {self.token_file.read_text()}"}

    def is_running(self) -> bool:
        """Return whether the head that was started for this folder is still alive."""
        return self._process() is not None

    def start(self) -> None:
        """Start the head, unless it is running.

        Raises:
            ParisError: if it does not come up.
        """
        if self.is_running():
            return
        self.state_file.parent.mkdir(parents=True, exist_ok=True)
        self.token_file.unlink(missing_ok=True)
        self.token_file.touch(mode=0o600)
        self.token_file.write_text(secrets.token_hex(32))
        port = DASHBOARD_PORT if port_is_free(DASHBOARD_PORT) else free_port()
        temp_dir = tempfile.mkdtemp(prefix="paris_ray-", dir="/tmp")  # short: it holds sockets
        self._write_state({"dashboard_port": port, "temp_dir": temp_dir})
        with self.log_file.open("w") as log:
            process = subprocess.Popen(
                _head_command(port, temp_dir),
                env=self.environment(),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        created = psutil.Process(process.pid).create_time()
        self._write_state({**self._state(), "pid": process.pid, "created": created})
        self._wait_until_up(process)

    def stop(self) -> bool:
        """Stop the head and every process that it started; return whether there was one.

        Each gets SIGTERM itself, once, so that trainings save at once.
        """
        state = self._state()
        if not state:
            return False
        head, temp_dir = _head_of(state), str(state["temp_dir"])
        family = set(_processes_of(temp_dir))  # with most of the head's children
        if head is not None:
            family.add(head)
            with suppress(*OUT_OF_REACH):
                family.update(head.children(recursive=True))
            for process in family:
                with suppress(*OUT_OF_REACH):
                    process.terminate()
        _, alive = psutil.wait_procs(family, timeout=STOP_TIMEOUT_S if head else 0)
        for process in alive:
            with suppress(*OUT_OF_REACH):
                process.kill()
        psutil.wait_procs(alive, timeout=STOP_TIMEOUT_S)
        shutil.rmtree(temp_dir, ignore_errors=True)
        self.state_file.unlink(missing_ok=True)  # another stop may have ended first
        return bool(family)

    def _wait_until_up(self, process: "subprocess.Popen[bytes]") -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and process.poll() is None:
            try:
                url = f"{self.dashboard_url}/api/jobs/"
                if requests.get(url, headers=self.headers(), timeout=2).ok:
                    return
            except requests.RequestException:
                pass
            time.sleep(0.5)
        self.stop()
        raise ParisError(f"Ray did not start; its log is {self.log_file}")

    def _state(self) -> dict[str, int | float | str]:
        """Return what was written of the cluster; nothing where there is none."""
        try:
            state: dict[str, int | float | str] = json.loads(self.state_file.read_text())
        except FileNotFoundError:  # also where another stop ends just now
            return {}
        return state

    def _write_state(self, state: dict[str, int | float | str]) -> None:
        with replacing(self.state_file) as written:  # whoever stops it may read at any time
            written.write_text(json.dumps(state, indent=2) + "\n")

    def _process(self) -> psutil.Process | None:
        """Return the head that was started for this folder, if it is still alive."""
        return _head_of(self._state())


def _head_of(state: Mapping[str, int | float | str]) -> psutil.Process | None:
    """Return the head, if it is alive; a recycled pid is told by its creation time."""
    if "pid" not in state:
        return None
    try:
        process = psutil.Process(int(state["pid"]))
        same = process.create_time() == state["created"]
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


def _processes_of(temp_dir: str) -> list[psutil.Process]:
    """Return the Ray processes that were told this temporary folder, whoever is their parent."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(temp_dir in argument for argument in process.info["cmdline"] or ()):
            found.append(process)
    return found


def _head_command(dashboard_port: int, temp_dir: str) -> list[str]:
    ports = ("port", "ray-client-server-port", "dashboard-agent-listen-port", "metrics-export-port")
    return [
        str(Path(sys.executable).parent / "ray"),
        "start",
        "--head",
        "--block",
        f"--node-ip-address={LOOPBACK}",
        f"--dashboard-host={LOOPBACK}",
        f"--dashboard-port={dashboard_port}",
        *(f"--{name}={free_port()}" for name in ports),
        "--min-worker-port=0",
        "--max-worker-port=0",
        f"--temp-dir={temp_dir}",
        f"--object-store-memory={OBJECT_STORE_BYTES}",
        "--disable-usage-stats",
    ]


def free_port() -> int:
    """Return a port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def port_is_free(port: int) -> bool:
    """Return whether a port can be listened on."""
    with socket.socket() as probe:
        return probe.connect_ex((LOOPBACK, port)) != 0
