"""Measure `prepare` on corpora of very many rows, and Ray Data against a plain loop.

    python tests/benchmarks/bench_data.py --run-dir RUN [--tars 1000] [PART ...]

RUN is a finished run of the quickstart, whose encoders are used. The tars are links to one file of
10,000 tiny pictures with captions, so 1,000 of them are ten million rows of which every picture is
decoded for real. What an earlier run would have left is written by this script: files with keys and
little else. Nothing is asserted: a bar that is missed is printed as missed.
"""

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
from bench_engine import report
from PIL import Image

from jobs.command import ray_session
from paris_ray.artifacts import read_manifest
from paris_ray.config import Config, load
from paris_ray.run import EMBEDDINGS, ENCODERS, Run

ROWS_A_TAR = 10_000
ROWS_A_FILE = 512
PAIRS = 3
WATCHED_S = 30.0  # how long a run is watched after its first file, before it is killed
STAGE = """
import sys
from jobs.command import log_to_stdout, ray_session
from paris_ray.artifacts import read_manifest
from paris_ray.config import load
from paris_ray.corpora import list_shards
from paris_ray.run import ENCODERS, Run
log_to_stdout()
config = load("quickstart", sys.argv[1:])
with ray_session(None):
    from paris_ray.pipeline.embed import prepare_embeddings
    print("begins", flush=True)
    encoders = read_manifest(Run(config).encoders, ENCODERS)
    prepare_embeddings(config, encoders, list_shards(config.corpus))
    print("ends", flush=True)
"""


