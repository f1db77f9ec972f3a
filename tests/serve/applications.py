"""Applications of tests."""

from collections.abc import Iterable

from ray import serve


def end_applications(names: Iterable[str]) -> None:
    """Let applications end while the next test begins.

    Serve looks every two seconds whether a replica has nothing left to do; nobody need wait for it.
    """
    for name in names:
        serve.delete(name, _blocking=False)
