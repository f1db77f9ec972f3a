"""Fixtures of all tests: tiny real models, never mocks."""

import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import settings
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from jobs.local_cluster import LOOPBACK_ONLY, SERVE_EDGE, SERVE_PATIENCE
from paris_ray.artifacts import VerifiedFolder, publish
from paris_ray.bundle import (
    Bundle,
    BundleFacts,
    load_bundle,
)
from paris_ray.config import (
    CodecConfig,
    ExpertConfig,
    LoRAConfig,
    RouterConfig,
    SamplingConfig,
)
from paris_ray.config.release import write_document
from paris_ray.encoders.codec import PatchPCA
from paris_ray.export import write_bundle
from paris_ray.folders import Folder
from paris_ray.models import Expert, Router
from paris_ray.models.lora import Adapter
from paris_ray.models.peft_layout import save_adapter
from paris_ray.run import BUNDLE, EXPERT_WEIGHTS, ROUTER_WEIGHTS
from paris_ray.training.distil import write_single_router
from tests.newer_experts import write_newer_parts

# Ray reads these when it is imported; unset, a local Ray would write a token to the home folder.
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
os.environ |= LOOPBACK_ONLY | SERVE_EDGE | SERVE_PATIENCE

# Seconds are no property of the code, and a busy machine is no failure.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

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
# 32 wide: processors have other ways for what is left over of fewer numbers, so that narrower
# samples would be computed one by one.
GEOMETRY = {"input_size": 4, "patch_size": 1, "in_channels": 8}
WIDTH = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "text_embed_dim": 16}


@pytest.fixture
def replica_threads() -> Iterator[None]:
    """Torch with one thread, as a replica has: their number decides the last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


def write_models(root: Path, *, first_seed: int, router_seed: int) -> None:
    """Write tiny experts and a router with random weights."""
    for k in range(NUM_EXPERTS):
        expert = Expert(ExpertConfig(text_injection="spatial", **GEOMETRY, **WIDTH))
        write_model(Folder(root / f"expert_{k}"), randomise(expert, first_seed + k), EXPERT_WEIGHTS)
    router = Router(RouterConfig(num_experts=NUM_EXPERTS, **GEOMETRY, **WIDTH))
    write_model(Folder(root / "router"), randomise(router, router_seed), ROUTER_WEIGHTS)


def write_parts(root: Path) -> None:
    """Write the parts of a tiny random-weight bundle of three experts."""
    # Of this seed the router begins with expert 1, and asks all three in time.
    write_models(root, first_seed=0, router_seed=102)
    pictures = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)
    PatchPCA.fit(pictures, CodecConfig(num_components=8)).save(Folder(root / "codec"))
    write_text_encoder(root / "text_encoder")


@pytest.fixture(scope="session")
def tiny_parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the parts of a tiny bundle."""
    root = tmp_path_factory.mktemp("parts")
    write_parts(root)
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
    publish_bundle(tiny_parts, path)
    assert json.loads((path / "model_index.json").read_text())["_class_name"] == "Bundle"
    return path


