"""Runs with two experts on the tests' Ray, and the processes that train them."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import psutil

from paris_ray.artifacts import read_manifest
from paris_ray.run import EXPERT, Run

NUM_EXPERTS = 2
OPTIONS = [
    f"cluster.num_clusters={NUM_EXPERTS}",
    "seed_training.steps=0",
    "training.steps=600",
    "training.checkpoint_every=20",
]


def digests(run: Run) -> list[str]:
    """Return the digests of the experts."""
    return [read_manifest(run.expert(k), EXPERT).digest for k in range(NUM_EXPERTS)]


def workers(*names: str) -> list[psutil.Process]:
    """Return the processes of this test's Ray that do tasks of these names, in any order."""
    titles, found = {f"ray::{name}" for name in names}, []
    for process in psutil.Process().children(recursive=True):
        try:
            found += [process] if titles & set(process.cmdline()[:1]) else []
        except psutil.NoSuchProcess:
            continue
    return found


@contextmanager
def meanwhile(do: Callable[[], object]) -> Iterator[None]:
    """Do something in a thread while the driver works in this one; raise what it raises."""
    with ThreadPoolExecutor() as pool:
        future = pool.submit(do)
        yield
    future.result()
