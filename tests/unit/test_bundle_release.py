"""A folder as the public release has it: read as it is, and every damage named."""

import json
import os
import shutil
import sys
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from paris_ray.bundle import Bundle, load_bundle
from paris_ray.config import QUALITIES, SamplingConfig
from paris_ray.errors import ArtifactError, BundleError, ConfigError
from paris_ray.folders import Folder
from paris_ray.models import Expert
from paris_ray.run import EXPERT_WEIGHTS, ROUTER_WEIGHTS
from paris_ray.sampling import generate
from paris_ray.sampling.generation import sample
from paris_ray.sampling.guidance import guided_velocity
from paris_ray.sampling.local import LocalModels
from paris_ray.sampling.sampler import Samples
from paris_ray.sampling_options import sampling_options
from tests.expert_calls import answer_alone, first_expert_calls

PROMPTS = ["a red cat", "blue dog"]
FEW = {"num_inference_steps": 3}
WEIGHTS = [f"expert_1/{EXPERT_WEIGHTS}", f"router/{ROUTER_WEIGHTS}"]
Change = Callable[[Path], Any]


@pytest.fixture
def copy(release_path: Path, tmp_path: Path) -> Path:
    """A release to damage."""
    return Path(shutil.copytree(release_path, tmp_path / "release"))


def draw(bundle: Bundle, **options: Any) -> Samples:
    options = {"num_inference_steps": 4, "guidance_scale": 2.0} | options
    text = bundle.encode_text(PROMPTS)
    return sample(bundle, text, [3, 14], sampling_options(bundle, **options))


def test_it_is_read_as_it_is(release_bundle: Bundle, release_path: Path) -> None:
    assert release_bundle.num_experts == 3
    assert release_bundle.latent_shape == release_bundle.codec.latent_shape == (4, 4, 4)
    for k in range(3):
        saved = safetensors.torch.load_file(release_path / f"expert_{k}" / EXPERT_WEIGHTS)
        loaded = release_bundle.expert(k).state_dict()
        assert all(torch.equal(loaded[name], saved[name]) for name in saved)
        assert release_bundle.expert(k).config.text_padding_mask is False
    assert release_bundle.null_text.text_embeddings.shape == (1, 77, 16)


def test_what_it_does_not_say_has_defaults(release_bundle: Bundle) -> None:
    facts = release_bundle.facts
    assert replace(facts.sampling, presets={}) == SamplingConfig(
        num_inference_steps=50, guidance_scale=7.5, routing="top-2"
    )
    assert list(facts.sampling.presets) == list(QUALITIES)
    assert (facts.model_name, facts.picture_size) == ("paris-small", 32)
    assert (facts.attribution, facts.example_prompts) == (None, ())
    assert facts.vae_name == "stabilityai/sd-vae-ft-mse"


def test_pictures_are_drawn_from_it(release_bundle: Bundle) -> None:
    images = generate(release_bundle, PROMPTS, seed=3, **FEW)
    assert [image.size for image in images] == [(32, 32), (32, 32)]
    again = generate(release_bundle, PROMPTS, seed=3, **FEW)
    assert [image.tobytes() for image in images] == [image.tobytes() for image in again]
    other = generate(release_bundle, PROMPTS[::-1], seed=3, **FEW)
    assert images[0].tobytes() != other[0].tobytes()
    assert np.asarray(images[0]).std() > 0


def test_its_name_of_the_full_ensemble_is_understood(release_bundle: Bundle) -> None:
    full = draw(release_bundle, routing="full")
    assert torch.equal(draw(release_bundle, routing="full-ensemble").latents, full.latents)


def store_as(dtype: torch.dtype, *names: str) -> Change:
    """Return a change of the data type of some tensors, or of all."""

    def change(root: Path) -> None:
        for file in WEIGHTS:
            state = safetensors.torch.load_file(root / file)
            chosen = names or tuple(state)
            cast = {name: state[name].to(dtype) for name in chosen if name in state}
            safetensors.torch.save_file(state | cast, root / file)

    return change


