"""LoRA: attached and merged, beside the real peft library, and against folders that do not fit."""

import copy
import json
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from paris_ray.artifacts import VerifiedFolder, publish
from paris_ray.config import LoRAConfig
from paris_ray.config.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, DEFAULT_TARGETS
from paris_ray.errors import ArtifactError, BundleError, ConfigError
from paris_ray.folders import Folder
from paris_ray.models import Expert, ExpertConfig, Router, RouterConfig
from paris_ray.models.lora import Adapter, LoRALinear, attach, merge
from paris_ray.models.peft_layout import (
    PICKLED_WEIGHTS,
    UNSUPPORTED_OPTIONS,
    load_adapter,
    save_adapter,
)

Randomise = Callable[[nn.Module, int], nn.Module]

SIZES = {"input_size": 4, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "text_embed_dim": 8}
# All but the in_proj of cross-attention, which peft's own wrapper cannot apply by rows.
WRAPPED = ("attn.in_proj", "out_proj", "mlp.0", "mlp.2", "text_proj", "t_block.1")
EVERY_LINEAR = (*WRAPPED, "cross_attn.in_proj", "final_layer.linear")
# Options of peft that do not change what stored factors mean.
HARMLESS_OPTIONS = {
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "layers_pattern",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
READ_OPTIONS = {"peft_type", "bias", "init_lora_weights", *(f.name for f in fields(LoRAConfig))}


@pytest.fixture
def expert(randomised: Randomise) -> nn.Module:
    return randomised(Expert(ExpertConfig(**SIZES)), 0).eval().requires_grad_(False)


@pytest.fixture
def make_adapter(expert: nn.Module, randomised: Randomise) -> Callable[..., Adapter]:
    def make(seed: int = 1, **options: Any) -> Adapter:
        return randomised(Adapter.create(expert, LoRAConfig(**{"r": 4} | options), seed), seed)

    return make


def run(model: Callable[..., Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(2, 4, 4, 4, generator=generator).to(dtype)
    text = torch.randn(2, 3, 8, generator=generator).to(dtype)
    return model(latents, torch.tensor([100.0, 900.0]), text)


def difference(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def opened(path: Path) -> VerifiedFolder:
    return VerifiedFolder(Folder(path), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_adapter_changes_nothing(expert: nn.Module, dtype: torch.dtype) -> None:
    expert = expert.to(dtype)
    adapter = Adapter.create(expert, LoRAConfig(r=4, target_modules=EVERY_LINEAR), seed=0)
    before = run(expert, dtype)
    assert torch.equal(run(attach(expert, adapter), dtype), before)
    assert torch.equal(run(merge(expert, adapter), dtype), before)


def test_the_default_targets_are_every_attention_projection(expert: nn.Module) -> None:
    expected = {
        f"layers.{layer}.{attn}.{part}_proj"
        for layer in range(2)
        for attn in ("attn", "cross_attn")
        for part in ("in", "out")
    }
    assert Adapter.create(expert, LoRAConfig(r=4), seed=0).updates().keys() == expected
    spatial = Expert(ExpertConfig(text_injection="spatial", **SIZES))
    assert len(Adapter.create(spatial, LoRAConfig(r=4), seed=0).updates()) == 4
    router = Router(RouterConfig(**SIZES))
    assert len(Adapter.create(router, LoRAConfig(r=4), seed=0).updates()) == 4


def test_the_start_of_a_linear_depends_on_seed_and_name_only(expert: nn.Module) -> None:
    def start(seed: int, *targets: str, layer: int = 1) -> Tensor:
        config = LoRAConfig(r=4, target_modules=targets)
        return Adapter.create(expert, config, seed).updates()[f"layers.{layer}.attn.in_proj"].A

    first = start(3, "layers.1.attn.in_proj")
    assert torch.equal(first, start(3, "in_proj", "mlp.0"))
    assert not torch.equal(first, start(4, "in_proj"))
    assert not torch.equal(first, start(3, "in_proj", layer=0))
    assert 0.5 < first.abs().max() * 16**0.5 <= 1  # Kaiming-uniform of 16 inputs


@pytest.mark.parametrize("target", EVERY_LINEAR)
def test_attached_equals_merged(
    expert: nn.Module, make_adapter: Callable[..., Adapter], target: str
) -> None:
    adapter = make_adapter(target_modules=[target], lora_alpha=8)
    attached = run(attach(expert, adapter))
    torch.testing.assert_close(attached, run(merge(expert, adapter)), atol=1e-5, rtol=1e-5)
    assert difference(attached, run(expert)) > 1e-3


@given(
    sizes=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    rank=st.integers(1, 7),
    bias=st.booleans(),
    use_rslora=st.booleans(),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_any_shape_attaches_merges_and_applies_rows(
    sizes: tuple[int, int], rank: int, bias: bool, use_rslora: bool, data: st.DataObject
) -> None:
    model = nn.Sequential(nn.Linear(*sizes, bias=bias), nn.ReLU())
    config = LoRAConfig(r=rank, lora_alpha=3, target_modules=("0",), use_rslora=use_rslora)
    if rank > min(sizes):
        with pytest.raises(ConfigError, match=f"^r={rank} is not allowed: 1 to {min(sizes)} for 0"):
            Adapter.create(model, config, seed=0)
        return
    adapter = Adapter.create(model, config, seed=0)
    update = adapter.updates()["0"]
    nn.init.normal_(update.B)
    x = torch.randn(2, 3, sizes[0])
    attached = attach(model, adapter)
    assert isinstance(attached, nn.Sequential)
    torch.testing.assert_close(attached(x), merge(model, adapter)(x), atol=1e-5, rtol=1e-5)
    scale = 3 / (rank**0.5 if use_rslora else rank)
    expected = model[0](x) + scale * x @ update.A.T @ update.B.T
    linear = attached[0]
    assert isinstance(linear, LoRALinear)
    torch.testing.assert_close(linear(x), expected, atol=1e-5, rtol=1e-5)
    start = data.draw(st.integers(0, sizes[1]))
    stop = data.draw(st.integers(start, sizes[1]))
    rows = linear.rows(x, start, stop)
    torch.testing.assert_close(rows, expected[..., start:stop], atol=1e-5, rtol=1e-5)
    rest = linear.rows(x, start, None)
    torch.testing.assert_close(rest, expected[..., start:], atol=1e-5, rtol=1e-5)


def test_text_encoded_once_is_that_of_the_view(
    expert: nn.Module, make_adapter: Callable[..., Adapter]
) -> None:
    view = attach(expert, make_adapter(target_modules=("cross_attn.in_proj",)))
    encoded_once = run(lambda latents, t, text: view(latents, t, view.encode_text(text)))
    assert torch.equal(encoded_once, run(view))
    of_the_base = run(lambda latents, t, text: view(latents, t, expert.encode_text(text)))
    assert difference(of_the_base, run(view)) > 1e-4


def test_adapters_attached_at_once_share_the_model(
    expert: nn.Module, make_adapter: Callable[..., Adapter]
) -> None:
    before, state = run(expert), {k: v.clone() for k, v in expert.state_dict().items()}
    views = [attach(expert, make_adapter(seed)) for seed in (1, 2)]
    outputs = [run(view) for view in views]
    assert not torch.allclose(outputs[0], outputs[1])
    for view in views:
        shared = {k: v for k, v in view.named_parameters() if ".lora." not in k}
        assert shared.keys() == dict(expert.named_parameters()).keys()
        for name, parameter in expert.named_parameters():
            assert shared[name] is parameter
            assert shared[name].data_ptr() == parameter.data_ptr()
    assert not any(isinstance(module, LoRALinear) for module in expert.modules())
    assert torch.equal(run(expert), before)
    assert expert.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in expert.state_dict().items())


def test_merging_copies_the_targets_only(
    expert: nn.Module, make_adapter: Callable[..., Adapter]
) -> None:
    before = run(expert)
    merged = merge(expert, make_adapter(target_modules=("cross_attn.in_proj",)))
    parameters = dict(merged.named_parameters())
    copied = {n for n, parameter in expert.named_parameters() if parameters[n] is not parameter}
    assert copied == {f"layers.{i}.cross_attn.in_proj.weight" for i in range(2)}
    assert not any(parameter.requires_grad for parameter in parameters.values())
    assert torch.equal(run(expert), before)
    fresh = Expert(ExpertConfig(**SIZES))
    fresh.load_state_dict(merged.state_dict(), strict=True)
    assert torch.equal(run(fresh), run(merged))


def test_threads_attach_to_one_model_side_by_side(
    expert: nn.Module, make_adapter: Callable[..., Adapter]
) -> None:
    adapters = [make_adapter(seed) for seed in range(4)]
    expected = [run(attach(expert, adapter)) for adapter in adapters]
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(lambda adapter: run(attach(expert, adapter)), adapters * 4))
    for output, own in zip(outputs, expected * 4, strict=True):
        torch.testing.assert_close(output, own)  # threads may cut the sums in other places


@pytest.mark.parametrize("under_autocast", [False, True])
def test_only_the_factors_learn(expert: nn.Module, under_autocast: bool) -> None:
    adapter = Adapter.create(expert, LoRAConfig(r=4), seed=0)
    view, before = attach(expert, adapter), run(expert)
    optimiser = torch.optim.SGD(adapter.parameters(), lr=0.1)
    losses = []
    for _ in range(8):
        optimiser.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=under_autocast):
            loss = run(view).float().square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(parameter.grad is None for parameter in expert.parameters())
    assert all(parameter.grad is not None for parameter in adapter.parameters())
    assert torch.equal(run(expert), before)


def test_a_bfloat16_model_keeps_its_dtype_and_the_factors_theirs(
    expert: nn.Module, make_adapter: Callable[..., Adapter]
) -> None:
    exact = run(attach(expert, make_adapter()))
    half = copy.deepcopy(expert).to(torch.bfloat16)
    view, merged = attach(half, make_adapter()), merge(half, make_adapter())
    for output in (run(view, torch.bfloat16), run(merged, torch.bfloat16)):
        assert output.dtype == torch.bfloat16
        assert difference(output.float(), exact) < 3e-2
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
    dtypes = {".lora." in name: parameter.dtype for name, parameter in view.named_parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}


def test_a_view_cannot_be_adapted_again(
    expert: nn.Module, make_adapter: Callable[..., Adapter]
) -> None:
    view = attach(expert, make_adapter())
    for adapt in (attach, merge):
        with pytest.raises(ValueError, match=r"layers\.0\.attn\.in_proj"):
            adapt(view, make_adapter())


# Beside the real peft library.


@pytest.mark.parametrize("use_rslora", [False, True])
def test_peft_loads_what_we_save(
    expert: nn.Module, make_adapter: Callable[..., Adapter], tmp_path: Path, use_rslora: bool
) -> None:
    options = {"lora_alpha": 6, "use_rslora": use_rslora}
    adapter = make_adapter(target_modules=WRAPPED, **options)
    save_adapter(adapter, Folder(tmp_path), base_model="somewhere")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(expert), tmp_path)
    assert theirs.peft_config["default"].base_model_name_or_path == "somewhere"
    ours = run(attach(expert, adapter))
    torch.testing.assert_close(run(theirs), ours, atol=1e-5, rtol=1e-5)
    assert difference(ours, run(expert)) > 1e-2


def test_peft_merges_what_we_save(
    expert: nn.Module, make_adapter: Callable[..., Adapter], tmp_path: Path
) -> None:
    adapter = make_adapter(target_modules=EVERY_LINEAR)
    save_adapter(adapter, Folder(tmp_path))
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(expert), tmp_path).merge_and_unload()
    merged = merge(expert, adapter).state_dict()
    assert merged.keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(value, merged[name], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(run(theirs), run(attach(expert, adapter)), atol=1e-5, rtol=1e-5)


@pytest.fixture
def peft_folder(expert: nn.Module, tmp_path: Path) -> Callable[..., tuple[nn.Module, Path]]:
    def make(**options: Any) -> tuple[nn.Module, Path]:
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, init_lora_weights=False, **options)
        theirs = peft.get_peft_model(copy.deepcopy(expert), config).eval()
        theirs.save_pretrained(tmp_path / "theirs")
        return theirs, tmp_path / "theirs"

    return make


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": list(WRAPPED)},
        {"target_modules": ["layers.1.attn.in_proj"], "lora_alpha": 3, "use_rslora": True},
        {"target_modules": ["mlp.0"], "lora_dropout": 0.5, "inference_mode": True},
        {"target_modules": r"layers\.\d\.mlp\.0"},
    ],
    ids=lambda options: str(options["target_modules"]),
)
def test_we_load_what_peft_saves(
    expert: nn.Module, peft_folder: Callable[..., tuple[nn.Module, Path]], options: dict[str, Any]
) -> None:
    theirs, path = peft_folder(**options)
    if isinstance(options["target_modules"], str):
        with pytest.raises(BundleError, match=r"target_modules='layers.*a list of names"):
            load_adapter(opened(path), expert)
        return
    adapter = load_adapter(opened(path), expert)
    ours = run(attach(expert, adapter))
    torch.testing.assert_close(run(theirs), ours, atol=1e-5, rtol=1e-5)
    assert difference(ours, run(expert)) > 1e-3


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"rank_pattern": {"mlp.0": 2}},
        {"alpha_pattern": {"mlp.0": 2}},
        {"modules_to_save": ["final_layer"]},
        {"layers_to_transform": 0, "layers_pattern": "layers"},
        {"layers_to_transform": [1], "layers_pattern": "layers"},
        {"exclude_modules": ["layers.0.mlp.0"]},
        {"exclude_modules": r"layers\.0.*"},
        {"target_parameters": ["layers.0.scale_shift_table"]},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # peft, of the biases that it stores
