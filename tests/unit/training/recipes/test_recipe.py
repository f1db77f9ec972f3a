"""Recipes as a whole: off they change no byte, on they resume to the bit, and misuse is refused."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from paris_ray.artifacts import CHECKPOINT
from paris_ray.config import (
    ExpertConfig,
    TrainingConfig,
    digest,
    identity,
    load,
    load_lora,
    packaged_recipes,
    to_yaml,
)
from paris_ray.errors import ArtifactError, ConfigError
from paris_ray.folders import Folder
from paris_ray.models import Expert
from paris_ray.seeding import build_seeded
from paris_ray.training.data import batches, load_dataset
from paris_ray.training.schedule import learning_rate
from tests.training_shards import EXPERT, TRAINING, Stop, stop_at, train, write_shard

DEEP = replace(EXPERT, num_layers=3)
DDPM = replace(DEEP, prediction="epsilon")
TECHNIQUES: dict[str, tuple[ExpertConfig, TrainingConfig]] = {
    "muon": (DEEP, replace(TRAINING, hidden_optimizer="muon")),
    "contrastive_flow": (DEEP, replace(TRAINING, contrastive_weight=0.05)),
    "layersync": (DEEP, replace(TRAINING, layersync_weight=0.2)),
    "alignment": (DEEP, replace(TRAINING, alignment_weight=0.5, alignment_share=0.7)),
    "shifted_time": (DEEP, replace(TRAINING, t_shift=3.0)),
    "min_snr": (DDPM, replace(TRAINING, min_snr_gamma=5.0)),
    "together": (
        DEEP,
        replace(
            TRAINING,
            hidden_optimizer="muon",
            contrastive_weight=0.05,
            layersync_weight=0.2,
            alignment_weight=0.5,
            t_shift=3.0,
        ),
    ),
}


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    features = np.random.default_rng(1).standard_normal((10, 6)).astype(np.float32)
    return write_shard(Folder(tmp_path_factory.mktemp("shard")), 10, features=features)


def plain_by_hand(shard: Folder, config: TrainingConfig) -> dict[str, torch.Tensor]:
    """The plain recipe in a few lines of torch: AdamW, flow matching, a moving average."""
    model = build_seeded(lambda: Expert(DEEP), 0)
    draw = batches(load_dataset([shard]), config, seed=0, purpose="batch", expert=DEEP)
    trained = [p for p in model.parameters() if p.requires_grad]
    rule = {"betas": config.betas, "eps": config.adam_eps, "weight_decay": config.weight_decay}
    adamw = torch.optim.AdamW(trained, fused=True, **rule)
    average = {name: value.clone() for name, value in model.state_dict().items()}
    for step in range(config.steps):
        batch = draw(step)
        t = batch.t.view(-1, 1, 1, 1)
        x, variance = (1 - t) * batch.latents + t * batch.noise, (1 - t) ** 2 + t**2
        output = model(x / variance.sqrt(), 1000 * batch.t, batch.text[:, None])
        velocity = (2 * t - 1) / variance * x - output / variance.sqrt()
        adamw.zero_grad()
        adamw.param_groups[0]["lr"] = learning_rate(step, config)
        ((velocity - (batch.noise - batch.latents)) ** 2 * variance).mean().backward()
        torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
        adamw.step()
        share = 1 - min(config.ema_decay, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            average[name].lerp_(value.detach(), share)
    return average


def test_without_a_recipe_the_weights_are_those_of_the_plain_recipe(
    shard: Folder, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    weights, _ = train(shard, Folder(tmp_path), expert=DEEP)
    for name, value in plain_by_hand(shard, TRAINING).items():
        assert torch.equal(safetensors.torch.load(weights)[name], value), name


def test_a_finished_run_of_before_recipes_is_still_finished() -> None:
    """Digests as they were when no recipe was in the configuration."""
    sections = ("seed", "expert", "training", "seed_training", "router_training")
    expected = "564f8b2f6a87beea4edf41738414b1e1266f7248db14b6e23ff7b39f29dc0622"
    trainings = ("seed_training", "training")
    plain = [f"{each}.{o}" for each in trainings for o in ("hidden_optimizer=adamw", "muon_rate=1")]
    before = ["seed_training.steps=1500", "training.steps=545"]
    assert digest(load("quickstart", [*plain, *before]), *sections) == expected
    assert "layersync_weight" not in identity(TRAINING)
    assert identity(replace(TRAINING, layersync_weight=0.1))["layersync_weight"] == 0.1


@pytest.mark.parametrize("name", TECHNIQUES)
def test_a_recipe_changes_weights_and_resumes_to_the_bit(
    shard: Folder, tmp_path: Path, name: str
) -> None:
    expert, config = TECHNIQUES[name]
    whole = train(shard, Folder(tmp_path / "whole"), expert=expert, config=config)
    assert whole[0] != train(shard, Folder(tmp_path / "plain"), expert=expert)[0]
    output = Folder(tmp_path / "killed")
    for step in (6, 10):  # alignment stops after 8 of the 12 steps
        with pytest.raises(Stop):
            train(shard, output, expert=expert, config=config, on_progress=stop_at(step))
    assert train(shard, output, expert=expert, config=config) == whole
    names = safetensors.torch.load(whole[0]).keys()
    assert names == Expert(expert).state_dict().keys()


@pytest.mark.parametrize("name", TECHNIQUES)
def test_parts_of_a_batch_add_up_to_its_gradient(shard: Folder, tmp_path: Path, name: str) -> None:
    """`accumulation_steps` says how a machine computes, so no recipe may notice it."""
    expert, config = TECHNIQUES[name]
    moments = []
    for count in (1, 2):
        output = Folder(tmp_path / str(count))
        parted = replace(config, steps=1, accumulation_steps=count)
        train(shard, output, expert=expert, config=parted)
        found = safetensors.torch.load(output.read(CHECKPOINT))
        kept = ("/exp_avg", "/momentum_buffer")  # multiples of the gradient, after one step
        moments.append({key: value for key, value in found.items() if key.endswith(kept)})
    whole, parts = moments
    assert whole.keys() == parts.keys() != set()
    for key, value in whole.items():
        torch.testing.assert_close(parts[key], value, rtol=1e-4, atol=1e-7)


def test_a_checkpoint_of_another_recipe_is_refused(shard: Folder, tmp_path: Path) -> None:
    output = Folder(tmp_path)
    with pytest.raises(Stop):
        train(shard, output, expert=DEEP, on_progress=stop_at(6))
    with pytest.raises(ArtifactError, match=f"{CHECKPOINT} belongs to another configuration"):
        train(shard, output, expert=DEEP, config=replace(TRAINING, t_shift=2.0))


def test_the_checkpoint_has_the_momentum_of_muon(shard: Folder, tmp_path: Path) -> None:
    expert, config = TECHNIQUES["muon"]
    with pytest.raises(Stop):
        train(shard, Folder(tmp_path), expert=expert, config=config, on_progress=stop_at(6))
    with safe_open(tmp_path / CHECKPOINT, framework="pt") as file:
        moments = [name for name in file.keys() if name.endswith("/momentum_buffer")]  # noqa: SIM118
    in_a_block = ("attn.in_proj", "attn.out_proj", "mlp.0", "mlp.2")
    assert sorted(moments) == sorted(
        f"optimizer/layers.{i}.{name}.weight/momentum_buffer"
        for i in range(3)
        for name in in_a_block
    )


# --- names in the configuration ------------------------------------------------------------------


@pytest.mark.parametrize("name", packaged_recipes())
def test_every_packaged_recipe_is_added_to_seed_and_experts(name: str) -> None:
    without = [f"{each}.hidden_optimizer=adamw" for each in ("seed_training", "training")]
    plain, config = load("quickstart", without), load(f"quickstart+{name}", ["seed=3"])
    assert config.seed == 3
    changed = [
        {key: value for key, value in identity(own).items() if identity(before).get(key) != value}
        for own, before in (
            (config.seed_training, plain.seed_training),
            (config.training, plain.training),
        )
    ]
    assert changed[0] == changed[1]
    assert changed[1] or config.expert != plain.expert


def test_recipes_add_up_and_unknown_ones_are_refused(tmp_path: Path) -> None:
    config = load("paris_b2+muon+layersync", ["corpus.path=/x", "training.layersync_weight=0.5"])
    assert config.training.hidden_optimizer == "muon"
    assert config.training.layersync_weight == 0.5
    with pytest.raises(ConfigError) as caught:
        load("quickstart+muons")
    assert str(caught.value) == (
        f"recipe='muons' is not allowed: one of {', '.join(packaged_recipes())}"
    )
    own = tmp_path / "a+b.yaml"
    own.write_text(to_yaml(load("quickstart", ["seed=9"])))
    assert load(str(own)).seed == 9


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.muon_rate=0"], "training.muon_rate=0.0 is not allowed: > 0"),
        (
            ["training.contrastive_weight=1"],
            "training.contrastive_weight=1.0 is not allowed: 0 <= x < 1",
        ),
        (
            ["seed_training.layersync_weight=-1"],
            "seed_training.layersync_weight=-1.0 is not allowed: at least 0",
        ),
        (
            ["training.layersync_weight=.1", "training.layersync_blocks=[3,3]"],
            "training.layersync_blocks=[3, 3] is not allowed: two of expert.num_layers=4 blocks "
            "from 1, the earlier one first",
        ),
        (
            ["training.layersync_weight=.1", "training.layersync_blocks=[1,2,3]"],
            "training.layersync_blocks=[1, 2, 3] is not allowed: two of expert.num_layers=4 blocks "
            "from 1, the earlier one first",
        ),
        (
            ["training.layersync_weight=.1", "expert.num_layers=1"],
            "training.layersync_blocks=None is not allowed: two of expert.num_layers=1 blocks "
            "from 1, the earlier one first",
        ),
        (
            ["training.alignment_share=0"],
            "training.alignment_share=0.0 is not allowed: 0 < x <= 1",
        ),
        (
            ["training.alignment_block=5"],
            "training.alignment_block=5 is not allowed: 1 to expert.num_layers=4, or null",
        ),
        (["training.t_shift=0"], "training.t_shift=0.0 is not allowed: > 0; 1: not moved"),
        (["training.min_snr_gamma=0"], "training.min_snr_gamma=0.0 is not allowed: > 0, or null"),
        (
            ["training.min_snr_gamma=5"],
            "training.min_snr_gamma=5.0 is not allowed: null for expert.prediction=preconditioned: "
            "it weighs the loss of epsilon",
        ),
        (
            ["expert.prediction=epsilon", "training.contrastive_weight=.05"],
            "training.contrastive_weight=0.05 is not allowed: 0 for expert.prediction=epsilon, "
            "which has no velocity",
        ),
        (
            ["router_training.layersync_weight=.2"],
            "router_training.layersync_weight=0.2 is not allowed: 0 here: only experts that learn "
            "from data have it",
        ),
        (
            ["distil_training.min_snr_gamma=5"],
            "distil_training.min_snr_gamma=5.0 is not allowed: null here: only experts that learn "
            "from data have it",
        ),
        (
            ["experts.2.training.t_shift=-1"],
            "experts.2.training.t_shift=-1.0 is not allowed: > 0; 1: not moved",
        ),
    ],
)
def test_what_is_not_allowed_is_named(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load("quickstart", overrides)
    assert str(caught.value) == message


def test_a_lora_has_no_hidden_matrices() -> None:
    with pytest.raises(ConfigError) as caught:
        load_lora(overrides=["training.hidden_optimizer=muon"])
    assert str(caught.value) == (
        "training.hidden_optimizer='muon' is not allowed: adamw: the factors of a LoRA are no "
        "hidden matrices"
    )


def test_shares_of_infinity_are_refused() -> None:
    for name in ("muon_rate", "layersync_weight", "alignment_weight", "t_shift", "min_snr_gamma"):
        with pytest.raises(ConfigError, match=rf"training\.{name}={math.inf}"):
            load("quickstart", [f"training.{name}=.inf"])