def dtypes(bundle: Bundle) -> set[torch.dtype]:
    models = [bundle.expert(1), bundle.router]
    return {parameter.dtype for model in models for parameter in model.parameters()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_stored_data_type_is_kept(copy: Path, dtype: torch.dtype) -> None:
    store_as(dtype)(copy)
    bundle = load_bundle(str(copy))
    assert dtypes(bundle) == {dtype}
    assert generate(bundle, PROMPTS, **FEW)
    assert dtypes(load_bundle(str(copy), dtype="float32")) == {torch.float32}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_data_type_draws_nearly_the_same(
    release_path: Path, release_bundle: Bundle, dtype: Any
) -> None:
    bundle = load_bundle(str(release_path), dtype=dtype)
    assert dtypes(bundle) == {getattr(torch, dtype)}
    options = {"routing": "full", "guidance_scale": 1.0}
    latents, expected = (draw(b, **options).latents for b in (bundle, release_bundle))
    assert latents.dtype == torch.float32
    assert (latents - expected).norm() / expected.norm() < 0.05
    assert not torch.equal(latents, expected)


def test_one_file_of_two_data_types_needs_to_be_told(copy: Path) -> None:
    store_as(torch.float16, "pos_embed")(copy)
    with pytest.raises(BundleError, match=r"'pos_embed' is F16, but .* load the bundle with"):
        load_bundle(str(copy))
    assert dtypes(load_bundle(str(copy), dtype="float32")) == {torch.float32}


def test_options_that_are_not_allowed(release_path: Path) -> None:
    with pytest.raises(ConfigError, match="dtype='int8' is not allowed: float32, bfloat16, float1"):
        load_bundle(str(release_path), dtype="int8")  # type: ignore[arg-type]
    bundle = load_bundle(str(release_path), device="abacus")  # facts need no device
    assert bundle.facts.picture_size == 32
    for load in (bundle.expert, lambda _: bundle.router, lambda _: bundle.codec):
        with pytest.raises(ConfigError, match="device='abacus'"):
            load(0)


def test_weights_are_mapped(copy: Path) -> None:
    bundle = load_bundle(str(copy))
    file = str(copy / "expert_2" / EXPERT_WEIGHTS)
    assert file not in Path("/proc/self/maps").read_text()
    expert = bundle.expert(2)
    assert file in Path("/proc/self/maps").read_text()
    assert expert.layers[0].mlp[0].weight.isfinite().all()


def test_offloading_keeps_the_two_experts_used_last(release_path: Path) -> None:
    bundle = load_bundle(str(release_path), offload=True)
    loaded = {}
    for k in (0, 1, 0, 2):
        loaded[k] = weakref.ref(bundle.expert(k))
    assert [loaded[k]() is None for k in range(3)] == [False, True, False]
    assert bundle.expert(0) is loaded[0]()


def test_threads_share_the_room_of_two_experts(
    release_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = []
    load = Bundle._load_expert

    def counted(self: Bundle, index: int) -> Any:
        expert = load(self, index)
        alive.add(expert)
        most.append(len(alive))
        return expert

    def slow(*arguments: Any) -> torch.Tensor:
        time.sleep(0.02)  # long enough for another thread to come in, if it may
        return guided_velocity(*arguments)

    monkeypatch.setattr(Bundle, "_load_expert", counted)
    monkeypatch.setattr("paris_ray.sampling.local.guided_velocity", slow)
    bundle = load_bundle(str(release_path), offload=True)
    options = sampling_options(bundle, routing="full", num_inference_steps=2)
    calls = first_expert_calls(bundle, bundle.encode_text(PROMPTS), [1, 2], options)
    models = LocalModels(bundle)
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda call: answer_alone(models, call), calls * 4))
    for i, answer in enumerate(answers):
        assert torch.equal(answer, answers[i % len(calls)])
    assert len(calls) == 3
    assert max(most) == 2


@pytest.mark.parametrize("routing", ["top-2", "full"])
def test_offloading_changes_no_picture(
    release_path: Path, release_bundle: Bundle, routing: str
) -> None:
    bundle = load_bundle(str(release_path), offload=True)
    latents = draw(bundle, routing=routing).latents
    assert torch.equal(latents, draw(release_bundle, routing=routing).latents)


def edit(name: str, **changes: Any) -> Change:
    """Return a change of a JSON file; None removes a field."""

    def change(root: Path) -> None:
        document = json.loads((root / name).read_text()) | changes
        kept = {key: value for key, value in document.items() if value is not None}
        (root / name).write_text(json.dumps(kept))

    return change


def remove(name: str) -> Change:
    return lambda root: (
        shutil.rmtree(root / name) if (root / name).is_dir() else (root / name).unlink()
    )


def write(name: str, payload: bytes) -> Change:
    return lambda root: (root / name).write_bytes(payload)


