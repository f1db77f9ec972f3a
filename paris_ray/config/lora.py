"""What `jobs.train_lora` makes: an adapter of one expert, under PEFT's names, and its training."""

import math
import reprlib
from dataclasses import dataclass, field
from typing import Any

from paris_ray.config.corpus import CorpusConfig
from paris_ray.config.training import TrainingConfig
from paris_ray.errors import ConfigError

# What PEFT calls the files of an adapter.
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Every projection of every attention; "mlp.0" and "mlp.2" are the others worth naming.
DEFAULT_TARGETS = ("in_proj", "out_proj")
MAX_RANK = 1024
MAX_ALPHA = 65_536


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
        require(
            _is_number(self.r, int) and 1 <= self.r <= MAX_RANK, "r", self.r, f"1 to {MAX_RANK}"
        )
        require(
            _is_number(self.lora_alpha, int | float) and 0 < self.lora_alpha <= MAX_ALPHA,
            "lora_alpha",
            self.lora_alpha,
            f"a number above 0, at most {MAX_ALPHA}",
        )
        require(
            isinstance(self.target_modules, list | tuple)
            and len(self.target_modules) > 0
            and all(isinstance(name, str) for name in self.target_modules),
            "target_modules",
            self.target_modules,
            "a list of names, not a pattern",
        )
        require(isinstance(self.use_rslora, bool), "use_rslora", self.use_rslora, "true or false")

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


def _is_number(value: object, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def require(holds: bool, field_name: str, value: object, allowed: str) -> None:
    """Refuse a value that may be a stranger's, and long; raises ConfigError unless it holds."""
    if not holds:
        raise ConfigError(f"{field_name}={reprlib.repr(value)} is not allowed: {allowed}")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoRARun:
    """A training of one adapter; the bundle decides the size of pictures and all encoders."""

    seed: int = 0
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
