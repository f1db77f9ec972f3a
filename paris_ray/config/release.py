"""Model configurations as the `config.json` documents of the public Paris release.

Fields that the release does not have stand under `paris_ray`. The release was never published with
code, so the spelling of a few fields is known from secondary sources alone: every spelling seen is
read, the first one is written. What the shapes of the tensors prove anyway, when they are compared
with the configuration, a document may leave out.
"""

from collections.abc import Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any, TypeVar

from paris_ray.config.conversion import from_dict, to_dict
from paris_ray.config.models import OFF_IN_MODELS, ExpertConfig, RouterConfig
from paris_ray.config.section_checks import check_model
from paris_ray.errors import ConfigError

OURS = "paris_ray"
ModelConfig = TypeVar("ModelConfig", ExpertConfig, RouterConfig)

_COMMON = {
    "hidden_size": ("hidden_size", "hidden_dim"),
    "num_layers": ("num_layers", "depth"),
    "num_heads": ("num_heads", "num_attention_heads"),
    "patch_size": ("patch_size",),
    "in_channels": ("in_channels", "num_channels"),
    "mlp_ratio": ("mlp_ratio",),
}
_SPELLINGS: Mapping[type, Mapping[str, tuple[str, ...]]] = {
    ExpertConfig: _COMMON | {"text_embed_dim": ("text_embed_dim",)},
    RouterConfig: _COMMON | {"num_experts": ("num_experts", "num_clusters")},
}
# No other value has a safe default: heads leave no trace in the tensors, and a model without a
# width or a depth is not described at all.
_REQUIRED = ("hidden_size", "num_layers", "num_heads")
# What these architectures are. An expert's document that says otherwise is of another one; what
# the release's router calls itself is not known, so there the tensors alone decide.
_FIXED: Mapping[type, Mapping[str, object]] = {
    ExpertConfig: {
        "model_type": "dit_expert",
        "architecture": "dit",
        "use_text_conditioning": True,
        "use_class_conditioning": False,
        "use_dit_time_embed": True,
        "use_adaln_single": True,
    },
    RouterConfig: {"architecture": "dit", "use_adaln_single": False},
}


def write_document(config: ExpertConfig | RouterConfig) -> dict[str, Any]:
    """Return the `config.json` of a model; what is off in it is left out, as in those of before."""
    ours = {k: v for k, v in to_dict(config).items() if (k, v) not in OFF_IN_MODELS.items()}
    spellings = _SPELLINGS[type(config)]
    public = {names[0]: ours.pop(field) for field, names in spellings.items()}
    if isinstance(config, ExpertConfig):
        public["out_channels"] = config.in_channels
    return {**_FIXED[type(config)], **public, OURS: ours}


def read_document(
    model: type[ModelConfig],
    document: object,
    where: str,
    *,
    defaults: Mapping[str, int] = MappingProxyType({}),
) -> ModelConfig:
    """Return the configuration that a `config.json` describes, checked.

    Args:
        model: `ExpertConfig` or `RouterConfig`.
        document: Parsed JSON that may come from a stranger.
        where: What to call it in an error.
        defaults: Values of fields that the document does not tell, from what surrounds it; those
            that the model does not have are ignored. Without any, the class's own hold.

    Raises:
        ConfigError: naming the field, its value and what is allowed.
    """
    if not isinstance(document, dict):
        raise ConfigError(f"{where} does not hold a mapping")
    if model is ExpertConfig:
        _check_architecture(document, where)
    ours = document.get(OURS, {})
    if not isinstance(ours, dict):
        raise ConfigError(f"{where}: {OURS}={ours!r} is not a mapping")
    for field in ours.keys() & _SPELLINGS[model].keys():
        raise ConfigError(f"{where}: {OURS}.{field} is not allowed: it has a public name")
    known = {field.name for field in fields(model)}
    values = {name: value for name, value in defaults.items() if name in known}
    config = from_dict(model, values | _public_values(model, document, where) | ours, where)
    check_model(where, config)
    channels = document.get("out_channels", config.in_channels)
    if channels != config.in_channels:
        raise ConfigError(f"{where}: out_channels={channels!r}, expected {config.in_channels}")
    return config


def _check_architecture(document: Mapping[str, Any], where: str) -> None:
    for field, expected in _FIXED[ExpertConfig].items():
        if document.get(field, expected) != expected:
            raise ConfigError(f"{where}: {field}={document[field]!r}, expected {expected!r}")


def _public_values(model: type, document: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the fields of the release that are there, under our names."""
    values = {}
    for field, names in _SPELLINGS[model].items():
        found = [document[name] for name in names if name in document]
        if found:
            values[field] = found[0]
        elif field in _REQUIRED:
            raise ConfigError(f"{where}: the field {names[0]} is missing")
    return values
