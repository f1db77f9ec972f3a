"""Jobs as children of another job, each stopped by its own pid whatever happens to the parent."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from paris_ray.errors import ParisError

STOP_TIMEOUT_S = 30
POLL_S = 0.2
LOG_LINES = 20  # of a job that failed, to be shown


def run_job(job: str, *arguments: str) -> None:
    """Run a job to its end, its output shown as it comes.

    Args:
        job: Name of the module in `jobs`.
        arguments: Of its command line.

    Raises:
        ParisError: if it fails.
    """
    process = subprocess.Popen(_command(job, arguments), env=_environment(), start_new_session=True)
    try:
        code = process.wait()
    finally:
        _stop(process)
    if code:
        raise ParisError(f"jobs.{job} failed with exit code {code}: what it said is above")


@contextmanager
def service(job: str, *arguments: str, log: Path, ready: str, timeout_s: float) -> Iterator[str]:
    """Start a job that serves until it is stopped, and stop it in the end.

    Args:
        job: Name of the module in `jobs`.
        arguments: Of its command line.
        log: File for its output.
        ready: How the line begins that it prints when it serves.
        timeout_s: Seconds until then.

    Yields:
        That line.

    Raises:
        ParisError: with the end of the log, if the line does not come.
    """
    with log.open("w") as file:
        process = subprocess.Popen(
            _command(job, arguments),
            env=_environment(),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield _wait_until_ready(process, log, ready, timeout_s)
    finally:
        _stop(process)


def stop_on_sigterm() -> None:
    """Let SIGTERM end this process as Ctrl-C does: through every `finally`."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def _command(job: str, arguments: tuple[str, ...]) -> list[str]:
    return [sys.executable, "-m", f"jobs.{job}", *arguments]


def _environment() -> dict[str, str]:
    """Return an environment that names no Ray: each job starts one of its own, if it needs one."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


def _wait_until_ready(
    process: "subprocess.Popen[bytes]", log: Path, ready: str, timeout_s: float
) -> str:
    deadline = time.monotonic() + timeout_s
    while True:
        code = process.poll()  # before the log is read: its last words are in it then
        lines = log.read_text().splitlines(keepends=True)
        for line in lines:
            if line.startswith(ready) and line.endswith("\n"):
                return line
        if code is not None or time.monotonic() > deadline:
            what = (
                f"is still running after {timeout_s:.0f} s" if code is None else f"exited ({code})"
            )
            end = "".join(lines[-LOG_LINES:])
            raise ParisError(f"there is no {ready!r} in {log}, and the job {what}:\n{end}")
        time.sleep(POLL_S)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """End a child that still runs, and all that it started, such as its Ray."""
    if process.poll() is not None:
        return
    family = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    _, alive = psutil.wait_procs(family, timeout=STOP_TIMEOUT_S)
    for descendant in alive:
        with suppress(psutil.NoSuchProcess):  # it ended just now
            descendant.kill()
