"""Lanes: the calls that wait for a model, taken in batches, and when it may be asked again."""

import math
from dataclasses import dataclass, replace

from paris_ray.sampling.calls import Call
from paris_ray.sampling.engine.requests import Picture, Ticket
from paris_ray.sampling.engine.turns import Turns

FIRST_RETRY_S, LONGEST_RETRY_S = 0.05, 1.0


@dataclass(frozen=True, slots=True)
class Waiting:
    """A call of a picture, and the place of its answer."""

    picture: Picture
    place: int
    call: Call
    since: float


@dataclass(frozen=True, slots=True)
class Batch:
    """Calls of one model that are to be answered together.

    Attributes:
        model: Which.
        waiting: The calls, and whose they are.
        taken: When.
    """

    model: int
    waiting: list[Waiting]
    taken: float

    @property
    def calls(self) -> list[Call]:
        """The calls, in the order that their answers are to have."""
        return [waiting.call for waiting in self.waiting]

    @property
    def waited_s(self) -> float:
        """For how long its oldest call has waited."""
        return self.taken - min(waiting.since for waiting in self.waiting)

    def halves(self) -> list["Batch"]:
        """Return the first and the second half of the calls; nothing, if there is one."""
        middle = len(self.waiting) // 2
        parts = (self.waiting[:middle], self.waiting[middle:])
        return [replace(self, waiting=part) for part in parts] if middle else []


class Lane:
    """What waits for one model, and how it does.

    Args:
        model: Which.
    """

    def __init__(self, model: int) -> None:
        self.model = model
        self.waiting: Turns[Waiting] = Turns()
        self.asked = 0  # calls that pictures ever wanted
        self._under_way = 0  # calls in batches that were taken
        self._failing_since: float | None = None
        self._answered, self._failed = -math.inf, -math.inf  # when it last did
        self._retry_s, self._closed_until = FIRST_RETRY_S, -math.inf

    # -- Calls ---------------------------------------------------------------------------------

    def push(self, waiting: Waiting) -> None:
        """Put a call that a picture has just come to want last of its request's."""
        self._queue(waiting)
        self.asked += 1

    def _queue(self, waiting: Waiting) -> None:
        self.waiting.push(waiting.picture.ticket, waiting, waiting.call.num_rows)

    def take(self, max_rows: int, now: float) -> Batch:
        """Return the calls whose turn it is, as many as have so many rows; at least one."""
        taken = [self.waiting.pop()]
        rows = taken[0].call.num_rows
        while self.waiting and rows + self.waiting.peek().call.num_rows <= max_rows:
            taken.append(self.waiting.pop())
            rows += taken[-1].call.num_rows
        self._under_way += len(taken)
        return Batch(self.model, taken, now)

    def discard(self, ticket: Ticket) -> None:
        """Forget the calls of a request; batches under way go on."""
        self.waiting.discard(ticket)

    @property
    def num_unanswered(self) -> int:
        """How many calls wait or are being answered."""
        return len(self.waiting) + self._under_way

    # -- The model -----------------------------------------------------------------------------

    def is_ready(self, now: float) -> bool:
        """Return whether something waits, and the model may be asked."""
        return bool(self.waiting) and self._closed_until <= now

    def ready_in(self, now: float) -> float:
        """Return in how many seconds the model may be asked again; negative: since when."""
        return self._closed_until - now

    @property
    def is_failing(self) -> bool:
        """Whether the model did not answer when it was last asked."""
        return self._failing_since is not None

    def answered(self, batch: Batch, now: float) -> None:
        """The model has answered a batch, if only with an error."""
        self._under_way -= len(batch.waiting)
        self._answered = now
        self._failing_since, self._retry_s, self._closed_until = None, FIRST_RETRY_S, -math.inf

    def failed(self, batch: Batch, now: float, lost_after_s: float) -> bool:
        """The model could not be asked a batch, and is left alone for a while.

        Returns:
            Whether it is lost: it has been failing for so long. If not, the calls of those
            requests that are still open wait again.
        """
        self._under_way -= len(batch.waiting)
        # A failure long ago tells nothing, nor does a batch that hung while others were answered.
        if self._failing_since is None or batch.taken - self._failed > lost_after_s:
            self._failing_since = max(batch.taken, self._answered)
            self._retry_s = FIRST_RETRY_S
        self._failed = now
        self._closed_until = now + self._retry_s
        self._retry_s = min(2 * self._retry_s, LONGEST_RETRY_S)
        if now - self._failing_since >= lost_after_s:
            return True
        for waiting in batch.waiting:
            if waiting.picture.ticket.is_open:
                self._queue(waiting)
        return False
