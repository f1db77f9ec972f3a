"""Waiting for Ray tasks, so that none of them goes on writing when the wait has ended."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray

POLL_INTERVAL_S = 1.0


def gather(results: Sequence["ray.ObjectRef[Any]"], check: Callable[[], object]) -> list[Any]:
    """Return the results of tasks; if one fails, or `check` raises, all are ended before it passes.

    Args:
        results: Of the tasks.
        check: Called every second.
    """
    pending = list(results)
    with ended(pending):
        while pending:
            check()
            finished, pending = ray.wait(
                pending, num_returns=len(pending), timeout=POLL_INTERVAL_S, fetch_local=False
            )
            ray.get(finished)  # raises what they raised
        return ray.get(list(results))


@contextmanager
def ended(results: Sequence["ray.ObjectRef[Any]"]) -> Iterator[None]:
    """Leave only when these tasks have ended, so that none writes when a lock is given back.

    If it is left by an error, or an interrupt by the user, tasks that run are killed.
    """
    results = list(results)
    try:
        yield
    except BaseException:
        for result in results:
            ray.cancel(result, force=True)
        if results:
            ray.wait(results, num_returns=len(results), fetch_local=False)
        raise
