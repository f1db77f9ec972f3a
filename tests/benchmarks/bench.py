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
from pathlib import Path
from typing import Any

import psutil

from jobs.command import ray_session
from paris_ray.artifacts import read_manifest
from paris_ray.config import Config, load
from paris_ray.evaluation.summary import headline
from paris_ray.folders import Folder
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
        plain = _in_plain_process(config)["cpu_s"]
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


def _in_plain_process(config: Config) -> dict[str, float]:
    """Train for a while in a process without Ray; return its report."""
    command = [sys.executable, __file__, "--run-dir", config.run_dir, "--plain"]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    report: dict[str, float] = json.loads(output.splitlines()[-1])
    return report


def main() -> None:
    """Print everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run-dir", default="runs/bench", help="is deleted first")
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    run_dir = Path(arguments.run_dir).resolve()
    steps = f"training.steps={TRAINING_STEPS}"
    short = load("quickstart", [f"run_dir={run_dir}", steps])
    if arguments.plain:
        print(json.dumps(train_for_a_while(short, 0)))
        return
    shutil.rmtree(run_dir, ignore_errors=True)
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    print(f"# {platform.processor() or platform.machine()}, {os.cpu_count()} CPUs")
    bench_stages(run_dir)
    with ray_session(None):
        bench_ray_task(short)
        bench_side_by_side(short)


if __name__ == "__main__":
    main()
