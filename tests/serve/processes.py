"""The processes of the tests' own Ray."""

from contextlib import suppress
from pathlib import Path

import psutil

TORCH = "libtorch"  # begins the names of its libraries


def processes(title: str) -> list[psutil.Process]:
    """Return the processes of Ray whose title, such as `ServeReplica:app:Ingress`, begins so.

    Another Ray on this machine may have such, too: only this one's are our descendants.
    """
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # Ray ends workers that are idle
            if "".join(process.cmdline()).startswith(f"ray::{title}"):
                found.append(process)
    return found


def maps_torch(process: psutil.Process) -> bool:
    """Return whether a process has torch in its memory, imported or unpickled."""
    return TORCH in Path(f"/proc/{process.pid}/maps").read_text()