def write_corpus(folder: Path, num_tars: int) -> None:
    """Write tars that are links to one file."""
    folder.mkdir()
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(stream, "PNG")
    first = folder / "00000.tar"
    with tarfile.open(first, "w") as tar:
        for i in range(ROWS_A_TAR):
            for extension, content in (("png", stream.getvalue()), ("txt", b"a red square")):
                member = tarfile.TarInfo(f"{i:05d}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    for number in range(1, num_tars):
        os.link(first, folder / f"{number:05d}.tar")


@contextmanager
def large_run(finished: Path, num_tars: int) -> Iterator[Config]:
    """Yield the configuration of a run that has encoders, and a corpus of very many rows."""
    with tempfile.TemporaryDirectory(dir=finished.parent) as folder:
        write_corpus(Path(folder) / "corpus", num_tars)
        shutil.copytree(finished / "encoders", Path(folder) / "run" / "encoders")
        yield load("quickstart", overrides_of(Path(folder)))


def overrides_of(folder: Path) -> list[str]:
    """Return what the configuration of such a run is."""
    return [
        f"run_dir={folder / 'run'}",
        "corpus.kind=webdataset",
        f"corpus.path={folder / 'corpus'}",
        f"corpus.rows_per_shard={ROWS_A_FILE}",
    ]


class Stage:
    """The embedding stage in a process and a Ray of its own, watched from outside."""

    def __init__(self, config: Config, options: Sequence[str] = ()) -> None:
        self.folder = Path(Run(config).embeddings.uri)
        self.before = self._files()
        options = options or overrides_of(Path(config.run_dir).parent)
        command = [sys.executable, "-c", STAGE, *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.wait_for("begins")
        self.began, self.memory = time.monotonic(), self._memory()

    def wait_for(self, line: str) -> None:
        """Read what it prints up to a line."""
        assert self.process.stdout is not None
        for printed in self.process.stdout:
            if printed.strip() == line:
                return
        sys.exit("the stage failed")

    def seconds_to_first_file(self) -> float:
        """Wait until it has written a file; return how long that took."""
        while self._files() <= self.before:
            time.sleep(0.1)
        return time.monotonic() - self.began

    def grown(self) -> float:
        """Return by how many megabytes its driver's memory has grown."""
        return (self._memory() - self.memory) / 1e6

    def kill(self) -> None:
        """Kill it and its Ray."""
        processes = [*psutil.Process(self.process.pid).children(recursive=True), self.process]
        for each in processes:
            each.kill()
        self.process.wait()

    def _memory(self) -> int:
        return int(psutil.Process(self.process.pid).memory_full_info().uss)

    def _files(self) -> set[str]:
        found = os.listdir(self.folder) if self.folder.is_dir() else []  # noqa: PTH208
        return {name for name in found if name.startswith("part-") and ".tmp-" not in name}


def start(finished: Path, num_tars: int) -> None:
    """How soon the first file is there, at the start and in the middle."""
    with large_run(finished, num_tars) as config:
        rows = num_tars * ROWS_A_TAR
        _watch(config, f"{rows:,} rows, from the start")
        shutil.rmtree(Run(config).embeddings.uri)
        shutil.rmtree(Run(config).quarantine.uri)
        leave_behind(config, num_tars // 2)
        _watch(config, f"{rows:,} rows, half of them done")


def _watch(config: Config, name: str) -> None:
    stage = Stage(config)
    report(f"{name}: seconds to the first file", [stage.seconds_to_first_file()], "<=", 30)
    time.sleep(WATCHED_S)
    report(f"{name}: driver's growth {WATCHED_S:.0f} s later, MB", [stage.grown()], "<=", 100)
    stage.kill()


def end(finished: Path, num_tars: int) -> None:
    """The end of a run of which all is done but one tar, and the same command again."""
    with large_run(finished, num_tars) as config:
        leave_behind(config, num_tars - 1)
        stage = Stage(config)
        grown = 0.0
        while stage.process.poll() is None and not (stage.folder / "manifest.json").exists():
            grown = max(grown, stage.grown())
            time.sleep(0.2)
        seconds = time.monotonic() - stage.began
        stage.wait_for("ends")
        stage.process.wait()
        facts = read_manifest(Run(config).embeddings, EMBEDDINGS).facts
        rows = facts["rows"] + facts["held_out"] + sum(facts["quarantined"].values())
        expected = num_tars * ROWS_A_TAR
        print(f"- rows counted: {rows:,} of {expected:,}; last tar and end in {seconds:.0f} s")
        report(f"{expected:,} rows: driver's growth to the end, MB", [grown], "<=", 100)
        stage = Stage(config)
        stage.wait_for("ends")
        again = time.monotonic() - stage.began
        stage.process.wait()
        report(f"{expected:,} rows: seconds of the same command again", [again], "<=", 10)


def leave_behind(config: Config, num_tars: int) -> None:
    """Write what an interrupted run has left of some tars: every row of them is good."""
    from paris_ray.corpora import captions_per_row, held_out_rule, open_corpus
    from paris_ray.embeddings import to_table, write_part

    run, corpus = Run(config), open_corpus(config.corpus)
    shards = corpus.shards()
    rule = held_out_rule(config.corpus, corpus, shards, config.seed)
    with ray_session(None):  # ray reads how it authenticates when it is imported
        from paris_ray.pipeline.accounts import Account, part_name, write_account
        from paris_ray.pipeline.embed import embedding_stage, shard_versions
        from paris_ray.pipeline.shards import ShardReader

        reader = ShardReader(config, rule, captions_per_row(config.corpus, corpus, shards))
        versions = shard_versions(reader, shards)
        encoders = read_manifest(run.encoders, ENCODERS)
        embedding_stage(config, encoders, versions).begin(run.quarantine)
    for shard in shards[:num_tars]:
        for first in range(0, ROWS_A_TAR, ROWS_A_FILE):
            rows = range(first, min(first + ROWS_A_FILE, ROWS_A_TAR))
            keys = [f"{Path(shard.source).name}/{i:05d}" for i in rows]
            write_part(run.embeddings, part_name(shard.name, first), to_table({"key": keys}))
        account = Account(versions[shard.name], ROWS_A_TAR)
        write_account(run.quarantine, shard.name, account, [])


def encoding(finished: Path, _: int) -> None:
    """Ray Data against a plain loop over the same classes and rows, in steady state."""
    ratios = []
    for _ in range(PAIRS):
        command = [sys.executable, __file__, "--run-dir", str(finished), "--loop"]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        loop = json.loads(printed.splitlines()[-1])
        with scratch_run(finished) as config:
            stage = Stage(config, [f"run_dir={config.run_dir}"])
            stage.wait_for("ends")
            stage.process.wait()
            ratios.append(steady_rate(stage.folder) / loop["rows_per_second"])
    name = "the quickstart's corpus: rows a second by Ray Data over a plain loop"
    report(name, ratios, ">=", 0.95)
    total = sum(loop["seconds"].values())
    shares = ", ".join(f"{step} {100 * s / total:.0f} %" for step, s in loop["seconds"].items())
    print(f"- where the plain loop spends its time: {shares}")


@contextmanager
def scratch_run(finished: Path) -> Iterator[Config]:
    """Yield the configuration of a run that has encoders and nothing else."""
    with tempfile.TemporaryDirectory(dir=finished.parent) as folder:
        shutil.copytree(finished / "encoders", Path(folder) / "encoders")
        yield load("quickstart", [f"run_dir={folder}"])


def steady_rate(folder: Path) -> float:
    """Return rows a second from the first file that was written to the last."""
    files = [f for kind in (folder, folder / "held_out") for f in kind.glob("part-*")]
    written = sorted((f.stat().st_mtime, pq.read_metadata(f).num_rows) for f in files)
    return sum(rows for _, rows in written[1:]) / (written[-1][0] - written[0][0])


def embed_in_a_loop(finished: Path) -> dict[str, Any]:
    """Embed the corpus with the classes that Ray Data uses, one shard after the other.

    Returns:
        `rows_per_second` after the first shard, and `seconds` by step.
    """
    import torch

    from paris_ray.corpora import held_out_rule, open_corpus
    from paris_ray.pipeline.embedders import FeatureEmbedder, LatentEmbedder, TextEmbedder
    from paris_ray.pipeline.shards import ShardReader, ShardWriter

    with scratch_run(finished) as config:
        corpus = open_corpus(config.corpus)
        shards = corpus.shards()
        rule = held_out_rule(config.corpus, corpus, shards, config.seed)
        reader = ShardReader(config, rule)
        kinds, write = (TextEmbedder, FeatureEmbedder, LatentEmbedder), ShardWriter(config)
        encoders = {kind.step: kind(config) for kind in kinds}
        torch.set_num_threads(os.cpu_count() or 1)  # as many cores as Ray Data has
        seconds = dict.fromkeys(("read and decode", *encoders, "write"), 0.0)
        rows, first_at, mark = 0, 0.0, time.monotonic()
        for shard in shards:
            fields = asdict(shard) | {"version": ""}
            for batch in reader({name: np.array([value]) for name, value in fields.items()}):
                count = len(batch["row"])
                mark = _add(seconds, "read and decode", mark)
                for name, encoder in encoders.items():
                    batch |= encoder.columns(batch)
                    mark = _add(seconds, name, mark)
                write(batch)
                mark = _add(seconds, "write", mark)
                rows += count if first_at else 0
                first_at = first_at or time.monotonic()
        return {"rows_per_second": rows / (time.monotonic() - first_at), "seconds": seconds}


def _add(seconds: dict[str, float], step: str, since: float) -> float:
    """Add the time since then to a step's; return the time."""
    now = time.monotonic()
    seconds[step] += now - since
    return now


PARTS = {"start": start, "end": end, "encoding": encoding}


def main() -> None:
    """Print the parts."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--run-dir", type=Path, default=Path("runs/bench/quickstart"))
    parser.add_argument("--tars", type=int, default=1000, help="of 10,000 rows each")
    parser.add_argument("--loop", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.parts) - PARTS.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if options.loop:
        print(json.dumps(embed_in_a_loop(options.run_dir)))
        return
    parts = options.parts or list(PARTS)
    if len(parts) == 1:
        PARTS[parts[0]](options.run_dir.resolve(), options.tars)
        return
    for name in parts:  # a process can have one Ray after another, but one token alone
        folder = ("--run-dir", str(options.run_dir), "--tars", str(options.tars))
        subprocess.run([sys.executable, __file__, *folder, name], check=True)


if __name__ == "__main__":
    main()
