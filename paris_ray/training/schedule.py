"""How many steps, and how large each is."""

import math
from dataclasses import replace

from paris_ray.config import TrainingConfig


def with_steps(config: TrainingConfig, num_rows: int) -> TrainingConfig:
    """Return the configuration with the steps that its `epochs` of so many rows are, if given."""
    if config.epochs is None:
        return config
    return replace(config, steps=math.ceil(config.epochs * num_rows / config.batch_size))


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Return the rate of optimiser step `step`: linear warm-up, constant, then as scheduled.

    Over the last `decay_share` of the steps, but never during the warm-up, it falls to
    `final_learning_rate_share`: not at all, along a line or along half a cosine.
    """
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    decay_start = max(config.steps * (1 - config.decay_share), config.warmup_steps)
    past = max(0.0, step - decay_start) / max(1.0, config.steps - decay_start)
    falls = {"constant": 0.0, "linear": past, "cosine": (1 - math.cos(math.pi * past)) / 2}
    fallen = falls[config.schedule] * (1 - config.final_learning_rate_share)
    return config.learning_rate * warmup * (1 - fallen)
