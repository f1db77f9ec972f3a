"""Print what the measures of paris_ray/evaluation cost on 50,000 pictures, on one thread.

    OMP_NUM_THREADS=1 taskset -c 0 python tests/benchmarks/bench_evaluation.py

Rows are random: 50,000 of 64 features for both sets. Nothing is asserted.
"""

import multiprocessing
import platform
import resource
import sys
import time
from collections.abc import Callable

import faiss
import numpy as np
import psutil
import torch

from paris_ray.evaluation.attributes import attribute_accuracy
from paris_ray.evaluation.bootstrap import bootstrap_mean
from paris_ray.evaluation.calibration import calibration, fit_temperature
from paris_ray.evaluation.coverage import coverage
from paris_ray.evaluation.frechet import fit_gaussian, frechet_distance, frechet_distance_infinity
from paris_ray.evaluation.kernel import cmmd, kid
from paris_ray.evaluation.memorisation import memorisation
from paris_ray.evaluation.prototypes import fit_prototypes
from paris_ray.evaluation.recall import caption_recall
from paris_ray.evaluation.retrieval import clip_scores, retrieval

NUM_ROWS, NUM_FEATURES, NUM_CLUSTERS, NUM_DRAWN = 50_000, 64, 8, 1000
GENERATOR = np.random.default_rng(0)


def rows(count: int = NUM_ROWS) -> np.ndarray:
    """Return unit-length random features."""
    features = GENERATOR.standard_normal((count, NUM_FEATURES), dtype=np.float32)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def pictures(count: int) -> np.ndarray:
    """Return random 32x32 pictures."""
    return GENERATOR.integers(256, size=(count, 32, 32, 3), dtype=np.uint8)


def frechet() -> Callable[[], object]:
    """Fit both sets and compare them."""
    x, y = rows(), rows()
    return lambda: frechet_distance(fit_gaussian(x), fit_gaussian(y))


def frechet_infinity() -> Callable[[], object]:
    """Extrapolate from 15 subsets."""
    x, y = rows(), rows()
    return lambda: frechet_distance_infinity(x, fit_gaussian(y), seed=0)


def kernel_inception() -> Callable[[], object]:
    """Compare 100 pairs of subsets of 1000."""
    x, y = rows(), rows()
    return lambda: kid(x, y, seed=0)


def kernel_clip() -> Callable[[], object]:
    """Compare all with all."""
    x, y = rows(), rows()
    return lambda: cmmd(x, y)


def clip() -> Callable[[], object]:
    """Compare pairs."""
    x, y = rows(), rows()
    return lambda: clip_scores(x, y)


def ranks() -> Callable[[], object]:
    """Rank all captions for all pictures, and back."""
    x, y = rows(), rows()
    return lambda: retrieval(x, y)


def balls() -> Callable[[], object]:
    """Count pictures in balls."""
    x, y = rows(), rows()
    return lambda: coverage(x, y)


def copies() -> Callable[[], object]:
    """Find the nearest of 50,000 training pictures of as many drawn and 5,000 held-out ones."""
    x, y, z = rows(), rows(5000), rows()
    return lambda: memorisation(x, y, z)


def attributes() -> Callable[[], object]:
    """Find the nearest gallery pictures of 1,000 drawn ones."""
    x, y, values = pictures(NUM_DRAWN), pictures(NUM_ROWS), list(range(NUM_ROWS))
    return lambda: attribute_accuracy(x, {"a": values[:NUM_DRAWN]}, y, {"a": values})


def recall() -> Callable[[], object]:
    """Find the nearest corpus picture of 1,000 drawn ones."""
    x, y, captions = pictures(NUM_DRAWN), pictures(NUM_ROWS), [""] * NUM_ROWS
    return lambda: caption_recall(x, np.arange(NUM_DRAWN), y, captions)


def router() -> Callable[[], object]:
    """Fit prototypes and a temperature, and measure the calibration."""
    x, clusters = torch.from_numpy(rows()), torch.arange(NUM_ROWS) % NUM_CLUSTERS

    def measure() -> object:
        logits = fit_prototypes(x, clusters, num_clusters=NUM_CLUSTERS).logits(x)
        return calibration(logits / fit_temperature(logits, clusters), clusters)

    return measure


def resamples() -> Callable[[], object]:
    """Resample 2,000 times."""
    values = GENERATOR.random(NUM_ROWS)
    return lambda: bootstrap_mean(values, seed=0)


BENCHES = {
    "frechet_distance": frechet,
    "frechet_distance_infinity": frechet_infinity,
    "kid": kernel_inception,
    "cmmd": kernel_clip,
    "clip_scores": clip,
    "retrieval": ranks,
    "coverage": balls,
    "memorisation": copies,
    "attribute_accuracy (1,000 drawn)": attributes,
    "caption_recall (1,000 drawn)": recall,
    "prototypes, temperature, calibration": router,
    "bootstrap_mean": resamples,
}


def print_row(name: str) -> None:
    """Measure one, with its highest memory above that of its inputs."""
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    measure = BENCHES[name]()
    before = psutil.Process().memory_info().rss
    start = time.perf_counter()
    measure()
    seconds = time.perf_counter() - start
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10 - before) / 2**30
    print(f"| {name} | {seconds:.1f} | {growth:.2f} |", flush=True)


def main() -> None:
    """Measure each in a process of its own, whose memory begins low."""
    print(f"{platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}\n")
    print("| measure | seconds | memory above its inputs, GiB |\n|---|---|---|", flush=True)
    processes = multiprocessing.get_context("spawn")
    for name in BENCHES:
        task = processes.Process(target=print_row, args=(name,))
        task.start()
        task.join()
        if task.exitcode:
            sys.exit(task.exitcode)


if __name__ == "__main__":
    main()
