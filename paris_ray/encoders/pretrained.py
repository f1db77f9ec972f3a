"""Models made by others: checked before anything is allocated for them, and loaded completely."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from paris_ray.errors import BundleError

ACTIVATIONS = ("gelu", "quick_gelu")
# Far above any text encoder; a bundle from a stranger must not make us allocate terabytes.
TRANSFORMER_LIMITS = {
    "vocab_size": 1_000_000,
    "hidden_size": 4096,
    "num_hidden_layers": 64,
    "num_attention_heads": 64,
    "intermediate_size": 16_384,
    "max_position_embeddings": 8192,
}


def check_sizes(sizes: Mapping[str, Any], limits: Mapping[str, int], where: str) -> None:
    """Raise BundleError unless every size is an integer between 1 and its limit."""
    for key, most in limits.items():
        value = sizes.get(key)
        if not isinstance(value, int) or not 1 <= value <= most:
            raise BundleError(f"{where}: {key}={value!r}, allowed: 1 to {most}")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, mapped; raises BundleError if it is none."""
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{path} is not a safetensors file: {error}") from None


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Give a model its tensors; raises BundleError if any is missing, left over or misshapen."""
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise BundleError(f"{where} does not fit: {reason[:500]}") from None


def load_transformer(
    model_class: Any,
    architecture: Mapping[str, Any],
    state: Mapping[str, Tensor],
    *,
    where: Path,
    dtype: torch.dtype,
    **options: Any,
) -> Any:
    """Return a transformers model with these weights, in evaluation mode.

    Of the architecture only shapes, activation and epsilon are taken: a stranger's config.json
    names neither code, nor kernels, nor further files.

    Args:
        model_class: A class of transformers, such as `CLIPTextModel`.
        architecture: Parsed `config.json`, or the section of it that describes the model.
        state: Weights, under the names of any release of transformers.
        where: The model's folder, for errors.
        dtype: Data type of the model.
        **options: Further arguments of the model's class.

    Raises:
        BundleError: if a size is not allowed, or weights are missing or misshapen.
    """
    from transformers.utils import logging  # here: its import is slow

    logging.disable_progress_bar()
    config = model_class.config_class(**_checked(model_class, architecture, f"{where}/config.json"))
    try:
        loaded: Any = model_class.from_pretrained(
            None,
            config=config,
            state_dict=dict(state),
            dtype=dtype,
            attn_implementation="sdpa",
            output_loading_info=True,
            **options,
        )
    except RuntimeError as error:
        raise BundleError(f"{where}/model.safetensors does not fit: {error}") from None
    model, report = loaded
    if report["missing_keys"]:  # transformers would fill them at random
        missing = ", ".join(sorted(report["missing_keys"]))
        raise BundleError(f"{where}/model.safetensors lacks {missing}")
    return model.eval().requires_grad_(False)


def _checked(model_class: Any, architecture: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return what is taken of an architecture, with the class's defaults for what it leaves out."""
    defaults = model_class.config_class().to_dict()
    keys = (*TRANSFORMER_LIMITS, "hidden_act", "layer_norm_eps")
    values = {key: architecture.get(key, defaults[key]) for key in keys}
    check_sizes(values, TRANSFORMER_LIMITS, where)
    if values["hidden_size"] % values["num_attention_heads"]:
        raise BundleError(
            f"{where}: hidden_size={values['hidden_size']}, "
            f"allowed: a multiple of num_attention_heads={values['num_attention_heads']}"
        )
    if values["hidden_act"] not in ACTIVATIONS:
        allowed = ", ".join(ACTIVATIONS)
        raise BundleError(f"{where}: hidden_act={values['hidden_act']!r}, allowed: {allowed}")
    if not isinstance(values["layer_norm_eps"], float):
        raise BundleError(f"{where}: layer_norm_eps={values['layer_norm_eps']!r} is no float")
    return values
