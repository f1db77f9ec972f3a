"""Alignment: the cosine of projected tokens and features, for the first steps alone."""

from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from paris_ray.artifacts import CHECKPOINT
from paris_ray.config import ExpertConfig, TrainingConfig
from paris_ray.diffusion import Answer
from paris_ray.errors import TrainingError
from paris_ray.folders import Folder
from paris_ray.training.data import Batch
from paris_ray.training.recipes import recipe_of
from paris_ray.training.recipes.alignment import Alignment, new_projector
from tests.training_shards import EXPERT, TRAINING, Stop, stop_at, train, write_shard

NOTHING = torch.empty(0)
ALIGNED = replace(TRAINING, alignment_weight=0.5, alignment_share=0.5)


def drawn(features: torch.Tensor) -> Batch:
    return Batch(NOTHING, NOTHING, NOTHING, NOTHING, NOTHING, None, features)


def test_the_term_is_the_cosine_of_averaged_projections_and_centred_features() -> None:
    """By hand, patch by patch: a 3 x 3 window of tokens around each, with zeros beyond the edge."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 9, 4, generator=generator)
    features = torch.randn(2, 5, generator=generator)
    torch.manual_seed(0)
    alignment = Alignment(0.5, 2, 1.0, new_projector(4, 5))
    weight, bias = alignment.projector.weight, alignment.projector.bias
    assert bias is not None
    projected = torch.zeros(2, 5)
    for row in range(3):
        for column in range(3):
            projected += bias
            for i in range(max(0, row - 1), min(3, row + 2)):
                for j in range(max(0, column - 1), min(3, column + 2)):
                    kernel = weight[:, :, i - row + 1, j - column + 1]
                    projected = projected + tokens[:, 3 * i + j] @ kernel.T
    centred = features - (features[0] + features[1]) / 2
    cosines = [(p @ f / (p.norm() * f.norm())) for p, f in zip(projected / 9, centred, strict=True)]
    answer = Answer(NOTHING, NOTHING, None, (torch.zeros(2, 9, 4), tokens))
    found = alignment.term(answer, alignment.prepare(0.0, drawn(features)))
    torch.testing.assert_close(found, -0.5 * (cosines[0] + cosines[1]) / 2)


def test_it_stops_after_its_share() -> None:
    alignment = Alignment(0.5, 1, 0.25, new_projector(4, 5))
    features = torch.ones(2, 5)
    assert alignment.prepare(0.24, drawn(features)).features is not None
    stopped = alignment.prepare(0.25, drawn(features))
    assert stopped.features is None
    assert alignment.term(Answer(NOTHING, NOTHING), stopped) is None


def test_the_block_is_that_after_a_third_unless_named() -> None:
    config, on = ExpertConfig(num_layers=12), TrainingConfig(alignment_weight=0.5)
    named = replace(on, alignment_block=7)
    blocks = [recipe_of(each, config, 8).techniques[0].block for each in (on, named)]  # type: ignore[attr-defined]
    assert blocks == [4, 7]
    assert recipe_of(on, config).techniques == ()  # a probe has no features


def test_the_projector_is_in_the_checkpoint_and_not_in_the_weights(tmp_path: Path) -> None:
    features = torch.randn(10, 6, generator=torch.Generator().manual_seed(0)).numpy()
    shard = write_shard(Folder(tmp_path / "shard"), 10, features=features)
    output = Folder(tmp_path / "output")
    with pytest.raises(Stop):
        train(shard, output, config=ALIGNED, on_progress=stop_at(10))
    with safe_open(tmp_path / "output" / CHECKPOINT, framework="pt") as file:
        names = {name for name in file.keys() if "heads/" in name}  # noqa: SIM118
        assert file.get_tensor("heads/0.weight").shape == (6, 16, 3, 3)
        # It stopped after 6 steps of 12, and with it the projector's own optimiser steps.
        assert file.get_tensor("optimizer/heads/0.weight/step") == 6
    moments = ("step", "exp_avg", "exp_avg_sq")
    assert names == {f"heads/0.{part}" for part in ("weight", "bias")} | {
        f"optimizer/heads/0.{part}/{moment}" for part in ("weight", "bias") for moment in moments
    }
    weights, _ = train(shard, output, config=ALIGNED)
    plain, _ = train(shard, Folder(tmp_path / "plain"))
    assert safetensors.torch.load(weights).keys() == safetensors.torch.load(plain).keys()
    other, _ = train(shard, Folder(tmp_path / "other"), config=ALIGNED, seed=1)
    assert other != weights


def test_a_shard_without_features_is_refused(tmp_path: Path) -> None:
    shard = write_shard(Folder(tmp_path / "shard"), 10)
    with pytest.raises(TrainingError) as caught:
        train(shard, Folder(tmp_path / "output"), config=ALIGNED, expert=EXPERT)
    assert str(caught.value) == f"shard {shard.uri} has no features: alignment_weight needs them"
