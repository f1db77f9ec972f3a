"""How pictures are drawn and judged."""

from dataclasses import dataclass, field
from typing import Literal

SolverName = Literal["euler", "heun", "ab2", "dpm++2m"]
TimeGrid = Literal["linspace", "half-last", "flow-match-euler"]


QUALITIES = ("low", "medium", "high")


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """A way to draw that a request can ask for by a word."""

    num_inference_steps: int
    solver: SolverName = "ab2"
    time_grid: TimeGrid = "half-last"


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """Defaults of image generation; written into the bundle."""

    num_inference_steps: int = 8
    # euler: of first order; heun (two velocities a step), ab2 and dpm++2m (one): of second
    solver: SolverName = "euler"
    # Equal steps of time from 1 to 0 (linspace), of which the last is half as long (half-last), or
    # from 1 to 1/1000 and then to 0, as diffusers' scheduler has them (flow-match-euler)
    time_grid: TimeGrid = "linspace"
    guidance_scale: float = 1.0
    routing: str = "top-2"
    # Divides the router's logits; 0: as fitted on held-out rows, 1 if there are none
    router_temperature: float = 1.0
    # What the qualities `low`, `medium` and `high` mean; one that is left out cannot be asked for
    presets: dict[str, Preset] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """How drawn pictures are compared with the corpus."""

    # Of several evaluations of the same experts each has a name: it is written to
    # evaluations/<name>/ of the run; null: to evaluation/, which the bundle tells of
    name: str | None = None
    # Draw every caption with the expert of its own picture's cluster alone, without the router, as
    # if that were never wrong
    oracle: bool = False
    max_captions: int | None = None  # captions to draw; null: all
    max_gallery: int | None = None  # corpus pictures to compare with; null: all
    dtype: Literal["float32", "bfloat16"] | None = None  # of experts and router; null: as stored
    batch_size: int = 64
    num_tasks: int = 2
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    threads: int = 1
