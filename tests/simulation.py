"""The engine of sampling under a simulated clock: models that take time, pictures that ask them.

Time is in seconds that nobody waits for. A picture's `denoise` here computes nothing, but follows
the protocol of the real one and checks that each answer is the one to its own call.
"""

import heapq
import math
from collections.abc import Callable, Collection, Generator, Sequence
from itertools import count

import torch

from paris_ray.errors import ExpertsLostError
from paris_ray.models import TextConditioning
from paris_ray.sampling.calls import ROUTER, Call, ExpertCall, RouterCall
from paris_ray.sampling.engine import Batch, Engine, Event, Failed, Finished, Ticket
from paris_ray.sampling.guidance import KeyedText
from paris_ray.sampling.sampler import Answers, Denoising, Samples, Step

NUM_EXPERTS = 3
MOST_EVENTS = 1_000_000  # of a simulation
MODELS = (ROUTER, *range(NUM_EXPERTS))
TEXT = KeyedText.of(TextConditioning(torch.zeros(1, 1, 1), torch.zeros(1, 1)))
_names = count()

Choose = Callable[[int], Collection[int]]


def reply(call: Call) -> torch.Tensor:
    """What a model answers to a call: no other call has the same answer."""
    return -call.latents


class Picture:
    """A picture that asks the router, then some experts, in each evaluation.

    Args:
        evaluations: Of the velocity.
        choose: Which experts the router chooses in an evaluation.
        guided: A guided call has two rows.
    """

    def __init__(self, evaluations: int, choose: Choose, *, guided: bool = False) -> None:
        self.evaluations, self._choose = evaluations, choose
        self._null = TEXT if guided else None
        self.done = 0
        self.wanted: set[float] = set()  # the names of calls without an answer
        self.missing: set[int] = set()
        self.is_begun = self.is_finished = False

    def denoise(self) -> Denoising:
        """Follow the protocol of `sampler.denoise`."""
        self.is_begun = True
        for evaluation in range(self.evaluations):
            self.done = evaluation
            yield from self._ask([RouterCall(latents=self._name(), t=1.0, text=TEXT)])
            while not (yield from self._ask(self._expert_calls())):
                pass
        self.done, self.is_finished = self.evaluations, True
        weights = torch.full((1, self.evaluations, NUM_EXPERTS), 1 / NUM_EXPERTS)
        asked = torch.full((1, self.evaluations), NUM_EXPERTS)
        return Samples(
            torch.tensor([float(self.done)]), weights, asked, tuple(sorted(self.missing))
        )

    def _ask(self, calls: Sequence[Call]) -> Generator[Step, Answers, bool]:
        """Yield calls and return whether all were answered."""
        preview = torch.tensor([float(self.done)]) if self.done else None
        answers = yield Step(list(calls), self.done, preview)
        self.wanted.clear()
        lost = {call.model for call, answer in zip(calls, answers, strict=True) if answer is None}
        for call, answer in zip(calls, answers, strict=True):
            assert answer is None or torch.equal(answer, reply(call)), "another call's answer"
        self.missing |= lost
        return not lost

    def _expert_calls(self) -> list[ExpertCall]:
        experts = [k for k in self._choose(self.done) if k not in self.missing]
        if not experts:
            raise ExpertsLostError("all experts are lost")
        return [
            ExpertCall(
                expert=k,
                lora=None,
                latents=self._name(),
                t=1.0,
                text=TEXT,
                null_text=self._null,
                guidance_scale=2.0,
            )
            for k in experts
        ]

    def _name(self) -> torch.Tensor:
        name = float(next(_names))
        self.wanted.add(name)
        return torch.tensor([name])


class Request:
    """A request of one client, and what it was told.

    Args:
        simulation: Where it runs.
        pictures: What it wants.
        client: Whose it is.
        options: Of `Engine.admit`.
    """

    def __init__(
        self,
        simulation: "Simulation",
        pictures: Sequence[Picture],
        *,
        client: str = "a",
        **options: object,
    ) -> None:
        self._simulation, self.pictures = simulation, pictures
        self.events: list[Event] = []
        self.ended: float | None = None
        self.ticket: Ticket = simulation.engine.admit(
            client,
            num_pictures=len(pictures),
            evaluations=pictures[0].evaluations,
            listener=self._hear,
            now=simulation.now,
            **{"timeout_s": 1e6} | options,
        )
        self.admitted = simulation.now

    def _hear(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Finished | Failed):
            self.ended = self._simulation.now

    def start(self) -> "Request":
        """Begin to draw."""
        denoisings = [picture.denoise() for picture in self.pictures]
        self._simulation.engine.start(self.ticket, denoisings, self._simulation.now)
        return self

    @property
    def seconds(self) -> float:
        """From its admission to its end."""
        assert self.ended is not None, "it is not over"
        return self.ended - self.admitted

    @property
    def error(self) -> Exception:
        """What it failed with."""
        (event,) = [event for event in self.events if isinstance(event, Failed)]
        return event.error


class Simulation:
    """An engine, lanes that compute for it, and a clock that jumps from event to event.

    Args:
        engine: The engine.
        lanes: Which models each lane computes for.
        seconds: How long a batch takes.
        works: Whether a batch that is over at a time is answered; it fails otherwise.
    """

    def __init__(
        self,
        engine: Engine,
        lanes: Sequence[Collection[int]] = tuple((model,) for model in MODELS),
        *,
        seconds: Callable[[Batch], float] = lambda batch: 1.0,
        works: Callable[[Batch, float], bool] = lambda batch, now: True,
    ) -> None:
        self.engine, self.now = engine, 0.0
        self.batches: list[Batch] = []
        self._lanes, self._seconds, self._works = list(lanes), seconds, works
        self._free = list(range(len(lanes)))
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()

    def at(self, time: float, action: Callable[[], object]) -> None:
        """Do something at a time."""
        heapq.heappush(self._agenda, (time, next(self._numbers), action))

    def run(self, until: float = math.inf) -> None:
        """Let time pass until nothing is left to do, or until some time."""
        self._take()
        while self._agenda and self._agenda[0][0] <= until:
            self.now, _, action = heapq.heappop(self._agenda)
            assert next(self._numbers) < MOST_EVENTS, "it never ends"
            action()
            self._take()
        if until < math.inf:
            self.now = until

    def _take(self) -> None:
        for lane in list(self._free):
            batch = self.engine.take(self._lanes[lane], self.now)
            if batch is not None:
                self._free.remove(lane)
                self.batches.append(batch)
                self.at(self.now + self._seconds(batch), lambda b=batch, n=lane: self._end(b, n))
            elif wait := self.engine.retry_in(self._lanes[lane], self.now):
                self.at(self.now + wait, lambda: None)

    def _end(self, batch: Batch, lane: int) -> None:
        self._free.append(lane)
        if self._works(batch, self.now):
            self.engine.answer(batch, [reply(call) for call in batch.calls], self.now)
        else:
            self.engine.fail(batch, self.now)


def rows(batch: Batch) -> int:
    """How many samples a batch has."""
    return sum(call.num_rows for call in batch.calls)


def is_idle(engine: Engine) -> bool:
    """Whether an engine counts nothing any more, and no call waits in it."""
    counts = (engine.num_active, engine.num_waiting, engine.num_left)
    unanswered = sum(engine.unanswered(model) for model in MODELS)
    return counts == (0, 0, 0) and unanswered == 0 and engine.take(MODELS, math.inf) is None
