"""An adapter as a folder in the layout of the `peft` library, whoever made it.

adapter_config.json  adapter_model.safetensors
"""

import reprlib
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from paris_ray.artifacts import Folder, VerifiedFolder
from paris_ray.config import LoRAConfig
from paris_ray.config.lora import require
from paris_ray.errors import BundleError, ConfigError
from paris_ray.models.lora import Adapter, LowRankUpdate, find_targets

LORA = "lora"  # the kind of artefact that `jobs.train_lora` publishes
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PICKLED_WEIGHTS = "adapter_model.bin"
PEFT_PREFIX = "base_model.model."
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
        model: The model to adapt; it may be on the meta device, since only its shapes are read.

    Returns:
        The adapter in float32 on the CPU.

    Raises:
        BundleError: if the folder holds no LoRA, one with options that are not supported, one
            that does not fit the model, or tensors that are missing, unknown, of another shape
            or dtype, or not finite. Pickled weights are never opened.
        ArtifactError: if a file is missing, damaged, or not the published one.
    """
    config, linears = _read_config(source, model)
    state = _read_tensors(source, config, linears)
    updates = {}
    for name in linears:
        a, b = (state[stored] for stored in _stored_names(name))
        updates[name] = LowRankUpdate(a, b, config.scale)
    return Adapter(config, updates)


def _read_config(
    source: VerifiedFolder, model: nn.Module
) -> tuple[LoRAConfig, dict[str, nn.Linear]]:
    document = source.read_json(ADAPTER_CONFIG)
    try:
        require(isinstance(document, dict), "the document", document, "a mapping")
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
    require(peft_type == "LORA", "peft_type", peft_type, "LORA")
    require(bias == "none", "bias", bias, "none")
    initialisation = document.get("init_lora_weights")
    require(
        initialisation in HARMLESS_INITIALISATIONS,
        "init_lora_weights",
        initialisation,
        "one that leaves the weights of the model as they are",
    )
    for key in UNSUPPORTED_OPTIONS:
        value = document.get(key)
        # The number 0 is a value of its own: layers_to_transform=0 means the first layer.
        off = value is None or value is False or value == [] or value == {}
        require(off, key, value, "this option is not supported")


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
    expected = {}
    for name, linear in linears.items():
        name_a, name_b = _stored_names(name)
        expected[name_a] = (config.r, linear.in_features)
        expected[name_b] = (linear.out_features, config.r)
    try:
        with safe_open(source.verified_file(ADAPTER_WEIGHTS), framework="pt") as weights:
            names = weights.keys()
            found = {name: tuple(weights.get_slice(name).get_shape()) for name in names}
            _check_shapes(found, expected, where)
            state = {name: weights.get_tensor(name) for name in expected}
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype that torch does not have
        raise BundleError(f"{where} is damaged: {error}") from None
    for name, tensor in state.items():
        _check_tensor(f"{where}: tensor {reprlib.repr(name)}", tensor)
    return {name: tensor.float() for name, tensor in state.items()}


def _check_shapes(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """Compare the header of a file, before any tensor is read, with what the model means."""
    for name in sorted(expected.keys() | found.keys()):
        if found.get(name) != expected.get(name):
            raise BundleError(
                f"{where}: tensor {reprlib.repr(name)} has shape {found.get(name, 'missing')}, "
                f"{ADAPTER_CONFIG} and the model mean {expected.get(name)}"
            )


def _check_tensor(what: str, tensor: Tensor) -> None:
    if tensor.dtype not in STORED_DTYPES:
        allowed = ", ".join(map(str, STORED_DTYPES))
        raise BundleError(f"{what} has dtype {tensor.dtype}, allowed: {allowed}")
    if not tensor.isfinite().all():
        raise BundleError(f"{what} has values that are not finite")
