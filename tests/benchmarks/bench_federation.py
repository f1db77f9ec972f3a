"""Print how well a federation's router does by what its sites hand over.

    python tests/benchmarks/bench_federation.py runs/quickstart        (results.py does)

The run must have its router; it is not written to. A tenth of its rows is the coordinator's; of the
others one site has the first half of the clusters, another one the second. Routers are compared on
the run's held-out rows, which none of them was trained on.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.numpy
import torch

from paris_ray.artifacts import VerifiedFolder
from paris_ray.bundle.weights import StoredModel
from paris_ray.config import TrainingConfig, load
from paris_ray.embeddings import (
    LATENTS,
    NULL_TEXT,
    TEXT_EMBEDDING,
    read_table,
    write_part,
)
from paris_ray.folders import Folder
from paris_ray.models import Router, TextConditioning
from paris_ray.roster.federation import shared_rows
from paris_ray.roster.federation.statistics import fitted_head, router_statistics
from paris_ray.run import Run
from paris_ray.training.data import load_dataset
from paris_ray.training.router import measure_router, train_router
from paris_ray.training.router_quality import NOISE_LEVELS

COORDINATOR = 10  # every tenth row is the coordinator's
CPU = torch.device("cpu")
Shards = dict[int, Folder]


def split(run: Run, root: Folder) -> tuple[Shards, Shards]:
    """Write the coordinator's shards and the sites'; return them by cluster."""
    parts: list[Shards] = [{}, {}]
    for k in range(run.num_experts):
        table = read_table(run.shard(k), [LATENTS, TEXT_EMBEDDING])
        chosen = [i % COORDINATOR == 0 for i in range(table.num_rows)]
        for whose, shards in enumerate(parts):
            rows = [i for i, is_coordinators in enumerate(chosen) if is_coordinators != whose]
            folder = root / f"{whose}" / f"cluster={k}"
            write_part(folder, "part-000000.parquet", table.take(rows))
            folder.write(NULL_TEXT, run.shard(k).read(NULL_TEXT))
            shards[k] = folder
    return parts[0], parts[1]


def open_folder(folder: Folder) -> Router:
    """Return a trained router."""
    return StoredModel(Router, VerifiedFolder(folder, None)).load(CPU)


def train(run: Run, shards: Shards, output: Folder, start: Folder | None = None) -> Router:
    """Train a router on shards, as the run's own was, or from another one."""
    config: TrainingConfig = replace(run.config.router_training, threads=1)
    config = config if start is None else replace(config, init_from=start.uri)
    train_router(
        run.config.router,
        config,
        shards=list(shards.values()),
        shards_digest="",
        seed=0,
        output=output,
        on_progress=lambda _: None,
    )
    return open_folder(output)


def of_statistics(run: Run, given: Router, sites: Sequence[Shards]) -> Router:
    """Return the given router, its last layer fitted to statistics of each site."""
    datasets = [{k: load_dataset([shard]) for k, shard in site.items()} for site in sites]
    statistics = [
        router_statistics(
            given, site, run.config.router_training, TextConditioning.from_vectors, seed=0
        )
        for site in datasets
    ]
    rows = [len(dataset) for site in datasets for dataset in site.values()]
    router = Router(run.config.router)
    router.load_state_dict(given.state_dict())
    weight, bias = fitted_head(statistics, rows)
    router.head[-1].load_state_dict({"weight": weight, "bias": bias})
    return router.eval().requires_grad_(False)


def of_rows(run: Run, given: Folder, sites: Sequence[Shards], root: Folder) -> Router:
    """Return the given router, trained on the rows that sites share."""
    sent = []
    for i, site in enumerate(sites):
        folder = root / f"sent-{i}"
        shared_rows.write_rows(folder, {k: load_dataset([s]) for k, s in site.items()}, seed=0)
        sent.append(safetensors.numpy.load(folder.read(shared_rows.FILE)))
    shards = {k: root / "rows" / f"cluster={k}" for k in range(run.num_experts)}
    for k, folder in shards.items():
        shared_rows.write_shard(folder, k, sent, run.shard(k).read(NULL_TEXT))
    return train(run, shards, root / "of-rows", given)


def row(name: str, facts: Mapping[str, Any], seconds: float) -> str:
    """Return a line of the table."""
    levels = facts["held_out"]["levels"].values()
    right = [f"{level['accuracy']:.3f}" for level in levels]
    loss, error = (
        sum(level[measure] for level in levels) / len(levels)
        for measure in ("nll_calibrated", "ece_calibrated")
    )
    return f"| {name} | {' | '.join(right)} | {loss:.4f} | {error:.4f} | {seconds:.0f} |"


def compare(run: Run, root: Folder) -> list[str]:
    """Return the lines of the table."""
    own, theirs = split(run, root)
    half = run.num_experts // 2
    sites = [{k: theirs[k] for k in part} for part in (range(half), range(half, run.num_experts))]
    ways: dict[str, Callable[[], Router]] = {
        "as trained on all rows together": lambda: open_folder(run.router),
        "trained on the coordinator's rows, as given": lambda: train(run, own, root / "given"),
        "that, its last layer fitted to statistics": lambda: of_statistics(
            run, open_folder(root / "given"), sites
        ),
        "that, trained on 5 % of the sites' rows": lambda: of_rows(
            run, root / "given", sites, root
        ),
    }
    everything = load_dataset([run.shard(k) for k in range(run.num_experts)])
    lines = []
    for name, make in ways.items():
        started = time.perf_counter()
        router = make()
        seconds = time.perf_counter() - started
        encode = TextConditioning.from_vectors
        facts = measure_router(router, everything, run.held_out_shards(), encode, 0)
        lines.append(row(name, facts, seconds))
    levels = " | ".join(f"t = {t}" for t in NOISE_LEVELS)
    return [
        f"| router | {levels} | loss | error | seconds |",
        f"|---|{'---|' * (len(NOISE_LEVELS) + 3)}",
        *lines,
    ]


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run_dir", help="a finished run of the quickstart")
    run = Run(load("quickstart", [f"run_dir={parser.parse_args().run_dir}"]))
    torch.set_num_threads(1)
    print(
        "The share of held-out rows that is sent to its own cluster, by noise level; loss "
        "(negative log likelihood, nats) and calibration error are means over the levels, after "
        "the fitted temperature. One thread.\n"
    )
    with tempfile.TemporaryDirectory() as path:
        print("\n".join(compare(run, Folder(Path(path)))))


if __name__ == "__main__":
    main()
