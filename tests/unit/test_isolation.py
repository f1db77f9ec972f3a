"""No collective beside a training, however it is asked for."""

import socket
from collections.abc import Callable

import pytest
import torch
from torch.distributed import distributed_c10d, init_process_group

from paris_ray.errors import TrainingError
from paris_ray.training.isolation import isolated


def alone() -> dict[str, object]:
    """Options of a process group that begins at once, since it has one member."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"tcp://127.0.0.1:{port}"
    return {"backend": "gloo", "init_method": address, "world_size": 1, "rank": 0}


@pytest.mark.parametrize(
    "begin",
    [
        lambda: torch.distributed.init_process_group(**alone()),
        lambda: distributed_c10d.init_process_group(**alone()),
        lambda: init_process_group(**alone()),  # a name that was imported before
    ],
)
def test_a_process_group_is_refused_with_who_asked_for_it(begin: Callable[[], None]) -> None:
    def train() -> None:
        with isolated("expert-3"):
            begin()

    with pytest.raises(TrainingError, match="expert-3 asked for a process group"):
        train()
    assert not torch.distributed.is_initialized(), "the next task of this worker begins without"


def test_what_a_failed_training_set_up_is_ended() -> None:
    def train() -> None:
        with isolated("expert-3"):
            init_process_group(**alone())
            raise KeyError

    with pytest.raises(KeyError):
        train()
    assert not torch.distributed.is_initialized()


def test_afterwards_everything_is_as_before() -> None:
    with isolated("expert-3"):
        assert torch.distributed.init_process_group is not init_process_group
    assert torch.distributed.init_process_group is init_process_group
    assert distributed_c10d.init_process_group is init_process_group


def test_a_process_group_of_before_is_refused() -> None:
    torch.distributed.init_process_group(**alone())
    try:
        with (
            pytest.raises(TrainingError, match="expert-3 asked for a process group"),
            isolated("expert-3"),
        ):
            pytest.fail("it trains")
    finally:
        torch.distributed.destroy_process_group()
