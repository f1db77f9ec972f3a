"""Bundles that are written: the public layout both ways, and experts that differ."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from paris_ray.artifacts import Manifest, VerifiedFolder, publish
from paris_ray.bundle import MODEL_INDEX, Bundle, load_bundle
from paris_ray.config import CodecConfig, TextConfig, load
from paris_ray.config.release import write_document
from paris_ray.diffusion import predict_velocity
from paris_ray.errors import BundleError
from paris_ray.export import codec_name, text_encoder_name, write_bundle
from paris_ray.folders import Folder
from paris_ray.model_card import model_card
from paris_ray.models import Expert
from paris_ray.pipeline.export import started_from
from paris_ray.run import BUNDLE, EXPERT, EXPERT_WEIGHTS, SEED, Run
from paris_ray.sampling import generate
from paris_ray.sampling.generation import sample
from paris_ray.sampling.sampler import initial_noise
from paris_ray.sampling_options import sampling_options

PROMPTS = ["a red cat", "blue dog", ""]
SEEDS = [3, 14, 15]


def test_a_release_is_written_as_it_was_read(
    release_bundle: Bundle, release_path: Path, tmp_path: Path
) -> None:
    write_bundle(release_bundle, Folder(tmp_path), model_card="# small\n")
    publish(Folder(tmp_path), BUNDLE, config_digest="", parents={}, facts={})
    written = load_bundle(str(tmp_path))
    assert written.facts == release_bundle.facts
    one, other = (generate(b, PROMPTS, num_inference_steps=3) for b in (written, release_bundle))
    assert [image.tobytes() for image in one] == [image.tobytes() for image in other]
    given = json.loads((release_path / "config.json").read_text())
    config = json.loads((tmp_path / "config.json").read_text())
    not_ours = ("experiment_name", "dataset_name")
    assert {key: config[key] for key in given if key not in not_ours} == {
        key: value for key, value in given.items() if key not in not_ours
    }
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index.items() >= json.loads((release_path / "model_index.json").read_text()).items()
    assert (tmp_path / "tokenizer" / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (CodecConfig(), "patch_pca"),
        (CodecConfig(path="stabilityai/sd-vae-ft-mse"), "stabilityai/sd-vae-ft-mse"),
        (CodecConfig(path="/home/somebody/models/vae"), "vae"),
    ],
)
def test_a_codec_is_named_without_the_path_to_it(config: CodecConfig, name: str) -> None:
    assert codec_name(config) == name


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (TextConfig(path="/home/somebody/minilm"), "sentence-transformers/all-MiniLM-L6-v2"),
        (TextConfig(kind="clip", path="openai/clip-vit-large-patch14"),) * 2,
        (TextConfig(kind="clip", path="/home/somebody/clip"), "clip"),
        (TextConfig(kind="open_clip", path="openai"), "open_clip ViT-L-14 openai"),
    ],
)
def test_a_text_encoder_is_named_without_the_path_to_it(config: TextConfig, name: Any) -> None:
    assert text_encoder_name(config) == (name if isinstance(name, str) else config.path)


UNLIKE = {
    1: {"hidden_size": 64, "num_layers": 2, "prediction": "epsilon"},
    2: {"text_injection": "cross_attention", "prediction": "preconditioned", "patch_size": 2},
}


def make_unlike(bundle: Bundle, root: Path, randomised: Any) -> Bundle:
    """Return a copy of the tiny bundle of which the experts differ as in `UNLIKE`."""
    parts = dict(bundle.parts)
    for k, changes in UNLIKE.items():
        expert = randomised(Expert(replace(bundle.expert(k).config, **changes)), k)
        folder = Folder(root / f"expert_{k}")
        folder.write_json("config.json", write_document(expert.config))
        folder.write(EXPERT_WEIGHTS, safetensors.torch.save(expert.state_dict()))
        parts[f"expert_{k}"] = VerifiedFolder(folder, None)
    target = Folder(root / "bundle")
    write_bundle(Bundle(parts, bundle.facts), target, model_card="")
    publish(target, BUNDLE, config_digest="", parents={}, facts={})
    return load_bundle(target.uri)


@pytest.fixture(scope="module")
def unlike(
    tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory, randomised: Any
) -> Bundle:
    return make_unlike(tiny_bundle, tmp_path_factory.mktemp("unlike"), randomised)


@torch.inference_mode()
def test_unlike_experts_are_combined_as_velocities(unlike: Bundle) -> None:
    """One step by hand: each expert predicts in its own way, the router weighs velocities."""
    noise, text = initial_noise(unlike.latent_shape, SEEDS), unlike.encode_text(PROMPTS)
    options = sampling_options(unlike, routing="full", num_inference_steps=1, guidance_scale=1.0)
    drawn = sample(unlike, text, SEEDS, options)
    weights = unlike.router(noise, torch.full((3,), 1000.0), text.pooled_text).softmax(dim=1)
    assert (weights > 1e-3).sum(dim=1).max() > 1
    velocity = torch.zeros_like(noise)
    for k in range(3):
        answer = predict_velocity(unlike.expert(k), noise, torch.ones(3), text)
        velocity += weights[:, k, None, None, None] * answer
    torch.testing.assert_close(drawn.latents, noise - velocity, rtol=1e-4, atol=1e-4)


def test_unlike_experts_draw_with_every_routing(unlike: Bundle) -> None:
    for routing in ("top-1", "top-2", "full"):
        images = generate(unlike, PROMPTS, routing=routing, guidance_scale=2.0)
        assert len({image.tobytes() for image in images}) == 3


EMBEDDINGS = {"rows": 10, "quarantined": {}, "attribution": None}  # as earlier code wrote them


def card(bundle: Bundle, **facts: Any) -> str:
    return model_card(
        bundle,
        cluster_sizes=[3, 3, 4],
        router={"right_cluster": {"0.5": 0.9}},
        losses=[0.1, 0.2, 0.3],
        **{"embeddings": EMBEDDINGS, "evaluation": None} | facts,
    )


def test_the_model_card_explains_what_was_measured_alone(tiny_bundle: Bundle) -> None:
    assert "aption recall" not in card(tiny_bundle)
    share = {"mean": 0.5, "low": 0.25, "high": 0.75}
    shown = {"captions": 9, "gallery": 10, "caption_recall": share, "attributes": {"all": share}}
    held_out = {"captions": 3, "attributes": {"object": share}, "frechet": 2.0}
    facts = {"shown": shown, "held_out": held_out, "expert_usage": [0.2, 0.3, 0.5]}
    text = card(tiny_bundle, evaluation=facts)
    interval = "| 0.5000 (0.2500 to 0.7500) |"
    assert f"| caption recall over 9 training captions, among 10 pictures {interval}" in text
    assert f"| all right over 9 training captions {interval}" in text
    assert f"| object right over 3 held-out captions {interval}" in text
    assert "over 3 held-out captions | 2.0000 |" in text


def test_the_model_card_tells_what_was_filtered(tiny_bundle: Bundle) -> None:
    assert "filtered" not in card(tiny_bundle)
    counts = {"rows": 10, "quarantined": {}, "filtered": {"min_size": 1200}, "attribution": None}
    told = "0 rows were set aside as unusable, 1,200 were filtered (1,200 by min_size). Pictures"
    assert told in card(tiny_bundle, embeddings=counts)


def test_the_model_card_tells_of_weights_of_others(tiny_bundle: Bundle) -> None:
    assert "licence" not in card(tiny_bundle)
    text = card(tiny_bundle, started_from={"expert_1": "5e" * 32})
    assert f"- expert_1 was started from other weights (SHA-256 `{'5e' * 32}`)" in text
    assert "expert_0" not in text
    assert "facebookresearch/DiT are CC BY-NC 4.0" in text


def test_the_model_card_tells_of_unlike_experts(unlike: Bundle, tiny_bundle: Bundle) -> None:
    counts = [sum(p.numel() for p in unlike.expert(k).parameters()) for k in range(3)]
    text = card(unlike)
    assert f"({min(counts):,} to {max(counts):,} parameters each)" in text
    assert f"| 1 | 64 wide, 2 layers | epsilon | {counts[1]:,} |" in text
    assert f"| 2 | 32 wide, 1 layers | preconditioned | {counts[2]:,} |" in text
    alike = card(tiny_bundle)
    assert "| prediction |" not in alike
    assert f"({counts[0]:,} parameters each)" in alike


def test_experts_of_other_latents_are_refused(
    tiny_bundle: Bundle, tmp_path: Path, randomised: Any
) -> None:
    config = replace(tiny_bundle.expert(0).config, in_channels=4)
    expert = randomised(Expert(config), 0)
    folder = Folder(tmp_path / "expert_0")
    folder.write_json("config.json", write_document(config))
    folder.write(EXPERT_WEIGHTS, safetensors.torch.save(expert.state_dict()))
    parts = dict(tiny_bundle.parts) | {"expert_0": VerifiedFolder(folder, None)}
    message = (
        r"expert_0/config.json: latents of shape \(4, 4, 4\), but the router reads \(8, 4, 4\)"
    )
    with pytest.raises(BundleError, match=message):
        Bundle(parts, tiny_bundle.facts).expert(1)


def test_starting_from_the_runs_own_seed_is_no_start_from_elsewhere(tmp_path: Path) -> None:
    """What the seed itself started from is, and an expert's own other start."""
    run = Run(load("quickstart", [f"run_dir={tmp_path}"]))
    run.seed.write(EXPERT_WEIGHTS, b"the seed's weights")

    def expert(k: int, start: str | None) -> Manifest:
        parents = {"shard": "s"} | ({} if start is None else {"init": start})
        return publish(run.expert(k), EXPERT, config_digest="", parents=parents, facts={})

    def seed(**parents: str) -> Manifest:
        return publish(run.seed, SEED, config_digest="", parents=parents, facts={})

    own = seed(clusters="c").files[EXPERT_WEIGHTS]
    starts = [own, "another", None]
    experts = {f"expert_{k}": expert(k, start) for k, start in enumerate(starts)}
    assert started_from(run, experts) == {"expert_1": "another"}
    seed(clusters="c", init="a stranger's")
    assert started_from(run, experts) == {"expert_1": "another", "seed": "a stranger's"}
    without = Run(load("quickstart", [f"run_dir={tmp_path}", "seed_training.steps=0"]))
    assert started_from(without, experts) == {"expert_0": own, "expert_1": "another"}


def test_a_bundle_carries_the_seed_that_its_experts_started_from(
    seeded_bundle_path: Path, tmp_path: Path
) -> None:
    bundle = load_bundle(str(seeded_bundle_path))
    assert "seed" in json.loads((seeded_bundle_path / MODEL_INDEX).read_text())
    experts = {bundle.weights_digest(f"expert_{k}") for k in range(3)}
    assert bundle.weights_digest("seed") not in experts
    assert "place of\nan expert that is lost" in card(bundle)
    copy = Path(shutil.copytree(seeded_bundle_path, tmp_path / "copy"))
    (copy / "seed" / EXPERT_WEIGHTS).unlink()
    with pytest.raises(BundleError, match=f"lacks seed/{EXPERT_WEIGHTS}"):
        load_bundle(str(copy))