def truncate(name: str, size: int = -5) -> Change:
    return lambda root: (root / name).write_bytes((root / name).read_bytes()[:size])


def link(name: str, target: str) -> Change:
    """Return the replacement of a file by a link."""

    def change(root: Path) -> None:
        (root / name).unlink(missing_ok=True)
        (root / name).symlink_to(target)

    return change


def reshape(name: str, tensor: str) -> Change:
    """Return a change that takes a row off a tensor."""

    def change(root: Path) -> None:
        state = safetensors.torch.load_file(root / name)
        safetensors.torch.save_file(state | {tensor: state[tensor][1:].contiguous()}, root / name)

    return change


EXPERT, ROUTER = f"expert_2/{EXPERT_WEIGHTS}", f"router/{ROUTER_WEIGHTS}"
VAE = "vae/diffusion_pytorch_model.safetensors"
CLIP = "text_encoder/model.safetensors"
# What the tensors of each prove.
EXPERT_PROOFS = ("patch_size", "in_channels", "out_channels", "mlp_ratio")
ROUTER_PROOFS = ("patch_size", "in_channels", "mlp_ratio", "num_experts")


@pytest.mark.parametrize(
    ("damage", "fragments"),
    [
        pytest.param(remove("model_index.json"), ["model_index.json does not exist"], id="index"),
        pytest.param(remove("expert_1"), ["lacks expert_1/"], id="expert"),
        pytest.param(remove("expert_1/config.json"), ["lacks expert_1/config.json"], id="config"),
        pytest.param(remove(EXPERT), [f"lacks {EXPERT}"], id="weights"),
        pytest.param(remove("router"), ["lacks router/"], id="router"),
        pytest.param(remove("vae"), ["lacks vae or codec"], id="vae"),
        pytest.param(remove(VAE), [f"lacks {VAE}"], id="vae weights"),
        pytest.param(remove("text_encoder"), ["lacks text_encoder/"], id="text encoder"),
        pytest.param(
            remove("tokenizer"),
            ["lacks tokenizer/", "text_encoder/config.json with model_type='clip_text_model'"],
            id="tokenizer",
        ),
        pytest.param(truncate(CLIP), [CLIP, "damaged"], id="truncated text encoder"),
        pytest.param(truncate(VAE), [VAE, "damaged"], id="truncated autoencoder"),
        pytest.param(write(VAE, b"\x80\x04pickle"), [VAE, "damaged"], id="pickled autoencoder"),
        pytest.param(
            lambda root: shutil.copytree(root / "expert_0", root / "expert_7"),
            ["config.json: num_experts=3, but expert_7/ exists"],
            id="an extra expert",
        ),
        pytest.param(
            lambda root: shutil.copytree(root / "vae", root / "codec"),
            ["has both codec and vae"],
            id="two codecs",
        ),
        pytest.param(truncate(EXPERT), [EXPERT, "damaged"], id="truncated"),
        pytest.param(truncate(ROUTER, 100), [ROUTER, "damaged"], id="truncated in the header"),
        pytest.param(write(EXPERT, b""), [EXPERT, "damaged"], id="empty"),
        pytest.param(
            write(EXPERT, (2**60).to_bytes(8, "little") + b"{}"), [EXPERT, "damaged"], id="header"
        ),
        pytest.param(write(EXPERT, b"\x80\x04pickle"), [EXPERT, "damaged"], id="pickle"),
        pytest.param(
            reshape(EXPERT, "pos_embed"), [EXPERT, "'pos_embed' has shape (0, 4, 32)"], id="shape"
        ),
        pytest.param(
            store_as(torch.int32, "pos_embed"),
            [f"expert_1/{EXPERT_WEIGHTS}", "'pos_embed' is I32, allowed: F32, BF16, F16"],
            id="integers",
        ),
        pytest.param(
            store_as(torch.float64), ["is F64, allowed: F32, BF16, F16"], id="double precision"
        ),
        pytest.param(
            edit("config.json", num_experts=2), ["num_experts=2, but expert_2/ exists"], id="count"
        ),
        pytest.param(
            edit("model_index.json", num_experts=8),
            ["model_index.json: num_experts=8, but config.json has 3"],
            id="count of the index",
        ),
        pytest.param(
            edit("router/config.json", num_experts=8),
            ["router/config.json: num_experts=8, but the bundle has 3"],
            id="count of the router",
        ),
        pytest.param(edit("config.json", model_name=None), ["'model_name'"], id="name"),
        pytest.param(edit("config.json", image_size=None), ["image_size=None"], id="no size"),
        pytest.param(edit("config.json", image_size=10**9), ["image_size=1000000000"], id="size"),
        pytest.param(edit("config.json", image_size=True), ["image_size=True"], id="true as size"),
        pytest.param(
            edit("config.json", num_channels=3), ["num_channels=3, but", "reads 4"], id="channels"
        ),
        pytest.param(
            edit("config.json", use_latents=False), ["use_latents=False"], id="not of latents"
        ),
        pytest.param(edit("config.json", paris_ray=3), ["paris_ray is missing"], id="no facts"),
        pytest.param(
            edit("expert_1/config.json", hidden_size=10**9), ["hidden_size=1000000000"], id="absurd"
        ),
        pytest.param(
            edit("expert_1/config.json", num_layers=3), ["expert_1", "layers.2"], id="layers"
        ),
        pytest.param(
            edit("expert_1/config.json", architecture="unet"), ["architecture='unet'"], id="unet"
        ),
        pytest.param(
            edit("expert_1/config.json", in_channels=8, out_channels=8),
            ["expert_1/config.json: latents of shape (8, 4, 4)", "router reads (4, 4, 4)"],
            id="other latents",
        ),
        pytest.param(
            edit("vae/config.json", block_out_channels=[8] * 99),
            ["vae/config.json: block_out_channels="],
            id="blocks",
        ),
        pytest.param(
            write("config.json", b"[" * 100_000), ["config.json is not JSON"], id="deep JSON"
        ),
        pytest.param(
            write("config.json", b'{"num_experts": ' + b"9" * 5000 + b"}"),
            ["config.json is not JSON"],
            id="long number",
        ),
        pytest.param(write("model_index.json", b"[]"), ["model_index.json does not"], id="list"),
        pytest.param(link(EXPERT, "/etc/hostname"), [EXPERT, "is a link that leaves"], id="link"),
        pytest.param(
            link("vae/notes", "../../elsewhere"), ["vae/notes is neither a file"], id="dead link"
        ),
        pytest.param(link("loop", "loop"), ["loop is neither a file nor a folder"], id="loop"),
        pytest.param(
            link("router/more", "/etc"), ["more is a link that leaves", "cp -rL"], id="link out"
        ),
        pytest.param(
            lambda root: os.mkfifo(root / "expert_0" / "pipe"), ["pipe is neither"], id="pipe"
        ),
    ],
)
def test_damage_is_named_before_any_weights_are_read(
    copy: Path, damage: Change, fragments: list[str]
) -> None:
    damage(copy)
    with pytest.raises((BundleError, ArtifactError)) as caught:
        load_bundle(str(copy))
    assert all(fragment in str(caught.value) for fragment in fragments), caught.value


