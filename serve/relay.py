"""The Samplers as the Ingress sees them: it asks one, and another when that one dies."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, TypeVar

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from paris_ray.errors import DeadlineError, ExpertsLostError, ParisError, QueueFullError
from serve import metrics
from serve.drawing import (
    Drawing,
    DrawRequest,
    ExpertUnavailableError,
    OtherOriginError,
    OtherVersionError,
    Partial,
    RequestCancelledError,
)
from serve.errors import ApiError, failed, retry_after, too_slow, unavailable
from serve.schemas import ErrorDetail

logger = logging.getLogger(__name__)
RESEND_PAUSE_S = 0.2
CANCEL_TIMEOUT_S = 5
Answer = TypeVar("Answer")
CANCELLED = 499  # as nginx has it; unlike 408, 409 or 5xx, client libraries do not send it again
OUTCOMES = {408: "late", 429: "refused", CANCELLED: "cancelled", 503: "unavailable"}


class _Errand:
    """A request on its way to some Sampler.

    Attributes:
        again: Whether a Sampler has died with it.

    Args:
        request: The request.
    """

    def __init__(self, request: DrawRequest) -> None:
        self._request, self._deadline = request, time.monotonic() + request.timeout_s
        self.again = False
        self._is_cancelled = False
        self._waiting: asyncio.Timeout | None = None

    def rest(self) -> DrawRequest:
        """Return the request with the time that is left for it."""
        return replace(self._request, timeout_s=self._left())

    async def wait(self, answer: Awaitable[Answer]) -> Answer:
        """Return an answer.

        Raises:
            DeadlineError, TimeoutError: if the request's time is over.
            RequestCancelledError: if `cancel` was called.
        """
        try:
            async with asyncio.timeout(0 if self._is_cancelled else self._left()) as self._waiting:
                return await answer
        except TimeoutError:
            if self._is_cancelled:
                raise RequestCancelledError(0) from None
            raise
        finally:
            self._waiting = None

    def cancel(self) -> None:
        """Wait no longer."""
        self._is_cancelled = True
        if self._waiting is not None:
            with suppress(RuntimeError):  # its time is over at this very moment
                self._waiting.reschedule(asyncio.get_running_loop().time())

    def _left(self) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise DeadlineError
        return left


class Samplers:
    """Draws through the handle of the Sampler.

    A request that a Sampler died with is sent again as it is until its time is over: its seeds make
    the same pictures. So is one whose Sampler found experts of another bundle, since it would have
    mixed two: the next one draws all of it.

    Args:
        handle: Of the Sampler.
        ingresses: Of the deployment that this is a part of: the others have requests, too.
    """

    def __init__(self, handle: DeploymentHandle[Any], ingresses: DeploymentHandle[Any]) -> None:
        self._handle, self._ingresses = handle, ingresses
        self._errands: dict[tuple[str, str], list[_Errand]] = {}

    async def draw(self, request: DrawRequest) -> Drawing:
        """Return the pictures of a request.

        Raises:
            ApiError: 408, 429, 499 or 503.
        """
        with self._errand(request) as errand, _Asking() as asking, _errors_for_clients():
            while True:
                reply = self._handle.draw.remote(errand.rest())
                try:
                    return asking.drawn(await errand.wait(reply))
                except (RayActorError, OtherVersionError):
                    errand.again = True
                    metrics.RESENDS.add()
                except QueueFullError:
                    if not errand.again:  # else it was admitted, and waits for room
                        raise
                except (RequestCancelledError, TimeoutError):
                    reply.cancel()  # perhaps it still waits for a Sampler
                    raise
                await errand.wait(asyncio.sleep(RESEND_PAUSE_S))

    async def stream(self, request: DrawRequest) -> AsyncIterator[Partial | Drawing]:
        """Yield unfinished pictures of a request, each once, and in the end the pictures.

        Raises:
            ApiError: as `draw`.
        """
        sent: set[tuple[int, int]] = set()
        with self._errand(request) as errand, _Asking() as asking, _errors_for_clients():
            while True:
                try:
                    async for message in self._stream_once(errand):
                        if isinstance(message, Drawing):
                            yield asking.drawn(message)
                            return
                        if (place := (message.picture, message.index)) not in sent:
                            sent.add(place)
                            yield message
                except (RayActorError, OtherVersionError):
                    errand.again = True
                    metrics.RESENDS.add()
                except QueueFullError:
                    if not errand.again:
                        raise
                await errand.wait(asyncio.sleep(RESEND_PAUSE_S))

    async def _stream_once(self, errand: _Errand) -> AsyncIterator[Partial | Drawing]:
        replies: Any = self._handle.options(stream=True).stream.remote(errand.rest())
        try:
            while True:
                try:
                    yield await errand.wait(anext(replies))
                except StopAsyncIteration:
                    return
        finally:
            replies.cancel()

    @contextmanager
    def _errand(self, request: DrawRequest) -> Iterator[_Errand]:
        key, errand = (request.client, request.id), _Errand(request)
        self._errands.setdefault(key, []).append(errand)
        try:
            yield errand
        finally:
            self._errands[key].remove(errand)
            if not self._errands[key]:
                del self._errands[key]

    async def cancel(self, client: str, request_id: str) -> int | None:
        """End a request wherever it is drawn.

        Returns:
            After how many evaluations it stopped; None if nobody has it.

        Raises:
            ApiError: 503, if none has it but one did not answer.
        """
        answers = await _ask_all(self._handle, "cancel", client, request_id)
        steps = [answer for answer in answers if isinstance(answer, int)]
        if steps:
            return max(steps)
        is_unsure = any(isinstance(answer, BaseException) for answer in answers)
        if True in await _ask_all(self._ingresses, "cancel_between", client, request_id, is_unsure):
            return 0
        if is_unsure:
            raise unavailable("A Sampler did not answer. Send the request again")
        return None

    def cancel_between(self, client: str, request_id: str, is_unsure: bool) -> bool:
        """End a request that no Sampler has; say if there was one.

        Args:
            client: Whose it is.
            request_id: What it is called.
            is_unsure: Whether a Sampler did not answer, or there is none at the moment. Otherwise
                only requests whose Sampler has died wait for another.
        """
        errands = self._errands.get((client, request_id), [])
        found = [errand for errand in errands if errand.again or is_unsure]
        for errand in found:
            errand.cancel()
        return bool(found)

    async def check_health(self, timeout_s: float) -> None:
        """Return when a Sampler has answered, and so has loaded its parts.

        Raises:
            ApiError: 503, if none does in time.
        """
        await self._ask("check_health", timeout_s)

    async def state(self, timeout_s: float) -> dict[str, Any]:
        """Return what a Sampler says of itself, see `Sampler.state`; raises as `check_health`."""
        state: dict[str, Any] = await self._ask("state", timeout_s)
        return state

    async def _ask(self, method: str, timeout_s: float) -> Any:
        try:
            return await asyncio.wait_for(getattr(self._handle, method).remote(), timeout_s)
        except (TimeoutError, RayActorError, BackPressureError, DeploymentUnavailableError):
            raise unavailable("The model is not loaded. Ask again") from None


class _Asking:
    """A request for pictures under way; what comes of it is counted when it ends."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._outcome: str | None = None

    def __enter__(self) -> "_Asking":
        return self

    def drawn(self, drawing: Drawing) -> Drawing:
        """Return the pictures, which have arrived."""
        self._outcome = "degraded" if drawing.missing_experts else "drawn"
        elsewhere = time.monotonic() - self._began - drawing.seconds
        metrics.STAGES.observe(elsewhere, stage="transport")
        return drawing

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        metrics.DRAWINGS.add(outcome=self._outcome or _outcome(error))


