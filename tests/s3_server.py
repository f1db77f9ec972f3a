"""An S3 server of this machine, with one bucket, and how processes find it."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pyarrow import fs

from jobs.local_cluster import LOOPBACK, free_port

BUCKET = "corpora"
KEY, SECRET, REGION = "AKIAEXAMPLE", "secret-that-stays-secret", "us-east-1"
START_S = 60.0


@dataclass(frozen=True, slots=True)
class S3Server:
    """A running server."""

    port: int

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to find it, as users have it in their environment."""
        return os.environ | {
            "AWS_ENDPOINT_URL": f"http://{LOOPBACK}:{self.port}",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    @property
    def store(self) -> fs.S3FileSystem:
        """Its files, for tests to write and to look at."""
        return fs.S3FileSystem(
            access_key=KEY,
            secret_key=SECRET,
            region=REGION,
            scheme="http",
            endpoint_override=f"{LOOPBACK}:{self.port}",
            allow_bucket_creation=True,
        )

    def upload(self, folder: Path, name: str) -> None:
        """Copy a folder into the bucket."""
        fs.copy_files(str(folder), f"{BUCKET}/{name}", destination_filesystem=self.store)

    def names(self, prefix: str) -> list[str]:
        """Return the names of all files below a folder of the bucket."""
        selector = fs.FileSelector(f"{BUCKET}/{prefix}", recursive=True, allow_not_found=True)
        infos = self.store.get_file_info(selector)
        return [info.path for info in infos if info.type == fs.FileType.File]


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """Start a server, which keeps everything in its memory."""
    server = S3Server(free_port())
    command = [sys.executable, "-m", "moto.server", "-H", LOOPBACK, "-p", str(server.port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _create_bucket(server)
        yield server
    finally:
        process.kill()
        process.wait()


def _create_bucket(server: S3Server) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            server.store.create_dir(BUCKET)
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
