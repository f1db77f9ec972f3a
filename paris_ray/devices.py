"""Where and in which precision a model runs; the same code on CPU and CUDA."""

import re
import resource
from contextlib import AbstractContextManager

import psutil
import torch

from paris_ray.config import Precision
from paris_ray.errors import ConfigError

# Dense bfloat16 FLOP/s with float32 accumulation, as the maker's data sheets state them, by
# a pattern of the device's name; the first that fits counts.
PEAK_FLOPS = (
    ("B200", 2250e12),
    ("GH200", 989e12),
    ("H200.*NVL", 835e12),
    ("H200", 989e12),
    ("H100.*NVL", 835e12),
    ("H100.*PCIe", 756e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("A40", 149.7e12),
    ("A30", 165e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("RTX 6000 Ada", 364e12),
    ("RTX A6000", 154.8e12),
    ("RTX 5090", 209.5e12),
    ("RTX 4090", 165e12),
    ("RTX 3090", 71e12),
)
# Of another speed than their namesakes: mobile and uprated versions, a slice of a GPU.
VARIANTS = re.compile(r"\b(Laptop|Max-Q|Ti|SUPER|D|MIG)\b")


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
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Return the autocast context of a precision; a no-op for float32."""
    enabled = dtype != torch.float32
    return torch.autocast(device.type, dtype=dtype, enabled=enabled)  # type: ignore[return-value]


def memory_bytes(device: torch.device) -> int:
    """Return the memory of a GPU, or of this machine for the CPU, used or not."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total


def device_name(device: torch.device) -> str:
    """Return what to call a device: the name that CUDA gives it, or CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most that this process has held of a GPU's memory, or of this machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak_flops(device: torch.device) -> float | None:
    """Return the dense bfloat16 FLOP/s of a device; None where they are not known, as of a CPU."""
    return peak_flops_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_flops_of(name: str) -> float | None:
    """Return the dense bfloat16 FLOP/s of a GPU by the name that CUDA gives it, or None."""
    if VARIANTS.search(name):
        return None
    return next(
        (flops for pattern, flops in PEAK_FLOPS if re.search(rf"\b{pattern}\b", name)), None
    )
