"""What can be asked of a bundle: steps, solver, guidance, routing and adapters, checked.

It is data alone: who checks a request and hands it on imports no torch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from paris_ray.config import SolverName, TimeGrid
from paris_ray.errors import ParisError, RoutingError
from paris_ray.model_folder.description import BundleDescription

ALLOWED = (
    "'top-1', 'top-2' ... 'top-K', 'full', 'threshold:x' or 'top-p:x' with 0 < x < 1, "
    "or, of two experts or more, 'agree:x' with x > 0"
)
FULL = ("full", "full-ensemble")  # ours, and that of the model card of the release
MAX_DIGITS = 9  # int() of thousands of digits is slow or refused


@dataclass(frozen=True, slots=True)
class Routing:
    """A parsed routing strategy.

    Attributes:
        kind: Which experts take part.
        top_k: Their number, for `top-k` and `agree`.
        threshold: The least router probability, for `threshold`.
        top_p: The probability that the chosen ones have together at least, for `top-p`.
        disagreement: The largest at which two experts are mixed, for `agree`.
    """

    kind: Literal["top-k", "full", "threshold", "top-p", "agree"]
    top_k: int = 0
    threshold: float = 0.0
    top_p: float = 0.0
    disagreement: float = 0.0


def parse_routing(text: str, num_experts: int) -> Routing:
    """Return the strategy that a text like `top-2` names.

    Raises:
        RoutingError: if there is no such strategy or too few experts for it.
    """
    name, _, argument = text.partition(":")
    if text in FULL:
        return Routing("full")
    number = _number(argument)
    if name == "threshold" and 0 < number < 1:
        return Routing("threshold", threshold=number)
    if name == "top-p" and 0 < number < 1:
        return Routing("top-p", top_p=number)
    if name == "agree" and 0 < number < math.inf and num_experts > 1:
        return Routing("agree", top_k=2, disagreement=number)
    count = text.removeprefix("top-")
    if text.startswith("top-") and count.isascii() and count.isdigit():
        if len(count) <= MAX_DIGITS and 1 <= int(count) <= num_experts:
            return Routing("top-k", top_k=int(count))
        raise RoutingError(f"routing={text!r} is not allowed: there are {num_experts} experts")
    raise RoutingError(f"routing={text!r} is not allowed: use {ALLOWED}")


def check_allowed_experts(allowed: Sequence[int] | None, num_experts: int) -> None:
    """Refuse experts that there are not, and lists that are empty or name one twice.

    Args:
        allowed: Numbers of the experts that may draw; None: all.
        num_experts: How many there are.

    Raises:
        ParisError: with what is allowed.
    """
    if allowed is None:
        return
    known = all(0 <= expert < num_experts for expert in allowed)
    if not known or not allowed or len(set(allowed)) < len(allowed):
        raise ParisError(
            f"allowed_experts={list(allowed)} is not allowed: numbers from 0 to {num_experts - 1}, "
            "at least one, each once"
        )


def _number(text: str) -> float:
    """Return a number; NaN, which is in no range, if the text is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingOptions:
    """Checked options of one request.

    `loras` names the adapter of an expert by its number; `allowed_experts` are those that may draw,
    None: all.
    """

    num_inference_steps: int
    guidance_scale: float
    routing: Routing
    router_temperature: float
    solver: SolverName = "euler"
    time_grid: TimeGrid = "linspace"
    loras: Mapping[int, str] = field(default_factory=dict)
    allowed_experts: frozenset[int] | None = None


def sampling_options(
    bundle: BundleDescription,
    *,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    routing: str | None = None,
    solver: str | None = None,
    time_grid: str | None = None,
    lora: str | None = None,
    allowed_experts: Sequence[int] | None = None,
) -> SamplingOptions:
    """Fill in the bundle's defaults and check.

    Raises:
        ParisError: naming the option, its value and what is allowed.
    """
    defaults = bundle.facts.sampling
    steps = defaults.num_inference_steps if num_inference_steps is None else num_inference_steps
    scale = defaults.guidance_scale if guidance_scale is None else guidance_scale
    if steps < 1:
        raise ParisError(f"num_inference_steps={steps} is not allowed: at least 1")
    if not 0 <= scale <= 100:
        raise ParisError(f"guidance_scale={scale} is not allowed: between 0 and 100")
    bundle.check_lora(lora)
    check_allowed_experts(allowed_experts, bundle.num_experts)
    return SamplingOptions(
        num_inference_steps=steps,
        guidance_scale=scale,
        routing=parse_routing(routing or defaults.routing, bundle.num_experts),
        router_temperature=defaults.router_temperature,
        solver=_named(SolverName, "solver", solver or defaults.solver),
        time_grid=_named(TimeGrid, "time_grid", time_grid or defaults.time_grid),
        loras={} if lora is None else {bundle.loras[lora]: lora},
        allowed_experts=None if allowed_experts is None else frozenset(allowed_experts),
    )


def _named(names: Any, option: str, value: str) -> Any:
    """Return a value that is one of the names of a `Literal`; raises ParisError otherwise."""
    if value not in get_args(names):
        allowed = ", ".join(get_args(names))
        raise ParisError(f"{option}={value!r} is not allowed: one of {allowed}")
    return value


def num_evaluations(solver: SolverName, num_inference_steps: int) -> int:
    """Return how many velocities a sample asks for: one a step; of Heun's steps, two but the last.

    This, and not the number of steps, is what a picture costs.
    """
    return 2 * num_inference_steps - 1 if solver == "heun" else num_inference_steps
