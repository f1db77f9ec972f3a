"""Low-rank adapters (LoRA) for the linear modules of an expert, stored in PEFT's layout.

The weight of a targeted linear becomes `W + scale * B A`. An adapter is attached to a view of the
model, which shares every weight with it, or merged into a copy of the targeted weights.

    adapter_config.json  adapter_model.safetensors

Source: LoRA (Hu et al. 2021, arXiv 2106.09685), eq. 3; rank-stabilised scale (Kalajdzievski 2023,
arXiv 2312.03732).
"""

import copy
import math
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional

from paris_ray.artifacts import Folder, VerifiedFolder
from paris_ray.errors import BundleError, ConfigError
from paris_ray.seeding import torch_generator

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PICKLED_WEIGHTS = "adapter_model.bin"
PEFT_PREFIX = "base_model.model."

# Every projection of every attention; "mlp.0" and "mlp.2" are the others worth naming.
DEFAULT_TARGETS = ("in_proj", "out_proj")
MAX_RANK = 1024
MAX_ALPHA = 65_536
STORED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Options of PEFT that change what the factors mean, and are not read here: each must be off.
UNSUPPORTED_OPTIONS = (
    "alora_invocation_tokens",
    "alpha_pattern",
    "arrow_config",
    "corda_config",
    "exclude_modules",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "layers_to_transform",
    "loftq_config",
    "lora_bias",
    "lora_ga_config",
    "megatron_config",
    "modules_to_save",
    "monteclora_config",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
)
# The other initialisations of PEFT also change the weights that the factors are added to.
HARMLESS_INITIALISATIONS = (None, True, False, "gaussian", "orthogonal", "eva")

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoRAConfig:
    """What an adapter is, under PEFT's names.

    Attributes:
        r: Rank of every update, 1 to 1024 and at most the smaller side of each weight.
        lora_alpha: Numerator of the scale.
        target_modules: Names of linear modules, or endings of them that begin after a dot.
        use_rslora: Divide by the square root of the rank instead of the rank.

    Raises:
        ConfigError: for a value that is not allowed.
    """

    r: int = 16
    lora_alpha: float = 16
    target_modules: tuple[str, ...] = DEFAULT_TARGETS
    use_rslora: bool = False

    def __post_init__(self) -> None:
        _require(
            _is_number(self.r, int) and 1 <= self.r <= MAX_RANK, "r", self.r, f"1 to {MAX_RANK}"
        )
        _require(
            _is_number(self.lora_alpha, int | float) and 0 < self.lora_alpha <= MAX_ALPHA,
            "lora_alpha",
            self.lora_alpha,
            f"a number above 0, at most {MAX_ALPHA}",
        )
        _require(
            isinstance(self.target_modules, list | tuple)
            and len(self.target_modules) > 0
            and all(isinstance(name, str) for name in self.target_modules),
            "target_modules",
            self.target_modules,
            "a list of names, not a pattern",
        )
        _require(isinstance(self.use_rslora, bool), "use_rslora", self.use_rslora, "true or false")

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


