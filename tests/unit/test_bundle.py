"""The bundle: it loads as it was written, and every damage is named."""

import json
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from paris_ray.artifacts import MANIFEST
from paris_ray.bundle import Bundle, load_bundle, load_expert
from paris_ray.cluster_facts import ClusterFacts
from paris_ray.encoders.folders import CODEC_WEIGHTS
from paris_ray.errors import ArtifactError, BundleError, ParisError
from paris_ray.export import write_bundle
from paris_ray.folders import Folder
from paris_ray.run import EXPERT_WEIGHTS, ROUTER_WEIGHTS

NUM_EXPERTS = 3


@pytest.fixture
def copy(tiny_bundle_path: Path, tmp_path: Path) -> Path:
    """A bundle to damage."""
    return Path(shutil.copytree(tiny_bundle_path, tmp_path / "bundle"))


@pytest.fixture
def unsigned(copy: Path) -> Path:
    """A bundle without manifest, as the public Paris release."""
    (copy / MANIFEST).unlink()
    return copy


def load_everything(path: Path) -> Bundle:
    bundle = load_bundle(str(path))
    for k in range(bundle.num_experts):
        bundle.expert(k)
    assert bundle.router
    assert bundle.codec
    assert len(bundle.null_text) == 1
    return bundle


def edit(path: Path, **changes: Any) -> None:
    """Change fields of a JSON file; None removes one."""
    document = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in document.items() if v is not None}))


def edit_model(path: Path, **changes: Any) -> None:
    """Change fields of a model's `config.json`, where each of them stands."""
    document = json.loads(path.read_text())
    public = {key: value for key, value in changes.items() if key in document}
    ours = {key: value for key, value in changes.items() if key not in document}
    edit(path, **public, paris_ray=document["paris_ray"] | ours)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def refusal(path: Path, error: type[ParisError] | tuple[type[ParisError], ...]) -> str:
    with pytest.raises(error) as caught:
        load_everything(path)
    return str(caught.value)


def test_round_trip(tiny_bundle: Bundle, tiny_parts: Path) -> None:
    assert tiny_bundle.num_experts == NUM_EXPERTS
    assert tiny_bundle.latent_shape == (8, 4, 4)
    assert tiny_bundle.facts.sampling.num_inference_steps == 3
    assert tiny_bundle.facts.example_prompts == ("a red cat", "a blue dog")
    for k in range(NUM_EXPERTS):
        saved = safetensors.torch.load_file(tiny_parts / f"expert_{k}" / EXPERT_WEIGHTS)
        loaded = tiny_bundle.expert(k).state_dict()
        assert loaded.keys() == saved.keys()
        assert all(torch.equal(loaded[name], saved[name]) for name in saved)
    assert not tiny_bundle.expert(0).training
    assert not any(p.requires_grad for p in tiny_bundle.router.parameters())
    assert tiny_bundle.expert(0) is tiny_bundle.expert(0)


def test_it_has_the_layout_of_the_public_release(tiny_bundle_path: Path) -> None:
    config = json.loads((tiny_bundle_path / "config.json").read_text())
    assert (config["num_experts"], config["image_size"], config["num_channels"]) == (3, 4, 8)
    index = json.loads((tiny_bundle_path / "model_index.json").read_text())
    assert index["num_experts"] == 3
    assert {"router", "text_encoder"} <= index.keys()
    for name in (f"expert_0/{EXPERT_WEIGHTS}", f"router/{ROUTER_WEIGHTS}", "README.md"):
        assert (tiny_bundle_path / name).is_file()


def test_it_loads_without_manifest(unsigned: Path) -> None:
    assert load_everything(unsigned).num_experts == NUM_EXPERTS


def test_one_expert_needs_only_its_own_files(copy: Path) -> None:
    for name in ("expert_1", "router"):
        flip_bit(next((copy / name).glob("*.safetensors")))
    assert load_bundle(str(copy)).expert(0)
    assert load_expert(load_bundle(str(copy)).parts["expert_2"])


@pytest.mark.parametrize("name", ["config.json", "router", "codec", "text_encoder", "expert_1"])
def test_a_missing_part_is_named(copy: Path, name: str) -> None:
    target = copy / name
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    assert name in refusal(copy, BundleError)


@pytest.mark.parametrize(
    "name",
    [
        f"expert_1/{EXPERT_WEIGHTS}",
        "expert_1/config.json",
        f"router/{ROUTER_WEIGHTS}",
        f"codec/{CODEC_WEIGHTS}",
        "codec/config.json",
        "text_encoder/tokenizer.json",
        "text_encoder/model.safetensors",
    ],
)
class TestAnyFile:
    """What holds for every file of a bundle."""

    def test_missing_is_named(self, copy: Path, name: str) -> None:
        (copy / name).unlink()
        assert name in refusal(copy, (ArtifactError, BundleError))

    def test_a_flipped_bit_is_named(self, copy: Path, name: str) -> None:
        flip_bit(copy / name)
        message = refusal(copy, ArtifactError)
        assert name in message
        assert "digest" in message

    def test_truncated_without_manifest_is_named(self, unsigned: Path, name: str) -> None:
        truncate(unsigned / name)
        assert name in refusal(unsigned, (ArtifactError, BundleError))


