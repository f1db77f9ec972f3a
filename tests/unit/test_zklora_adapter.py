"""From PEFT folders to integers and back, beside the real peft and transformers libraries."""

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from paris_ray.artifacts import MANIFEST, VerifiedFolder, read_manifest
from paris_ray.config import ExpertConfig, LoRAConfig
from paris_ray.config.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from paris_ray.errors import ArtifactError, BundleError, ParisError, VerificationError
from paris_ray.folders import Folder
from paris_ray.identity import Identity
from paris_ray.models import Expert
from paris_ray.models.lora import Adapter
from paris_ray.models.peft_layout import (
    PICKLED_WEIGHTS,
    UNSUPPORTED_OPTIONS,
    load_adapter,
    save_adapter,
)
from paris_ray.zklora.adapter import PeftAdapter, quantise_adapter, read_peft, write_peft
from paris_ray.zklora.commitment import commit
from paris_ray.zklora.fixed_point import QuantisedModule, dequantise, evaluate, quantise
from paris_ray.zklora.fixed_point import quantise_rows as to_integers
from paris_ray.zklora.manifest import AdapterManifest, Base
from paris_ray.zklora.offer import build_manifest

# peft says when it corrects the option for one layer; transformers renames something.
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is", "ignore:.*is_gradient_check")

Randomise = Callable[[nn.Module, int], nn.Module]
Modules = dict[str, QuantisedModule]
Offer = Callable[..., AdapterManifest]

TARGETS = ["c_attn", "c_proj", "c_fc"]
MLP = "base_model.model.transformer.h.0.mlp"


