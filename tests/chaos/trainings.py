"""Trainings of every objective, small enough to be killed often, and the moments to be killed at.

A training runs in a process of its own. It is a fork of one that has imported everything, so that
a hundred of them take seconds; nothing of a training is in what they share.
"""

import itertools
import json
import multiprocessing
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from transformers import BertModel  # noqa: F401 -- slow: once, and not in every process

from paris_ray.artifacts import CHECKPOINT, SAMPLES
from paris_ray.bundle import load_bundle
from paris_ray.config import ExpertConfig, LoRAConfig, RouterConfig, TrainingConfig
from paris_ray.embeddings import to_table, write_null_text, write_part
from paris_ray.folders import Folder
from paris_ray.models import Expert
from paris_ray.sampling.teacher import EnsembleTeacher
from paris_ray.sampling_options import sampling_options
from paris_ray.training.distil import velocities
from paris_ray.training.expert import ExpertData, train_expert
from paris_ray.training.loop import Progress
from paris_ray.training.lora import train_lora
from paris_ray.training.router import train_router

# The geometry of the tests' tiny bundle, which teaches the student and is what a LoRA adapts.
GEOMETRY: dict[str, Any] = {"input_size": 4, "patch_size": 1, "in_channels": 8}
WIDTH: dict[str, Any] = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "text_embed_dim": 16}
EXPERT = ExpertConfig(text_injection="spatial", **GEOMETRY, **WIDTH)
STEPS, INTERVAL = 40, 4
TRAINING = TrainingConfig(
    steps=STEPS,
    batch_size=4,
    warmup_steps=2,
    log_every=1,
    checkpoint_every=INTERVAL,
    validate_every=6,
    sample_every=6,  # sometimes with a checkpoint, sometimes between two
    precision="float32",
    device="cpu",
)
NUM_CLUSTERS, ROWS = 3, 24
# Larger than the metrics ever get, smaller than any checkpoint, weights or column of a shard.
FEW_BYTES = 12_000

