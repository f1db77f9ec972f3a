"""What Samplers and experts measure of their work; `metrics` has what the numbers are called."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from paris_ray.sampling.calls import ROUTER, Call
from paris_ray.sampling.engine import Engine
from serve import metrics

Answers = TypeVar("Answers")


def model_label(model: int) -> str:
    """Return what the label `model` says: `router`, or the number of an expert."""
    return "router" if model == ROUTER else str(model)


def add_router_mass(expert_usage: Sequence[Sequence[float]]) -> None:
    """Add the pictures of a request; `(n, K)`, rows sum to 1."""
    for k, mass in enumerate(map(sum, zip(*expert_usage, strict=True))):
        metrics.ROUTER_MASS.add(mass, model=str(k))


def set_levels(engine: Engine) -> None:
    """Tell what a Sampler has to do."""
    metrics.ACTIVE.set(engine.num_active)
    metrics.WAITING.set(engine.num_waiting)
    metrics.STEPS_LEFT.set(engine.num_left)
    failing = engine.failing
    for model, count in engine.waiting_calls.items():
        metrics.WAITING_CALLS.set(count, model=model_label(model))
        metrics.FAILING.set(float(model in failing), model=model_label(model))


def compute(answer: Callable[[Sequence[Call]], Answers], calls: Sequence[Call]) -> Answers:
    """Return the answers to calls of one model, and measure what they cost."""
    model = model_label(calls[0].model)
    metrics.ROWS_COMPUTED.observe(sum(call.num_rows for call in calls), model=model)
    with metrics.CALLS.time(model=model, part="compute"):
        return answer(calls)
