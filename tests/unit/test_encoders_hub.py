"""Models by hub name: the real cache of huggingface_hub, filled by hand, and no network."""

import json
from pathlib import Path

import huggingface_hub
import numpy as np
import open_clip
import pytest
import safetensors.torch
import timm
import torch

from paris_ray.config import FeaturesConfig
from paris_ray.encoders.hub import model_folder
from paris_ray.encoders.images import (
    OPEN_CLIP_FILES,
    TIMM_FILES,
    OpenClipFeatures,
    TimmFeatures,
    load_features,
    load_open_clip,
    preprocess,
    register_packaged_models,
    save_open_clip,
)
from paris_ray.errors import BundleError, ConfigError
from paris_ray.folders import Folder

ARCHITECTURE = "test_vit"
PICTURES = np.random.default_rng(0).integers(0, 256, (4, 48, 48, 3), dtype=np.uint8)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def cached(hub_cache: Path, name: str) -> Path:
    """Return the folder of a repository's only revision in the cache."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = hub_cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    (repository / "snapshots" / revision).mkdir(parents=True)
    return repository / "snapshots" / revision


def test_a_local_folder_is_taken_as_it_is(tmp_path: Path, hub_cache: Path) -> None:
    (tmp_path / "config.json").touch()
    assert model_folder(str(tmp_path), ["config.json"], field="text.path") == tmp_path
    files = ["config.json", "model.safetensors", "vocab.json"]
    with pytest.raises(ConfigError, match=r"text.path='.*' lacks model.safetensors, vocab.json;"):
        model_folder(str(tmp_path), files, field="text.path")


def test_a_download_that_fails_says_what_to_fetch_and_where_to_put_it(hub_cache: Path) -> None:
    files = ["config.json", "model.safetensors"]
    with pytest.raises(ConfigError) as caught:
        model_folder("openai/clip-vit-large-patch14", files, field="text.path")
    message = str(caught.value)
    assert "text.path='openai/clip-vit-large-patch14'" in message
    remedy = (
        "fetch config.json, model.safetensors from "
        "https://huggingface.co/openai/clip-vit-large-patch14, put them into a folder "
        "and set text.path to its path"
    )
    assert message.endswith(remedy)


def test_a_cached_repository_is_found(hub_cache: Path) -> None:
    folder = cached(hub_cache, "org/name")
    (folder / "config.json").write_text("{}")
    found = model_folder("org/name", ["config.json"], field="codec.path", optional=["x.json"])
    assert found == folder
    (folder / "model.bin").touch()
    with pytest.raises(ConfigError, match=r"lacks model.safetensors \(no pickle is read\); fetch"):
        model_folder("org/name", ["config.json", "model.safetensors"], field="codec.path")


@pytest.mark.parametrize(
    "name", ["name", "/no/such/folder", "a/b/c", "../x", "org/na me", "https://x.org/y"]
)
def test_what_is_neither_a_folder_nor_a_hub_name_is_refused(hub_cache: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"codec.path=.* is neither a folder nor the name"):
        model_folder(name, ["config.json"], field="codec.path")


def test_a_file_is_no_folder(tmp_path: Path, hub_cache: Path) -> None:
    (tmp_path / "weights.pth").touch()
    with pytest.raises(ConfigError, match="is neither a folder nor the name of a hub model"):
        model_folder(str(tmp_path / "weights.pth"), ["config.json"], field="codec.path")


def write_timm(folder: Path, architecture: str = ARCHITECTURE) -> torch.nn.Module:
    """Write a random vision transformer with a classifier in the hub's layout."""
    torch.manual_seed(0)
    model = timm.create_model(architecture, num_classes=5).eval()
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors")
    config = {"architecture": architecture, "num_classes": 5}
    (folder / "config.json").write_text(json.dumps(config))
    return model


def timm_features(checkpoint: Path | str, model: str = ARCHITECTURE) -> TimmFeatures:
    features = load_features(FeaturesConfig(kind="timm", model=model, checkpoint=str(checkpoint)))
    assert isinstance(features, TimmFeatures)
    return features


def test_timm_features_are_the_pooled_ones_of_unit_length(tmp_path: Path) -> None:
    model = write_timm(tmp_path)
    encoder = timm_features(tmp_path)
    features = encoder.encode(PICTURES)
    assert features.shape == (4, 64)
    assert features.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-5)
    half = (0.5, 0.5, 0.5)  # what timm says of test_vit
    with torch.no_grad():
        class_token = model.forward_features(preprocess(PICTURES, 224, half, half))[:, 0]
    expected = torch.nn.functional.normalize(class_token, dim=-1).numpy()
    np.testing.assert_allclose(features, expected, atol=1e-5)
    assert np.abs(features @ features.T - np.eye(4)).max() < 1 - 1e-6


def test_dinov2_reads_pictures_of_224_pixels_as_imagenet(tmp_path: Path) -> None:
    """Its positions are those of 518 pixels; they are interpolated to 16 x 16."""
    model = write_timm(tmp_path, "vit_small_patch14_dinov2")
    encoder = timm_features(tmp_path, "vit_small_patch14_dinov2.lvd142m")
    assert encoder.preprocessing["mean"] == (0.485, 0.456, 0.406)
    assert encoder.preprocessing["std"] == (0.229, 0.224, 0.225)
    assert model.pos_embed.shape[1] == 37**2 + 1
    resized = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=224).eval()
    filtered = timm.models.vision_transformer.checkpoint_filter_fn(model.state_dict(), resized)
    resized.load_state_dict({n: v for n, v in filtered.items() if not n.startswith("head.")})
    pixels = preprocess(PICTURES[:1], 224, **{k: encoder.preprocessing[k] for k in ("mean", "std")})
    with torch.no_grad():
        expected = torch.nn.functional.normalize(resized(pixels), dim=-1).numpy()
    np.testing.assert_allclose(encoder.encode(PICTURES[:1]), expected, atol=1e-5)