def test_variants_that_peft_made_are_refused(
    expert: nn.Module, peft_folder: Callable[..., tuple[nn.Module, Path]], options: dict[str, Any]
) -> None:
    _, path = peft_folder(target_modules=["attn.in_proj", "mlp.0"], **options)
    option = next(iter(options))
    with pytest.raises(BundleError, match=rf"{ADAPTER_CONFIG}: {option}=.* is not allowed"):
        load_adapter(opened(path), expert)


def test_every_option_of_peft_is_known() -> None:
    known = READ_OPTIONS | HARMLESS_OPTIONS | set(UNSUPPORTED_OPTIONS)
    assert {field.name for field in fields(peft.LoraConfig)} <= known


# Folders that do not fit.


@pytest.fixture
def saved(make_adapter: Callable[..., Adapter], tmp_path: Path) -> Path:
    save_adapter(make_adapter(), Folder(tmp_path / "saved"))
    return tmp_path / "saved"


def test_saving_and_loading_keep_every_bit(
    expert: nn.Module, make_adapter: Callable[..., Adapter], saved: Path
) -> None:
    loaded, expected = load_adapter(opened(saved), expert), make_adapter()
    assert loaded.config.target_modules == list(DEFAULT_TARGETS)
    assert loaded.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in expected.state_dict().items())
    assert torch.equal(run(attach(expert, loaded)), run(attach(expert, expected)))


