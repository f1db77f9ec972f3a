"""Many requests at once: what is admitted, which calls run together, and what a failure costs.

Every picture has a `denoise` of its own, so pictures enter, leave and wait without the others. The
calls that they want made queue by model; whoever computes for a model takes everything that waits
for it whenever he is free (continuous batching: Orca, Yu et al. 2022; here by step of denoising and
by expert). A slow or dead expert delays the pictures that want it and no others.

This is a scheduler alone: no clock of its own (each method is told the time, in seconds), no
threads, no event loop, no Ray. `serve.sampler` drives it; tests drive it by simulation.
"""

import math
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from torch import Tensor

from paris_ray.sampling.calls import ROUTER, Call
from paris_ray.sampling.sampler import Denoising, ExpertsLostError, Samples, advance

ROWS_OF_A_TURN = 2  # the call of a guided picture
FIRST_RETRY_S, LONGEST_RETRY_S = 0.05, 1.0
HALF_LIFE_S = 10.0  # of what the measured speed remembers
REMEMBERED_S = 60.0  # a speed that was not measured for longer is not known any more

Item = TypeVar("Item")


class QueueFullError(RuntimeError):
    """There is no room for a request now.

    Args:
        reason: For a person.
        position: How many pictures wait already.
        retry_after_s: When there may be room.
    """

    def __init__(self, reason: str, position: int, retry_after_s: float) -> None:
        super().__init__(reason)
        self.reason, self.position, self.retry_after_s = reason, position, retry_after_s

    def __reduce__(self) -> tuple[type["QueueFullError"], tuple[str, int, float]]:
        return type(self), (self.reason, self.position, self.retry_after_s)


class DeadlineError(RuntimeError):
    """A request took longer than it was allowed to."""


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


class _ClientsTurn(Generic[Item]):
    """What waits of one client: its requests take turns, an item each."""

    def __init__(self) -> None:
        self.requests: OrderedDict[Ticket, deque[tuple[Item, int]]] = OrderedDict()
        self.credit = 0  # rows that it may have before it is the turn of the next

    def peek(self) -> tuple[Item, int]:
        return next(iter(self.requests.values()))[0]

    def pop(self) -> Item:
        ticket, queue = self.requests.popitem(last=False)
        item, rows = queue.popleft()
        if queue:
            self.requests[ticket] = queue
        self.credit -= rows
        return item


class Turns(Generic[Item]):
    """Items that clients have in turn, as many rows each; so within a client its requests.

    Source: deficit round robin, Shreedhar and Varghese 1996.
    """

    def __init__(self) -> None:
        self._clients: OrderedDict[str, _ClientsTurn[Item]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Item]:
        """Go through the items, in no order."""
        for client in self._clients.values():
            yield from (item for queue in client.requests.values() for item, _ in queue)

    def push(self, ticket: "Ticket", item: Item, rows: int) -> None:
        """Put an item last of its request's, a new request last of its client's, and so on.

        Args:
            ticket: The request.
            item: The item.
            rows: What it counts.
        """
        client = self._clients.setdefault(ticket.client, _ClientsTurn())
        client.requests.setdefault(ticket, deque()).append((item, rows))
        self._count += 1

    def peek(self) -> Item:
        """Return what `pop` would."""
        while True:
            name, client = next(iter(self._clients.items()))
            item, rows = client.peek()
            if rows <= client.credit:
                return item
            client.credit += ROWS_OF_A_TURN
            self._clients.move_to_end(name)

    def pop(self) -> Item:
        """Return the next item."""
        self.peek()
        name, client = next(iter(self._clients.items()))
        item = client.pop()
        if not client.requests:
            del self._clients[name]
        self._count -= 1
        return item

    def discard(self, ticket: "Ticket") -> None:
        """Forget a request."""
        client = self._clients.get(ticket.client)
        if client is None:
            return
        self._count -= len(client.requests.pop(ticket, ()))
        if not client.requests:
            del self._clients[ticket.client]


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


