"""Corpus and run folder on an S3 server: the whole small pipeline, and what a kill leaves of it."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from tests.long_tests import chaos
from tests.s3_server import BUCKET, SECRET, S3Server, s3_server

pytestmark = [pytest.mark.ray, chaos]

REPOSITORY = Path(__file__).resolve().parents[2]
RUN = "runs/shapes"


@pytest.fixture
def server(shapes_corpus: Path) -> Iterator[S3Server]:
    """A server with the corpus of shapes on it."""
    with s3_server() as server:
        server.upload(shapes_corpus, "shapes")
        yield server


@pytest.fixture
def command(tiny_overrides: list[str]) -> list[str]:
    """The command of a user whose pictures and runs are in a bucket."""
    others = [each for each in tiny_overrides if not each.startswith("corpus.path=")]
    places = [f"corpus.path=s3://{BUCKET}/shapes", f"run_dir=s3://{BUCKET}/{RUN}"]
    return [sys.executable, "-m", "jobs.pipeline", *places, *others]


def test_the_pipeline_runs_on_s3_and_survives_a_kill(
    server: S3Server,
    command: list[str],
    num_good_rows: int,
    bad_rows: dict[str, str],
    tmp_path: Path,
) -> None:
    _kill_while_embedding(server, command)
    assert f"{BUCKET}/{RUN}/embeddings/manifest.json" not in server.names(RUN)
    environment = server.environment
    finished = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    assert "are kept, 0 gone" in finished.stdout
    assert SECRET not in finished.stdout + finished.stderr
    for name in server.names(RUN):
        with server.store.open_input_file(name) as file:
            assert SECRET.encode() not in file.read(), name
    quarantined = _table(server, "quarantine", "key")
    assert sorted(quarantined) == sorted(bad_rows)
    keys = _table(server, "embeddings", "key") + _table(server, "embeddings/held_out", "key")
    assert len(keys) == len(set(keys)) == num_good_rows
    _draw_from_the_bucket(environment, tmp_path / "drawn.png")


def _kill_while_embedding(server: S3Server, command: list[str]) -> None:
    """Kill a run and all of its processes when it has written something, but not everything."""
    process = subprocess.Popen(
        command, cwd=REPOSITORY, env=server.environment, stdout=subprocess.DEVNULL
    )
    try:
        while not any("/embeddings/part-" in name for name in server.names(RUN)):
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.5)
    finally:
        with suppress(psutil.NoSuchProcess):
            for each in psutil.Process(process.pid).children(recursive=True):
                each.kill()
        process.kill()
        process.wait()


def _table(server: S3Server, folder: str, column: str) -> list[str]:
    names = [name for name in server.names(RUN) if f"{RUN}/{folder}/part-" in name]
    tables = [pq.read_table(name, columns=[column], filesystem=server.store) for name in names]
    return [value for table in tables for value in table[column].to_pylist()]


def _draw_from_the_bucket(environment: dict[str, str], target: Path) -> None:
    code = (
        "from paris_ray.bundle import load_bundle\n"
        "from paris_ray.sampling import generate\n"
        f"bundle = load_bundle('s3://{BUCKET}/{RUN}/bundle')\n"
        f"generate(bundle, ['a red circle number 1'], seed=1)[0].save({str(target)!r})\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env=environment, check=True)
    assert target.read_bytes().startswith(b"\x89PNG")