def test_an_extra_expert_is_named(copy: Path) -> None:
    shutil.copytree(copy / "expert_0", copy / "expert_3")
    assert "num_experts=3, but expert_3/ exists" in refusal(copy, BundleError)


@pytest.mark.parametrize("value", [0, -1, 10**9, "3", 3.0, None])
def test_an_absurd_number_of_experts_is_refused(unsigned: Path, value: object) -> None:
    edit(unsigned / "config.json", num_experts=value)
    message = refusal(unsigned, BundleError)
    assert f"config.json: num_experts={value!r}, allowed: 1 to" in message


def test_a_router_for_other_experts_is_refused(unsigned: Path) -> None:
    shutil.rmtree(unsigned / "expert_2")
    edit(unsigned / "config.json", num_experts=2)
    edit(unsigned / "model_index.json", num_experts=2)
    assert "router/config.json: num_experts=3, but the bundle has 2" in refusal(
        unsigned, BundleError
    )


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"paris_ray": None}, "the field paris_ray is missing"),
        ({"paris_ray": 3}, "the field paris_ray is missing"),
        ({"model_name": None}, "'model_name' is missing"),
        ({"model_name": ["tiny"]}, "model_name=['tiny'], allowed: a text"),
        ({"vae_name": 3}, "vae_name=3, allowed: a text"),
        ({"paris_ray": {"picture_size": 32, "attribution": None}}, "'sampling' is missing"),
        ({"paris_ray": {"sampling": {}}}, "paris_ray: picture_size=None, allowed: 1 to"),
        ({"num_channels": 4}, "num_channels=4, but the router reads 8"),
        ({"num_channels": None}, "num_channels=None, allowed: 1 to"),
        ({"image_size": None}, "image_size=None, allowed: 1 to"),
        ({"image_size": 8}, "image_size=8, but the router reads 4"),
        ({"use_latents": False}, "use_latents=False, expected True"),
        ({"paris_ray": {"sampling": {"steps": 3}}}, "paris_ray.sampling: unknown key 'steps'"),
        ({"paris_ray": {"sampling": {"solver": "rk4"}}}, "expected one of ['euler', 'heun', 'ab2'"),
        ({"paris_ray": {"sampling": {"routing": "${oc.env:HOME}"}}}, "interpolation"),
    ],
)
def test_bad_facts_are_named(unsigned: Path, changes: dict[str, Any], fragment: str) -> None:
    edit(unsigned / "config.json", **changes)
    message = refusal(unsigned, BundleError)
    assert "bundle/config.json" in message
    assert fragment in message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("example_prompts", "a red cat"),
        ("example_prompts", ["a red cat", 3]),
        ("example_prompts", None),
        ("attribution", ["nobody"]),
    ],
    ids=str,
)
def test_facts_that_are_no_text_are_named(unsigned: Path, field: str, value: object) -> None:
    ours = json.loads((unsigned / "config.json").read_text())["paris_ray"]
    edit(unsigned / "config.json", paris_ray=ours | {field: value})
    assert f"paris_ray.{field}={value!r}, allowed: a" in refusal(unsigned, BundleError)


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"hidden_size": 64}, "tensor 'final_layer.linear.weight' has shape (8, 32)"),
        ({"num_layers": 2}, "has shape missing"),
        ({"text_injection": "cross_attention"}, "cross_attn"),
        ({"hidden": 16}, "unknown key 'hidden'; allowed here: input_size"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"hidden_size": 10**9}, "hidden_size=1000000000 is not allowed"),
        ({"hidden_size": 10**30}, "hidden_size="),
        ({"hidden_size": 18}, "hidden_size=18 is not allowed"),
        ({"num_heads": 3}, "hidden_size=32 is not allowed: a multiple of num_heads=3"),
        ({"num_heads": 0}, "num_heads=0"),
        ({"patch_size": 3}, "input_size=4 is not allowed"),
        ({"text_embed_dim": -1}, "text_embed_dim=-1"),
        ({"text_hidden_size": 10**12}, "text_hidden_size="),
        ({"prediction": "${oc.env:HOME}"}, "interpolation"),
    ],
    ids=str,
)
def test_a_bad_expert_config_is_named(
    unsigned: Path, changes: dict[str, Any], fragment: str
) -> None:
    edit_model(unsigned / "expert_1" / "config.json", **changes)
    message = refusal(unsigned, BundleError)
    assert "expert_1" in message
    assert fragment in message


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"num_experts": -1}, "num_experts=-1"),
        ({"num_experts": 10**9}, "num_experts=1000000000 is not allowed"),
        ({"num_experts": 4}, "num_experts=4, but the bundle has 3 experts"),
        ({"text_embed_dim": 24}, "text_proj"),
        ({"patch_size": 4}, "patch_embed"),
        ({"in_channels": 4}, "num_channels=8, but the router reads 4"),
        ({"text_embed_dim": 0}, "text_proj"),
    ],
    ids=str,
)
def test_a_bad_router_config_is_named(
    unsigned: Path, changes: dict[str, Any], fragment: str
) -> None:
    edit_model(unsigned / "router" / "config.json", **changes)
    message = refusal(unsigned, BundleError)
    assert "router" in message
    assert fragment in message