@pytest.mark.parametrize(
    ("damage", "fragments"),
    [
        pytest.param(
            remove("tokenizer/tokenizer.json"), ["lacks tokenizer.json"], id="tokenizer file"
        ),
        pytest.param(
            edit("text_encoder/config.json", model_type="t5"), ["model_type='t5'"], id="T5"
        ),
        pytest.param(
            edit("vae/config.json", latent_channels=8), ["diffusion_pytorch"], id="autoencoder"
        ),
        pytest.param(
            edit("vae/config.json", _class_name="AutoencoderTiny"), ["AutoencoderTiny"], id="class"
        ),
    ],
)
def test_damage_of_the_encoders_is_named_when_they_load(
    copy: Path, damage: Change, fragments: list[str]
) -> None:
    damage(copy)
    bundle = load_bundle(str(copy))
    with pytest.raises((BundleError, ArtifactError)) as caught:
        _ = bundle.null_text, bundle.codec
    assert all(fragment in str(caught.value) for fragment in fragments), caught.value


def test_links_inside_the_folder_are_read(copy: Path) -> None:
    shutil.move(copy / EXPERT, copy / "expert_2" / "blob")
    (copy / EXPERT).symlink_to("blob")
    assert load_bundle(str(copy)).expert(2)


def leave_out(name: str, *fields: str) -> Change:
    return edit(name, **dict.fromkeys(fields))


