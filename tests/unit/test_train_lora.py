"""Training a LoRA: only the adapter moves, to the bit the same after an interruption."""

import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn

from paris_ray.artifacts import METRICS, VerifiedFolder
from paris_ray.bundle import Bundle
from paris_ray.config import (
    ExpertConfig,
    LoRAConfig,
    TrainingConfig,
    digest,
    load,
    load_lora,
    packaged_configs,
    to_yaml,
)
from paris_ray.config.lora import ADAPTER_WEIGHTS
from paris_ray.embeddings import to_table, write_null_text, write_part
from paris_ray.errors import ArtifactError, ConfigError, TrainingError
from paris_ray.folders import Folder
from paris_ray.models import Expert
from paris_ray.models.lora import attach
from paris_ray.models.peft_layout import load_adapter
from paris_ray.training.loop import Progress
from paris_ray.training.lora import train_lora
from tests.training_shards import Stop, stop_at

REPOSITORY = Path(__file__).resolve().parents[2]
SIZES = {"input_size": 2, "patch_size": 1, "in_channels": 3, "text_embed_dim": 4}
WIDTH = {"hidden_size": 16, "num_layers": 2, "num_heads": 2}
TRAINING = TrainingConfig(
    steps=12,
    batch_size=4,
    learning_rate=1e-2,
    warmup_steps=2,
    schedule="constant",
    ema_decay=0.5,
    log_every=2,
    checkpoint_every=4,
    precision="float32",
    device="cpu",
)
LORA = LoRAConfig(r=2, target_modules=("in_proj", "mlp.2"))


def carry_on(progress: Progress) -> None:
    pass


def write_shard(folder: Folder, text: dict[str, Any], null_text: Any) -> Folder:
    generator = np.random.default_rng(0)
    latents = 2 + 0.1 * generator.standard_normal((10, 3, 2, 2))
    write_part(folder, "part-0.parquet", to_table({"latents": latents.astype(np.float16)} | text))
    write_null_text(folder, null_text)
    return folder


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    text = np.random.default_rng(1).standard_normal((10, 2, 4)).astype(np.float16)
    folder = Folder(tmp_path_factory.mktemp("shard"))
    return write_shard(folder, {"text_embedding": text}, np.ones(4, np.float32))


@pytest.fixture
def expert(randomised: Callable[[nn.Module, int], nn.Module]) -> Expert:
    expert = randomised(Expert(ExpertConfig(**SIZES, **WIDTH)), 0).eval()
    assert isinstance(expert, Expert)
    return expert.requires_grad_(False)


def train(expert: Expert, shard: Folder, output: Folder, **changes: Any) -> bytes:
    """Train and return the bytes of the adapter's weights."""
    options: dict[str, Any] = {
        "lora": LORA,
        "config": TRAINING,
        "inputs": {"expert": "0"},
        "seed": 0,
        "on_progress": carry_on,
    }
    train_lora(expert, shard=shard, output=output, **(options | changes))
    return output.read(ADAPTER_WEIGHTS)


def predict(expert: Callable[..., Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(2, 3, 2, 2, generator=generator).to(dtype)
    text = torch.randn(2, 1, 4, generator=generator).to(dtype)
    return expert(latents, torch.tensor([100.0, 900.0]), text)


def losses(output: Folder) -> list[float]:
    return [json.loads(line)["loss"] for line in output.read(METRICS).splitlines()]


def opened(output: Folder) -> VerifiedFolder:
    return VerifiedFolder(output, None)


def test_only_the_adapter_is_trained(expert: Expert, shard: Folder, tmp_path: Path) -> None:
    before = copy.deepcopy(expert.state_dict())
    output = Folder(tmp_path)
    adapted = train_lora(
        expert,
        LORA,
        replace(TRAINING, steps=60),
        shard=shard,
        inputs={},
        seed=0,
        output=output,
        on_progress=carry_on,
    )
    after = expert.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in expert.parameters())
    loss = losses(output)
    assert np.mean(loss[-5:]) < 0.7 * loss[0], loss
    assert not adapted.training
    assert predict(adapted).isfinite().all()
    assert not torch.allclose(predict(adapted), predict(expert), atol=1e-2)


def test_what_is_saved_is_what_was_trained(expert: Expert, shard: Folder, tmp_path: Path) -> None:
    output = Folder(tmp_path)
    options = {"shard": shard, "inputs": {}, "seed": 0, "on_progress": carry_on}
    adapted = train_lora(expert, LORA, TRAINING, output=output, base_model="here", **options)
    loaded = load_adapter(opened(output), expert)
    assert torch.equal(predict(attach(expert, loaded)), predict(adapted))
    assert loaded.config.target_modules == list(LORA.target_modules)
    unwrapped = LoRAConfig(r=2, target_modules=("attn.in_proj", "mlp.2"))
    adapted = train_lora(expert, unwrapped, TRAINING, output=output / "peft", **options)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(expert), tmp_path / "peft")
    torch.testing.assert_close(predict(theirs), predict(adapted), atol=1e-5, rtol=1e-5)


