"""The Sampler: text encoder, router, engine and codec; it asks the experts for velocities.

It drives `paris_ray.sampling.engine`: lanes, one for each computation that can run at a time, take
what waits for their models, have it answered, and give the answers back. A served picture equals
the one that `generate` draws with the same arguments, seed and thread count, whatever else is
being drawn.
"""

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context
from dataclasses import replace
from operator import attrgetter
from typing import Any, TypeVar

import numpy as np
import torch
from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle
from torch import Tensor

from paris_ray.exactness import MOST_TRIED
from paris_ray.sampling.calls import ROUTER, Call, ExpertCall
from paris_ray.sampling.engine import (
    Batch,
    Engine,
    Event,
    Failed,
    Finished,
    Limits,
    Previewed,
    Ticket,
)
from paris_ray.sampling.guidance import KeyedText
from paris_ray.sampling.local import LocalModels
from paris_ray.sampling.sampler import Denoising, initial_noise, start_denoising
from paris_ray.sampling_options import SamplingOptions, num_evaluations
from serve import metrics
from serve.coalescing import Coalescer
from serve.drawing import (
    Drawing,
    DrawRequest,
    ExpertUnavailableError,
    OtherVersionError,
    Partial,
    Pixels,
    RequestCancelledError,
)
from serve.expert import ExpertClient
from serve.measuring import add_router_mass, compute, model_label, set_levels
from serve.opening import open_bundle
from serve.scaling import Reporter
from serve.source import BundleSource, Origin

EXPIRY_PERIOD_S = 0.25
SHORT_PASS_S = 0.02  # of which Python is a fifth or more

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
Answer = Callable[[Sequence[Any]], Awaitable[list[Tensor]]]


