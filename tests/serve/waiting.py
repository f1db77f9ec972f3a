"""Waiting in tests: until something is so, however busy the machine is."""

import time
from collections.abc import Callable

WAIT_S = 180.0  # for what takes seconds on an idle machine


def wait_until(is_so: Callable[[], bool]) -> None:
    """Return when something is so; fail after WAIT_S."""
    deadline = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)
