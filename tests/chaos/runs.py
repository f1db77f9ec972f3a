"""Runs with two experts on the tests' Ray, its nodes, and the processes that train them."""

import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

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
def another_node(**options: Any) -> Iterator["subprocess.Popen[bytes]"]:
    """Add a node to the tests' Ray; yields its raylet."""
    import ray  # only now: ray reads RAY_AUTH_MODE when it is imported
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    cluster.head_node = ray._private.worker._global_node
    cluster.redis_address = cluster.head_node.redis_address
    node = cluster.add_node(object_store_memory=80_000_000, **options)
    try:
        yield node.all_processes["raylet"][0].process
    finally:
        cluster.remove_node(node, allow_graceful=False)


@contextmanager
def meanwhile(do: Callable[[], object]) -> Iterator[None]:
    """Do something in a thread while the driver works in this one; raise what it raises."""
    with ThreadPoolExecutor() as pool:
        future = pool.submit(do)
        yield
    future.result()
