"""Print what each objective of few steps is worth, on the quickstart's held-out captions.

    python tests/benchmarks/bench_few_steps.py runs/quickstart        (results.py does)

The run must be distilled; it is not written to. Its student is trained on, by each objective and
from several seeds, as `few_step_training` says: one process a training, as many at a time as there
are cores, without Ray. Captions and noise are those of the run's evaluation.
"""

import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from bench_solvers import (
    draw,
    open_run,
    quickstart_run,
    read_captions,
    right_share,
    rmse,
)

from paris_ray.artifacts import VerifiedFolder
from paris_ray.bundle import load_expert
from paris_ray.config import Objective
from paris_ray.export import open_student, open_trained_parts
from paris_ray.folders import Folder
from paris_ray.models import Expert
from paris_ray.run import STUDENT, Run
from paris_ray.sampling.generation import sample_one_expert
from paris_ray.sampling.teacher import EnsembleTeacher
from paris_ray.sampling_options import sampling_options
from paris_ray.seeding import derive_seed
from paris_ray.training.distil import OBJECTIVES
from paris_ray.training.expert import ExpertData, train_expert

STEPS = (2, 4)
SEEDS = (0, 1)
UNTAUGHT = "student, not taught"


class Arm(NamedTuple):
    """One training."""

    num_steps: int
    objective: Objective
    seed: int


@dataclass(frozen=True, slots=True)
class Measured:
    """Share right in everything, distance to the ensemble's pictures, CPU time of the training."""

    right: float
    rmse: float
    seconds: float = 0.0


def train(run_dir: Path, arm: Arm, output: Path) -> float:
    """Teach the run's student few steps, in a process of its own; return the CPU time."""
    run = quickstart_run(run_dir)
    ensemble = open_trained_parts(run)
    options = sampling_options(ensemble)
    teacher, lesson = EnsembleTeacher(ensemble, options), OBJECTIVES[arm.objective]
    start = (run.student(STUDENT) / "expert_0").uri
    started = time.process_time()
    train_expert(
        run.config.expert,
        replace(run.config.few_step_training, init_from=start, device="cpu"),
        data=ExpertData(shards=[run.shard(k) for k in range(run.num_experts)], digests={}),
        seed=derive_seed(arm.seed, "few steps"),
        output=Folder(output),
        on_progress=lambda progress: None,
        text_encoder=run.encoders,
        lesson=lesson(teacher, arm.num_steps, options.num_inference_steps),
    )
    return time.process_time() - started


class Judge:
    """What is drawn, and what it is compared with.

    Args:
        run: The run.
        num_captions: How many held-out captions are drawn.
    """

    def __init__(self, run: Run, num_captions: int) -> None:
        self.captions = read_captions(run, num_captions)
        self.ensemble = open_trained_parts(run)
        self.options = sampling_options(self.ensemble)
        self.text = self.ensemble.encode_text(self.captions.texts)
        self.share_right = right_share(run, self.captions.attributes)
        self.wanted = draw(self.ensemble, self.text, self.captions.seeds, self.options)

    def measure(self, expert: Expert, num_steps: int, seconds: float = 0.0) -> Measured:
        """Return how well one expert draws in some Euler steps."""
        latents = sample_one_expert(
            expert,
            self.text,
            self.ensemble.null_text,
            seeds=self.captions.seeds,
            num_inference_steps=num_steps,
            guidance_scale=1.0,
        )
        pictures = self.ensemble.codec.decode(latents)
        return Measured(self.share_right(pictures), rmse(pictures, self.wanted), seconds)


def taught(run_dir: Path, judge: Judge) -> Iterator[tuple[Arm, Measured]]:
    """Yield every training with what came of it, in the order in which they finish."""
    arms = [Arm(n, objective, seed) for seed, n, objective in product(SEEDS, STEPS, OBJECTIVES)]
    processes = ProcessPoolExecutor(os.cpu_count(), get_context("spawn"))
    with tempfile.TemporaryDirectory() as folder, processes as pool:
        outputs = {arm: Path(folder) / "-".join(map(str, arm)) for arm in arms}
        trainings = {pool.submit(train, run_dir, *each): each[0] for each in outputs.items()}
        for training in as_completed(trainings):
            arm = trainings[training]
            expert = load_expert(VerifiedFolder(Folder(outputs[arm]), None))
            measured = judge.measure(expert, arm.num_steps, training.result())
            print(arm, measured, file=sys.stderr, flush=True)
            yield arm, measured


def table(rows: Mapping[str, Mapping[int, Sequence[Measured]]]) -> Iterator[str]:
    """Yield the lines of the table, of rows with the measures of every seed by steps."""
    titles = (f"right in {n} steps | RMSE | CPU s" for n in STEPS)
    yield f"| | {' | '.join(titles)} |"
    yield f"|---|{'---|' * 3 * len(STEPS)}"
    for name, by_steps in rows.items():
        yield f"| {name} | {' | '.join(_cells(by_steps[n]) for n in STEPS)} |"


def _cells(seeds: Sequence[Measured]) -> str:
    shares = ", ".join(f"{one.right:.4f}" for one in seeds)
    seconds = mean(one.seconds for one in seeds)
    return (
        f"{shares} | {mean(one.rmse for one in seeds):.2f} | {f'{seconds:.0f}' if seconds else ''}"
    )


def main() -> None:
    """Measure."""
    run, num_captions = open_run(__doc__, "a distilled run of the quickstart")
    judge = Judge(run, num_captions)
    student, training = open_student(run, STUDENT).expert(0), run.config.few_step_training
    found = dict(taught(Path(run.config.run_dir), judge))
    rows = {UNTAUGHT: {n: [judge.measure(student, n)] for n in STEPS}} | {
        objective: {n: [found[Arm(n, objective, seed)] for seed in SEEDS] for n in STEPS}
        for objective in OBJECTIVES
    }
    print(
        f"{len(judge.wanted)} captions that were never shown; right is a picture in all attributes "
        f"(of the ensemble's {judge.share_right(judge.wanted):.4f}), by seed. The others are means "
        f"over the {len(SEEDS)} seeds: RMSE, in pixel values, to what the ensemble draws from the "
        f"same noise in {judge.options.num_inference_steps} steps; CPU time of the training, "
        f"{training.steps} steps of {training.batch_size} samples.\n"
    )
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
