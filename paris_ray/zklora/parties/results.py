"""Results of Ray tasks, and their errors as they were raised."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray


def result(reference: Any) -> Any:
    """Return what a task or actor returned; raise what it raised, without Ray's wrapping."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None


def in_chunks(
    start: Callable[[Sequence[str]], Any], names: Sequence[str], size: int
) -> Iterator[Any]:
    """Yield the results of a task a chunk of names, as they come.

    Few more tasks are started than the cluster computes at a time: what they are given lies in
    memory.

    Args:
        start: Starts the task of a chunk, and returns its reference.
        names: What is divided among them.
        size: Of a chunk.
    """
    most = 1 + int(ray.cluster_resources().get("CPU", 1))
    waiting: list[Any] = []
    for first in range(0, len(names), size):
        if len(waiting) == most:
            ready, waiting = ray.wait(waiting)
            yield result(ready[0])
        waiting.append(start(names[first : first + size]))
    while waiting:
        ready, waiting = ray.wait(waiting)
        yield result(ready[0])