def test_the_bundle_tells_what_its_models_leave_out(unsigned: Path) -> None:
    """The classes' own defaults are 4 channels and 8 experts."""
    edit(unsigned / "expert_1" / "config.json", in_channels=None, out_channels=None)
    edit(unsigned / "router" / "config.json", in_channels=None, num_experts=None)
    bundle = load_everything(unsigned)
    assert bundle.expert(1).config.in_channels == bundle.router.config.in_channels == 8
    assert bundle.router.config.num_experts == NUM_EXPERTS


def test_other_codecs_are_refused(unsigned: Path) -> None:
    edit(unsigned / "codec" / "config.json", kind="jpeg")
    assert "kind='jpeg', expected 'patch_pca'" in refusal(unsigned, BundleError)


def test_a_codec_of_another_shape_is_named(unsigned: Path) -> None:
    path = unsigned / "codec" / CODEC_WEIGHTS
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file(tensors | {"mean": tensors["mean"][0]}, path)
    assert f"codec/{CODEC_WEIGHTS}" in refusal(unsigned, BundleError)


@pytest.mark.parametrize("name", ["config.json", "expert_0/config.json", "codec/config.json"])
@pytest.mark.parametrize("payload", ["[]", "3", "null", '{"kind": '])
def test_json_of_another_form_is_refused(unsigned: Path, name: str, payload: str) -> None:
    (unsigned / name).write_text(payload)
    assert name in refusal(unsigned, (ArtifactError, BundleError))


def test_a_lying_config_allocates_nothing(unsigned: Path) -> None:
    """A width within the limits would be an expert of 4 GB; it is compared before it is made."""
    edit_model(unsigned / "expert_0" / "config.json", hidden_size=8192)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "has shape" in refusal(unsigned, BundleError)
    growth_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert growth_kib < 500_000


def tell_clusters(path: Path, **changes: Any) -> None:
    cluster = {"rows": 2, "words": ["cat"], "pictures": ["aGk="]} | changes
    (path / "clusters").mkdir()
    (path / "clusters" / "clusters.json").write_text(json.dumps([cluster] * 3))


def test_it_tells_what_its_experts_were_trained_on(unsigned: Path) -> None:
    assert load_bundle(str(unsigned)).clusters == []
    tell_clusters(unsigned)
    told = ClusterFacts(rows=2, words=["cat"], pictures=["aGk="])
    bundle = load_bundle(str(unsigned))
    assert bundle.clusters == [told] * 3
    target = unsigned / "again"
    write_bundle(bundle, Folder(target), model_card="")
    assert load_bundle(str(target)).clusters == [told] * 3


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"rows": "2"}, "rows"),
        ({"words": ["x" * 101]}, "words"),
        ({"words": ["x"] * 21}, "words"),
        ({"pictures": ["<script>"]}, "pictures"),
        ({"pictures": ["A" * 20_001]}, "pictures"),
        ({"link": "https://example.com"}, "link"),
    ],
)
def test_what_it_tells_is_checked(unsigned: Path, changes: dict[str, Any], fragment: str) -> None:
    tell_clusters(unsigned, **changes)
    with pytest.raises(BundleError, match=rf"clusters\.json is damaged: 0\.{fragment}"):
        _ = load_bundle(str(unsigned)).clusters


def test_it_tells_of_as_many_clusters_as_experts(unsigned: Path) -> None:
    tell_clusters(unsigned)
    (unsigned / "clusters" / "clusters.json").write_text("[]")
    with pytest.raises(BundleError, match="has 0 clusters, expected 3"):
        _ = load_bundle(str(unsigned)).clusters


def test_an_absent_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no model folder at .*nowhere.* no config.json"):
        load_bundle(str(tmp_path / "nowhere"))


def test_an_artefact_of_another_kind_is_refused(copy: Path) -> None:
    edit(copy / MANIFEST, kind="clusters")
    with pytest.raises(ArtifactError, match="holds 'clusters', expected 'bundle'"):
        load_bundle(str(copy))
