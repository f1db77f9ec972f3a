"""Where and in which precision a model runs; the same code on CPU and CUDA."""

from contextlib import AbstractContextManager

import torch

from paris_ray.config import Precision
from paris_ray.errors import ConfigError


def resolve_device(device: str) -> torch.device:
    """Return the device of a setting; `auto` is CUDA where there is one, else the CPU.

    Raises:
        ConfigError: if the setting names a device that does not exist.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device={device!r} is not available here: {error}") from None
    return resolved


def resolve_precision(precision: Precision, device: torch.device) -> torch.dtype:
    """Return the autocast type; `auto` is bfloat16 where the hardware multiplies it natively."""
    if precision == "auto":
        precision = "bfloat16" if _has_bfloat16(device) else "float32"
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Return the autocast context of a precision; a no-op for float32."""
    enabled = dtype != torch.float32
    return torch.autocast(device.type, dtype=dtype, enabled=enabled)  # type: ignore[return-value]
