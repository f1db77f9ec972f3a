"""Results of Ray tasks, and their errors as they were raised."""

from typing import Any

import ray


def result(reference: Any) -> Any:
    """Return what a task or actor returned; raise what it raised, without Ray's wrapping."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