def edit_config(path: Path, **changes: Any) -> None:
    document = json.loads((path / ADAPTER_CONFIG).read_text()) | changes
    (path / ADAPTER_CONFIG).write_text(json.dumps(document))


def test_unknown_information_is_ignored(expert: nn.Module, saved: Path) -> None:
    edit_config(saved, peft_version="9.9", task_type="FEATURE_EXTRACTION", lora_dropout=0.3)
    edit_config(saved, made_by="somebody", modules_to_save=[], rank_pattern={}, use_dora=False)
    load_adapter(opened(saved), expert)


@pytest.mark.parametrize(
    ("field_name", "value"),
    [
        ("peft_type", "IA3"),
        ("peft_type", "lora"),
        ("peft_type", None),
        ("peft_type", ["LORA"]),
        ("r", 0),
        ("r", -4),
        ("r", 17),  # more than the 16 inputs
        ("r", 1025),
        ("r", 10**30),
        ("r", 4.0),
        ("r", True),
        ("r", "4"),
        ("r", None),
        ("lora_alpha", 0),
        ("lora_alpha", -1),
        ("lora_alpha", 1e9),
        ("lora_alpha", float("inf")),
        ("lora_alpha", float("nan")),
        ("lora_alpha", "16"),
        ("lora_alpha", True),
        ("lora_alpha", None),
        ("use_rslora", 1),
        ("use_rslora", None),
        ("target_modules", []),
        ("target_modules", None),
        ("target_modules", "all-linear"),
        ("target_modules", ".*(in_proj|(a+)+)"),
        ("target_modules", {"in_proj": 1}),
        ("target_modules", ["in_proj", 3]),
        ("target_modules", ["in_proj", ["out_proj"]]),
        ("target_modules", ["in_proj", "to_q"]),
        ("target_modules", ["in_proj", "proj"]),
        ("target_modules", ["in_proj", ""]),
        ("target_modules", ["in_proj", "layers.2.attn.in_proj"]),
        ("target_modules", ["in_proj", "layers.0.attn"]),
        ("target_modules", ["in_proj", "patch_embed"]),
        ("target_modules", ["in_proj", "x" * 100_000]),
        ("bias", "all"),
        ("bias", None),
        ("fan_in_fan_out", True),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", {"a": 1}),
        ("layers_to_transform", 0),
        *((name, {"some": 1}) for name in UNSUPPORTED_OPTIONS),
        *((name, 0) for name in UNSUPPORTED_OPTIONS),
    ],
    ids=lambda value: str(value)[:30],
)
def test_configurations_that_do_not_fit_are_refused(
    expert: nn.Module, saved: Path, field_name: str, value: object
) -> None:
    edit_config(saved, **{field_name: value})
    with pytest.raises(BundleError, match=rf"^{saved}/{ADAPTER_CONFIG}: {field_name}=") as caught:
        load_adapter(opened(saved), expert)
    assert len(str(caught.value)) < 1000


