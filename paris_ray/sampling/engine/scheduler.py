"""The scheduler: what is admitted and begun, and what comes of answers and failures."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from torch import Tensor

from paris_ray.errors import DeadlineError, ExpertsLostError, QueueFullError
from paris_ray.sampling.calls import ROUTER
from paris_ray.sampling.engine.lanes import Batch, Lane, Waiting
from paris_ray.sampling.engine.requests import Event, Failed, Finished, Picture, Previewed, Ticket
from paris_ray.sampling.engine.speed import Speed
from paris_ray.sampling.engine.turns import Turns
from paris_ray.sampling.sampler import Denoising, Samples, advance


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What an engine takes on.

    Attributes:
        max_batch_rows: Samples of one batch; a guided picture is two. With exact bytes a forward
            pass has `exactness.MOST_TRIED` at most, so more gain nothing then.
        max_active_pictures: Pictures that are drawn at the same time.
        max_waiting_pictures: Pictures that wait to be drawn.
        lost_after_s: How long a model may fail before pictures are drawn without it.
    """

    max_batch_rows: int = 16
    max_active_pictures: int = 64
    max_waiting_pictures: int = 256
    lost_after_s: float = 60.0

    @property
    def call_timeout_s(self) -> float:
        """How long a batch of calls may take; what hangs is asked again before it is given up."""
        return self.lost_after_s / 2

    @property
    def max_pictures(self) -> int:
        """The most pictures that are drawn or wait; a request for more never finds room."""
        return self.max_active_pictures + self.max_waiting_pictures