class Sampler:
    """A deployment that draws pictures.

    Args:
        source: Where the bundle is.
        experts: Handles of the experts, in order, and of the last resort, if one is to draw in the
            place of those that are lost; None keeps the experts in this process.
        threads: Torch threads of one computation.
        limits: What is drawn at a time, and what may wait.
        lanes: How many batches each expert is asked at a time.
    """

    def __init__(
        self,
        source: BundleSource,
        experts: Sequence[DeploymentHandle[Any]] | None,
        *,
        threads: int,
        limits: Limits,
        lanes: Sequence[int] = (),
    ) -> None:
        torch.set_num_threads(threads)
        self._bundle, self._source, self._limits = open_bundle(source), source, limits
        self._models = LocalModels(self._bundle, exact=source.exact)
        self._num_lanes = lanes
        self._experts = (
            None
            if experts is None
            else [
                ExpertClient(handle, source.of_expert(k).version)
                for k, handle in enumerate(experts)
            ]
        )
        # Torch runs in threads: the event loop stays free for the other requests. Texts have one
        # of their own, since those of many new requests must not hold up the steps of the others;
        # it encodes no more at a time than one pass or one request has, so that nobody waits long.
        self._num_computations = self._count_computations(threads)
        self._computing = ThreadPoolExecutor(self._num_computations, "computing")
        self._encoding = ThreadPoolExecutor(1, "encoding")
        self._beginning = Coalescer(
            self._begin, size=_num_texts, most=MOST_TRIED, client=attrgetter("client")
        )
        # Experts in this process are not lost without it: nobody needs to stand in for one.
        count = self._bundle.num_experts if experts is None else len(experts)
        self._last_resort = self._bundle.last_resort if count > self._bundle.num_experts else None
        self._models_asked = (ROUTER, *range(count))
        self._engine = Engine(self._models_asked, limits)
        self._reporter = Reporter(count)
        self._requests: dict[tuple[str, str], list[tuple[Ticket, asyncio.Queue[Event]]]] = {}
        self._idle: dict[asyncio.Future[Batch], Collection[int]] = {}  # lanes at rest
        self._tasks: list[asyncio.Task[None]] = []
        self._load()

    def _load(self) -> None:
        """Load what requests need now: a broken bundle must not become a broken request."""
        _ = self._models.most_rows(ROUTER), self._bundle.codec, self._bundle.null_text
        if self._source.exact:
            self._bundle.texts.try_out()
        if self._experts is None:
            for k in range(self._bundle.num_experts):
                self._models.most_rows(k)
            for name, k in self._bundle.loras.items():
                self._bundle.expert(k, name)

    def check_health(self) -> None:
        """Raise if the device or a lane has failed: the process must be replaced."""
        torch.ones((), device=self._bundle.device).item()
        for task in self._tasks:  # they never end, unless by a bug
            if task.done():
                task.result()

    async def state(self) -> dict[str, Any]:
        """Return the fields of `serve.schemas.Readiness`."""
        return {
            "num_experts": self._bundle.num_experts,
            "failing_experts": [
                model for model in self._engine.failing if 0 <= model < self._bundle.num_experts
            ],
            "active_pictures": self._engine.num_active,
            "waiting_pictures": self._engine.num_waiting,
        }

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Return what `serve.scaling` decides by; Serve asks for it where replicas may scale."""
        return self._reporter.report(self._engine)

    async def draw(self, request: DrawRequest) -> Drawing:
        """Draw the pictures of a request.

        Raises:
            QueueFullError: if there is no room for it.
            DeadlineError: if it took too long.
            ExpertsLostError: if experts are lost that it may not be drawn without.
            RequestCancelledError: if it was cancelled.
            OtherVersionError: if the request, or an expert that it wants, is of another bundle.
            OtherOriginError: if something else than this may draw it alone.
        """
        async for message in self.stream(request):
            if isinstance(message, Drawing):
                return message
        raise AssertionError("a stream ends with the drawing")

    async def stream(self, request: DrawRequest) -> AsyncIterator[Partial | Drawing]:
        """Draw the pictures of a request and tell of unfinished ones; raises as `draw`."""
        self._check_version(request.options)
        origin = self._origin(request.options)
        request.check_origin(origin)
        events: asyncio.Queue[Event] = asyncio.Queue()
        preview_at = _preview_steps(request)
        ticket = self._engine.admit(
            request.client,
            num_pictures=len(request.seeds),
            evaluations=_evaluations(request),
            timeout_s=request.timeout_s,
            listener=events.put_nowait,
            now=time.monotonic(),
            preview_at=preview_at,
            allow_missing=request.allow_degraded,
            max_pictures_of_client=request.max_pictures_of_client,
        )
        key, entry = (request.client, request.id), (ticket, events)
        self._requests.setdefault(key, []).append(entry)
        try:
            self._start_lanes()
            with metrics.STAGES.time(stage="text"):
                denoisings = await self._denoisings(request, events)
            self._engine.start(ticket, denoisings, time.monotonic())
            self._wake()
            async for message in self._follow(ticket, events, preview_at, origin):
                yield message
        finally:
            metrics.STAGES.observe(ticket.queued_s(time.monotonic()), stage="queue")
            self._engine.cancel(ticket, time.monotonic())
            self._requests[key].remove(entry)
            if not self._requests[key]:
                del self._requests[key]
            self._wake()

    async def cancel(self, client: str, request_id: str) -> int | None:
        """End a request; return after how many steps it stopped, or None if it is not here."""
        steps = []
        for ticket, events in self._requests.get((client, request_id), []):
            if ticket.is_open:  # else it is drawn, and only decoded now
                steps.append(self._engine.cancel(ticket, time.monotonic()))
                events.put_nowait(Failed(RequestCancelledError(steps[-1])))
        return max(steps, default=None)

    def _check_version(self, options: SamplingOptions) -> None:
        """Refuse what was checked against other experts or adapters, while Serve replaces them."""
        known, count = self._bundle.loras, self._bundle.num_experts
        if (
            any(known.get(name) != expert for expert, name in options.loras.items())
            or max(options.allowed_experts or (0,)) >= count
            or options.routing.top_k > count
        ):
            raise OtherVersionError("the request was checked against another bundle")

    def _origin(self, options: SamplingOptions) -> Origin:
        return self._source.origin(next(iter(options.loras.values()), None))

    async def _denoisings(
        self, request: DrawRequest, events: "asyncio.Queue[Event]"
    ) -> list[Denoising]:
        """Return the `denoise` of each picture, or raise what ends the request before its turn."""
        asking = asyncio.ensure_future(self._beginning.ask(request))
        ending = asyncio.ensure_future(events.get())
        try:
            await asyncio.wait({asking, ending}, return_when=asyncio.FIRST_COMPLETED)
            if ending.done():  # nothing else is told of a request that has not started
                event = ending.result()
                assert isinstance(event, Failed)
                raise event.error
            return await asking
        finally:
            asking.cancel()
            ending.cancel()

    async def _begin(self, requests: Sequence[DrawRequest]) -> list[list[Denoising]]:
        """Return the `denoise` of each picture of some requests, whose texts are encoded together.

        Those that come meanwhile are the next: the encoder takes all that waits when it is free.
        """
        return await self._in(self._encoding, self._encode, requests)

    def _encode(self, requests: Sequence[DrawRequest]) -> list[list[Denoising]]:
        prompts = [prompt for request in requests for prompt in request.prompts]
        text = self._bundle.texts.encode(prompts, exact=self._source.exact)
        rows = (text.rows(slice(i, i + 1)) for i in range(len(prompts)))
        return [
            [
                start_denoising(
                    self._bundle, next(rows), [seed], request.options, self._last_resort
                )
                for seed in request.seeds
            ]
            for request in requests
        ]

    async def _follow(
        self,
        ticket: Ticket,
        events: "asyncio.Queue[Event]",
        preview_at: Sequence[int],
        origin: Origin,
    ) -> AsyncIterator[Partial | Drawing]:
        while True:
            match await events.get():
                case Previewed(picture, evaluations, latents):
                    (pixels,) = await self._decode([latents])
                    index = preview_at.index(evaluations)
                    yield Partial(
                        picture=picture,
                        index=index,
                        step=evaluations,
                        pixels=pixels,
                        origin=origin,
                    )
                case Finished(samples):
                    now = time.monotonic()
                    drawn_s = now - ticket.admitted - ticket.queued_s(now)
                    metrics.STAGES.observe(drawn_s, stage="draw")
                    weights = [one.expert_weights[0].tolist() for one in samples]
                    usage = [one.expert_usage[0].tolist() for one in samples]
                    add_router_mass(usage)
                    pictures = await self._decode([one.latents for one in samples])
                    yield Drawing(
                        pictures=pictures,
                        expert_usage=usage,
                        expert_weights=weights,
                        missing_experts=sorted({k for one in samples for k in one.missing_experts}),
                        last_resort=any(one.last_resort for one in samples),
                        seconds=time.monotonic() - ticket.admitted,
                        origin=origin,
                    )
                    return
                case Failed(error):
                    raise error

    async def _decode(self, latents: Sequence[Tensor]) -> Pixels:
        """Decode pictures one by one: a codec's last bits depend on the batch.

        Steps of others may come between.
        """
        decode = self._bundle.codec.decode
        with metrics.STAGES.time(stage="decode"):
            return np.concatenate([await self._in(self._computing, decode, one) for one in latents])

    async def _in(
        self, threads: ThreadPoolExecutor, function: Callable[..., Result], *arguments: Any
    ) -> Result:
        return await asyncio.get_running_loop().run_in_executor(threads, function, *arguments)

    # -- Lanes ---------------------------------------------------------------------------------

    def _start_lanes(self) -> None:
        if self._tasks:
            return
        if self._experts is None:
            count = self._num_computations
            lanes = [
                self._run_lane(self._models_asked, self._answer_here, None) for _ in range(count)
            ]
        else:
            limits = self._limits
            lanes = [self._run_lane((ROUTER,), self._answer_here, None)]
            for k, (client, count) in enumerate(zip(self._experts, self._num_lanes, strict=True)):
                # With many lanes, batches wait for one replica until there are more.
                timeout_s = limits.call_timeout_s if count <= 2 else limits.lost_after_s
                lanes += [self._run_lane((k,), client.ask, timeout_s) for _ in range(count)]
        # Not in the context of the request that comes first: Ray would cancel their calls with it.
        self._tasks = [
            asyncio.create_task(task, context=Context()) for task in (*lanes, self._expire())
        ]

    def _count_computations(self, threads: int) -> int:
        """Return how many batches are computed here at a time.

        More than one where there are cores, and experts that are large enough: passes of small ones
        are mostly Python, which threads of a process only take from each other.
        """
        cores = (os.cpu_count() or 1) // threads
        if self._experts is not None or self._bundle.device.type != "cpu" or self._bundle.offload:
            return 1
        return max(1, cores) if self._seconds_of_pass() > SHORT_PASS_S else 1

    def _seconds_of_pass(self) -> float:
        """Return how much processor time of a thread an expert takes for one sample, at best."""
        noise = initial_noise(self._bundle.latent_shape, [0])
        text = KeyedText.of(self._bundle.null_text)
        call = ExpertCall(
            expert=0,
            lora=None,
            latents=noise,
            t=0.5,
            text=text,
            null_text=None,
            guidance_scale=1.0,
        )
        self._models.answer([call])  # loads it, and encodes the text
        seconds = []
        for _ in range(3):
            began = time.thread_time()
            self._models.answer([call])
            seconds.append(time.thread_time() - began)
        return min(seconds)

    async def _answer_here(self, calls: Sequence[Call]) -> list[Tensor]:
        return await self._in(self._computing, compute, self._models.answer, calls)

    async def _run_lane(
        self, models: Collection[int], ask: Answer, timeout_s: float | None
    ) -> None:
        while True:
            batch = await self._next_batch(models)
            metrics.CALLS.observe(batch.waited_s, model=model_label(batch.model), part="wait")
            await self._compute(batch, ask, timeout_s)
            self._wake()

    async def _compute(self, batch: Batch, ask: Answer, timeout_s: float | None) -> None:
        """Give the engine the answers to a batch.

        A batch that fails is computed in halves: only a request that is at fault is over.
        """
        model = model_label(batch.model)
        try:
            with metrics.CALLS.time(model=model, part="answer"):
                async with asyncio.timeout(timeout_s):
                    answers = await ask(batch.calls)
            self._engine.answer(batch, answers, time.monotonic())
        except (RayActorError, ExpertUnavailableError, TimeoutError):
            metrics.CALL_FAILURES.add(model=model)
            self._engine.fail(batch, time.monotonic())
        except OtherVersionError as error:  # its requests begin again, at another Sampler
            self._engine.reject(batch, error, time.monotonic())
        except Exception as error:
            if not (halves := batch.halves()):
                logger.exception("a call of model %d failed", batch.model)
                self._engine.reject(batch, error, time.monotonic())
            for half in halves:  # the model has answered until now, if only with an error
                half_now = replace(half, taken=time.monotonic())
                await self._compute(half_now, ask, timeout_s)

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(EXPIRY_PERIOD_S)
            self._engine.expire(time.monotonic())
            set_levels(self._engine)
            self._wake()

    async def _next_batch(self, models: Collection[int]) -> Batch:
        """Return what waits for some models, as soon as something does."""
        now, loop = time.monotonic(), asyncio.get_running_loop()
        batch = self._engine.take(models, now)
        if batch is not None:
            return batch
        retry_s = self._engine.retry_in(models, now)
        if retry_s is not None:  # something waits for a model that has just failed
            loop.call_later(retry_s, self._wake)
        handed: asyncio.Future[Batch] = loop.create_future()
        self._idle[handed] = models
        return await handed

    def _wake(self) -> None:
        """Hand what waits to the lanes at rest; those that there is nothing for sleep on."""
        now = time.monotonic()
        for handed, models in list(self._idle.items()):
            batch = self._engine.take(models, now)
            if batch is not None:
                del self._idle[handed]
                handed.set_result(batch)


def _num_texts(request: DrawRequest) -> int:
    """Return how many texts of a request are encoded: each once."""
    return len(set(request.prompts))


def _evaluations(request: DrawRequest) -> int:
    """Return how often the velocity of each picture of a request is evaluated."""
    return num_evaluations(request.options.solver, request.options.num_inference_steps)


def _preview_steps(request: DrawRequest) -> list[int]:
    """Return after how many steps of a request its partial images are due, evenly spread."""
    steps, count = _evaluations(request), request.partial_images
    return sorted({steps * (i + 1) // (count + 1) for i in range(count)} - {0})
