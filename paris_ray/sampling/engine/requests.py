"""Requests that were admitted, their pictures, and what whoever asked is told."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from torch import Tensor

from paris_ray.sampling.sampler import Denoising, Samples


@dataclass(frozen=True, slots=True)
class Previewed:
    """A picture has reached a step of which a preview was asked for.

    Attributes:
        picture: Which of the request's.
        evaluations: How many evaluations of the velocity are done.
        latents: `(1, C, H, W)` what the last one points to.
    """

    picture: int
    evaluations: int
    latents: Tensor


@dataclass(frozen=True, slots=True)
class Finished:
    """All pictures of a request are drawn.

    Attributes:
        samples: One a picture.
    """

    samples: list[Samples]


@dataclass(frozen=True, slots=True)
class Failed:
    """A request is over without pictures."""

    error: Exception


Event = Previewed | Finished | Failed


class Ticket:
    """A request that was admitted.

    Args:
        client: Whose it is.
        num_pictures: How many pictures it wants.
        evaluations: Of the velocity, for each of them.
        preview_at: After how many evaluations a preview is wanted.
        allow_missing: Whether it may be drawn without an expert that is lost.
        admitted: When.
        deadline: When nobody waits for it any more.
        listener: Is told what happens.
    """

    def __init__(
        self,
        client: str,
        *,
        num_pictures: int,
        evaluations: int,
        preview_at: Collection[int],
        allow_missing: bool,
        admitted: float,
        deadline: float,
        listener: Callable[[Event], None],
    ) -> None:
        self.client, self.num_pictures, self.evaluations = client, num_pictures, evaluations
        self.preview_at, self.allow_missing = preview_at, allow_missing
        self.admitted, self.deadline, self.tell = admitted, deadline, listener
        self.began: float | None = None
        self.is_open, self.is_started = True, False
        self.num_active = 0
        self.done = [0] * num_pictures  # evaluations of each picture
        self.samples: dict[int, Samples] = {}

    @property
    def left(self) -> int:
        """How many evaluations are left."""
        return self.num_pictures * self.evaluations - sum(self.done)

    def queued_s(self, now: float) -> float:
        """Return for how long it waited for its first step, or has waited so far."""
        return (now if self.began is None else self.began) - self.admitted


class Picture:
    """A picture that is being drawn."""

    def __init__(self, ticket: Ticket, index: int, denoising: Denoising) -> None:
        self.ticket, self.index, self.denoising = ticket, index, denoising
        self.answers: list[Tensor | None] = []
        self.unanswered = 0