class Engine:
    """The scheduler.

    Args:
        models: `ROUTER` and the numbers of the experts.
        limits: What it takes on.
    """

    def __init__(self, models: Collection[int], limits: Limits) -> None:
        self._limits = limits
        self._lanes = {model: Lane(model) for model in models}
        self._waiting: Turns[Picture] = Turns()
        self._active = 0
        self._reserved = 0  # pictures that were admitted and have not started
        self._left = 0  # evaluations of all that was admitted
        self._of_client: dict[str, int] = {}  # pictures that are admitted
        self._open: dict[Ticket, None] = {}  # in the order of their admission
        self._speed = Speed(limits.max_batch_rows)

    # -- Requests ------------------------------------------------------------------------------

    def admit(
        self,
        client: str,
        *,
        num_pictures: int,
        evaluations: int,
        timeout_s: float,
        listener: Callable[[Event], None],
        now: float,
        preview_at: Collection[int] = (),
        allow_missing: bool = True,
        max_pictures_of_client: int | None = None,
    ) -> Ticket:
        """Take a request on, before anything is computed for it; `start` begins it.

        Args: see `Ticket`; `max_pictures_of_client` are the most that its client may have here.

        Raises:
            QueueFullError: if there is no room, or it would not be done in time.
        """
        self._check_room(client, num_pictures, max_pictures_of_client, now)
        self._check_time(num_pictures, num_pictures * evaluations, timeout_s, now)
        ticket = Ticket(
            client,
            num_pictures=num_pictures,
            evaluations=evaluations,
            preview_at=preview_at,
            allow_missing=allow_missing,
            admitted=now,
            deadline=now + timeout_s,
            listener=listener,
        )
        self._reserved += num_pictures
        self._left += ticket.left
        self._of_client[client] = self._of_client.get(client, 0) + num_pictures
        self._open[ticket] = None
        return ticket

    def _check_room(self, client: str, num_pictures: int, most: int | None, now: float) -> None:
        queued = self.num_waiting
        wait = max(1.0, self._seconds(self._left, 0, now))
        if self._active + queued + num_pictures > self._limits.max_pictures:
            raise QueueFullError(
                f"{self._active + queued} pictures are in work or wait", queued, wait
            )
        theirs = self._of_client.get(client, 0)
        if most is not None and theirs + num_pictures > most:
            raise QueueFullError(
                f"you have {theirs} pictures in work or waiting; the most at once are {most}",
                queued,
                wait,
            )

    def _check_time(
        self, num_pictures: int, evaluations: int, timeout_s: float, now: float
    ) -> None:
        wait = self._seconds(self._left + evaluations, num_pictures, now)
        if self._left and wait > timeout_s:
            raise QueueFullError(
                f"it would be done in {wait:.0f} s, and {timeout_s:.0f} s are allowed",
                self.num_waiting,
                max(1.0, wait - timeout_s),
            )

    def _seconds(self, evaluations: int, new_pictures: int, now: float) -> float:
        """Return how long it takes to draw what is here and some new pictures."""
        pictures = self._active + self.num_waiting + new_pictures
        drawn = min(pictures, self._limits.max_active_pictures)
        return self._speed.seconds(evaluations, drawn, now)

    def start(self, ticket: Ticket, denoisings: Sequence[Denoising], now: float) -> None:
        """Begin a request, unless it is over already.

        Args:
            ticket: What `admit` returned.
            denoisings: `denoise` of each picture, at its beginning.
            now: The time.
        """
        if len(denoisings) != ticket.num_pictures:
            raise ValueError(f"{len(denoisings)} pictures begin, {ticket.num_pictures} were let in")
        if not ticket.is_open:
            return
        ticket.is_started = True
        self._reserved -= ticket.num_pictures
        for index, denoising in enumerate(denoisings):
            self._waiting.push(ticket, Picture(ticket, index, denoising), 1)
        self._speed.begin(now)
        self._fill(now)

    def cancel(self, ticket: Ticket, now: float) -> int:
        """End a request; return after how many evaluations its furthest picture stopped."""
        self._close(ticket)
        self._fill(now)
        return max(ticket.done)

    def expire(self, now: float) -> None:
        """End the requests that nobody waits for any more."""
        for ticket in [ticket for ticket in self._open if ticket.deadline <= now]:
            self._end(ticket, Failed(DeadlineError("it was not done in time")))
        self._fill(now)

    # -- Models --------------------------------------------------------------------------------

    def take(self, models: Collection[int], now: float) -> Batch | None:
        """Return what waits for one of some models, for the one that was kept waiting longest.

        Whoever takes a batch calls `answer`, `fail` or `reject` with it, or with each of its parts.
        """
        ready = [self._lanes[model] for model in models if self._lanes[model].is_ready(now)]
        if not ready:
            return None
        lane = min(ready, key=lambda lane: lane.waiting.peek().since)
        return lane.take(self._limits.max_batch_rows, now)

    def retry_in(self, models: Collection[int], now: float) -> float | None:
        """Return in how many seconds a model that failed may be asked again; None: none waits."""
        lanes = (self._lanes[model] for model in models)
        times = [lane.ready_in(now) for lane in lanes if lane.waiting]
        return max(0.0, min(times)) if times else None

    def answer(self, batch: Batch, answers: Sequence[Tensor], now: float) -> None:
        """Give the answers to a batch, in the order of its calls."""
        self._lanes[batch.model].answered(batch, now)
        for waiting, answer in zip(batch.waiting, answers, strict=True):
            self._give(waiting, answer, now)
        self._fill(now)

    def reject(self, batch: Batch, error: Exception, now: float) -> None:
        """Say that a batch cannot be answered at all, now or later: its requests are over."""
        self._lanes[batch.model].answered(batch, now)
        for waiting in batch.waiting:
            self._end(waiting.picture.ticket, Failed(error))
        self._fill(now)

    def fail(self, batch: Batch, now: float) -> None:
        """Say that a model could not be asked: its calls wait again, or it is given up."""
        if self._lanes[batch.model].failed(batch, now, self._limits.lost_after_s):
            for waiting in batch.waiting:
                self._lose(waiting, now)
        self._fill(now)

    def _lose(self, waiting: Waiting, now: float) -> None:
        """Let a picture go on without a model that is lost, if it can and its request allows it."""
        ticket, model = waiting.picture.ticket, waiting.call.model
        if ticket.allow_missing and model != ROUTER:
            self._give(waiting, None, now)
        else:
            name = "the router" if model == ROUTER else f"expert {model}"
            self._end(ticket, Failed(ExpertsLostError(f"{name} is lost")))

    # -- Facts ---------------------------------------------------------------------------------

    @property
    def num_active(self) -> int:
        """How many pictures are being drawn."""
        return self._active

    @property
    def num_waiting(self) -> int:
        """How many pictures wait to be drawn."""
        return len(self._waiting) + self._reserved

    @property
    def num_left(self) -> int:
        """How many evaluations of the velocity all that was admitted still needs."""
        return self._left

    def asked(self, model: int) -> int:
        """Return how many calls of a model pictures have wanted so far."""
        return self._lanes[model].asked

    def unanswered(self, model: int) -> int:
        """Return how many calls of a model wait or are being answered."""
        return self._lanes[model].num_unanswered

    @property
    def waiting_calls(self) -> dict[int, int]:
        """How many calls wait for each model."""
        return {model: len(lane.waiting) for model, lane in self._lanes.items()}

    @property
    def failing(self) -> list[int]:
        """Which models did not answer when they were last asked."""
        return [model for model, lane in self._lanes.items() if lane.is_failing]

    # -- Pictures ------------------------------------------------------------------------------

    def _fill(self, now: float) -> None:
        while self._waiting and self._active < self._limits.max_active_pictures:
            picture = self._waiting.pop()
            self._active += 1
            picture.ticket.num_active += 1
            if picture.ticket.began is None:
                picture.ticket.began = now
            self._advance(picture, None, now)

    def _give(self, waiting: Waiting, answer: Tensor | None, now: float) -> None:
        picture = waiting.picture
        picture.answers[waiting.place] = answer
        picture.unanswered -= 1
        if picture.ticket.is_open and picture.unanswered == 0:
            self._advance(picture, picture.answers, now)

    def _advance(
        self, picture: Picture, answers: Sequence[Tensor | None] | None, now: float
    ) -> None:
        ticket = picture.ticket
        try:
            step = advance(picture.denoising, answers)
        except Exception as error:  # of this picture alone: the others go on
            self._end(ticket, Failed(error))
            return
        if isinstance(step, Samples):
            self._count(picture, ticket.evaluations, now)
            self._keep(picture, step)
            return
        is_new = step.evaluations > ticket.done[picture.index]
        self._count(picture, step.evaluations, now)
        picture.answers, picture.unanswered = [None] * len(step.calls), len(step.calls)
        for place, call in enumerate(step.calls):
            self._lanes[call.model].push(Waiting(picture, place, call, now))
        if is_new and step.preview is not None and step.evaluations in ticket.preview_at:
            ticket.tell(Previewed(picture.index, step.evaluations, step.preview))

    def _count(self, picture: Picture, evaluations: int, now: float) -> None:
        new = evaluations - picture.ticket.done[picture.index]
        picture.ticket.done[picture.index] = evaluations
        self._left -= new
        self._speed.record(new, self._active, now)

    def _keep(self, picture: Picture, samples: Samples) -> None:
        ticket = picture.ticket
        self._active -= 1
        ticket.num_active -= 1
        ticket.samples[picture.index] = samples
        if len(ticket.samples) == ticket.num_pictures:
            everything = [ticket.samples[index] for index in range(ticket.num_pictures)]
            self._end(ticket, Finished(everything))

    def _end(self, ticket: Ticket, event: Event) -> None:
        if ticket.is_open:
            self._close(ticket)
            ticket.tell(event)

    def _close(self, ticket: Ticket) -> None:
        """Forget a request: its pictures, its calls and its place; batches under way go on."""
        if not ticket.is_open:
            return
        ticket.is_open = False
        del self._open[ticket]
        self._left -= ticket.left
        if not self._left:
            self._speed.pause()
        self._of_client[ticket.client] -= ticket.num_pictures
        if not self._of_client[ticket.client]:
            del self._of_client[ticket.client]
        if not ticket.is_started:
            self._reserved -= ticket.num_pictures
        self._waiting.discard(ticket)
        self._active -= ticket.num_active
        ticket.num_active = 0
        for lane in self._lanes.values():
            lane.discard(ticket)