OnProgress = Callable[[Progress], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """What the trainings read.

    Attributes:
        shards: Folders of one shard a cluster, which `write_shards` wrote.
        bundle: Path of the tests' tiny bundle.
        threads: Torch threads of a training.
    """

    shards: Path
    bundle: Path
    threads: int = 1

    @property
    def config(self) -> TrainingConfig:
        return replace(TRAINING, threads=self.threads)

    def shard(self, cluster: int) -> Folder:
        return Folder(self.shards / f"cluster={cluster}")


def write_shards(path: Path) -> None:
    """Write a shard a cluster, with two caption variants a row."""
    for k in range(NUM_CLUSTERS):
        generator = np.random.default_rng(k)
        columns = {
            "latents": generator.standard_normal((ROWS, 8, 4, 4)).astype(np.float32),
            "text_embedding": generator.standard_normal((ROWS, 2, 16)).astype(np.float32),
        }
        folder = Folder(path / f"cluster={k}")
        write_part(folder, "part-0.parquet", to_table(columns))
        write_null_text(folder, np.ones(16, np.float32))


def train_flow(inputs: Inputs, output: Folder, on_progress: OnProgress, **changes: Any) -> None:
    def draw_samples(average: Expert, step: int) -> None:
        first = next(average.parameters()).detach().numpy()
        output.write(f"{SAMPLES}/step-{step:06d}", first.tobytes())

    options: dict[str, Any] = {
        "data": ExpertData(
            shards=[inputs.shard(0)],
            digests={"shard": "0"},
            held_out=[inputs.shard(0)],
            held_out_others=[inputs.shard(1)],
        ),
        "expert_config": EXPERT,
        "draw_samples": draw_samples,
    }
    config = inputs.config
    train_expert(
        config=config, seed=0, output=output, on_progress=on_progress, **(options | changes)
    )


def train_ddpm(inputs: Inputs, output: Folder, on_progress: OnProgress) -> None:
    expert = replace(EXPERT, prediction="epsilon")
    train_flow(inputs, output, on_progress, expert_config=expert)


def train_the_router(inputs: Inputs, output: Folder, on_progress: OnProgress) -> None:
    train_router(
        RouterConfig(num_experts=NUM_CLUSTERS, **GEOMETRY, **WIDTH),
        inputs.config,
        shards=[inputs.shard(k) for k in range(NUM_CLUSTERS)],
        shards_digest="0",
        seed=0,
        output=output,
        on_progress=on_progress,
    )


def train_adapter(inputs: Inputs, output: Folder, on_progress: OnProgress) -> None:
    def draw_samples(_expert: Expert, step: int) -> None:
        output.write(f"{SAMPLES}/step-{step:06d}", b"")

    train_lora(
        load_bundle(str(inputs.bundle)).expert(0).requires_grad_(False),
        LoRAConfig(r=8),
        inputs.config,
        shard=inputs.shard(0),
        inputs={"expert": "0"},
        seed=0,
        output=output,
        on_progress=on_progress,
        draw_samples=draw_samples,
    )


def train_student(inputs: Inputs, output: Folder, on_progress: OnProgress) -> None:
    bundle = load_bundle(str(inputs.bundle))
    lesson = velocities(EnsembleTeacher(bundle, sampling_options(bundle)), routed_share=0.5)
    shards = [inputs.shard(k) for k in range(NUM_CLUSTERS)]
    data = ExpertData(shards=shards, digests={"ensemble": "0"})
    train_flow(inputs, output, on_progress, data=data, lesson=lesson)


OBJECTIVES: dict[str, Callable[[Inputs, Folder, OnProgress], None]] = {
    "flow matching": train_flow,
    "DDPM": train_ddpm,
    "router": train_the_router,
    "LoRA": train_adapter,
    "distillation": train_student,
}


@dataclass(frozen=True, slots=True)
class Death:
    """When and how a process ends.

    Attributes:
        how: `at`: SIGKILL just before the n-th time that it opens a file for writing, maps a
            spooled column or renames a finished file; `in`: from then on the kernel ends it in the
            midst of the first write beyond FEW_BYTES of a file; `after`: SIGKILL after n
            milliseconds of training, wherever it is; `asked`: SIGTERM in the n-th step.
        n: Which time, counted from 1; or milliseconds.
    """

    how: Literal["at", "in", "after", "asked"]
    n: int

    def prepare(self) -> None:
        """Make this process end so."""
        if self.how == "asked":
            return  # whoever counts the steps does it
        if self.how == "after":
            threading.Thread(target=self._end_later, daemon=True).start()
            return
        count, end = itertools.count(1), kill_myself if self.how == "at" else forbid_large_files

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            if touches_files(event, arguments) and next(count) == self.n:
                end()

        sys.addaudithook(watch)

    def _end_later(self) -> None:
        threading.Event().wait(self.n / 1000)
        kill_myself()


def touches_files(event: str, arguments: tuple[Any, ...]) -> bool:
    """Return whether an event of Python's audit is one after which files are another way."""
    if event == "open":
        path, _mode, flags = arguments
        return bool(flags & os.O_TMPFILE == os.O_TMPFILE or ".tmp-" in str(path))
    return event in ("os.rename", "mmap.__new__")


def kill_myself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def forbid_large_files() -> None:
    """Let the kernel end this process in a write, as a SIGKILL in it does: half of it is done."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FEW_BYTES, FEW_BYTES))


def _train_here(objective: str, inputs: Inputs, output: Path, death: Death | None) -> None:
    steps = os.open(output.with_suffix(".steps"), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    count = itertools.count(1)

    def note(progress: Progress) -> None:
        os.write(steps, f"{progress.step}\n".encode())
        if Death("asked", next(count)) == death:
            os.kill(os.getpid(), signal.SIGTERM)

    if death is not None:
        death.prepare()
    OBJECTIVES[objective](inputs, Folder(output), note)


def start(
    objective: str, inputs: Inputs, output: Path, death: Death | None = None
) -> multiprocessing.context.ForkServerProcess:
    """Start a training in a process of its own; the steps that it ends are noted beside `output`.

    Args:
        objective: A name of OBJECTIVES.
        inputs: What it reads.
        output: Its folder.
        death: How it ends; None: as it ends by itself.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=_train_here, args=(objective, inputs, output, death))
    process.start()
    return process


def steps_done(output: Path) -> list[int]:
    """Return the steps that all processes together have ended, in order."""
    return [int(line) for line in output.with_suffix(".steps").read_text().split()]


def pictures(output: Path) -> dict[str, bytes]:
    """Return the sample grids; one may be missing for every time that the process ended."""
    found = (output / SAMPLES).glob("*")
    return {f"{SAMPLES}/{path.name}": path.read_bytes() for path in found if path.is_file()}


def result(output: Path) -> dict[str, Any]:
    """Return what a training left that has to be the same, by name: all but times and grids."""
    files = {p.relative_to(output).as_posix(): p for p in output.rglob("*") if p.is_file()}
    left: dict[str, Any] = {name: path.read_bytes() for name, path in files.items()}
    for name in ("timings.jsonl", "spent.json"):
        del left[name]
    for name in pictures(output):
        del left[name]
    # safetensors writes the entries of a header in any order; all bytes after it are compared.
    header, size = left[CHECKPOINT][8:], int.from_bytes(left[CHECKPOINT][:8], "little")
    left[CHECKPOINT] = json.loads(header[:size]), header[size:]
    return left