def _outcome(error: BaseException | None) -> str:
    if isinstance(error, ApiError):
        return OUTCOMES.get(error.status, "failed")
    if isinstance(error, asyncio.CancelledError | GeneratorExit):  # the client hung up
        return "cancelled"
    return "failed"


async def _ask_all(handle: DeploymentHandle[Any], method: str, *arguments: Any) -> list[Any]:
    """Return what each replica of a deployment answers, or its error; an error if there is none."""
    try:
        replies = handle.broadcast(method, *arguments)
        answers: list[Any] = await replies.results_async(
            timeout_s=CANCEL_TIMEOUT_S, return_exceptions=True
        )
        return answers
    except (TimeoutError, DeploymentUnavailableError) as error:
        return [error]


@contextmanager
def _errors_for_clients() -> Iterator[None]:
    """Turn what can go wrong with a drawing into what clients are told; nothing internal is."""
    try:
        yield
    except QueueFullError as error:
        raise _queue_full(error.reason, error.position, error.retry_after_s) from error
    except BackPressureError as error:
        raise _queue_full("the Samplers are busy", None, 1) from error
    except (DeadlineError, TimeoutError) as error:
        refusal = too_slow("The pictures were not finished in the time that a request has")
        # What did not fit once would not fit again: OpenAI's clients obey this header.
        raise ApiError(refusal.status, refusal.detail, {"x-should-retry": "false"}) from error
    except RequestCancelledError as error:
        message = f"The request was cancelled after {error.step} steps"
        detail = ErrorDetail(message=message, type="cancelled_error", code="cancelled")
        raise ApiError(CANCELLED, detail) from error
    except (
        ExpertsLostError,
        ExpertUnavailableError,
        DeploymentUnavailableError,
        OtherOriginError,
    ) as error:
        message = "A part of the model is being replaced. Send the request again"
        raise unavailable(message) from error
    except ParisError as error:  # a Sampler's own, of which Ray made a traceback: not the client's
        logger.exception("a Sampler failed")
        raise failed() from error


def _queue_full(reason: str, position: int | None, retry_after_s: float) -> ApiError:
    headers = retry_after(retry_after_s)
    message = f"There is no room for the request now: {reason}. Send it again after Retry-After"
    if position is not None:
        headers["X-Paris-Queue-Position"] = str(position)
    detail = ErrorDetail(message=message, type="rate_limit_error", code="queue_full")
    return ApiError(429, detail, headers)