def edit_weights(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = safetensors.torch.load_file(path / ADAPTER_WEIGHTS)
    change(tensors)
    safetensors.torch.save_file(tensors, path / ADAPTER_WEIGHTS)


NAME = "base_model.model.layers.0.attn.in_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.pop(NAME), rf"'{NAME[:6]}.*' has shape missing.*mean \(4, 16\)"),
        (lambda t: t.update(extra=torch.ones(1)), r"'extra' has shape \(1,\).*mean None"),
        (
            lambda t: t.update({NAME.replace("lora_A", "lora_magnitude_vector"): torch.ones(48)}),
            r"has shape \(48,\).*mean None",
        ),
        (lambda t: t.update({NAME.replace("layers.0", "layers.2"): t.pop(NAME)}), "missing"),
        (lambda t: t.update({NAME.removeprefix("base_model."): t.pop(NAME)}), "missing"),
        (lambda t: t.update({NAME: torch.ones(3, 16)}), r"\(3, 16\).*mean \(4, 16\)"),
        (lambda t: t.update({NAME: torch.ones(16, 4)}), r"\(16, 4\).*mean \(4, 16\)"),
        (lambda t: t.update({NAME: torch.ones(64)}), r"\(64,\).*mean \(4, 16\)"),
        (lambda t: t.update({NAME: torch.ones(4, 0)}), r"\(4, 0\).*mean \(4, 16\)"),
        (lambda t: t.update({NAME: torch.ones(1, 4, 16)}), r"\(1, 4, 16\).*mean \(4, 16\)"),
        (lambda t: t.update({NAME: t[NAME].double()}), "float64, allowed: torch.float32"),
        (lambda t: t.update({NAME: t[NAME].to(torch.int8)}), "int8, allowed"),
        (lambda t: t.update({NAME: t[NAME].to(torch.float8_e4m3fn)}), "float8_e4m3fn, allowed"),
        (lambda t: t[NAME][1].fill_(float("nan")), "not finite"),
        (lambda t: t[NAME][3].fill_(float("-inf")), "not finite"),
        (lambda t: t.clear(), "missing"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    expert: nn.Module, saved: Path, change: Callable[[dict[str, Tensor]], object], reason: str
) -> None:
    edit_weights(saved, change)
    with pytest.raises(BundleError, match=rf"^{saved}/{ADAPTER_WEIGHTS}: tensor .*{reason}"):
        load_adapter(opened(saved), expert)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_factors_stored_in_half_precision_are_read(
    expert: nn.Module, saved: Path, dtype: torch.dtype
) -> None:
    edit_weights(saved, lambda t: t.update({name: value.to(dtype) for name, value in t.items()}))
    adapter = load_adapter(opened(saved), expert)
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float32}


