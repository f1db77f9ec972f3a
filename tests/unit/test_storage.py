"""Storage beneath artefacts: what counts as a full disk, and stores that do not answer."""

import errno
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from safetensors import SafetensorError

from paris_ray import storage
from paris_ray.errors import ArtifactError
from paris_ray.storage import disk_is_full, reach, temporary_folder


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (SafetensorError("I/O error: No space left on device (os error 28)"), True),
        (OSError(errno.EACCES, "Permission denied"), False),
        (SafetensorError("I/O error: Permission denied (os error 13)"), False),
        (ValueError("os error 28"), False),
    ],
)
def test_what_a_full_disk_is(error: Exception, full: bool) -> None:
    assert disk_is_full(error) == full


HOLD = """
import sys, time
from paris_ray.storage import temporary_folder
with temporary_folder() as folder:
    print(folder, flush=True)
    sys.stdin.read()
"""


def start_holder(root: Path) -> tuple["subprocess.Popen[str]", Path]:
    """Start a process that uses a temporary folder until it is told to end; return it too."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD],
        env=os.environ | {"TMPDIR": str(root)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    return holder, Path(holder.stdout.readline().strip())


def test_copies_of_a_killed_process_are_removed_by_the_next_those_in_use_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    holder, in_use = start_holder(tmp_path)
    killed, left = start_holder(tmp_path)
    young_one, young = start_holder(tmp_path)
    for process in (killed, young_one):
        process.kill()
        process.communicate()
    long_ago = time.time() - 3600
    for folder in (in_use, left):
        (folder / "copy").write_bytes(b"large")
        os.utime(folder, (long_ago, long_ago))
    with temporary_folder() as own:
        assert {*tmp_path.iterdir()} == {own, in_use, young}
    holder.communicate()
    assert {*tmp_path.iterdir()} == {young}


def uri(port: int) -> str:
    endpoint = f"endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"
    return f"s3://name:secret@bucket/run?{endpoint}"


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that accepts connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def forbidding_port() -> Iterator[int]:
    """A port of an HTTP server that forbids everything."""

    class Forbidding(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(403)
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Forbidding) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server.server_port
        server.shutdown()


def test_a_store_that_says_nothing_is_told_in_time(
    silent_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "ANSWER_TIMEOUT_S", 1.0)
    started = time.monotonic()
    with pytest.raises(ArtifactError, match=r"^s3://bucket/run cannot be reached \(.*too slow"):
        reach(uri(silent_port))
    assert time.monotonic() - started < 30, "pyarrow by itself takes 100 s"


def test_a_store_that_is_not_there_is_told_without_its_keys() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(ArtifactError) as caught:
        reach(uri(port))
    message = str(caught.value)
    assert message.startswith("s3://bucket/run cannot be reached (")
    assert "AWS_ENDPOINT_URL" in message
    assert "secret" not in message


def test_the_endpoint_of_the_environment_counts(
    forbidding_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{forbidding_port}")
    reach("s3://bucket/run")


def test_a_store_that_forbids_is_there(forbidding_port: int) -> None:
    reach(uri(forbidding_port))
