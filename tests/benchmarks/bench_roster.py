"""Print what becomes of quality when an expert of the quickstart leaves, returns, is replaced.

    python tests/benchmarks/bench_roster.py runs/quickstart        (results.py does)

The run must have its bundle; it is not written to. On held-out rows, on one thread and without Ray:
how many are routed to their own cluster at the worst noise level, and the error of the velocity
that pictures are drawn with, the mean of all levels.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from bench_solvers import quickstart_run
from torch import Tensor

from paris_ray.bundle import load_bundle
from paris_ray.diffusion import router_logits, sample_path
from paris_ray.folders import Folder
from paris_ray.models import TextConditioning
from paris_ray.roster.changes import Roster
from paris_ray.roster.newcomer import Newcomer
from paris_ray.roster.successor import Change, Options
from paris_ray.run import EXPERT_WEIGHTS, MODEL_CONFIG, Run
from paris_ray.sampling.teacher import EnsembleTeacher
from paris_ray.sampling_options import sampling_options
from paris_ray.seeding import torch_generator
from paris_ray.training.data import LatentDataset, load_dataset
from paris_ray.training.router_quality import NOISE_LEVELS

POINT = 0.01  # by which accuracy elsewhere may fall
BATCH_SIZE = 256


@dataclass(frozen=True, slots=True)
class Quality:
    """Of rows of a cluster, and of those of all others.

    Attributes:
        accuracy: Share routed to their own expert, at the worst level; of both groups.
        loss: Mean squared error of the mixture's velocity, over all levels; of both groups.
    """

    accuracy: tuple[float, float]
    loss: tuple[float, float]


def held_out_rows(run: Run) -> LatentDataset:
    """Return the held-out rows of a run, with their clusters."""
    shards = run.held_out_shards()
    rows = load_dataset(list(shards.values()))
    return replace(rows, clusters=torch.tensor(list(shards))[rows.clusters])


def measure(bundle_path: str, rows: LatentDataset, cluster: int, experts: list[int]) -> Quality:
    """Measure a bundle on the rows of one cluster, and on the others.

    Args:
        bundle_path: The bundle.
        rows: Held-out rows.
        cluster: The one that changed.
        experts: Number of the expert of each cluster; -1: it has none.
    """
    bundle = load_bundle(bundle_path)
    teacher = EnsembleTeacher(bundle, sampling_options(bundle))
    wanted = torch.tensor(experts)[rows.clusters]
    right, errors = [], []
    for t in NOISE_LEVELS:
        found = [
            answers(teacher, bundle.router, rows, index, t)
            for index in torch.arange(len(rows)).split(BATCH_SIZE)
        ]
        chosen, error = (torch.cat(parts) for parts in zip(*found, strict=True))
        right.append(chosen == wanted)
        errors.append(error)
    is_own = rows.clusters == cluster
    groups = (is_own, ~is_own)
    return Quality(
        accuracy=tuple(min(r[group].double().mean().item() for r in right) for group in groups),
        loss=tuple(torch.stack(errors)[:, group].mean().item() for group in groups),
    )


@torch.no_grad()
def answers(
    teacher: EnsembleTeacher, router: torch.nn.Module, rows: LatentDataset, index: Tensor, t: float
) -> tuple[Tensor, Tensor]:
    """Return which expert is the likeliest for each row, and the error of the mixture."""
    latents = rows.read_latents(index)
    generator = torch_generator(0, "bench roster", round(1000 * t), int(index[0]))
    noise = torch.randn(latents.shape, generator=generator)
    path = sample_path(latents, noise, torch.full((len(index),), t))
    text = TextConditioning.from_vectors(rows.read_text(index, 0))
    velocity = teacher.routed(path.x_t, path.t, text)
    error = (velocity - path.velocity).square().flatten(1).mean(dim=1)
    return router_logits(router, path.x_t, path.t, text).argmax(dim=1), error


class Bench:
    """Changes of one expert, and what they do.

    Args:
        run: A finished run.
        cluster: The expert that leaves, returns and is replaced.
        folder: For the bundles.
    """

    def __init__(self, run: Run, cluster: int, folder: Path) -> None:
        self.run, self.cluster, self.folder = run, cluster, folder
        self.rows, self.count = held_out_rows(run), run.num_experts
        self.before = measure(run.bundle.uri, self.rows, cluster, list(range(self.count)))

    def lines(self, fits_all: bool) -> Iterator[str]:
        """Yield a row of the table for each change and way to refit.

        Args:
            fits_all: Whether the whole router is fitted too, which takes longest.
        """
        cluster, original = self.cluster, self.run.bundle.uri
        some = ("head", "all") if fits_all else ("head",)
        yield self._line("as trained", None, self.before)
        higher = [k if k < cluster else k - 1 for k in range(self.count)]
        gone = [-1 if k == cluster else higher[k] for k in range(self.count)]
        back = [self.count - 1 if k == cluster else higher[k] for k in range(self.count)]
        for method in ("none", *some):
            yield self._change("retired", original, lambda r: r.retire(cluster), method, gone)
        without = str(self.folder / "retired-head")
        comes = Newcomer.open(self.run.expert(cluster), self.run.shard(cluster))
        for method in some:
            yield self._change("added back", without, lambda r: r.add(comes), method, back)
        seed = Newcomer.open(self._seed(), self.run.shard(cluster))
        same = list(range(self.count))
        for method in ("none", "head"):
            yield self._change(
                "replaced by the seed", original, lambda r: r.replace(cluster, seed), method, same
            )

    def _seed(self) -> Folder:
        """Return the seed as somebody's expert: two files, without a manifest."""
        target = self.folder / "seed"
        target.mkdir(exist_ok=True)
        for name in (MODEL_CONFIG, EXPERT_WEIGHTS):
            shutil.copy(self.run.seed.local_path / name, target / name)
        return Folder(target)

    def _change(
        self,
        what: str,
        bundle: str,
        change: Callable[[Roster], Change],
        method: str,
        experts: list[int],
    ) -> str:
        output = str(self.folder / f"{what}-{method}")
        started = time.process_time()
        roster = Roster(bundle, self.run.config)
        roster.write(change(roster), output, Options(method=method))
        seconds = time.process_time() - started
        quality = measure(output, self.rows, self.cluster, experts)
        return self._line(f"{what}, {method}", seconds, quality)

    def _line(self, what: str, seconds: float | None, quality: Quality) -> str:
        own, others = quality.accuracy
        cells = [
            f"{self.cluster}",
            what,
            "" if seconds is None else f"{seconds:.0f}",
            f"{others:.4f}",
            f"{quality.loss[1]:.4f}",
            "" if what.startswith("retired") else f"{own:.4f}",
            f"{quality.loss[0]:.4f}",
            "" if self.before.accuracy[1] - others <= POINT else "MISSED",
        ]
        return f"| {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run_dir", type=Path, help="a finished run of the quickstart")
    parser.add_argument("--experts", type=int, nargs="+", default=[0, 3, 6], help="which change")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    run = quickstart_run(options.run_dir)
    print(
        f"{len(held_out_rows(run))} held-out rows. Accuracy: routed to their own cluster at the "
        "worst of the noise levels; loss: of the mixture's velocity, over all levels. Missed is "
        f"an accuracy elsewhere that fell by more than {POINT}. Seconds are of the processor, for "
        "the whole change.\n"
    )
    print("| expert | change, refit | s | accuracy elsewhere | loss | own rows | loss | |")
    print("|---|---|---|---|---|---|---|---|")
    for number, cluster in enumerate(options.experts):
        with tempfile.TemporaryDirectory() as folder:
            for line in Bench(run, cluster, Path(folder)).lines(fits_all=number == 0):
                print(line, flush=True)


if __name__ == "__main__":
    main()