def safetensors_bytes(header: bytes, payload: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + payload


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"not safetensors at all",
        pickle.dumps({NAME: [1.0]}),
        safetensors_bytes(b"{"),
        (2**63).to_bytes(8, "little") + b"{}",
        safetensors_bytes(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}', b"\0" * 8),
        safetensors_bytes(
            b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,8]}}', b"\0" * 8
        ),
        safetensors_bytes(b'{"a":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]}}', b"\0" * 3),
        safetensors_bytes(b'{"a":{"dtype":"X9","shape":[4],"data_offsets":[0,4]}}', b"\0" * 4),
    ],
)
def test_damaged_weights_are_refused(expert: nn.Module, saved: Path, payload: bytes) -> None:
    (saved / ADAPTER_WEIGHTS).write_bytes(payload)
    with pytest.raises(BundleError, match=rf"^{saved}/{ADAPTER_WEIGHTS}( is damaged|: tensor 'a')"):
        load_adapter(opened(saved), expert)


def test_truncated_weights_are_refused(expert: nn.Module, saved: Path) -> None:
    whole = (saved / ADAPTER_WEIGHTS).read_bytes()
    for size in (4, 100, len(whole) - 1):
        (saved / ADAPTER_WEIGHTS).write_bytes(whole[:size])
        with pytest.raises(BundleError, match="is damaged"):
            load_adapter(opened(saved), expert)