def test_what_the_tensors_prove_need_not_be_told(copy: Path, release_bundle: Bundle) -> None:
    leave_out("expert_1/config.json", *EXPERT_PROOFS)(copy)
    leave_out("router/config.json", *ROUTER_PROOFS)(copy)
    bundle = load_bundle(str(copy))
    assert bundle.expert(1).config == release_bundle.expert(1).config
    assert bundle.router.config == release_bundle.router.config
    images, expected = (generate(b, PROMPTS, **FEW) for b in (bundle, release_bundle))
    assert [image.tobytes() for image in images] == [image.tobytes() for image in expected]


@pytest.mark.parametrize(
    "statement", [{"architecture": "dit_router"}, {"use_adaln_single": True}], ids=str
)
def test_the_tensors_of_a_router_decide_what_it_is(copy: Path, statement: dict[str, Any]) -> None:
    edit("router/config.json", **statement)(copy)
    assert load_bundle(str(copy)).router


def remake(**changes: Any) -> Change:
    """Return a change of expert 1 to another architecture, of which `config.json` is silent."""

    def change(root: Path) -> None:
        config = replace(load_bundle(str(root)).expert_configs[1], **changes)
        state = Expert(config).state_dict()
        safetensors.torch.save_file(state, root / "expert_1" / EXPERT_WEIGHTS)
        leave_out("expert_1/config.json", *changes)(root)

    return change


@pytest.mark.parametrize(
    ("damage", "fragments"),
    [
        pytest.param(
            leave_out("expert_1/config.json", "text_embed_dim"),
            ["expert_1", "'text_proj.weight' has shape (32, 16)", "means (32, 768)"],
            id="text_embed_dim",
        ),
        pytest.param(remake(mlp_ratio=2.0), ["expert_1", "mlp"], id="mlp_ratio"),
        pytest.param(remake(patch_size=1), ["expert_1", "has shape"], id="patch_size"),
        pytest.param(
            remake(in_channels=8), ["expert_1", "'final_layer.linear.bias'"], id="in_channels"
        ),
        pytest.param(
            lambda root: (
                leave_out("router/config.json", "num_experts")(root),
                reshape(ROUTER, "head.4.bias")(root),
            ),
            [ROUTER, "'head.4.bias' has shape (2,)", "means (3,)"],
            id="num_experts",
        ),
        *(
            pytest.param(
                leave_out(f"{part}/config.json", field),
                [f"{part}/config.json: the field {field} is missing"],
                id=f"{field} of {part}",
            )
            for part in ("expert_0", "router")
            for field in ("hidden_size", "num_layers", "num_heads")
        ),
    ],
)
def test_a_wrong_guess_is_refused(copy: Path, damage: Change, fragments: list[str]) -> None:
    damage(copy)
    with pytest.raises(BundleError) as caught:
        load_bundle(str(copy))
    assert all(fragment in str(caught.value) for fragment in fragments), caught.value


@pytest.mark.parametrize(
    ("package", "folder", "load"),
    [
        ("diffusers", "vae", lambda bundle: bundle.codec),
        ("transformers", "text_encoder", lambda bundle: bundle.text_encoder),
    ],
)
def test_a_missing_package_is_named(
    release_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    package: str,
    folder: str,
    load: Callable[[Bundle], Any],
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"/{folder} needs {package}: pip install 'paris_ray\[paris\]'"
    with pytest.raises(BundleError, match=message):
        load(load_bundle(str(release_path)))


def narrow_text(root: Path) -> None:
    """Make expert 1 one of narrower text."""
    path = root / "expert_1" / EXPERT_WEIGHTS
    state = safetensors.torch.load_file(path)
    narrow = state["text_proj.weight"][:, :8].contiguous()
    safetensors.torch.save_file(state | {"text_proj.weight": narrow}, path)
    edit("expert_1/config.json", text_embed_dim=8)(root)


def test_an_expert_of_other_text_is_named(copy: Path) -> None:
    narrow_text(copy)
    bundle = load_bundle(str(copy))
    message = r"expert_1/config.json: text_embed_dim=8, but the text encoder has 16"
    with pytest.raises(BundleError, match=message):
        generate(bundle, PROMPTS)


@pytest.mark.parametrize("offload", [False, True])
def test_a_remote_folder_draws_the_same(
    release_path: Path, release_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, offload: bool
) -> None:
    expected = draw(release_bundle, routing="full").latents
    monkeypatch.setattr(Folder, "is_local", False)
    bundle = load_bundle(str(release_path), offload=offload)
    assert torch.equal(draw(bundle, routing="full").latents, expected)
    assert np.array_equal(bundle.codec.decode(expected), release_bundle.codec.decode(expected))
