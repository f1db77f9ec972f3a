"""The architectures of experts and router."""

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from paris_ray.errors import ConfigError

Dtype = Literal["float32", "bfloat16", "float16"]  # of the parameters of experts and router

# (hidden_size, num_layers, num_heads) of the published DiT sizes; all have patch_size 2.
PRESETS = {
    "S/2": (384, 12, 6),
    "B/2": (768, 12, 12),
    "L/2": (1024, 24, 16),
    "XL/2": (1152, 28, 16),
}

# Far above any published expert; a bundle from a stranger must not make us allocate terabytes.
MODEL_LIMITS = {
    "input_size": 1024,
    "patch_size": 64,
    "in_channels": 4096,
    "hidden_size": 16_384,
    "num_layers": 256,
    "num_heads": 256,
}
MAX_TEXT_WIDTH = 65_536
MAX_EXPERTS = 1024

# Values of fields that say nothing where they are off: models of before they were there have none.
OFF_IN_MODELS: dict[str, Any] = {"blocks": "released", "text_adapter": False}

# Fields that two models may differ in while their tensors fit.
FREE_FIELDS = frozenset(
    {
        "prediction",
        "cosine_offset",
        "min_alpha",
        "x0_clamp",
        "layer_norm_eps",
        "text_padding_mask",
        "head_activation",
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertConfig:
    """Architecture of one expert (Paris, arXiv 2510.03434; DiT, arXiv 2212.09748)."""

    input_size: int = 32  # height and width of the latents
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    text_embed_dim: int = 768
    # cross_attention: to the text's tokens, as the release. spatial: a projection of its one vector
    # onto the patch tokens, which learns layout in minutes. both: together
    text_injection: Literal["cross_attention", "spatial", "both"] = "cross_attention"
    text_hidden_size: int = 256  # width of the spatial text projection
    text_padding_mask: bool = False  # cross-attention skips padding; the release attends to it
    # modern: RMSNorm, normed queries and keys, rotary positions; the release has none of them
    blocks: Literal["released", "modern"] = "released"
    text_adapter: bool = False  # a transformer block between the text's states and cross-attention
    layer_norm_eps: float = 1e-6
    prediction: Literal["velocity", "preconditioned", "epsilon"] = "velocity"
    # Of an expert with prediction=epsilon (HDDM, arXiv 2603.06741):
    cosine_offset: float = 0.0  # s of the cosine schedule (arXiv 2102.09672); 0: the pure cosine
    min_alpha: float = 0.01  # least 1 - t to divide by
    x0_clamp: float | None = 20.0  # bound of the estimated clean latents; null: no guard

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "ExpertConfig":
        """Return the architecture of a published size.

        Args:
            name: `S/2`, `B/2`, `L/2` or `XL/2` (DiT, arXiv 2212.09748, table 1).
            changes: Other fields.

        Raises:
            ConfigError: if there is no such size.
        """
        if name not in PRESETS:
            raise ConfigError(f"preset={name!r} is not allowed: one of {', '.join(PRESETS)}")
        hidden_size, num_layers, num_heads = PRESETS[name]
        size = cls(hidden_size=hidden_size, num_layers=num_layers, num_heads=num_heads)
        return replace(size, **changes)


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterConfig:
    """Architecture of the router: DiT with AdaLN-Zero and a class token."""

    input_size: int = 32
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    num_experts: int = 8
    text_embed_dim: int = 0  # 0: no text, as the released router
    head_activation: Literal["identity", "gelu"] = "identity"  # after the LayerNorm of the head
    layer_norm_eps: float = 1e-6


def is_released(expert: ExpertConfig) -> bool:
    """Return whether an expert's tensors are those that the public release has."""
    off = all(getattr(expert, field) == value for field, value in OFF_IN_MODELS.items())
    return off and expert.text_injection == "cross_attention"


def unlike_fields(
    model: ExpertConfig | RouterConfig, start: ExpertConfig | RouterConfig
) -> dict[str, tuple[Any, Any]]:
    """Return the fields, with both values, for which a model cannot take another's tensors."""
    free = FREE_FIELDS
    if isinstance(model, ExpertConfig) and model.text_injection == "cross_attention":
        free |= {"text_hidden_size"}  # which only a projection of the sentence vector has
    both = {f.name: (getattr(model, f.name), getattr(start, f.name)) for f in fields(start)}
    return {name: v for name, v in both.items() if name not in free and v[0] != v[1]}