class Bomb:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def test_pickles_are_never_opened(expert: nn.Module, saved: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    bomb = pickle.dumps({NAME: Bomb(trace)})
    pickle.loads(bomb)
    assert trace.exists()  # it works
    trace.unlink()
    (saved / PICKLED_WEIGHTS).write_bytes(bomb)
    load_adapter(opened(saved), expert)
    (saved / ADAPTER_WEIGHTS).unlink()
    with pytest.raises(BundleError, match=rf"{PICKLED_WEIGHTS} is a pickle, which is never opened"):
        load_adapter(opened(saved), expert)
    assert not trace.exists()


@pytest.mark.parametrize("name", [ADAPTER_CONFIG, ADAPTER_WEIGHTS])
def test_a_missing_file_is_named(expert: nn.Module, saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(ArtifactError, match=rf"{name} does not exist"):
        load_adapter(opened(saved), expert)


@pytest.mark.parametrize(("text", "error"), [("{", ArtifactError), ("[1]", BundleError)])
def test_a_configuration_that_is_no_mapping_is_refused(
    expert: nn.Module, saved: Path, text: str, error: type[Exception]
) -> None:
    (saved / ADAPTER_CONFIG).write_text(text)
    with pytest.raises(error, match=ADAPTER_CONFIG):
        load_adapter(opened(saved), expert)


def test_an_adapter_of_another_expert_is_refused(saved: Path) -> None:
    for sizes in ({"hidden_size": 32}, {"num_layers": 1}, {"num_layers": 3}):
        with pytest.raises(BundleError, match=rf"{ADAPTER_WEIGHTS}: tensor"):
            load_adapter(opened(saved), Expert(ExpertConfig(**{**SIZES, **sizes})))


def test_published_digests_hold(expert: nn.Module, saved: Path) -> None:
    manifest = publish(Folder(saved), "adapter", config_digest="", parents={}, facts={})
    load_adapter(VerifiedFolder(Folder(saved), manifest.files), expert)
    edit_config(saved, lora_alpha=32)
    with pytest.raises(ArtifactError, match=rf"{ADAPTER_CONFIG} does not have the digest"):
        load_adapter(VerifiedFolder(Folder(saved), manifest.files), expert)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"r": 0}, "r=0 is not allowed: 1 to 1024"),
        ({"r": 32}, "r=32 is not allowed: 1 to 16 for layers.0.attn.in_proj"),
        ({"lora_alpha": -1}, "lora_alpha=-1 is not allowed"),
        ({"target_modules": "in_proj"}, "target_modules='in_proj' is not allowed: a list"),
        ({"target_modules": ("to_q",)}, "target_modules='to_q' is not allowed: .*attn.in_proj"),
    ],
)
def test_new_adapters_that_do_not_fit_are_refused(
    expert: nn.Module, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{reason}"):
        Adapter.create(expert, LoRAConfig(**options), seed=0)
