"""Print the numbers of docs/results.md, from one run on this machine.

    python tests/benchmarks/bench.py [--run-dir runs/bench]        (results.py does)

Ratios are taken in one run, in alternation, because machines are noisy. Nothing is asserted.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from jobs.command import ray_session
from paris_ray.artifacts import Folder, read_manifest
from paris_ray.config import Config, load
from paris_ray.corpora import held_out_rule, open_corpus
from paris_ray.evaluation.summary import headline
from paris_ray.run import EVALUATION, SHARD, Run

# ray reads its authentication mode when it is imported, so only functions import it here, after
# `ray_session` has set the mode.
VERBS = ("prepare", "train_seed", "train_experts", "train_router", "evaluate", "export")
MEMORY_INTERVAL_S = 0.5
TRAINING_STEPS = 150
PAIRS = 3


class PeakMemory(threading.Thread):
    """Samples the memory of a process tree; shared pages count once (PSS)."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.process, self.peak_bytes = psutil.Process(pid), 0

    def run(self) -> None:
        while self.process.is_running() and self.process.status() != psutil.STATUS_ZOMBIE:
            self.peak_bytes = max(self.peak_bytes, _tree_bytes(self.process))
            time.sleep(MEMORY_INTERVAL_S)


def _tree_bytes(root: psutil.Process) -> int:
    total = 0
    for process in [root, *root.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:  # it ended while we looked
            continue
    return total


def bench_stages(run_dir: Path) -> None:
    """Run every verb in a Ray of its own; print seconds and peak memory."""
    print("\n## Stages (each in a process and a Ray of its own, Ray's start included)\n")
    print("| stage | seconds | peak memory, GB |\n|---|---|---|")
    for verb in VERBS:
        command = [sys.executable, "-m", f"jobs.{verb}", f"run_dir={run_dir}"]
        started = time.monotonic()
        with Path(f"{run_dir}.log").open("a") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
            memory = PeakMemory(process.pid)
            memory.start()
            if process.wait():
                sys.exit(f"{verb} failed, see {run_dir}.log")
        seconds = time.monotonic() - started
        memory.join()
        print(f"| {verb} | {seconds:.0f} | {memory.peak_bytes / 1e9:.1f} |", flush=True)
    facts = read_manifest(Folder(run_dir) / "evaluation", EVALUATION).facts
    print("", *headline(facts), sep="\n")


def train_for_a_while(config: Config, expert: int) -> dict[str, float]:
    """Train an expert for some steps; return CPU seconds and samples a second of the loop."""
    from paris_ray.training.expert import ExpertData, train_expert

    run, timings = Run(config), []
    shard = run.shard(expert)
    with tempfile.TemporaryDirectory() as output:
        cpu = time.process_time()
        train_expert(
            config.expert,
            config.training,
            data=ExpertData(shards=[shard], digests={"shard": read_manifest(shard, SHARD).digest}),
            seed=0,
            output=Folder(output),
            on_progress=timings.append,
        )
        cpu = time.process_time() - cpu
    # The first report includes warming up.
    rate = statistics.mean(progress.samples_per_second for progress in timings[1:])
    return {"cpu_s": cpu, "samples_per_second": rate}


def bench_ray_task(config: Config) -> None:
    """Compare the CPU time of training in a Ray task with that in a plain process."""
    import ray

    ratios = []
    for _ in range(PAIRS):
        plain = _in_plain_process("train", config)["cpu_s"]
        inside = ray.get(_training_task(config, 0))["cpu_s"]
        ratios.append(inside / plain)
    print("\n## Training inside a Ray task, CPU time over a plain process\n")
    _print_ratios(ratios, "<= 1.01")


def bench_side_by_side(config: Config) -> None:
    """Compare the throughput of two experts at once with that of one alone."""
    import ray

    ratios = []
    for _ in range(PAIRS):
        alone = ray.get(_training_task(config, 0))["samples_per_second"]
        both = ray.get([_training_task(config, k) for k in (0, 1)])
        ratios.append(sum(report["samples_per_second"] for report in both) / alone)
    print(f"\n## Two experts side by side, throughput over one ({os.cpu_count()} CPUs)\n")
    _print_ratios(ratios, ">= 1.9")


def _training_task(config: Config, expert: int) -> Any:
    import ray

    # A fresh worker each time, as a plain process is fresh too.
    task = ray.remote(num_cpus=1, max_calls=1)(train_for_a_while)
    return task.remote(config, expert)


def _print_ratios(ratios: list[float], goal: str) -> None:
    every = ", ".join(f"{ratio:.3f}" for ratio in ratios)
    print(f"median {statistics.median(ratios):.3f} of {every} (goal {goal})", flush=True)


def bench_embedding(config: Config) -> None:
    """Compare Ray Data with a plain loop over the same classes and rows, in steady state."""
    from paris_ray.pipeline.embed import prepare_embeddings

    print("\n## Embedding with Ray Data, rows a second over a plain loop\n")
    plain = _in_plain_process("embed", config)
    with _scratch_run(config) as scratch:
        started = time.time()
        prepare_embeddings(scratch, read_manifest(Run(config).encoders, "encoders"))
        seconds = time.time() - started
        first_at, rate = _steady_rate(Path(Run(scratch).embeddings.uri))
    start_up = first_at - started
    print("| | start-up, s | rows/s in steady state |\n|---|---|---|")
    print(f"| plain loop | {plain['start_up_s']:.1f} | {plain['rows_per_second']:.0f} |")
    print(f"| Ray Data | {start_up:.1f} | {rate:.0f} |")
    print(f"\nratio {rate / plain['rows_per_second']:.2f} (goal >= 0.9); in all {seconds:.0f} s")


@contextmanager
def _scratch_run(config: Config) -> Iterator[Config]:
    """Yield the configuration of a run that has encoders and nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(Run(config).encoders.uri, Path(folder) / "encoders")
        yield replace(config, run_dir=folder)


def _steady_rate(folder: Path) -> tuple[float, float]:
    """Return when the first file was written, and rows a second from then to the last."""
    import pyarrow.parquet as pq

    written = sorted(
        (f.stat().st_mtime, pq.read_metadata(f).num_rows) for f in folder.glob("*.pa*")
    )
    first_at, last_at = written[0][0], written[-1][0]
    return first_at, sum(rows for _, rows in written[1:]) / (last_at - first_at)


def embed_in_a_loop(config: Config) -> dict[str, float]:
    """Embed the corpus with the classes that Ray Data uses, one shard after the other."""
    import torch

    from paris_ray.pipeline.embedders import FeatureEmbedder, LatentEmbedder, TextEmbedder
    from paris_ray.pipeline.shards import ShardReader, ShardWriter

    with _scratch_run(config) as scratch:
        started = time.monotonic()
        corpus = open_corpus(scratch.corpus)
        reader = ShardReader(scratch, held_out_rule(scratch.corpus, corpus, scratch.seed))
        encoders = (TextEmbedder, FeatureEmbedder, LatentEmbedder)
        steps = [*(encoder(scratch) for encoder in encoders), ShardWriter(scratch)]
        torch.set_num_threads(os.cpu_count() or 1)  # as many cores as Ray Data has
        shards = open_corpus(scratch.corpus).shards()
        rows, first_at = 0, 0.0
        for shard in shards:
            description: Any = {k: np.array([v]) for k, v in asdict(shard).items()}
            for batch in reader(description | {"duplicates": np.empty((1, 0))}):
                for step in steps:
                    batch = step(batch)
                rows += int(batch["rows"][0]) if first_at else 0
                first_at = first_at or time.monotonic()
        return {
            "start_up_s": first_at - started,
            "rows_per_second": rows / (time.monotonic() - first_at),
        }


PLAIN: dict[str, Callable[[Config], dict[str, float]]] = {
    "train": lambda config: train_for_a_while(config, 0),
    "embed": embed_in_a_loop,
}


def _in_plain_process(what: str, config: Config) -> dict[str, float]:
    """Run a function of `PLAIN` in a process without Ray; return its report."""
    command = [sys.executable, __file__, "--run-dir", config.run_dir, "--plain", what]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    report: dict[str, float] = json.loads(output.splitlines()[-1])
    return report


def main() -> None:
    """Print everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run-dir", default="runs/bench", help="is deleted first")
    parser.add_argument("--plain", choices=sorted(PLAIN), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    run_dir = Path(arguments.run_dir).resolve()
    steps = f"training.steps={TRAINING_STEPS}"
    short = load("quickstart", [f"run_dir={run_dir}", steps])
    if arguments.plain:
        print(json.dumps(PLAIN[arguments.plain](short)))
        return
    shutil.rmtree(run_dir, ignore_errors=True)
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    print(f"# {platform.processor() or platform.machine()}, {os.cpu_count()} CPUs")
    bench_stages(run_dir)
    with ray_session(None):
        bench_ray_task(short)
        bench_side_by_side(short)
        bench_embedding(short)


if __name__ == "__main__":
    main()
