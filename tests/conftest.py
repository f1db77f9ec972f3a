"""Fixtures of all tests: tiny real models, never mocks."""

import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel

from jobs.local_cluster import LOOPBACK_ONLY
from paris_ray.artifacts import Folder, VerifiedFolder, publish
from paris_ray.bundle import (
    Bundle,
    BundleFacts,
    load_bundle,
)
from paris_ray.config import CodecConfig, ExpertConfig, RouterConfig, SamplingConfig
from paris_ray.encoders.codec import PatchPCA
from paris_ray.export import write_bundle
from paris_ray.models import Expert, Router
from paris_ray.models.release import write_document
from paris_ray.run import BUNDLE, EXPERT_WEIGHTS, ROUTER_WEIGHTS

# Ray reads these when it is imported; unset, a local Ray would write a token to the home folder.
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)} | LOOPBACK_ONLY

NUM_EXPERTS = 3
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "a",
    "red",
    "green",
    "blue",
    "square",
    "circle",
    "cat",
    "dog",
]
GEOMETRY = {"input_size": 4, "patch_size": 1, "in_channels": 8}
WIDTH = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "text_embed_dim": 16}


def randomise(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Give every parameter a random value, so that no path is silent as after initialisation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def write_text_encoder(path: Path) -> None:
    """Write a small random BERT in the file layout of all-MiniLM-L6-v2."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=160,
    )
    BertModel(config).save_pretrained(path)
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(path / "tokenizer.json"))


def write_model(folder: Folder, model: torch.nn.Module, weights: str) -> None:
    folder.write_json("config.json", write_document(model.config))
    folder.write(weights, safetensors.torch.save(model.state_dict()))


@pytest.fixture(scope="session")
def tiny_parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the parts of a tiny random-weight bundle of three experts."""
    root = tmp_path_factory.mktemp("parts")
    for k in range(NUM_EXPERTS):
        expert = Expert(ExpertConfig(text_injection="spatial", **GEOMETRY, **WIDTH))
        write_model(Folder(root / f"expert_{k}"), randomise(expert, k), EXPERT_WEIGHTS)
    router = Router(RouterConfig(num_experts=NUM_EXPERTS, **GEOMETRY, **WIDTH))
    write_model(Folder(root / "router"), randomise(router, 99), ROUTER_WEIGHTS)
    pictures = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)
    PatchPCA.fit(pictures, CodecConfig(num_components=8)).save(Folder(root / "codec"))
    write_text_encoder(root / "text_encoder")
    return root


def open_parts(root: Path) -> Bundle:
    """Return the bundle of loose parts."""
    parts = {p.name: VerifiedFolder(Folder(p), None) for p in sorted(root.iterdir()) if p.is_dir()}
    facts = BundleFacts(
        model_name="tiny",
        sampling=SamplingConfig(num_inference_steps=3),
        picture_size=32,
        attribution="All pictures by nobody.",
        example_prompts=("a red cat", "a blue dog"),
    )
    return Bundle(parts, facts)


@pytest.fixture(scope="session")
def tiny_bundle_path(tiny_parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The path of an exported tiny bundle; tests must not change it."""
    path = tmp_path_factory.mktemp("bundle") / "bundle"
    write_bundle(open_parts(tiny_parts), Folder(path), model_card="# tiny\n")
    publish(Folder(path), BUNDLE, config_digest="", parents={}, facts={})
    assert json.loads((path / "model_index.json").read_text())["_class_name"] == "Bundle"
    return path


@pytest.fixture(scope="session")
def tiny_bundle(tiny_bundle_path: Path) -> Bundle:
    """The tiny bundle, opened."""
    return load_bundle(str(tiny_bundle_path))


@pytest.fixture(scope="session")
def randomised() -> Callable[[torch.nn.Module, int], torch.nn.Module]:
    """`randomise`, for tests that build models of their own."""
    return randomise


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """The one Ray of the test run; its CPUs are logical, so that small tasks run side by side."""
    import ray

    folder = tempfile.mkdtemp(prefix="pr-", dir="/tmp")  # socket paths must stay short
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        _temp_dir=folder,
    )
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
