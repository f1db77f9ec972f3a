"""Print what fewer steps and other solvers cost in quality, on the quickstart's held-out captions.

    python tests/benchmarks/bench_solvers.py runs/quickstart        (results.py does)

The run must have its bundle; it is not written to. Captions and noise are those of its evaluation,
on one thread and without Ray.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray

from paris_ray.bundle import Bundle, load_bundle
from paris_ray.config import SolverName, TimeGrid, load
from paris_ray.corpora import compositions
from paris_ray.corpora.labels import label_names
from paris_ray.embeddings import ATTRIBUTE, read_rows
from paris_ray.evaluation.attributes import Attributes, attribute_accuracy
from paris_ray.models import TextConditioning
from paris_ray.pipeline.drawing import chosen_rows
from paris_ray.reports import thumbnail
from paris_ray.run import Run
from paris_ray.sampling.generation import sample
from paris_ray.sampling_options import SamplingOptions, num_evaluations, sampling_options
from paris_ray.seeding import derive_seed

STEPS = (2, 3, 4, 5, 6, 8)
BASE_STEPS = 8  # of Euler's, which others are compared with
REFERENCE_STEPS = 100
BATCH_SIZE = 64
GRID_SEED = 0

GRIDS: tuple[TimeGrid, ...] = ("linspace", "half-last")

Pictures = NDArray[np.uint8]
Way = tuple[SolverName, TimeGrid, int]  # the last: steps


@dataclass(frozen=True, slots=True)
class Captions:
    """The captions that are drawn, their attributes and the seeds of their noise."""

    texts: list[str]
    attributes: Attributes
    seeds: list[int]


@dataclass(frozen=True, slots=True)
class Measured:
    """A way to draw: its velocities a picture, share right in everything, distance in pixels."""

    evaluations: int
    right: float
    rmse: float


def open_run(description: str, kind: str) -> tuple[Run, int]:
    """Return the run that the command line names, and how many captions are to be drawn.

    Args:
        description: Of the command.
        kind: What run it must be.
    """
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("run_dir", type=Path, help=kind)
    parser.add_argument("--captions", type=int, default=400, help="how many are drawn")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    return quickstart_run(arguments.run_dir), arguments.captions


def quickstart_run(run_dir: Path) -> Run:
    """Return a run of the quickstart."""
    return Run(load("quickstart", [f"run_dir={run_dir.resolve()}"]))


def right_share(run: Run, wanted: Attributes) -> Callable[[Pictures], float]:
    """Return what says which share of pictures has all the wanted attributes.

    It compares thumbnails, as a run's evaluation does, with all that its captions can ask for.
    """
    everything = compositions(run.config.corpus)
    assert everything is not None, "the quickstart knows all that its captions can ask for"

    def right(pictures: Pictures) -> float:
        small = np.stack([thumbnail(picture) for picture in pictures])
        return attribute_accuracy(small, wanted, *everything).share_all_right

    return right


def read_captions(run: Run, count: int) -> Captions:
    """Return held-out captions of a run, with the seeds that its evaluation gives them."""
    rows = chosen_rows(run, "held_out", count, "evaluation")
    names = label_names(run.config.corpus.attributes)
    table = read_rows(run.held_out, rows, ["caption", *(f"{ATTRIBUTE}{name}" for name in names)])
    seed = derive_seed(run.config.seed, "evaluation held_out")
    return Captions(
        table["caption"].to_pylist(),
        {name: table[f"{ATTRIBUTE}{name}"].to_pylist() for name in names},
        [derive_seed(seed, "picture", int(row)) for row in rows],
    )


def draw(
    bundle: Bundle, text: TextConditioning, seeds: list[int], options: SamplingOptions
) -> Pictures:
    """Return pictures `(N, S, S, 3)`."""
    parts = []
    for start in range(0, len(seeds), BATCH_SIZE):
        batch = slice(start, start + BATCH_SIZE)
        samples = sample(bundle, text.rows(batch), seeds[batch], options)
        parts.append(bundle.codec.decode(samples.latents))
    return np.concatenate(parts)


def rmse(one: Pictures, other: Pictures) -> float:
    """Return the root mean squared difference of pixel values, of 0 to 255."""
    return float(np.sqrt(np.square(one.astype(np.float64) - other).mean()))


def solver_lines(measured: dict[Way, Measured]) -> Iterator[str]:
    """Yield the table of all ways to draw, and whether the goals are met."""
    yield f"| share right, RMSE | {' | '.join(f'{n} steps' for n in STEPS)} |"
    yield f"|---|{'---|' * len(STEPS)}"
    for grid in GRIDS:
        for name in get_args(SolverName):
            ways = [measured[name, grid, steps] for steps in STEPS]
            cells = [f"{way.right:.4f}, {way.rmse:.2f}" for way in ways]
            yield f"| {name}, {grid} | {' | '.join(cells)} |"
    base = measured["euler", "linspace", BASE_STEPS]
    as_right = {way: m for way, m in measured.items() if m.right >= base.right}
    as_near = {way: m for way, m in measured.items() if m.rmse <= base.rmse}
    yield ""
    for what, found in (("As many right", as_right), ("As small an RMSE", as_near)):
        way = min(found, key=lambda way: (found[way].evaluations, found[way].rmse))
        fewest = found[way].evaluations
        goal = "met" if 2 * fewest <= base.evaluations else "missed"
        yield (
            f"{what} as by {BASE_STEPS} steps of euler on linspace: {fewest} velocities, by "
            f"{way[2]} steps of {way[0]} on {way[1]} (goal: at most half as many, {goal}). Fewest "
            f"by solver: {', '.join(_fewest(found))}.\n"
        )


def _fewest(found: dict[Way, Measured]) -> Iterator[str]:
    for name in get_args(SolverName):
        counts = [m.evaluations for way, m in found.items() if way[0] == name]
        yield f"{name} {min(counts)}" if counts else f"{name} in more than {max(STEPS)} steps"


def grid_line(bundle: Bundle, options: SamplingOptions) -> str:
    """Return how far the two time grids are apart on one seed."""
    prompt = bundle.facts.example_prompts[0]
    text = bundle.encode_text([prompt])
    one, other = (
        draw(bundle, text, [GRID_SEED], replace(options, time_grid=grid)).astype(int)
        for grid in ("linspace", "flow-match-euler")
    )
    return (
        f'Seed {GRID_SEED} of "{prompt}" by {options.num_inference_steps} steps of '
        f"{options.solver}, linspace beside flow-match-euler: RMSE {rmse(one, other):.2f}, at most "
        f"{abs(one - other).max()} of 255."
    )


def main() -> None:
    """Measure."""
    run, num_captions = open_run(__doc__, "a finished run of the quickstart")
    bundle, captions = load_bundle(run.bundle.uri), read_captions(run, num_captions)
    right = right_share(run, captions.attributes)
    text = bundle.encode_text(captions.texts)
    euler = replace(sampling_options(bundle), solver="euler", time_grid="linspace")
    long = replace(euler, num_inference_steps=REFERENCE_STEPS)
    reference = draw(bundle, text, captions.seeds, long)
    measured: dict[Way, Measured] = {}
    for name, grid, steps in product(get_args(SolverName), GRIDS, STEPS):
        options = replace(euler, solver=name, time_grid=grid, num_inference_steps=steps)
        pictures = draw(bundle, text, captions.seeds, options)
        evaluations = num_evaluations(name, steps)
        way = Measured(evaluations, right(pictures), rmse(pictures, reference))
        measured[name, grid, steps] = way
    print(
        f"{len(captions.texts)} captions that were never shown. Right is a picture in all "
        f"attributes; RMSE, in pixel values, is to {REFERENCE_STEPS} steps of euler from the same "
        f"noise, of which {right(reference):.4f} are right. N steps of heun take 2 N - 1 "
        "velocities, of the others N.\n"
    )
    print("\n".join(solver_lines(measured)))
    print(grid_line(bundle, replace(euler, num_inference_steps=BASE_STEPS)))


if __name__ == "__main__":
    main()