class _Picture:
    """A picture that is being drawn."""

    def __init__(self, ticket: Ticket, index: int, denoising: Denoising) -> None:
        self.ticket, self.index, self.denoising = ticket, index, denoising
        self.answers: list[Tensor | None] = []
        self.unanswered = 0


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A call of a picture, and the place of its answer."""

    picture: _Picture
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
    waiting: list[_Waiting]
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


class _Lane:
    """What waits for one model, and how it does."""

    def __init__(self) -> None:
        self.waiting: Turns[_Waiting] = Turns()
        self.asked = self.under_way = 0  # calls: ever, and in batches that were taken
        self.failing_since: float | None = None
        self.answered, self.failed = -math.inf, -math.inf  # when it last did
        self.retry_s, self.closed_until = FIRST_RETRY_S, -math.inf

    def take(self, max_rows: int) -> list[_Waiting]:
        taken = [self.waiting.pop()]
        rows = taken[0].call.num_rows
        while self.waiting and rows + self.waiting.peek().call.num_rows <= max_rows:
            taken.append(self.waiting.pop())
            rows += taken[-1].call.num_rows
        self.under_way += len(taken)
        return taken

    def push(self, ticket: Ticket, waiting: _Waiting) -> None:
        self.waiting.push(ticket, waiting, waiting.call.num_rows)
        self.asked += 1

    def recover(self, now: float) -> None:
        self.answered = now
        self.failing_since, self.retry_s, self.closed_until = None, FIRST_RETRY_S, -math.inf

    def back_off(self, taken: float, now: float, remembered_s: float) -> float:
        """Wait before the next batch; return for how long the model has been failing."""
        # A failure long ago tells nothing, nor does a batch that hung while others were answered.
        if self.failing_since is None or taken - self.failed > remembered_s:
            self.failing_since, self.retry_s = max(taken, self.answered), FIRST_RETRY_S
        self.failed = now
        self.closed_until = now + self.retry_s
        self.retry_s = min(2 * self.retry_s, LONGEST_RETRY_S)
        return now - self.failing_since


@dataclass(slots=True)
class _Measured:
    """Evaluations, the seconds that they took, and pictures times seconds; old ones fade."""

    evaluations: float = 0.0
    seconds: float = 0.0
    picture_seconds: float = 0.0
    at: float = -math.inf

    def add(self, evaluations: int, pictures: int, seconds: float, now: float) -> None:
        kept = 0.5 ** (seconds / HALF_LIFE_S)
        self.evaluations = kept * self.evaluations + evaluations
        self.seconds = kept * self.seconds + seconds
        self.picture_seconds = kept * self.picture_seconds + pictures * seconds
        self.at = now


class Speed:
    """Evaluations a second while there is work, by how many pictures are drawn at a time.

    Few pictures make small batches, which tell little of how fast many are drawn. So speeds are
    kept apart by powers of two; more pictures than have been measured lately are taken to share
    batches without a loss: they are let in rather than refused, and so are measured.

    Args:
        max_batch_rows: How many samples a batch has at most.
    """

    def __init__(self, max_batch_rows: int) -> None:
        self._most_shared = max_batch_rows
        self._by_level: dict[int, _Measured] = {}
        self._last: float | None = None

    def begin(self, now: float) -> None:
        """There is work from now on, if there was none."""
        if self._last is None:
            self._last = now

    def record(self, evaluations: int, pictures: int, now: float) -> None:
        """Some evaluations are done, while so many pictures were drawn."""
        assert self._last is not None, "work was recorded that has not begun"
        level = self._by_level.setdefault(pictures.bit_length(), _Measured())
        level.add(evaluations, pictures, now - self._last, now)
        self._last = now

    def pause(self) -> None:
        """There is no work any more."""
        self._last = None

    def seconds(self, evaluations: int, pictures: int, now: float) -> float:
        """Return how long so many will take if so many pictures are drawn at a time.

        0 as long as nothing is known.
        """
        wanted = pictures.bit_length()
        known = [
            (abs(level - wanted), level)
            for level, measured in self._by_level.items()
            if measured.evaluations and measured.seconds and now - measured.at <= REMEMBERED_S
        ]
        if not known:
            return 0.0
        nearest = self._by_level[min(known)[1]]
        drawn = nearest.picture_seconds / nearest.seconds
        shared = min(max(1.0, pictures / drawn), self._most_shared)
        return evaluations * nearest.seconds / nearest.evaluations / shared


class Engine:
    """The scheduler.

    Args:
        models: `ROUTER` and the numbers of the experts.
        limits: What it takes on.
    """

    def __init__(self, models: Collection[int], limits: Limits) -> None:
        self._limits = limits
        self._lanes = {model: _Lane() for model in models}
        self._waiting: Turns[_Picture] = Turns()
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
        assert len(denoisings) == ticket.num_pictures
        if not ticket.is_open:
            return
        ticket.is_started = True
        self._reserved -= ticket.num_pictures
        for index, denoising in enumerate(denoisings):
            self._waiting.push(ticket, _Picture(ticket, index, denoising), 1)
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
        ready = [
            model
            for model in models
            if self._lanes[model].waiting and self._lanes[model].closed_until <= now
        ]
        if not ready:
            return None
        model = min(ready, key=lambda model: self._lanes[model].waiting.peek().since)
        return Batch(model, self._lanes[model].take(self._limits.max_batch_rows), now)

    def retry_in(self, models: Collection[int], now: float) -> float | None:
        """Return in how many seconds a model that failed may be asked again; None: none waits."""
        times = [
            self._lanes[model].closed_until - now for model in models if self._lanes[model].waiting
        ]
        return max(0.0, min(times)) if times else None

    def answer(self, batch: Batch, answers: Sequence[Tensor], now: float) -> None:
        """Give the answers to a batch, in the order of its calls."""
        self._lanes[batch.model].recover(now)
        self._lanes[batch.model].under_way -= len(batch.waiting)
        for waiting, answer in zip(batch.waiting, answers, strict=True):
            self._give(waiting, answer, now)
        self._fill(now)

    def reject(self, batch: Batch, error: Exception, now: float) -> None:
        """Say that a batch cannot be answered at all, now or later: its requests are over."""
        self._lanes[batch.model].recover(now)
        self._lanes[batch.model].under_way -= len(batch.waiting)
        for waiting in batch.waiting:
            self._end(waiting.picture.ticket, Failed(error))
        self._fill(now)

    def fail(self, batch: Batch, now: float) -> None:
        """Say that a model could not be asked: its calls wait again, or it is given up."""
        lane, lost_after_s = self._lanes[batch.model], self._limits.lost_after_s
        lane.under_way -= len(batch.waiting)
        is_lost = lane.back_off(batch.taken, now, lost_after_s) >= lost_after_s
        for waiting in batch.waiting:
            ticket = waiting.picture.ticket
            if not is_lost and ticket.is_open:
                lane.waiting.push(ticket, waiting, waiting.call.num_rows)
            elif ticket.allow_missing and batch.model != ROUTER:
                self._give(waiting, None, now)
            else:
                name = "the router" if batch.model == ROUTER else f"expert {batch.model}"
                self._end(ticket, Failed(ExpertsLostError(f"{name} is lost")))
        self._fill(now)

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
        return len(self._lanes[model].waiting) + self._lanes[model].under_way

    @property
    def waiting_calls(self) -> dict[int, int]:
        """How many calls wait for each model."""
        return {model: len(lane.waiting) for model, lane in self._lanes.items()}

    @property
    def failing(self) -> list[int]:
        """Which models did not answer when they were last asked."""
        return [model for model, lane in self._lanes.items() if lane.failing_since is not None]

    # -- Pictures ------------------------------------------------------------------------------

    def _fill(self, now: float) -> None:
        while self._waiting and self._active < self._limits.max_active_pictures:
            picture = self._waiting.pop()
            self._active += 1
            picture.ticket.num_active += 1
            if picture.ticket.began is None:
                picture.ticket.began = now
            self._advance(picture, None, now)

    def _give(self, waiting: _Waiting, answer: Tensor | None, now: float) -> None:
        picture = waiting.picture
        picture.answers[waiting.place] = answer
        picture.unanswered -= 1
        if picture.ticket.is_open and picture.unanswered == 0:
            self._advance(picture, picture.answers, now)

    def _advance(
        self, picture: _Picture, answers: Sequence[Tensor | None] | None, now: float
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
            self._lanes[call.model].push(ticket, _Waiting(picture, place, call, now))
        if is_new and step.preview is not None and step.evaluations in ticket.preview_at:
            ticket.tell(Previewed(picture.index, step.evaluations, step.preview))

    def _count(self, picture: _Picture, evaluations: int, now: float) -> None:
        new = evaluations - picture.ticket.done[picture.index]
        picture.ticket.done[picture.index] = evaluations
        self._left -= new
        self._speed.record(new, self._active, now)

    def _keep(self, picture: _Picture, samples: Samples) -> None:
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
            lane.waiting.discard(ticket)
