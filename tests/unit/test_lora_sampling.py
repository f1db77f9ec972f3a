"""Drawing with a LoRA: one expert draws with it, the others and later requests without."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from paris_ray.artifacts import MANIFEST, publish
from paris_ray.bundle import Bundle, load_bundle
from paris_ray.config import LoRAConfig
from paris_ray.config.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from paris_ray.errors import ArtifactError, BundleError, ConfigError, ParisError
from paris_ray.folders import Folder
from paris_ray.models.lora import Adapter
from paris_ray.models.peft_layout import EXPERT_DIGEST, save_adapter
from paris_ray.sampling import generate
from paris_ray.sampling.calls import ExpertCall
from paris_ray.sampling.local import LocalModels
from paris_ray.sampling_options import sampling_options
from tests.expert_calls import answer_alone, first_expert_calls

EXPERT = 1
PROMPTS = ["a red cat", "a blue dog"]
WriteLoRA = Callable[..., Path]


@pytest.fixture(scope="session")
def write_lora(
    randomised: Callable[[nn.Module, int], nn.Module], tmp_path_factory: pytest.TempPathFactory
) -> WriteLoRA:
    """A function that writes a random adapter of a bundle's expert, as `peft` would."""

    def write(bundle: Bundle, expert: int = EXPERT, seed: int = 7, **options: Any) -> Path:
        config = LoRAConfig(**{"r": 2, "lora_alpha": 8} | options)
        adapter = randomised(Adapter.create(bundle.expert(expert), config, 0), seed)
        path = tmp_path_factory.mktemp("lora")
        save_adapter(adapter, Folder(path))
        return path

    return write


@pytest.fixture
def release(release_path: Path) -> Bundle:
    """The release, opened for this test alone."""
    return load_bundle(str(release_path))


@pytest.fixture
def lora_path(write_lora: WriteLoRA, release: Bundle) -> Path:
    return write_lora(release)


def draw(bundle: Bundle, **options: Any) -> NDArray[np.uint8]:
    options = {"num_inference_steps": 3, "guidance_scale": 2.0, "routing": "full"} | options
    return np.stack([np.asarray(image) for image in generate(bundle, PROMPTS, **options)])


def test_it_is_drawn_with_when_it_is_asked_for(release: Bundle, lora_path: Path) -> None:
    before = draw(release)
    release.add_lora("mine", str(lora_path), expert=EXPERT)
    assert release.loras == {"mine": EXPERT}
    with_lora = draw(release, lora="mine")
    assert (with_lora != before).mean() > 0.01
    assert np.array_equal(draw(release), before)
    assert np.array_equal(draw(release, lora="mine"), with_lora)


def test_the_bundles_files_stay_as_they_are(release_path: Path, lora_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in release_path.rglob("*")}
    bundle = load_bundle(str(release_path))
    for name, merge in (("attached", False), ("merged", True)):
        bundle.add_lora(name, str(lora_path), expert=EXPERT, merge=merge)
        draw(bundle, lora=name)
    assert {path: path.stat().st_mtime_ns for path in release_path.rglob("*")} == before


def test_only_its_expert_is_asked_to_use_it(release: Bundle, lora_path: Path) -> None:
    release.add_lora("mine", str(lora_path), expert=EXPERT)
    options = sampling_options(release, routing="full", lora="mine")
    calls = first_expert_calls(release, release.encode_text(PROMPTS), [0, 1], options)
    assert [call.lora for call in calls] == [None, "mine", None]
    models = LocalModels(release)
    plain = sampling_options(release, routing="full")
    others = first_expert_calls(release, release.encode_text(PROMPTS), [0, 1], plain)
    equal = [
        torch.equal(answer_alone(models, call), answer_alone(models, other))
        for call, other in zip(calls, others, strict=True)
    ]
    assert equal == [True, False, True]


def first_call(bundle: Bundle, lora: str | None) -> ExpertCall:
    """The first question to the adapted expert."""
    options = sampling_options(bundle, routing="full", lora=lora)
    return first_expert_calls(bundle, bundle.encode_text(PROMPTS), [0, 1], options)[EXPERT]


def test_what_an_expert_keeps_of_a_caption_is_not_mixed(
    release: Bundle, write_lora: WriteLoRA
) -> None:
    path = write_lora(release, target_modules=("cross_attn.in_proj",))
    release.add_lora("mine", str(path), expert=EXPERT)
    with_lora, plain = first_call(release, "mine"), first_call(release, None)
    shared = LocalModels(release)
    for call in (with_lora, plain, with_lora):
        assert torch.equal(answer_alone(shared, call), answer_alone(LocalModels(release), call))
    assert not torch.equal(answer_alone(shared, with_lora), answer_alone(shared, plain))


def test_merged_equals_attached_and_weights_are_shared(release: Bundle, lora_path: Path) -> None:
    release.add_lora("attached", str(lora_path), expert=EXPERT)
    release.add_lora("merged", str(lora_path), expert=EXPERT, merge=True)
    attached, merged = (draw(release, lora=name).astype(int) for name in ("attached", "merged"))
    assert abs(attached - merged).max() <= 1
    base = release.expert(EXPERT)
    views = [release.expert(EXPERT, name) for name in ("attached", "merged")]
    assert all(view.pos_embed is base.pos_embed for view in views)
    weights = [model.layers[0].attn.in_proj.weight for model in (base, *views)]
    assert weights[1] is weights[0]
    assert not torch.equal(weights[2], weights[0])
    assert release.expert(EXPERT, "merged") is views[1]


