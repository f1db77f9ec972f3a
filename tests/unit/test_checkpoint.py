"""Checkpoints: what was changed in one is never trained on."""

import logging
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import nn

from paris_ray.artifacts import CHECKPOINT
from paris_ray.errors import ArtifactError
from paris_ray.folders import Folder
from paris_ray.training import checkpoint
from paris_ray.training.checkpoint import TrainingState
from paris_ray.training.ema import ExponentialMovingAverage

IDENTITY = "0" * 64


def new_state() -> TrainingState:
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return TrainingState(model, ExponentialMovingAverage(model, 0.9), [optimizer])


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    folder = Folder(tmp_path)
    checkpoint.save(folder, new_state(), identity=IDENTITY, samples_seen=160)
    return folder


def test_a_checkpoint_is_restored(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    assert checkpoint.restore(folder, new_state(), identity=IDENTITY) == 160
    assert not caplog.records


@pytest.mark.parametrize("mask", [1, 8, 0x20])  # 8 makes 960 of 160
def test_no_byte_may_change(folder: Folder, mask: int) -> None:
    intact, state = folder.read(CHECKPOINT), new_state()
    for place in range(len(intact)):
        changed = intact[:place] + bytes([intact[place] ^ mask]) + intact[place + 1 :]
        folder.local_path.joinpath(CHECKPOINT).write_bytes(changed)
        with pytest.raises(ArtifactError, match=rf"{CHECKPOINT} is damaged"):
            checkpoint.restore(folder, state, identity=IDENTITY)


def test_a_checkpoint_of_earlier_code_is_restored_with_a_warning(
    folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    path = folder.local_path / CHECKPOINT
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    del header["crc32"]
    tensors = safetensors.torch.load(path.read_bytes())
    safetensors.torch.save_file(tensors, path, metadata=header)
    with caplog.at_level(logging.WARNING, "paris_ray"):
        assert checkpoint.restore(folder, new_state(), identity=IDENTITY) == 160
    (record,) = caplog.records
    assert f"{path} has no checksum" in record.getMessage()


def test_one_that_cannot_be_had_is_not_called_damaged(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reading(self: Folder, name: str) -> None:
        raise ArtifactError(f"{name} cannot be read: 503")

    monkeypatch.setattr(Folder, "reading", reading)
    with pytest.raises(ArtifactError, match=r"^checkpoint\.safetensors cannot be read: 503$"):
        checkpoint.restore(folder, new_state(), identity="id")