@pytest.fixture(scope="module")
def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=20, n_positions=8, n_embd=12, n_layer=2, n_head=2, tie_word_embeddings=False
    )
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module")
def gpt2_lora(gpt2: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of Conv1D layers and one Linear, as peft writes it."""
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=[*TARGETS, "lm_head"],
        fan_in_fan_out=True,
        init_lora_weights=False,
    )
    folder = tmp_path_factory.mktemp("gpt2_lora")
    model = peft.get_peft_model(copy.deepcopy(gpt2), config)
    # Else peft stores the base's own weight of lm_head as well, which is an embedding to it.
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.fixture(scope="module")
def offer(tmp_path_factory: pytest.TempPathFactory) -> Offer:
    identity = Identity.create(tmp_path_factory.mktemp("contributor"))

    def make(modules: Modules, config: LoRAConfig, expert: int | None = None) -> AdapterManifest:
        return build_manifest(
            {name: commit(module)[1] for name, module in modules.items()},
            config,
            base=Base(digest="0f" * 32, expert=expert, router_digest=None),
            adapter="bought",
            price=1,
            sealed=b"-",
            key=b"-",
            contributor_certificate=identity.certificate,
        )

    return make


def copied(folder: Path, target: Path) -> Path:
    target.mkdir()
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        (target / name).write_bytes((folder / name).read_bytes())
    return target


def digests(modules: Modules) -> dict[str, str]:
    return {name: module.digest for name, module in modules.items()}


def logits(model: Callable[..., Any]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([[1, 5, 7, 2]])).logits


# Reading.


def test_conv1d_and_linear_are_read_alike(gpt2_lora: Path) -> None:
    adapter = read_peft(gpt2_lora)
    shapes = {name: (a.shape, b.shape) for name, (a, b) in adapter.factors.items()}
    assert len(shapes) == 9
    assert shapes["transformer.h.0.attn.c_attn"] == ((12, 3), (3, 36))
    assert shapes["transformer.h.1.mlp.c_proj"] == ((48, 3), (3, 12))
    assert shapes["lm_head"] == ((12, 3), (3, 20))
    assert adapter.config.scale == pytest.approx(5 / 3)
    assert list(adapter.config.target_modules) == list(adapter.factors)


def test_what_peft_says_of_conv1d_changes_no_factor(gpt2: nn.Module, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=3, target_modules=["c_fc"], fan_in_fan_out=True)
    peft.get_peft_model(copy.deepcopy(gpt2), config).save_pretrained(tmp_path)
    assert json.loads((tmp_path / ADAPTER_CONFIG).read_text())["fan_in_fan_out"] is True
    factors = read_peft(tmp_path).factors
    assert [(a.shape, b.shape) for a, b in factors.values()] == [((12, 3), (3, 48))] * 2
    edit_config(tmp_path, fan_in_fan_out=False)
    for name, pair in read_peft(tmp_path).factors.items():
        assert all(map(np.array_equal, pair, factors[name]))


def test_the_integers_do_what_peft_does(gpt2: nn.Module, gpt2_lora: Path) -> None:
    adapter = read_peft(gpt2_lora)
    modules = quantise_adapter(adapter)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(gpt2), gpt2_lora).eval()

    def add_update(module: QuantisedModule) -> Callable[..., Tensor]:
        def hook(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            x, exponent = to_integers(inputs[0].reshape(-1, module.d_in).numpy())
            exponent += module.exponent_a + module.exponent_b
            update = dequantise(evaluate(module, x), exponent, adapter.config.scale)
            return output + torch.from_numpy(update).reshape(output.shape)

        return hook

    ours = copy.deepcopy(gpt2)
    for name, module in modules.items():
        ours.get_submodule(name).register_forward_hook(add_update(module))
    expected, base = logits(theirs), logits(gpt2)
    assert (expected - base).norm() > 0.5 * base.norm()
    assert (logits(ours) - expected).norm() < 1e-3 * (expected - base).norm()


def test_layers_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(12)))
    config = peft.LoraConfig(r=2, target_modules=r"\d+")
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    assert json.loads((tmp_path / ADAPTER_CONFIG).read_text())["target_modules"] == r"\d+"
    assert list(read_peft(tmp_path).factors) == [str(number) for number in range(12)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read(gpt2_lora: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    folder = copied(gpt2_lora, tmp_path / "half")
    edit_weights(folder, lambda t: t.update({name: v.to(dtype) for name, v in t.items()}))
    for name, (a, b) in read_peft(folder).factors.items():
        full_a, full_b = read_peft(gpt2_lora).factors[name]
        assert a.dtype == b.dtype == np.float32
        np.testing.assert_allclose(a, full_a, rtol=5e-3, atol=1e-6)
        np.testing.assert_allclose(b, full_b, rtol=5e-3, atol=1e-6)


def edit_config(folder: Path, **changes: Any) -> None:
    document = json.loads((folder / ADAPTER_CONFIG).read_text()) | changes
    (folder / ADAPTER_CONFIG).write_text(json.dumps(document))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = safetensors.torch.load_file(folder / ADAPTER_WEIGHTS)
    change(tensors)
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    safetensors.torch.save_file(tensors, folder / ADAPTER_WEIGHTS)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("peft_type", "IA3"),
        ("bias", "all"),
        ("init_lora_weights", "pissa"),
        ("r", 4),
        ("r", 3.5),
        ("r", "3"),
        ("r", None),
        ("lora_alpha", 0),
        ("lora_alpha", float("nan")),
        ("use_rslora", 1),
        ("fan_in_fan_out", "yes"),
        ("fan_in_fan_out", None),
        *((name, {"some": 1}) for name in UNSUPPORTED_OPTIONS),
        *((name, 0) for name in UNSUPPORTED_OPTIONS),
    ],
)
def test_options_that_change_the_meaning_are_refused(
    gpt2_lora: Path, tmp_path: Path, option: str, value: object
) -> None:
    folder = copied(gpt2_lora, tmp_path / "edited")
    edit_config(folder, **{option: value})
    reason = r"has shape \(3, .*mean \(4, " if value == 4 else f"{ADAPTER_CONFIG}: {option}="
    with pytest.raises(BundleError, match=reason):
        read_peft(folder)


A, B = f"{MLP}.c_fc.lora_A.weight", f"{MLP}.c_fc.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.pop(A), "tensor .* has shape"),
        (lambda t: t.pop(B), "tensor .* has shape missing"),
        (lambda t: t.update(extra=torch.ones(1)), "'extra' has shape"),
        (lambda t: t.update({f"{MLP}.c_fc.lora_magnitude_vector": torch.ones(48)}), "has shape"),
        (lambda t: t.update({f"{MLP}.c_fc.base_layer.weight": torch.ones(12, 48)}), "has shape"),
        (lambda t: t.update({f"{MLP}.c_fc.bias": torch.ones(48)}), "has shape"),
        (lambda t: t.update({A.removeprefix("base_model."): t.pop(A)}), "has shape"),
        (lambda t: t.update({A: t[A].T}), r"has shape \(12, 3\)"),
        (lambda t: t.update({A: torch.ones(2, 12), B: torch.ones(48, 2)}), r"mean \(3, 12\)"),
        (lambda t: t.update({A: torch.ones(36)}), r"has shape \(36,\)"),
        (lambda t: t.update({A: torch.ones(())}), r"has shape \(\)"),
        (lambda t: t.update({B: torch.ones(())}), r"has shape \(\)"),
        (lambda t: t.update({A: torch.ones(3, 12, 1, 1)}), r"has shape \(3, 12, 1, 1\)"),
        (lambda t: t.update({A: t[A].double()}), "float64, allowed"),
        (lambda t: t[A][1].fill_(float("nan")), "not finite"),
        (lambda t: t[B][1].fill_(float("inf")), "not finite"),
        (lambda t: t.clear(), "has no tensor"),
        (lambda t: [t.clear(), t.update(x=torch.ones(1))], "has no tensor"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    gpt2_lora: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], object], reason: str
) -> None:
    folder = copied(gpt2_lora, tmp_path / "edited")
    edit_weights(folder, change)
    with pytest.raises(BundleError, match=rf"^{folder}/{ADAPTER_WEIGHTS}.*{reason}"):
        read_peft(folder)


@pytest.mark.parametrize("payload", [b"", b"no safetensors", pickle.dumps({A: 1})])
def test_damaged_weights_are_refused(gpt2_lora: Path, tmp_path: Path, payload: bytes) -> None:
    folder = copied(gpt2_lora, tmp_path / "edited")
    (folder / ADAPTER_WEIGHTS).write_bytes(payload)
    with pytest.raises(BundleError, match=f"{ADAPTER_WEIGHTS} is damaged"):
        read_peft(folder)
    (folder / ADAPTER_WEIGHTS).rename(folder / PICKLED_WEIGHTS)
    with pytest.raises(BundleError, match="is a pickle, which is never opened"):
        read_peft(folder)
    (folder / PICKLED_WEIGHTS).unlink()
    with pytest.raises(ArtifactError, match=f"{ADAPTER_WEIGHTS} does not exist"):
        read_peft(folder)


def test_a_folder_that_is_none_is_refused(gpt2_lora: Path, tmp_path: Path) -> None:
    for folder in (tmp_path / "nowhere", gpt2_lora / ADAPTER_CONFIG):
        with pytest.raises(ArtifactError, match=ADAPTER_CONFIG):
            read_peft(folder)
    folder = copied(gpt2_lora, tmp_path / "edited")
    (tmp_path / "secret").write_text("{}")
    (folder / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(BundleError, match="is a link that leaves the folder"):
        read_peft(folder)


# Integers.


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (1e-38, r"^good\.0: .*exponent=141 is not allowed: -112 to 126"),
        (float("nan"), r"^good\.0: A has values that are not finite"),
    ],
)
def test_modules_that_cannot_be_delivered_are_named(value: float, reason: str) -> None:
    factors = np.full((4, 2), value, np.float32), np.ones((2, 4), np.float32)
    with pytest.raises(ParisError, match=reason):
        quantise_adapter(PeftAdapter(LoRAConfig(r=2), {"good.0": factors}))


def float32(integers: Any, exponent: int) -> Any:
    return np.ldexp(integers.astype(np.float32), -exponent)


matrices = arrays(
    np.float32, st.tuples(st.integers(1, 4), st.integers(1, 4)), elements=st.floats(-8, 8, width=32)
)


@given(matrix=matrices, size=st.integers(-100, 90))
@settings(max_examples=200, deadline=None)
def test_integers_that_became_floats_become_themselves(matrix: Any, size: int) -> None:
    a = np.ldexp(matrix, size)
    first = quantise(a, a.T)
    if max(abs(first.exponent_a), abs(first.exponent_b)) > 112:
        return  # refused by `quantise_adapter`
    again = quantise(
        float32(first.a, first.exponent_a), np.asarray(float32(first.b, first.exponent_b))
    )
    assert again.digest == first.digest


@pytest.mark.parametrize("peak", [32767.49, 32767.5, 32768.0, 65535.0, 65534.99, 0.0])
def test_peaks_that_round_up_become_themselves(peak: float) -> None:
    a = np.array([[peak, 1.0]])
    first = quantise(a, -a.T)
    again = quantise(float32(first.a, first.exponent_a), float32(first.b, first.exponent_b))
    assert again.digest == first.digest


# Delivery.


def test_what_is_delivered_is_what_was_quantised(
    gpt2: nn.Module, gpt2_lora: Path, offer: Offer, tmp_path: Path
) -> None:
    adapter = read_peft(gpt2_lora)
    modules = quantise_adapter(adapter)
    manifest = offer(modules, adapter.config)
    write_peft(tmp_path / "bought", modules, manifest)
    delivered = read_peft(tmp_path / "bought")
    assert digests(quantise_adapter(delivered)) == digests(modules)
    assert delivered.config == manifest.config
    for name, (a, b) in delivered.factors.items():
        module = modules[name]
        assert np.array_equal(a.astype(float) * 2.0**module.exponent_a, module.a)
        assert np.array_equal(b.astype(float) * 2.0**module.exponent_b, module.b)
    with safetensors.safe_open(tmp_path / "bought" / ADAPTER_WEIGHTS, framework="pt") as weights:
        assert weights.metadata() == {"format": "pt", "zklora_adapter_id": manifest.adapter_id}
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(gpt2), tmp_path / "bought").eval()
    sold = peft.PeftModel.from_pretrained(copy.deepcopy(gpt2), gpt2_lora).eval()
    update = logits(sold) - logits(gpt2)
    assert (logits(theirs) - logits(sold)).norm() < 1e-3 * update.norm()


@pytest.mark.parametrize("exponent", [-112, 0, 126])
def test_small_and_large_integers_keep_every_bit(
    offer: Offer, tmp_path: Path, exponent: int
) -> None:
    integers = np.array([[1, -32767, 32767], [0, -1, 12345]], np.int16)
    module = QuantisedModule(integers, np.ascontiguousarray(integers.T), exponent, exponent)
    manifest = offer({"some.linear": module}, LoRAConfig(r=3))
    write_peft(tmp_path, {"some.linear": module}, manifest)
    a, b = read_peft(tmp_path).factors["some.linear"]
    for factor in (a, b):
        assert np.abs(factor[factor != 0]).min() >= np.finfo(np.float32).tiny  # none is subnormal
    assert np.array_equal(np.ldexp(a.astype(float), exponent), integers)
    assert np.array_equal(np.ldexp(b.astype(float), exponent), integers.T)


def test_integers_with_fewer_bits_are_only_shifted(offer: Offer, tmp_path: Path) -> None:
    few = np.array([[3, -5], [1, 0]], np.int16)
    module = QuantisedModule(few, few, 7, 9)
    write_peft(tmp_path, {"x": module}, offer({"x": module}, LoRAConfig(r=2)))
    again = quantise_adapter(read_peft(tmp_path))["x"]
    assert np.array_equal(again.a, few * 2 ** (again.exponent_a - 7))
    assert np.array_equal(again.b, few * 2 ** (again.exponent_b - 9))


def test_an_adapter_of_an_expert_is_an_artefact_that_bundles_read(
    randomised: Randomise, offer: Offer, tmp_path: Path
) -> None:
    config = ExpertConfig(input_size=4, hidden_size=16, num_layers=2, num_heads=2, text_embed_dim=8)
    expert = Expert(config)
    lora = LoRAConfig(r=4, lora_alpha=6)
    sold = randomised(Adapter.create(expert, lora, seed=0), 0)
    assert isinstance(sold, Adapter)
    save_adapter(sold, Folder(tmp_path / "sold"))
    adapter = read_peft(tmp_path / "sold")
    modules = quantise_adapter(adapter)
    manifest = offer(modules, adapter.config, expert=1)
    for _ in range(2):  # again changes nothing
        write_peft(tmp_path / "bought", modules, manifest)
    published = read_manifest(Folder(tmp_path / "bought"), "lora")
    assert published.facts["expert"] == 1
    assert published.config_digest == manifest.adapter_id
    loaded = load_adapter(VerifiedFolder(Folder(tmp_path / "bought"), published.files), expert)
    assert loaded.config.target_modules == list(modules)
    assert loaded.config.scale == lora.scale
    for name, update in loaded.updates().items():
        a, b = update.A.detach().numpy().T, update.B.detach().numpy().T
        assert quantise(a, b).digest == modules[name].digest
        torch.testing.assert_close(update.A, sold.updates()[name].A, atol=1e-4, rtol=1e-4)


def test_nothing_else_is_overwritten(gpt2_lora: Path, offer: Offer, tmp_path: Path) -> None:
    adapter = read_peft(gpt2_lora)
    modules = quantise_adapter(adapter)
    trained = copied(gpt2_lora, tmp_path / "trained")
    before = (trained / ADAPTER_WEIGHTS).read_bytes()
    with pytest.raises(ArtifactError, match="holds weights: choose another folder"):
        write_peft(trained, modules, offer(modules, adapter.config))
    assert (trained / ADAPTER_WEIGHTS).read_bytes() == before
    write_peft(tmp_path / "bought", modules, offer(modules, adapter.config))
    with pytest.raises(ArtifactError, match="was made with another configuration"):
        write_peft(tmp_path / "bought", modules, offer(modules, adapter.config))
    (tmp_path / "bought" / MANIFEST).write_text("{}")
    with pytest.raises(ArtifactError, match="is not a manifest"):
        write_peft(tmp_path / "bought", modules, offer(modules, adapter.config))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda modules: modules.pop("lm_head"), "lm_head: .* are missing"),
        (lambda modules: modules.update(more=modules["lm_head"]), "more: .*no such module"),
        (lambda modules: modules.clear(), "are missing"),
        (
            lambda modules: modules.update(lm_head=modules["transformer.h.0.mlp.c_fc"]),
            r"lm_head: .*\(12, 3, 48, .*\(12, 3, 20, ",
        ),
        (
            lambda modules: modules.update(
                lm_head=QuantisedModule(modules["lm_head"].a, modules["lm_head"].b, 5, 5)
            ),
            r"lm_head: .*\(12, 3, 20, 5, 5\), the manifest has",
        ),
    ],
)
def test_modules_that_are_not_the_manifests_are_refused(
    gpt2_lora: Path,
    offer: Offer,
    tmp_path: Path,
    change: Callable[[Modules], object],
    reason: str,
) -> None:
    adapter = read_peft(gpt2_lora)
    modules = quantise_adapter(adapter)
    manifest = offer(modules, adapter.config)
    change(modules)
    with pytest.raises(VerificationError, match=reason):
        write_peft(tmp_path / "bought", modules, manifest)
    assert not (tmp_path / "bought").exists()