def test_offloaded_experts_take_their_adapters_along(
    release: Bundle, release_path: Path, lora_path: Path
) -> None:
    frugal = load_bundle(str(release_path), offload=True)
    for bundle in (release, frugal):
        bundle.add_lora("mine", str(lora_path), expert=EXPERT)
    assert np.array_equal(draw(frugal, lora="mine"), draw(release, lora="mine"))


def test_the_factors_are_read_whatever_the_experts_dtype(
    release_path: Path, lora_path: Path
) -> None:
    bundle = load_bundle(str(release_path), dtype="bfloat16")
    bundle.add_lora("mine", str(lora_path), expert=EXPERT)
    assert (draw(bundle, lora="mine") != draw(bundle)).any()


def test_the_manifest_tells_the_expert(release: Bundle, lora_path: Path) -> None:
    publish(Folder(lora_path), "lora", config_digest="", parents={}, facts={"expert": 2})
    release.add_lora("mine", str(lora_path))
    release.add_lora("theirs", str(lora_path), expert=0)
    assert release.loras == {"mine": 2, "theirs": 0}
    (lora_path / ADAPTER_CONFIG).write_text("{}")
    with pytest.raises(ArtifactError, match=f"{ADAPTER_CONFIG} does not have the digest"):
        release.add_lora("changed", str(lora_path))


@pytest.mark.parametrize("number", [1, 2, 7])
def test_its_expert_is_known_by_its_weights(release: Bundle, lora_path: Path, number: int) -> None:
    """Its number changes when another expert leaves the bundle."""
    facts = {"expert": number, EXPERT_DIGEST: release.weights_digest("expert_2")}
    publish(Folder(lora_path), "lora", config_digest="", parents={}, facts=facts)
    release.add_lora("mine", str(lora_path))
    assert release.loras == {"mine": 2}


def test_an_adapter_whose_expert_has_left_must_be_given_one(
    release: Bundle, lora_path: Path
) -> None:
    facts = {"expert": 1, EXPERT_DIGEST: "9" * 64}
    publish(Folder(lora_path), "lora", config_digest="", parents={}, facts=facts)
    with pytest.raises(BundleError, match=rf"^{lora_path}: expert 1, with the weights '9+', which"):
        release.add_lora("mine", str(lora_path))
    release.add_lora("mine", str(lora_path), expert=1)
    assert release.loras == {"mine": 1}


@pytest.mark.parametrize("expert", [None, 3, -1, True, "1"])
def test_an_expert_that_does_not_exist_is_refused(
    release: Bundle, lora_path: Path, expert: Any
) -> None:
    with pytest.raises(BundleError, match=rf"{lora_path}: expert={expert!r} .*: .*0 to 2"):
        release.add_lora("mine", str(lora_path), expert=expert)
    publish(Folder(lora_path), "lora", config_digest="", parents={}, facts={"expert": expert})
    with pytest.raises(BundleError, match=rf"expert={expert!r} is not allowed"):
        release.add_lora("mine", str(lora_path))
    assert release.loras == {}


def test_folders_that_do_not_fit_are_refused_when_they_are_added(
    release: Bundle, tiny_bundle: Bundle, write_lora: WriteLoRA, tmp_path: Path
) -> None:
    for path, reason in (
        (tmp_path / "nowhere", "adapter_config.json does not exist"),
        (write_lora(tiny_bundle), f"{ADAPTER_WEIGHTS}: tensor .* has shape"),
    ):
        with pytest.raises(ParisError, match=rf"^{path}.*{reason}"):
            release.add_lora("mine", str(path), expert=EXPERT)
    path = write_lora(release)
    (path / MANIFEST).write_text(json.dumps({"kind": "lora"}))
    with pytest.raises(ArtifactError, match="is not a manifest"):
        release.add_lora("mine", str(path), expert=EXPERT)
    assert release.loras == {}


def test_names_are_checked(release: Bundle, lora_path: Path) -> None:
    with pytest.raises(ParisError, match=r"^lora='mine' is not allowed: the bundle has none"):
        draw(release, lora="mine")
    release.add_lora("mine", str(lora_path), expert=EXPERT)
    with pytest.raises(ConfigError, match=r"lora='mine' .* there is one of that name already"):
        release.add_lora("mine", str(lora_path), expert=EXPERT)
    release.add_lora("theirs", str(lora_path), expert=0)
    with pytest.raises(ParisError, match=r"^lora='Mine' is not allowed: 'mine', 'theirs'$"):
        draw(release, lora="Mine")


@pytest.mark.parametrize("merge", [False, True])
def test_a_view_that_sampling_made_can_be_trained_with(
    release: Bundle, lora_path: Path, merge: bool
) -> None:
    release.add_lora("mine", str(lora_path), expert=EXPERT, merge=merge)
    generate(release, PROMPTS, num_inference_steps=1, routing="full", lora="mine")
    assert not any(p.is_inference() for p in release.expert(EXPERT, "mine").parameters())


def test_a_link_out_of_the_folder_is_refused(
    release: Bundle, lora_path: Path, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("{}")
    (lora_path / "link.json").symlink_to(secret)
    with pytest.raises(BundleError, match=r"link.json is a link that leaves the folder"):
        release.add_lora("mine", str(lora_path), expert=EXPERT)


@pytest.mark.parametrize("facts", [[], None, "x"])
def test_a_manifest_whose_facts_are_no_mapping_is_refused(
    release: Bundle, lora_path: Path, facts: object
) -> None:
    publish(Folder(lora_path), "lora", config_digest="", parents={}, facts={"expert": EXPERT})
    document = json.loads((lora_path / MANIFEST).read_text())
    (lora_path / MANIFEST).write_text(json.dumps(document | {"facts": facts}))
    with pytest.raises(ArtifactError, match="is not a manifest"):
        release.add_lora("mine", str(lora_path))
