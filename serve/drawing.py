"""What the Ingress asks of a Sampler, and what it is told."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paris_ray.sampling_options import SamplingOptions
from serve.source import Origin

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawRequest:
    """One request, checked; drawing it again elsewhere gives the same pictures.

    Attributes:
        id: What the client calls it, or we for it; unique among the requests of a client.
        client: Whose it is: the name of a key, or `local` where there are none.
        prompts: One a picture.
        seeds: One a picture.
        options: Steps, guidance, routing and adapters.
        timeout_s: Seconds after which nobody waits for it any more.
        partial_images: How many unfinished states of each picture are sent before the last.
        allow_degraded: Whether it may be finished without an expert that is lost.
        max_pictures_of_client: The most pictures that the client may have in work or waiting.
        origin: What alone may draw it; None: any.
    """

    id: str
    client: str
    prompts: Sequence[str]
    seeds: Sequence[int]
    options: SamplingOptions
    timeout_s: float
    partial_images: int = 0
    allow_degraded: bool = True
    max_pictures_of_client: int | None = None
    origin: Origin | None = None

    def check_origin(self, origin: Origin) -> None:
        """Raise OtherOriginError if a request may not be drawn by this."""
        if self.origin not in (None, origin):
            raise OtherOriginError


@dataclass(frozen=True, kw_only=True, slots=True)
class Partial:
    """An unfinished picture: what the velocity at its present step points to.

    Attributes:
        picture: Which of the request's.
        index: Which of its `partial_images`, from 0.
        step: How many steps are done.
        pixels: `(S, S, 3)`.
        origin: What draws it.
    """

    picture: int
    index: int
    step: int
    pixels: Pixels
    origin: Origin


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """The pictures of a request.

    Attributes:
        pictures: `(n, S, S, 3)`.
        expert_usage: `(n, K)` mean weight of each expert over the steps; rows sum to 1.
        expert_weights: `(n, steps, K)` its weight in each step.
        missing_experts: Those that were lost and drawn without, in order; of all pictures.
        last_resort: Whether the last resort drew in their place; of any picture.
        seconds: How long the Sampler had the request.
        origin: What drew them. It is the Sampler's to tell: while Serve replaces replicas, the
            Ingress may be of another version.
    """

    pictures: Pixels
    expert_usage: list[list[float]]
    expert_weights: list[list[list[float]]]
    missing_experts: list[int]
    last_resort: bool
    seconds: float
    origin: Origin


class OtherOriginError(RuntimeError):
    """A Sampler has another bundle, data type or adapter than what alone may draw a request."""


class ExpertUnavailableError(RuntimeError):
    """An expert is being replaced; the call may be made again."""


class OtherVersionError(RuntimeError):
    """Another bundle or other adapters than the picture was begun, or its request checked, with.

    This is so while Serve replaces replicas, one deployment at its own pace: the picture can only
    be drawn again from its beginning, by a Sampler of the experts' version.
    """


class RequestCancelledError(RuntimeError):
    """Somebody cancelled a request.

    Args:
        step: How many evaluations of the velocity were done.
    """

    def __init__(self, step: int) -> None:
        super().__init__(f"cancelled after {step} steps")
        self.step = step

    def __reduce__(self) -> tuple[type["RequestCancelledError"], tuple[int]]:
        return type(self), (self.step,)