def _is_number(value: object, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _require(holds: bool, field_name: str, value: object, allowed: str) -> None:
    if not holds:
        raise ConfigError(f"{field_name}={reprlib.repr(value)} is not allowed: {allowed}")


class LowRankUpdate(nn.Module):
    """The trainable `scale * B A` of one linear.

    Args:
        a: `(r, in_features)`, float32.
        b: `(out_features, r)`, float32.
        scale: Multiplies the product.
    """

    def __init__(self, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(a), nn.Parameter(b)
        self.scale = scale

    def weight(self) -> Tensor:
        """What is added to the linear's weight, `(out_features, in_features)`."""
        return self.scale * (self.B @ self.A)

    def forward(self, x: Tensor, start: int, stop: int | None) -> Tensor:
        """`(..., in_features) -> (..., stop - start)`, in the precision of `x`."""
        narrow = self.scale * functional.linear(x, self.A.to(x.dtype))  # (..., r)
        return functional.linear(narrow, self.B[start:stop].to(x.dtype))


class LoRALinear(nn.Linear):
    """A linear with a low-rank update; the weight and bias are those of the linear it replaces.

    Also stands in for the fused projection of an attention, whose rows are applied separately.

    Args:
        linear: The linear to replace; it is left as it is.
        lora: The update.
    """

    def __init__(self, linear: nn.Linear, lora: LowRankUpdate) -> None:
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.lora = lora

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in_features) -> (..., out_features)`."""
        return self.rows(x, 0, None)

    def rows(self, x: Tensor, start: int, stop: int | None) -> Tensor:
        """Return output features `start` to `stop` only: `(..., stop - start)`."""
        bias = None if self.bias is None else self.bias[start:stop]
        return functional.linear(x, self.weight[start:stop], bias) + self.lora(x, start, stop)


class Adapter(nn.Module):
    """The low-rank updates of a model's linears: all that is trained and stored of a LoRA.

    Args:
        config: What it is.
        updates: The update of each targeted linear, by the name of the linear.
    """

    def __init__(self, config: LoRAConfig, updates: Mapping[str, LowRankUpdate]) -> None:
        super().__init__()
        self.config = config
        # The name of a child cannot have dots.
        self.targets: Any = nn.ModuleDict({k.replace(".", "/"): v for k, v in updates.items()})

    @classmethod
    def create(cls, model: nn.Module, config: LoRAConfig, seed: int) -> "Adapter":
        """Return a new adapter, which changes nothing yet: A is random, B zero.

        Args:
            model: The model to adapt; each update is put on the device of its linear.
            config: Rank, scale and targets.
            seed: Decides A; that of a linear does not depend on the other targets.

        Raises:
            ConfigError: if a target is no linear of the model, or the rank does not fit.
        """
        updates = {}
        for name, linear in find_targets(model, config).items():
            a = torch.empty(config.r, linear.in_features, dtype=torch.float32)
            b = torch.zeros(linear.out_features, config.r, dtype=torch.float32)
            generator = torch_generator(seed, f"lora {name}")
            nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
            updates[name] = LowRankUpdate(a, b, config.scale).to(linear.weight.device)
        return cls(config, updates)

    def updates(self) -> dict[str, LowRankUpdate]:
        """Return the updates by the name of their linear."""
        return {name.replace("/", "."): update for name, update in self.targets.items()}


def find_targets(model: nn.Module, config: LoRAConfig) -> dict[str, nn.Linear]:
    """Return the linears of a model that a configuration targets, by name.

    Raises:
        ConfigError: if an entry of `target_modules` fits no linear, or `r` exceeds a side of one.
    """
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    endings = ", ".join(sorted({".".join(name.split(".")[-2:]) for name in linears}))
    targets = {}
    for entry in dict.fromkeys(config.target_modules):
        found = [name for name in linears if name == entry or name.endswith(f".{entry}")]
        _require(bool(found), "target_modules", entry, f"names or endings of linears, as {endings}")
        targets.update({name: linears[name] for name in found})
    for name, linear in targets.items():
        most = min(linear.weight.shape)
        _require(config.r <= most, "r", config.r, f"1 to {most} for {name}")
    return targets


def attach(model: Model, adapter: Adapter) -> Model:
    """Return a view of a model with an adapter at work.

    The view shares every parameter with the model and the adapter, and the model is left as it
    is: any number of adapters can be attached to one model at once.

    Args:
        model: The model that the adapter was created or loaded for, with none attached.
        adapter: The adapter.
    """
    view = _share(model)
    for name, linear, update in _pairs(view, adapter):
        view.set_submodule(name, LoRALinear(linear, update))
    return view


@torch.no_grad()
def merge(model: Model, adapter: Adapter) -> Model:
    """Return a model whose targeted weights are `W + scale * B A`; it shares all others.

    The sum is computed in float32 and stored in the dtype of `W`.

    Args:
        model: The model that the adapter was created or loaded for, with none attached.
        adapter: The adapter.
    """
    merged = _share(model)
    for _, linear, update in _pairs(merged, adapter):
        weight = linear.weight
        total = (weight.float() + update.weight()).to(weight.dtype)
        linear.weight = nn.Parameter(total, requires_grad=weight.requires_grad)
    return merged


def _share(model: Model) -> Model:
    """Return new modules around the very parameters and buffers of a model."""
    tensors = chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _pairs(model: nn.Module, adapter: Adapter) -> Iterator[tuple[str, nn.Linear, LowRankUpdate]]:
    for name, update in adapter.updates().items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear), name
        assert not isinstance(linear, LoRALinear), f"{name} has an adapter already"
        assert linear.weight.shape == (len(update.B), update.A.shape[1]), name
        yield name, linear, update


def save_adapter(adapter: Adapter, folder: Folder, base_model: str | None = None) -> None:
    """Write an adapter as a folder that the `peft` library loads.

    Args:
        adapter: The adapter.
        folder: Where to.
        base_model: Where the adapted model is, for the reader's information.
    """
    tensors = {}
    for name, update in adapter.updates().items():
        name_a, name_b = _stored_names(name)
        tensors[name_a], tensors[name_b] = update.A.detach(), update.B.detach()
    folder.write(ADAPTER_WEIGHTS, safetensors.torch.save(tensors, metadata={"format": "pt"}))
    config = adapter.config
    folder.write_json(
        ADAPTER_CONFIG,
        {
            "peft_type": "LORA",
            "task_type": None,
            "base_model_name_or_path": base_model,
            "inference_mode": True,
            "r": config.r,
            "lora_alpha": config.lora_alpha,
            "lora_dropout": 0.0,
            "target_modules": list(config.target_modules),
            "use_rslora": config.use_rslora,
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
        },
    )


def _stored_names(name: str) -> tuple[str, str]:
    return f"{PEFT_PREFIX}{name}.lora_A.weight", f"{PEFT_PREFIX}{name}.lora_B.weight"


def load_adapter(source: VerifiedFolder, model: nn.Module) -> Adapter:
    """Return the adapter in a folder of PEFT's layout, whoever made it.

    Args:
        source: The folder.
        model: The model to adapt; each update is put on the device of its linear.

    Raises:
        BundleError: if the folder holds no LoRA, one with options that are not supported, one
            that does not fit the model, or tensors that are missing, unknown, of another shape
            or dtype, or not finite. Pickled weights are never opened.
        ArtifactError: if a file is missing, damaged, or not the published one.
    """
    config, linears = _read_config(source, model)
    state = _read_tensors(source, config, linears)
    updates = {}
    for name, linear in linears.items():
        a, b = (state[stored].to(linear.weight.device) for stored in _stored_names(name))
        updates[name] = LowRankUpdate(a, b, config.scale)
    return Adapter(config, updates)


def _read_config(
    source: VerifiedFolder, model: nn.Module
) -> tuple[LoRAConfig, dict[str, nn.Linear]]:
    document = source.read_json(ADAPTER_CONFIG)
    try:
        _require(isinstance(document, dict), "the document", document, "a mapping")
        _check_options(document)
        config = LoRAConfig(
            r=document.get("r"),
            lora_alpha=document.get("lora_alpha"),
            target_modules=document.get("target_modules"),
            use_rslora=document.get("use_rslora", False),
        )
        return config, find_targets(model, config)
    except ConfigError as error:
        raise BundleError(f"{source.folder.uri}/{ADAPTER_CONFIG}: {error}") from None


def _check_options(document: Mapping[str, Any]) -> None:
    peft_type, bias = document.get("peft_type"), document.get("bias", "none")
    _require(peft_type == "LORA", "peft_type", peft_type, "LORA")
    _require(bias == "none", "bias", bias, "none")
    initialisation = document.get("init_lora_weights")
    _require(
        initialisation in HARMLESS_INITIALISATIONS,
        "init_lora_weights",
        initialisation,
        "one that leaves the weights of the model as they are",
    )
    for key in UNSUPPORTED_OPTIONS:
        value = document.get(key)
        # The number 0 is a value of its own: layers_to_transform=0 means the first layer.
        off = value is None or value is False or value == [] or value == {}
        _require(off, key, value, "this option is not supported")


def _read_tensors(
    source: VerifiedFolder, config: LoRAConfig, linears: Mapping[str, nn.Linear]
) -> dict[str, Tensor]:
    """Return the factors in float32 by their stored names, checked."""
    where = f"{source.folder.uri}/{ADAPTER_WEIGHTS}"
    if not source.folder.exists(ADAPTER_WEIGHTS) and source.folder.exists(PICKLED_WEIGHTS):
        raise BundleError(
            f"{where} does not exist, and {PICKLED_WEIGHTS} is a pickle, which is never opened: "
            f"have its maker save it as {ADAPTER_WEIGHTS}"
        )
    try:
        state = safetensors.torch.load(source.read(ADAPTER_WEIGHTS))
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype that torch does not have
        raise BundleError(f"{where} is damaged: {error}") from None
    expected = {}
    for name, linear in linears.items():
        name_a, name_b = _stored_names(name)
        expected[name_a] = (config.r, linear.in_features)
        expected[name_b] = (linear.out_features, config.r)
    for name in sorted(expected.keys() | state.keys()):
        _check_tensor(f"{where}: tensor {reprlib.repr(name)}", state.get(name), expected.get(name))
    return {name: tensor.float() for name, tensor in state.items()}


def _check_tensor(what: str, tensor: Tensor | None, shape: tuple[int, int] | None) -> None:
    if tensor is None or shape is None or tuple(tensor.shape) != shape:
        found = "missing" if tensor is None else tuple(tensor.shape)
        raise BundleError(f"{what} has shape {found}, {ADAPTER_CONFIG} and the model mean {shape}")
    if tensor.dtype not in STORED_DTYPES:
        allowed = ", ".join(map(str, STORED_DTYPES))
        raise BundleError(f"{what} has dtype {tensor.dtype}, allowed: {allowed}")
    if not tensor.isfinite().all():
        raise BundleError(f"{what} has values that are not finite")
