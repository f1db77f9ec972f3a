"""Losses on held-out rows: what they are, when they come, and that nothing is trained on them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from paris_ray.artifacts import CHECKPOINT, METRICS, VerifiedFolder
from paris_ray.bundle import load_expert
from paris_ray.evaluation.denoising import denoising_losses
from paris_ray.folders import Folder
from paris_ray.models import Expert, TextConditioning
from paris_ray.training.data import load_dataset
from paris_ray.training.validation import MAX_ROWS, NOISE_LEVELS, held_out_validation
from tests.training_shards import EXPERT, TRAINING, Stop, stop_at, train, write_shard

NAMES = ("held_out_loss", "held_out_loss_others")
encode = TextConditioning.from_vectors


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Folder]:
    """Training rows, held-out ones like them, and those of two other clusters."""
    root = tmp_path_factory.mktemp("shards")
    sizes = enumerate((10, 5, 3, 4))
    return [write_shard(Folder(root / str(i)), n, mean=i / 2, seed=i) for i, n in sizes]


@pytest.fixture
def held_out(shards: list[Folder]) -> dict[str, Any]:
    return {"held_out": [shards[1]], "held_out_others": shards[2:]}


def rows_of(metrics: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in metrics.splitlines()]


@pytest.fixture
def expert(randomised: Any) -> Expert:
    model: Expert = randomised(Expert(EXPERT), 0).eval()
    return model


def by_hand(expert: Expert, folder: Folder, rows: list[int], seed: int) -> float:
    data = load_dataset([folder])
    index = torch.tensor(rows)
    text = encode(data.read_text(index, 0))
    losses = denoising_losses(expert, data.read_latents(index), text, NOISE_LEVELS, seed=seed)
    return losses.double().mean().item()


def test_losses_are_the_mean_over_levels_and_rows(expert: Expert, shards: list[Folder]) -> None:
    validate = held_out_validation([shards[1]], [shards[2]], encode, 3)
    assert validate is not None
    found = validate(expert)
    assert tuple(found) == NAMES
    assert found[NAMES[0]] == pytest.approx(by_hand(expert, shards[1], list(range(5)), 3))
    assert found[NAMES[1]] == pytest.approx(by_hand(expert, shards[2], list(range(3)), 3))
    torch.manual_seed(9)
    assert validate(expert) == found
    other = held_out_validation([shards[1]], [shards[2]], encode, 4)
    assert other is not None and other(expert) != found


def test_of_many_rows_evenly_spread_ones_count(expert: Expert, tmp_path: Path) -> None:
    many = write_shard(Folder(tmp_path), 160)
    validate = held_out_validation([many], [], encode, 0)
    assert validate is not None
    chosen = [i * 160 // MAX_ROWS for i in range(MAX_ROWS)]
    assert chosen[-1] > 150
    assert validate(expert) == {NAMES[0]: pytest.approx(by_hand(expert, many, chosen, 0))}


def test_without_held_out_rows_there_is_nothing_to_measure(
    expert: Expert, shards: list[Folder]
) -> None:
    assert held_out_validation([], [], encode, 0) is None
    only_others = held_out_validation([], [shards[2]], encode, 0)
    assert only_others is not None and list(only_others(expert)) == [NAMES[1]]


@pytest.mark.parametrize(
    ("every", "expected"),
    [(1, [2, 4, 6, 8, 10, 12]), (4, [4, 8, 12]), (5, [6, 10, 12]), (7, [8, 12]), (200, [12])],
)
def test_losses_come_at_the_first_log_after_they_are_due_and_at_the_end(
    shards: list[Folder], held_out: dict[str, Any], tmp_path: Path, every: int, expected: list[int]
) -> None:
    config = replace(TRAINING, validate_every=every)
    _, metrics = train(shards[0], Folder(tmp_path), config=config, data=held_out)
    rows = rows_of(metrics)
    assert len(rows) == 6
    measured = [row["samples_seen"] // 4 for row in rows if "held_out_loss" in row]
    assert measured == expected
    assert all((NAMES[0] in row) == (NAMES[1] in row) for row in rows)
    last = rows[-1]
    assert 0 < last[NAMES[0]] != last[NAMES[1]] > 0


def test_nothing_is_trained_on_held_out_rows(
    shards: list[Folder], held_out: dict[str, Any], tmp_path: Path
) -> None:
    """Weights, checkpoint and training losses are the same to the bit without them."""
    with_them, without = Folder(tmp_path / "with"), Folder(tmp_path / "without")
    config = replace(TRAINING, validate_every=1)
    weights, metrics = train(shards[0], with_them, config=config, data=held_out)
    assert weights == train(shards[0], without)[0]
    first, second = (safetensors.torch.load(f.read(CHECKPOINT)) for f in (with_them, without))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    unmeasured = [{k: v for k, v in row.items() if k not in NAMES} for row in rows_of(metrics)]
    assert unmeasured == rows_of(without.read(METRICS))
    assert unmeasured != rows_of(metrics)


@pytest.mark.parametrize("killed_at", [[6], [10], [6, 10]])
@pytest.mark.parametrize("changes", [{"validate_every": 5}, {"validate_every": 3, "log_every": 3}])
def test_resumed_metrics_are_the_same_to_the_byte(
    shards: list[Folder],
    held_out: dict[str, Any],
    tmp_path: Path,
    killed_at: list[int],
    changes: dict[str, int],
) -> None:
    config = replace(TRAINING, **({"log_every": 2} | changes))
    whole = train(shards[0], Folder(tmp_path / "whole"), config=config, data=held_out)
    output = Folder(tmp_path / "output")
    for step in killed_at:
        step -= step % config.log_every
        with pytest.raises(Stop):
            train(shards[0], output, config=config, data=held_out, on_progress=stop_at(step))
    assert train(shards[0], output, config=config, data=held_out) == whole


def test_losses_are_those_of_the_average(
    shards: list[Folder], held_out: dict[str, Any], tmp_path: Path
) -> None:

    output = Folder(tmp_path)
    _, metrics = train(shards[0], output, data=held_out, seed=5)
    validate = held_out_validation(*held_out.values(), encode, 5)
    assert validate is not None
    found = validate(load_expert(VerifiedFolder(output, None)))
    last = rows_of(metrics)[-1]
    np.testing.assert_allclose([found[n] for n in NAMES], [last[n] for n in NAMES], rtol=1e-6)
