"""An adapter as a folder in the layout of the `peft` library, whoever made it.

adapter_config.json  adapter_model.safetensors
"""

import reprlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from paris_ray.artifacts import VerifiedFolder
from paris_ray.config import LoRAConfig
from paris_ray.config.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, require
from paris_ray.errors import BundleError, ConfigError
from paris_ray.folders import Folder
from paris_ray.models.lora import Adapter, LowRankUpdate, find_targets
from paris_ray.models.stored import check_stored

LORA = "lora"  # the kind of artefact that `jobs.train_lora` publishes
EXPERT_DIGEST = "expert_sha256"  # of the weights that it was trained on, among its facts
PICKLED_WEIGHTS = "adapter_model.bin"
PEFT_PREFIX = "base_model.model."
Factors = tuple[Tensor, Tensor]

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
    updates = adapter.updates().items()
    factors = {name: (update.A.detach(), update.B.detach()) for name, update in updates}
    save_factors(factors, adapter.config, folder, base_model=base_model)


def save_factors(
    factors: Mapping[str, Factors],
    config: LoRAConfig,
    folder: Folder,
    *,
    base_model: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the factors of linears as a folder that the `peft` library loads.

    Args:
        factors: `(r, in_features)` and `(out_features, r)` of each linear, by its name.
        config: Rank, scale and targets.
        folder: Where to.
        base_model: See `save_adapter`.
        metadata: What else the header of the weights says.
    """
    tensors: dict[str, Tensor] = {}
    for name, pair in factors.items():
        tensors.update(zip(stored_names(name), pair, strict=True))
    header = {"format": "pt", **(metadata or {})}
    folder.write(ADAPTER_WEIGHTS, safetensors.torch.save(tensors, metadata=header))
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


def stored_names(name: str) -> tuple[str, str]:
    """Return what the factors of a linear are called in the file."""
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
    widths = {name: (m.in_features, m.out_features) for name, m in linears.items()}
    factors = read_factors(source, config.r, widths)
    return Adapter(
        config, {name: LowRankUpdate(a, b, config.scale) for name, (a, b) in factors.items()}
    )


def _read_config(
    source: VerifiedFolder, model: nn.Module
) -> tuple[LoRAConfig, dict[str, nn.Linear]]:
    document = read_options(source)
    with naming_document(source):
        config = to_config(document, document.get("target_modules"))
        return config, find_targets(model, config)


@contextmanager
def naming_document(source: VerifiedFolder) -> Iterator[None]:
    """Turn a ConfigError about an adapter's document into a BundleError that names the file."""
    try:
        yield
    except ConfigError as error:
        raise BundleError(f"{source.folder.uri}/{ADAPTER_CONFIG}: {error}") from None


def read_options(source: VerifiedFolder, understood: Collection[str] = ()) -> dict[str, Any]:
    """Return the document of an adapter, whoever made it.

    Args:
        source: The folder.
        understood: Those of `UNSUPPORTED_OPTIONS` that the caller looks after.

    Raises:
        BundleError: if it is that of no LoRA, or an option is on that is not supported.
        ArtifactError: if it is missing, damaged, or not the published one.
    """
    document = source.read_json(ADAPTER_CONFIG)
    with naming_document(source):
        require(isinstance(document, dict), "the document", document, "a mapping")
        _check_options(document, understood)
    assert isinstance(document, dict)
    return document


def to_config(document: Mapping[str, Any], target_modules: Any) -> LoRAConfig:
    """Return what an adapter's document says, for these targets; raises ConfigError."""
    return LoRAConfig(
        r=document.get("r"),  # type: ignore[arg-type] # checked there, as are the others
        lora_alpha=document.get("lora_alpha"),  # type: ignore[arg-type]
        target_modules=target_modules,
        use_rslora=document.get("use_rslora", False),
    )


def _check_options(document: Mapping[str, Any], understood: Collection[str]) -> None:
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
    for key in (option for option in UNSUPPORTED_OPTIONS if option not in understood):
        value = document.get(key)
        # The number 0 is a value of its own: layers_to_transform=0 means the first layer.
        off = value is None or value is False or value == [] or value == {}
        require(off, key, value, "this option is not supported")


def stored_shapes(source: VerifiedFolder) -> dict[str, tuple[int, ...]]:
    """Return the shapes of an adapter's tensors by their stored names; raises BundleError."""
    with _opened(source) as weights:
        return _shapes(weights)


def read_factors(
    source: VerifiedFolder, r: int, widths: Mapping[str, tuple[int, int]]
) -> dict[str, Factors]:
    """Return the factors of an adapter in float32, whoever made it.

    Args:
        source: The folder.
        r: Rank of every linear.
        widths: `in_features` and `out_features` of each, by its name: these and no others.

    Returns:
        `(r, in_features)` and `(out_features, r)` of each.

    Raises:
        BundleError: if a tensor is missing, unknown, of another shape or dtype, or not finite.
        ArtifactError: if the file is missing, or not the published one.
    """
    where = f"{source.folder.uri}/{ADAPTER_WEIGHTS}"
    expected: dict[str, tuple[int, ...]] = {}
    for name, (in_features, out_features) in widths.items():
        shapes = ((r, in_features), (out_features, r))
        expected.update(zip(stored_names(name), shapes, strict=True))
    with _opened(source) as weights:
        _check_shapes(_shapes(weights), expected, where)
        state = {name: weights.get_tensor(name) for name in expected}
    for name, tensor in state.items():
        check_stored(f"{where}: tensor {reprlib.repr(name)}", tensor)
    factors = {}
    for name in widths:
        a, b = (state[stored].float() for stored in stored_names(name))
        factors[name] = (a, b)
    return factors


@contextmanager
def _opened(source: VerifiedFolder) -> Iterator[Any]:
    where = f"{source.folder.uri}/{ADAPTER_WEIGHTS}"
    if not source.folder.exists(ADAPTER_WEIGHTS) and source.folder.exists(PICKLED_WEIGHTS):
        raise BundleError(
            f"{where} does not exist, and {PICKLED_WEIGHTS} is a pickle, which is never opened: "
            f"have its maker save it as {ADAPTER_WEIGHTS}"
        )
    try:
        with safe_open(source.verified_file(ADAPTER_WEIGHTS), framework="pt") as weights:
            yield weights
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype that torch does not have
        raise BundleError(f"{where} is damaged: {error}") from None


def _shapes(weights: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118


def _check_shapes(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """Compare the header of a file, before any tensor is read, with what the model means."""
    for name in sorted(expected.keys() | found.keys()):
        if found.get(name) != expected.get(name):
            raise BundleError(
                f"{where}: tensor {reprlib.repr(name)} has shape {found.get(name, 'missing')}, "
                f"{ADAPTER_CONFIG} and the modules mean {expected.get(name)}"
            )