@pytest.fixture(scope="session")
def other_bundle_path(tiny_parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The path of a bundle of the same shape, whose router and experts have other weights."""
    root = tmp_path_factory.mktemp("other")
    for name in ("codec", "text_encoder"):
        shutil.copytree(tiny_parts / name, root / "parts" / name)
    write_models(root / "parts", first_seed=50, router_seed=150)
    publish_bundle(root / "parts", root / "bundle")
    return root / "bundle"


@pytest.fixture(scope="session")
def seeded_bundle_path(tiny_parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The path of the tiny bundle with a seed, which draws unlike any of its experts."""
    root = tmp_path_factory.mktemp("seeded")
    shutil.copytree(tiny_parts, root / "parts")
    seed = Expert(ExpertConfig(text_injection="spatial", **GEOMETRY, **WIDTH))
    write_model(Folder(root / "parts" / "seed"), randomise(seed, 70), EXPERT_WEIGHTS)
    publish_bundle(root / "parts", root / "bundle")
    return root / "bundle"


@pytest.fixture(scope="session")
def newer_parts(tiny_parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the parts of a bundle whose experts have modern blocks and text adapters."""
    root = tmp_path_factory.mktemp("newer") / "parts"
    write_newer_parts(root, tiny_parts, GEOMETRY, WIDTH)
    return root


@pytest.fixture(scope="session")
def newer_bundle_path(newer_parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The path of an exported bundle of these experts, which were trained for a few steps."""
    path = tmp_path_factory.mktemp("newer") / "bundle"
    publish_bundle(newer_parts, path)
    return path


def publish_bundle(parts: Path, path: Path) -> None:
    """Write the bundle of loose parts."""
    write_bundle(open_parts(parts), Folder(path), model_card="# tiny\n")
    publish(Folder(path), BUNDLE, config_digest="", parents={}, facts={})


@pytest.fixture(scope="session")
def single_bundle_path(tiny_parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The path of a bundle of one of the tiny experts, as distillation writes it."""
    root = tmp_path_factory.mktemp("single")
    for name, part in {"expert_0": "expert_1", "codec": "codec"}.items():
        shutil.copytree(tiny_parts / part, root / "parts" / name)
    shutil.copytree(tiny_parts / "text_encoder", root / "parts" / "text_encoder")
    expert = ExpertConfig(text_injection="spatial", **GEOMETRY, **WIDTH)
    write_single_router(expert, Folder(root / "parts" / "router"))
    loose = open_parts(root / "parts")
    facts = replace(loose.facts, sampling=replace(loose.facts.sampling, routing="top-1"))
    write_bundle(Bundle(loose.parts, facts), Folder(root / "bundle"), model_card="# single\n")
    publish(Folder(root / "bundle"), BUNDLE, config_digest="", parents={}, facts={})
    return root / "bundle"


@pytest.fixture(scope="session")
def tiny_bundle(tiny_bundle_path: Path) -> Bundle:
    """The tiny bundle, opened."""
    return load_bundle(str(tiny_bundle_path))


@pytest.fixture(scope="session")
def lora_path(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random adapter of the tiny bundle's expert 1, as `jobs.train_lora` publishes it."""
    path = tmp_path_factory.mktemp("loras") / "mine"
    adapter = randomise(Adapter.create(tiny_bundle.expert(1), LoRAConfig(r=4), 0), 7)
    save_adapter(adapter, Folder(path))
    publish(Folder(path), "lora", config_digest="", parents={}, facts={"expert": 1})
    return path


# The fields of the public release, and none of ours; sizes are small.
RELEASE_GEOMETRY = {"patch_size": 2, "in_channels": 4}
RELEASE_WIDTH = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "mlp_ratio": 4.0}
RELEASE_CONFIG = {
    "model_name": "paris-small",
    "num_experts": NUM_EXPERTS,
    "experiment_name": "small",
    "dataset_name": "noise",
    "image_size": 4,
    "num_channels": 4,
    "expert_architecture": "dit",
    "router_architecture": "dit",
    "use_latents": True,
    "vae_name": "stabilityai/sd-vae-ft-mse",
    "text_encoder_name": "openai/clip-vit-large-patch14",
}
RELEASE_EXPERT = {
    "model_type": "dit_expert",
    "architecture": "dit",
    "out_channels": 4,
    "use_text_conditioning": True,
    "use_class_conditioning": False,
    "num_classes": 1000,
    "text_embed_dim": 16,
    "use_dit_time_embed": True,
    "use_adaln_single": True,
    "cfg_dropout_prob": 0.1,
    **RELEASE_GEOMETRY,
    **RELEASE_WIDTH,
}
RELEASE_ROUTER = {
    "architecture": "dit",
    "num_experts": NUM_EXPERTS,
    "use_adaln_single": False,
    **RELEASE_GEOMETRY,
    **RELEASE_WIDTH,
}
RELEASE_INDEX = {
    "_class_name": "DDMPipeline",
    "_diffusers_version": "0.21.0",
    "num_experts": NUM_EXPERTS,
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
}


def write_clip(root: Path) -> None:
    """Write `tokenizer/` and `text_encoder/` of a small random CLIP with a vocabulary of bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ends = [f"{letter}</w>" for letter in letters]
    tokens = [*letters, *ends, "ca", "cat</w>", "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[("c", "a"), ("ca", "t</w>")],
        model_max_length=77,
    )
    tokenizer.save_pretrained(root / "tokenizer")
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=len(tokens) - 2,
        eos_token_id=len(tokens) - 1,
    )
    randomise(CLIPTextModel(config), 1).save_pretrained(root / "text_encoder")


def write_autoencoder(path: Path) -> None:
    """Write a small random autoencoder that halves pictures three times, as Stable Diffusion's."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=64,
    ).save_pretrained(path)


def write_release(root: Path) -> None:
    """Write a small folder as the public release has it, by the libraries that it names."""
    folder = Folder(root)
    for k in range(NUM_EXPERTS):
        expert = ExpertConfig(input_size=4, text_embed_dim=16, **RELEASE_GEOMETRY, **RELEASE_WIDTH)
        weights = randomise(Expert(expert), k).state_dict()
        folder.write(f"expert_{k}/{EXPERT_WEIGHTS}", safetensors.torch.save(weights))
        folder.write_json(f"expert_{k}/config.json", RELEASE_EXPERT)
        folder.write_json(f"expert_{k}/model_index.json", {"_class_name": "DiTExpert"})
    config = RouterConfig(
        input_size=4, num_experts=NUM_EXPERTS, **RELEASE_GEOMETRY, **RELEASE_WIDTH
    )
    weights = randomise(Router(config), 99).state_dict()
    folder.write(f"router/{ROUTER_WEIGHTS}", safetensors.torch.save(weights))
    folder.write_json("router/config.json", RELEASE_ROUTER)
    folder.write_json("config.json", RELEASE_CONFIG)
    folder.write_json("model_index.json", RELEASE_INDEX)
    write_autoencoder(root / "vae")
    write_clip(root)
    assert not any(b"paris_ray" in path.read_bytes() for path in root.rglob("*.json"))


@pytest.fixture(scope="session")
def release_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small folder as the public release has it."""
    root = tmp_path_factory.mktemp("release") / "paris-small"
    write_release(root)
    return root


@pytest.fixture(scope="session")
def release_bundle(release_path: Path) -> Bundle:
    """The release, opened."""
    return load_bundle(str(release_path))


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
        _system_config={
            # As many processes wait for their next task, and need not import torch again.
            "num_workers_soft_limit": 12,
            "metrics_report_interval_ms": 1000,  # tests of metrics would wait for ten seconds
        },
    )
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
