"""What `--dry-run` plans with."""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuConfig:
    """Some equal GPUs of a fleet."""

    name: str = "A40"
    count: int = 8
    memory_gb: float = 48.0
    peak_tflops: float = 149.7  # dense bfloat16, as the maker states it
    mfu: float = 0.4  # share of the peak that training is expected to reach
    dollars_per_hour: float = 0.4  # of one GPU


@dataclass(frozen=True, kw_only=True, slots=True)
class FleetConfig:
    """What `--dry-run` plans with; nothing else reads it."""

    num_images: int = 2_000  # rows of the corpus
    gpus: list[GpuConfig] = field(default_factory=list)
