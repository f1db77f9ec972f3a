"""Model configurations as the `config.json` documents of the public Paris release.

Fields that the release does not have stand under `paris_ray`. The release was never published with
code, so the spelling of a few fields is known from secondary sources alone: every spelling seen is
read, the first one is written.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

from paris_ray.config import ExpertConfig, RouterConfig, check_model, from_dict, to_dict
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
# What these architectures are; a document that says otherwise is of another one.
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
    """Return the `config.json` of a model."""
    fields = to_dict(config)
    spellings = _SPELLINGS[type(config)]
    public = {names[0]: fields.pop(field) for field, names in spellings.items()}
    if isinstance(config, ExpertConfig):
        public["out_channels"] = config.in_channels
    return {**_FIXED[type(config)], **public, OURS: fields}


def read_document(
    model: type[ModelConfig], document: object, where: str, *, input_size: int | None = None
) -> ModelConfig:
    """Return the configuration that a `config.json` describes, checked.

    Args:
        model: `ExpertConfig` or `RouterConfig`.
        document: Parsed JSON that may come from a stranger.
        where: What to call it in an error.
        input_size: Height and width of the latents, where the document does not tell.

    Raises:
        ConfigError: naming the field, its value and what is allowed.
    """
    if not isinstance(document, dict):
        raise ConfigError(f"{where} does not hold a mapping")
    for field, expected in _FIXED[model].items():
        if document.get(field, expected) != expected:
            raise ConfigError(f"{where}: {field}={document[field]!r}, expected {expected!r}")
    values = {} if input_size is None else {"input_size": input_size}
    for field, names in _SPELLINGS[model].items():
        values[field] = _read_field(document, names, where)
    ours = document.get(OURS, {})
    if not isinstance(ours, dict):
        raise ConfigError(f"{where}: {OURS}={ours!r} is not a mapping")
    config = from_dict(model, values | ours, where)
    check_model(where, config)
    channels = document.get("out_channels", config.in_channels)
    if channels != config.in_channels:
        raise ConfigError(f"{where}: out_channels={channels!r}, expected {config.in_channels}")
    return config


def _read_field(document: Mapping[str, Any], names: tuple[str, ...], where: str) -> Any:
    for name in names:
        if name in document:
            return document[name]
    raise ConfigError(f"{where}: the field {names[0]} is missing")
