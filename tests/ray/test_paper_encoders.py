"""The paper's encoders in small: autoencoder latents, CLIP token ids, timm features."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch

from paris_ray.artifacts import read_manifest
from paris_ray.bundle import load_bundle
from paris_ray.config import Config, load
from paris_ray.corpora import list_shards
from paris_ray.embeddings import column_names, read_null_text, read_table, tensor_column
from paris_ray.encoders.clip import ClipText
from paris_ray.errors import ConfigError
from paris_ray.run import EMBEDDINGS, ENCODERS, EXPERT, ROUTER, Run
from paris_ray.sampling import generate

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def timm_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as timm's models have it on the hub."""
    folder = tmp_path_factory.mktemp("timm")
    torch.manual_seed(0)
    state = timm.create_model("test_vit", num_classes=5).state_dict()
    safetensors.torch.save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": "test_vit"}))
    return folder


@pytest.fixture(scope="module")
def config(
    release_path: Path,
    timm_path: Path,
    tiny_overrides: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Config:
    """The tests' small run, with the encoders of the paper."""
    overrides = [
        f"run_dir={tmp_path_factory.mktemp('paper') / 'run'}",
        *tiny_overrides,
        "corpus.horizontal_flip=true",
        "corpus.image_size=32",
        "corpus.resize=adm",
        "text.kind=clip",
        f"text.path={release_path}",
        "features.kind=timm",
        "features.model=test_vit",
        f"features.checkpoint={timm_path}",
        "codec.kind=autoencoder_kl",
        f"codec.path={release_path / 'vae'}",
        "codec.patch_size=8",
        "codec.posterior=sample",
        "codec.num_components=4",
        "expert.text_embed_dim=16",
        "expert.text_injection=cross_attention",
        "expert.prediction=velocity",
        "training.steps=6",
        "training.text_noise=0",
        "training.sample_every=3",
        "router.text_embed_dim=0",
        "router_training.steps=4",
        "router_training.text_noise=0",
        "seed_training.steps=0",
        "text.token_states=0",
        "cluster.features=image",
        "sampling.guidance_scale=2",
    ]
    return load("quickstart", overrides)


@pytest.fixture(scope="module")
def finished(ray_session: None, config: Config) -> Run:
    """The run, trained and exported."""
    from paris_ray.pipeline.stages import run

    for verb in ("prepare", "train_experts", "train_router", "export"):
        run(config, verb)
    return Run(config)


def test_the_encoders_are_copied_and_nothing_is_fitted(finished: Run, release_path: Path) -> None:
    manifest = read_manifest(finished.encoders, ENCODERS)
    assert {name.split("/")[0] for name in manifest.files} == {
        "null_text.safetensors",
        "text_encoder",
        "tokenizer",
        "vae",
    }
    assert manifest.facts["rows_fitted_to"] == 0
    name = "vae/diffusion_pytorch_model.safetensors"
    assert finished.encoders.read(name) == (release_path / name).read_bytes()


def test_the_shards_hold_latents_of_both_sides_and_token_ids(
    finished: Run, release_path: Path, num_good_rows: int
) -> None:
    facts = read_manifest(finished.embeddings, EMBEDDINGS).facts
    assert facts["held_out"] > 0
    assert facts["rows"] + facts["held_out"] == num_good_rows
    labels = ["attribute.colour", "attribute.shape"]
    tensors = ["latents", "latents_flipped", "features", "token_ids"]
    columns = ["key", "caption", "thumbnail", *labels, *tensors]
    tables = [read_table(finished.shard(k), columns) for k in range(3)]
    assert column_names(finished.shard(0)) == columns
    assert sum(table.num_rows for table in tables) == facts["rows"]
    latents, flipped = (tensor_column(tables[0], n) for n in ("latents", "latents_flipped"))
    assert latents.shape[1:] == flipped.shape[1:] == (4, 4, 4)
    assert latents.dtype == flipped.dtype == np.float16
    clip = ClipText(release_path / "text_encoder", release_path / "tokenizer")
    caption = tables[0]["caption"][0].as_py()
    templates = finished.config.corpus.caption_templates
    expected = clip.tokenize([template.replace("{}", caption) for template in templates])
    np.testing.assert_array_equal(tensor_column(tables[0], "token_ids")[0], expected)
    null_text = read_null_text(finished.shard(0))
    np.testing.assert_array_equal(null_text, clip.tokenize([""])[0])


def test_experts_and_router_are_trained_and_draw_on_the_way(finished: Run) -> None:
    for k in range(3):
        assert finished.expert(k).read("samples/step-000003.png").startswith(b"\x89PNG")
        assert finished.expert(k).read("samples.png").startswith(b"\x89PNG")
        assert np.isfinite(read_manifest(finished.expert(k), EXPERT).facts["loss"])
    assert read_manifest(finished.router, ROUTER).facts["right_cluster"]


def test_the_bundle_is_in_the_public_layout_and_draws(finished: Run) -> None:
    for folder in ("vae", "text_encoder", "tokenizer", "router", "expert_0", "expert_2"):
        assert finished.bundle.exists(folder)
    assert not finished.bundle.exists("codec")
    bundle = load_bundle(finished.bundle.uri)
    assert isinstance(bundle.text_encoder, ClipText)
    images = generate(bundle, ["a cat", "a red square"], seed=3)
    assert [image.size for image in images] == [(32, 32), (32, 32)]
    again = generate(load_bundle(finished.bundle.uri), ["a cat"], seed=3)
    assert again[0].tobytes() == images[0].tobytes()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"codec": {"num_components": 8}, "expert": {"in_channels": 8}},
            ["codec.path", "(4, 4, 4)", "(8, 4, 4)", "codec.num_components"],
        ),
        ({"expert": {"text_embed_dim": 32}}, ["expert.text_embed_dim=32", "has 16"]),
    ],
)
def test_encoders_that_do_not_fit_the_experts_are_refused(
    ray_session: None,
    config: Config,
    tmp_path: Path,
    changes: dict[str, dict[str, int]],
    words: list[str],
) -> None:
    from paris_ray.pipeline.encoders import prepare_encoders

    sections = {name: replace(getattr(config, name), **new) for name, new in changes.items()}
    with pytest.raises(ConfigError) as error:
        prepare_encoders(
            replace(config, run_dir=str(tmp_path), **sections), list_shards(config.corpus)
        )
    assert all(word in str(error.value) for word in words)
    assert not (tmp_path / "encoders" / "manifest.json").exists()