def test_a_hub_name_and_a_file_give_the_same_features(tmp_path: Path, hub_cache: Path) -> None:
    folder = cached(hub_cache, "timm/test_vit.r160_in1k")
    write_timm(folder)
    by_name = timm_features("timm/test_vit.r160_in1k", "test_vit.r160_in1k")
    by_file = timm_features(folder / "model.safetensors")
    assert np.array_equal(by_name.encode(PICTURES), by_file.encode(PICTURES))


@pytest.mark.parametrize("name", TIMM_FILES)
def test_a_missing_timm_file_is_named(tmp_path: Path, name: str) -> None:
    write_timm(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ConfigError, match=rf"features.checkpoint='.*' lacks {name}"):
        timm_features(tmp_path)


@pytest.mark.parametrize("suffix", [".bin", ".pth", ".pt"])
def test_pickled_timm_weights_are_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    torch.save(write_timm(tmp_path).state_dict(), path)
    with pytest.raises(ConfigError, match="is neither a folder nor the name of a hub model"):
        timm_features(path)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    write_timm(tmp_path)
    with pytest.raises(ConfigError, match=r"features.model='test_vit2', but .* says 'test_vit'"):
        timm_features(tmp_path, "test_vit2")
    with pytest.raises(BundleError, match=r"model.safetensors does not fit"):
        timm_features(tmp_path / "model.safetensors", "test_vit2")
    for model in ("no_such_model", "test_convnext"):
        with pytest.raises(ConfigError, match=f"features.model='{model}' is not a vision transf"):
            timm_features(tmp_path / "model.safetensors", model)


def test_incomplete_timm_weights_are_refused(tmp_path: Path) -> None:
    state = write_timm(tmp_path).state_dict()
    del state["blocks.0.norm1.weight"]
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(BundleError, match=r"does not fit: .*blocks.0.norm1.weight"):
        timm_features(tmp_path)


def test_timm_features_move(tmp_path: Path) -> None:
    write_timm(tmp_path)
    encoder = timm_features(tmp_path).to(torch.device("meta"))
    assert {parameter.device.type for parameter in encoder.model.parameters()} == {"meta"}


def test_timm_models_are_not_trained_here() -> None:
    config = FeaturesConfig(kind="timm", model=ARCHITECTURE)
    with pytest.raises(ConfigError, match=r"features.checkpoint is null"):
        load_features(config)


def write_open_clip(folder: Path) -> None:
    register_packaged_models()
    torch.manual_seed(0)
    model = open_clip.create_model("paris-tiny", load_weights=False)
    save_open_clip(model, "paris-tiny", Folder(folder))


@pytest.fixture
def published_tag(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tag of a small architecture, published with QuickGELU as OpenAI's are."""
    entry = {"hf_hub": "org/tiny/", "quick_gelu": True}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "paris-tiny", {"openai": entry})
    return cached(hub_cache, "org/tiny")


def test_a_tag_decides_the_activation(published_tag: Path) -> None:
    """open_clip itself would only warn, and give wrong features."""
    write_open_clip(published_tag)
    model = load_open_clip("paris-tiny", "openai", field="text.path")
    assert type(model.visual.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"
    assert type(model.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"
    assert open_clip.get_model_config("paris-tiny").get("quick_gelu") is None


def test_a_tag_without_safetensors_is_refused(published_tag: Path) -> None:
    (published_tag / OPEN_CLIP_FILES[0]).write_text("{}")
    (published_tag / "open_clip_pytorch_model.bin").touch()
    with pytest.raises(ConfigError, match=r"lacks open_clip_model.safetensors .*/org/tiny, put"):
        load_open_clip("paris-tiny", "openai", field="text.path")


def test_pictures_are_normalised_as_the_model_was_trained(tmp_path: Path) -> None:
    write_open_clip(tmp_path)
    ours = OpenClipFeatures(load_open_clip("x", str(tmp_path), field="x")).encode(PICTURES)
    path = tmp_path / OPEN_CLIP_FILES[0]
    document = json.loads(path.read_text())
    document["preprocess_cfg"] |= {"mean": [0.5] * 3, "std": [0.5] * 3}  # as of laion2b_s32b_b82k
    path.write_text(json.dumps(document))
    encoder = OpenClipFeatures(load_open_clip("x", str(tmp_path), field="x"))
    assert np.abs(encoder.encode(PICTURES) - ours).max() > 1e-3
    with torch.no_grad():
        expected = encoder.visual(preprocess(PICTURES, 32, [0.5] * 3, [0.5] * 3))
    expected = torch.nn.functional.normalize(expected, dim=-1).numpy()
    np.testing.assert_allclose(encoder.encode(PICTURES), expected, atol=1e-5)


def test_open_clip_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    write_open_clip(tmp_path)
    weights = tmp_path / OPEN_CLIP_FILES[1]
    state = safetensors.torch.load_file(weights)
    del state["visual.proj"]
    safetensors.torch.save_file(state, weights)
    for checkpoint in (tmp_path, weights):
        with pytest.raises(BundleError, match=r"does not fit: .*visual.proj"):
            load_open_clip("paris-tiny", str(checkpoint), field="features.checkpoint")
