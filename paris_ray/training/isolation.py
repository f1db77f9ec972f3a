"""Experts are trained apart: a training that sets up collectives is refused, and says so."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Never

import torch.distributed
from torch.distributed import distributed_c10d

from paris_ray.errors import TrainingError


@contextmanager
def isolated(name: str) -> Iterator[None]:
    """Refuse process groups of torch.distributed as long as it is entered.

    Setting one up is refused, rather than found out afterwards: it would wait for half an hour
    for others to join. Where it is asked for by a name that was imported before, it is found out
    afterwards alone, and ended, since Ray gives the process to other tasks. Not seen are
    collectives that do not go through torch.distributed, as those of ray.util.collective, groups
    that were ended meanwhile, and what code does with sockets of its own.

    Args:
        name: Who is trained, for the message.

    Raises:
        TrainingError: if there is a process group, or one is asked for.
    """

    def refuse(*_arguments: Any, **_options: Any) -> Never:
        raise TrainingError(
            f"{name} asked for a process group of torch.distributed: experts are trained without "
            "any collective, so nothing that its task runs may set one up"
        )

    if torch.distributed.is_initialized():
        refuse()
    before = distributed_c10d.init_process_group
    torch.distributed.init_process_group = distributed_c10d.init_process_group = refuse
    try:
        yield
    finally:
        torch.distributed.init_process_group = distributed_c10d.init_process_group = before
        found = torch.distributed.is_initialized()
        if found:
            torch.distributed.destroy_process_group()
    if found:
        refuse()