def test_resumed_equals_uninterrupted_to_the_bit(
    expert: Expert, shard: Folder, tmp_path: Path
) -> None:
    whole = train(expert, shard, Folder(tmp_path / "whole"))
    output = Folder(tmp_path / "resumed")
    with pytest.raises(Stop):
        train(expert, shard, output, on_progress=stop_at(6))  # after the checkpoint of step 4
    assert not output.exists(ADAPTER_WEIGHTS)
    steps: list[int] = []
    resumed = train(expert, shard, output, on_progress=lambda p: steps.append(p.step))
    assert steps[0] == 6
    assert resumed == whole
    assert losses(output) == losses(Folder(tmp_path / "whole"))
    assert train(expert, shard, Folder(tmp_path / "other"), seed=1) != whole


@pytest.mark.parametrize(
    "changes",
    [
        {"inputs": {"expert": "1"}},
        {"lora": replace(LORA, lora_alpha=4)},
        {"config": replace(TRAINING, learning_rate=1e-3)},
        {"seed": 1},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_checkpoint_of_another_training_is_refused(
    expert: Expert, shard: Folder, tmp_path: Path, changes: dict[str, Any]
) -> None:
    with pytest.raises(Stop):
        train(expert, shard, Folder(tmp_path), on_progress=stop_at(6))
    with pytest.raises(ArtifactError, match="belongs to another configuration"):
        train(expert, shard, Folder(tmp_path), **changes)


def test_options_that_save_memory_change_little(
    expert: Expert, shard: Folder, tmp_path: Path
) -> None:
    train(expert, shard, Folder(tmp_path / "plain"))
    frugal = replace(TRAINING, gradient_checkpointing=True, accumulation_steps=2)
    train(expert, shard, Folder(tmp_path / "frugal"), config=frugal)
    outputs = [
        predict(attach(expert, load_adapter(opened(Folder(tmp_path / name)), expert)))
        for name in ("plain", "frugal")
    ]
    torch.testing.assert_close(*outputs, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(outputs[0], predict(expert), atol=1e-2)


def test_an_expert_may_be_in_bfloat16(expert: Expert, shard: Folder, tmp_path: Path) -> None:
    train(expert.to(torch.bfloat16), shard, Folder(tmp_path))
    adapter = load_adapter(opened(Folder(tmp_path)), expert)
    assert {value.dtype for value in expert.state_dict().values()} == {torch.bfloat16}
    exact = predict(expert, torch.bfloat16)
    assert not torch.equal(predict(attach(expert, adapter), torch.bfloat16), exact)
    assert np.isfinite(losses(Folder(tmp_path))).all()


def test_token_ids_are_read_with_the_bundles_text_encoder(
    release_bundle: Bundle, release_path: Path, tmp_path: Path
) -> None:
    expert = release_bundle.expert(0)
    ids = np.asarray(release_bundle.text_encoder.tokenize(["a cat"] * 10))[:, None]  # type: ignore[attr-defined]
    null = np.asarray(release_bundle.text_encoder.tokenize([""]))[0]  # type: ignore[attr-defined]
    latents = np.random.default_rng(0).standard_normal((10, 4, 4, 4)).astype(np.float16)
    shard = Folder(tmp_path / "shard")
    write_part(shard, "part-0.parquet", to_table({"latents": latents, "token_ids": ids}))
    write_null_text(shard, null)
    with pytest.raises(TrainingError, match="no folder with a text encoder"):
        train(expert, shard, Folder(tmp_path / "lora"))
    train(expert, shard, Folder(tmp_path / "lora"), text_encoder=Folder(release_path))
    loaded = load_adapter(opened(Folder(tmp_path / "lora")), expert)
    assert max(update.B.abs().max() for update in loaded.updates().values()) > 0


def test_samples_are_drawn_from_the_average(expert: Expert, shard: Folder, tmp_path: Path) -> None:
    drawn: list[tuple[int, Tensor]] = []
    train(
        expert,
        shard,
        Folder(tmp_path),
        config=replace(TRAINING, sample_every=4),
        draw_samples=lambda adapted, step: drawn.append((step, predict(adapted))),
    )
    assert [step for step, _ in drawn] == [4, 8]
    assert not torch.equal(drawn[0][1], drawn[1][1])


@pytest.mark.parametrize(
    ("lora", "reason"),
    [
        (LoRAConfig(r=17), "r=17 is not allowed: 1 to 16 for layers.0.attn.in_proj"),
        (LoRAConfig(r=2, target_modules=("to_q",)), "target_modules='to_q' is not allowed"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    expert: Expert, shard: Folder, tmp_path: Path, lora: LoRAConfig, reason: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{reason}"):
        train(expert, shard, Folder(tmp_path), lora=lora)
    assert not Folder(tmp_path).files()


# Its configuration.


def test_the_packaged_configuration_is_a_run_of_its_own(tmp_path: Path) -> None:
    run = load_lora()
    assert (run.training.steps, run.lora.r) == (400, 16)
    assert "lora" not in packaged_configs()
    with pytest.raises(ConfigError, match="'lora' is neither a file nor one of"):
        load("lora")
    with pytest.raises(ConfigError, match=r"'quickstart' is neither a file nor one of \['lora'\]"):
        load_lora("quickstart")
    changed = load_lora(overrides=["lora.target_modules=[mlp.0]", "corpus.limit=5", "seed=3"])
    assert changed.lora.target_modules == ("mlp.0",)
    (tmp_path / "saved.yaml").write_text(to_yaml(changed))
    assert load_lora(str(tmp_path / "saved.yaml")) == changed
    digests = {digest(each, "seed", "corpus", "lora", "training") for each in (run, changed)}
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("lora.rank=4", "unknown key 'lora.rank'; allowed here: r, lora_alpha, target_modules"),
        (
            "expert.hidden_size=4",
            "unknown key 'expert'; allowed here: seed, corpus, lora",
        ),
        ("lora.r=many", "lora.r: "),
        ("lora.r=0", "r=0 is not allowed: 1 to 1024"),
        ("lora.target_modules=in_proj", "lora.target_modules: "),
        ("training.steps=0", "training.steps=0 is not allowed"),
        ("training.init_from=there", "training.init_from='there' is not allowed: null"),
        ("corpus.path=there", "corpus.path='there' is not allowed: .* --data"),
        ("corpus.image_size=64", "corpus.image_size=64 is not allowed: .* the bundle decides"),
        ("corpus.max_bad_share=2", "corpus.max_bad_share=2.0 is not allowed"),
    ],
)
def test_values_that_are_not_allowed_are_refused(override: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"^{reason}"):
        load_lora(overrides=[override])


# Its command line; nothing here starts Ray.


def run_job(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jobs.train_lora", *arguments],
        cwd=REPOSITORY,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_help_shows_the_command() -> None:
    result = run_job("--help")
    assert result.returncode == 0
    assert "python -m jobs.train_lora --bundle" in result.stdout


PATHS = ("--expert", "0", "--bundle", "/bundle", "--data", "/pictures")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (PATHS, "the following arguments are required: --output"),
        ((*PATHS, "--output", "/lora", "lora.rank=3"), "error: unknown key 'lora.rank'; allowed"),
        (("lora.r=0", *PATHS, "--output", "/lora"), "error: r=0 is not allowed: 1 to 1024"),
        ((*PATHS, "--output", "mine"), "--output='mine' is relative, .* example --output=.PWD"),
    ],
)
def test_mistakes_are_refused_before_ray_starts(arguments: Sequence[str], message: str) -> None:
    result = run_job(*arguments, RAY_JOB_CONFIG_JSON_ENV_VAR="{}")
    assert result.returncode == 2
    assert re.search(message, result.stderr), result.stderr
