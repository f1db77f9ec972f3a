"""What a request passes before anything else looks at it: the edge of Ray's proxy, and the gate.

    client -> edge (around Ray's HTTP proxy) -> gate (in an Ingress replica) -> the routes

The gate is the outermost layer of the application and holds wherever that runs: access, limits,
request ids, security headers, HEAD, one error shape. The edge does what only a layer around Ray's
proxy can: clients do not override the operator's time limit, Ray buffers no long bodies, a request
whose replica died is sent to another, and what Ray answers by itself gets our error shape.
`serve.access.EDGE_VARIABLE` tells Ray of it.
"""

import asyncio
import inspect
import logging
import math
import re
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket
from uvicorn.protocols.http import auto

from serve import metrics
from serve.access import Access
from serve.connection import Connection
from serve.errors import ApiError, as_response, error_of, malformed, too_large, too_many, too_slow
from serve.exchange import Exchange, Replay

logger = logging.getLogger(__name__)
request_log = logging.getLogger("ray.serve")  # the one whose files Serve keeps

MAX_HEAD_BYTES = 16 * 1024  # path, query and headers
MAX_BODY_BYTES = 1024 * 1024
BODY_TIMEOUT_S = 5.0  # for the whole of a body
# Requests that an Ingress replica has at a time. With Ray's default, 5, five slow clients shut out
# everybody. Bodies on their way get half of the places, so that other requests find one.
MAX_ONGOING_REQUESTS = 512
MAX_BODIES = MAX_ONGOING_REQUESTS // 2
MAX_QUEUED_REQUESTS = 512  # that wait in a proxy for a place; beyond that Ray refuses
SAFE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
}
TIMEOUT_HEADER = b"x-request-timeout-seconds"
# By these, too, Ray's proxy does what a client says; it reads them with either separator.
RAYS_HEADERS = (b"x-request-disconnect-disabled", b"x-session-id", b"serve-multiplexed-model-id")
# By this the edge tells an Ingress that another one has died with the request.
SENT_AGAIN_HEADER = b"x-paris-sent-again"
OWN_HEADERS = (*RAYS_HEADERS, SENT_AGAIN_HEADER)  # which no client may send
HEALTH_PATHS = ("/healthz", "/readyz")  # who asks is no burst, and decides what becomes of us
RAYS_ROUTES = "/-/routes"  # tells the names of applications


class ClientGoneError(Exception):
    """The client hung up before its body had arrived."""


class Gate:
    """The outermost ASGI layer of the application.

    Endpoints find `request.state.client`, the `serve.keys.Client` (None on an open route of a
    server with keys), and `request.state.request_id`, which Ray sends back as `X-Request-Id`. What
    they put into `request.state.logged` is in the line that the log has of the request.

    Args:
        app: What comes after.
        find_access: Returns the rule by which this replica answers.
        open_paths: What needs no key: paths and, with a slash at their end, folders.
        cors_origins: The origins whose pages may use the API, such as `https://example.com`.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        find_access: Callable[[], Access],
        open_paths: Sequence[str] = (),
        cors_origins: Sequence[str] = (),
    ) -> None:
        self._app = app
        self._find_access = find_access
        self._open_paths = frozenset(open_paths)
        self._open_folders = tuple(path for path in open_paths if path[1:].endswith("/"))
        self._num_bodies = 0
        self._layers: ASGIApp = self._answer
        if cors_origins:  # outside of the checks: preflights have no key, and pages read refusals
            self._layers = CORSMiddleware(
                self._answer,
                allow_origins=cors_origins,
                allow_methods=["GET", "HEAD", "POST", "DELETE"],
                allow_headers=["Authorization", "Content-Type", "X-Request-Id"],
                # All: none is secret, and without cookies browsers know the asterisk.
                expose_headers=["*"],
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        match scope["type"]:
            case "http":
                request_id = set_request_id(scope)
                scope.setdefault("state", {}).update(request_id=request_id, client=None, logged={})
                exchange = Exchange(receive, send)
                try:
                    await self._layers(scope, exchange.receive, Answer(scope, exchange.send))
                finally:
                    note(scope, exchange)
            case "websocket":
                await refuse_websocket(scope, receive, send)
            case _:  # the application's start and end
                await self._app(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        await answer(self._admit, scope, receive, send)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        check_head(scope)
        client = self._find_access().check(HTTPConnection(scope), is_open=self._is_open(scope))
        scope["state"]["client"] = client
        if has_body(scope):
            receive = await self._collect(scope, receive)
        if scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        await self._app(scope, receive, send)

    def _is_open(self, scope: Scope) -> bool:
        path = route_path(scope)
        return path in self._open_paths or path.startswith(self._open_folders)

    async def _collect(self, scope: Scope, receive: Receive) -> Receive:
        """Wait for the body; return how the application receives it."""
        if self._num_bodies >= MAX_BODIES:
            raise too_many("Too many requests are on their way. Send the request again", 1)
        self._num_bodies += 1
        try:
            body = await read_body(scope, receive)
        finally:
            self._num_bodies -= 1
        return first(body, receive)


class Edge:
    """A layer around Ray's HTTP proxy.

    Args:
        app: The proxy, perhaps in layers of Ray's own.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._limit_s = operators_limit_s(app)
        self._turn = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "websocket":
            await refuse_websocket(scope, receive, send)
            return
        request_id = set_request_id(scope)
        exchange = Exchange(receive, send)
        own = Answer(scope, exchange.send, request_id)
        try:
            await answer(partial(self._pass_on, exchange), scope, exchange.receive, own)
        finally:
            metrics.HTTP.observe(exchange.seconds, status=str(exchange.status))

    async def _pass_on(
        self, exchange: Exchange, scope: Scope, receive: Receive, send: Send
    ) -> None:
        check_head(scope)
        check_length(scope)
        if route_path(scope) == RAYS_ROUTES:
            raise error_of(404)
        if not scope["path"].endswith(HEALTH_PATHS):
            await self._take_turn()
        scope["headers"] = [header for header in scope["headers"] if self._is_allowed(*header)]
        request = Replay(at_most(MAX_BODY_BYTES, receive))

        async def send_on(message: Message) -> None:
            request.forget()  # who has an answer is not sent to another
            await send(message)

        await self._app(dict(scope), request.from_start(), send_on)  # a copy: Ray adds to it
        # Where Ray says nothing, the replica has most likely died. Its requests mean the same to
        # another one: pictures are drawn by their seeds. Once, since they may be what it died of.
        left_s = self._limit_s_of(scope) - exchange.seconds
        if exchange.is_unanswered and left_s > 0:
            id = Headers(scope=scope)["x-request-id"]
            logger.warning("no replica answered request %s, which is sent to another", id)
            limit = (TIMEOUT_HEADER, str(left_s).encode())  # the last one counts
            again = {**scope, "headers": [*scope["headers"], (SENT_AGAIN_HEADER, b"1"), limit]}
            await self._app(again, request.from_start(), send)

    async def _take_turn(self) -> None:
        """Let one request begin at each round of the proxy's loop, in the order of arrival.

        Ray's proxy computes for milliseconds before it waits for a replica. Where hundreds arrive
        at once, whoever comes next would find all of that between any two steps of its own.
        """
        async with self._turn:
            await asyncio.sleep(0)

    def _limit_s_of(self, scope: Scope) -> float:
        """Return the time that a request has: the operator's, or the client's own."""
        return float(dict(scope["headers"]).get(TIMEOUT_HEADER, self._limit_s))

    def _is_allowed(self, name: bytes, value: bytes) -> bool:
        if name != TIMEOUT_HEADER:
            return name.replace(b"_", b"-") not in OWN_HEADERS
        try:
            return 0 < float(value) <= self._limit_s
        except ValueError:
            return False


def edge() -> list[Middleware]:
    """Return the layers that Ray puts around its HTTP proxy; Ray calls this before it starts it."""
    auto.AutoHTTPProtocol = Connection
    return [Middleware(Edge)]


class Answer:
    """A `send` that puts every error into our shape, and adds headers.

    Args:
        scope: The request.
        send: Where the answer goes.
        request_id: What `X-Request-Id` says; None leaves it to others.
    """

    def __init__(self, scope: Scope, send: Send, request_id: str | None = None) -> None:
        self._is_head = scope["method"] == "HEAD"
        self._send = send
        self._request_id = request_id
        self._instead: bytes | None = None  # of the body of an error in another shape

    async def __call__(self, message: Message) -> None:
        """Send one ASGI message."""
        if message["type"] == "http.response.start":
            message = self._start(message)
        elif self._is_head or self._instead is not None:
            if message.get("more_body", False):
                return
            message = {"type": "http.response.body", "body": self._instead or b""}
        await self._send(message)

    def _start(self, message: Message) -> Message:
        status, headers = message["status"], MutableHeaders(raw=list(message["headers"]))
        if status >= 400 and not headers.get("content-type", "").startswith("application/json"):
            response = as_response(error_of(status))
            if "retry-after" in headers:
                response.headers["retry-after"] = headers["retry-after"]
            self._instead = b"" if self._is_head else bytes(response.body)
            headers = response.headers
        for name, value in SECURITY_HEADERS.items():
            headers.setdefault(name, value)
        if self._request_id is not None:
            headers["x-request-id"] = self._request_id
        return {**message, "headers": headers.raw}


def note(scope: Scope, exchange: Exchange) -> None:
    """Count a request that is over, and log it: who, what and how long, never what was asked for.

    Serve adds the request's id, its route and the replica, and writes the line as JSON.
    """
    state, status = scope["state"], exchange.status
    metrics.INGRESS.observe(exchange.seconds, status=str(status))
    fields = {
        "method": scope["method"],
        "status": status,
        "seconds": round(exchange.seconds, 4),
        "client": None if state["client"] is None else state["client"].name,
        **state["logged"],
    }
    request_log.info("%s %d", scope["method"], status, extra=fields)


async def answer(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Let an application answer; where it refuses, fails or says nothing, answer in its place."""
    started = False

    async def watch(message: Message) -> None:
        nonlocal started
        started = True
        await send(message)

    try:
        await app(scope, receive, watch)
        error = error_of(503)  # it said nothing: the replicas that had the request are gone
    except ClientGoneError:
        return
    except ApiError as refusal:
        error = refusal
    except Exception:
        if started:
            raise
        logger.exception("%s %s failed", scope["method"], route_path(scope))
        error = error_of(500)
    if not started:
        response = as_response(error)
        if has_body(scope):  # perhaps it is still to come: not read as the next request
            response.headers["connection"] = "close"
        await response(scope, receive, send)


async def refuse_websocket(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request for a web socket; there are none."""
    await WebSocket(scope, receive, send).send_denial_response(as_response(error_of(404)))


def route_path(scope: Scope) -> str:
    """Return the path within the application."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", "")) or "/"


def set_request_id(scope: Scope) -> str:
    """Return the request's id: the client's if it is short and plain, else one of ours.

    Ray and the endpoints find it in the header; Ray fails on one that is not UTF-8.
    """
    headers = MutableHeaders(scope=scope)
    given = headers.get("x-request-id", "")
    headers["x-request-id"] = given if SAFE_ID.fullmatch(given) else uuid.uuid4().hex
    return headers["x-request-id"]


def check_head(scope: Scope) -> None:
    """Refuse a request whose path, query and headers are too long together.

    Raises:
        ApiError: with status 431.
    """
    size = len(scope.get("raw_path") or b"") + len(scope["query_string"])
    size += sum(len(name) + len(value) for name, value in scope["headers"])
    if size > MAX_HEAD_BYTES:
        message = f"Path, query and headers have {size} bytes; allowed are {MAX_HEAD_BYTES}"
        raise too_large(message, status=431, code="headers_too_large")


def check_length(scope: Scope) -> None:
    """Refuse a request that says that its body is too long.

    Raises:
        ApiError: with status 413, or 400 where it says no number.
    """
    length = Headers(scope=scope).get("content-length", "0")
    if not (length.isascii() and length.isdigit()):
        raise malformed("Content-Length is not a number")
    if len(length) > 18 or int(length) > MAX_BODY_BYTES:
        raise _body_too_large()


def has_body(scope: Scope) -> bool:
    """Return whether a body comes after the head of a request."""
    headers = Headers(scope=scope)
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"


async def read_body(scope: Scope, receive: Receive) -> bytes:
    """Return the body of a request.

    Raises:
        ApiError: 413 if it is too long, where possible before a byte of it is read; 408 if it has
            not arrived in BODY_TIMEOUT_S.
        ClientGoneError: if it never will.
    """
    check_length(scope)
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError
                body += message.get("body", b"")
                if len(body) > MAX_BODY_BYTES:
                    raise _body_too_large()
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        raise too_slow(f"The body did not arrive within {BODY_TIMEOUT_S:g} s") from None


def first(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives a whole body, and then what follows it."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_body_first() -> Message:
        return messages.pop() if messages else await receive()

    return receive_body_first


def at_most(limit: int, receive: Receive) -> Receive:
    """Return a `receive` that reads no further once a body is longer than the limit.

    Ray's proxy buffers all that comes, whether or not the replica asks for it; the gate refuses
    what is longer, so nobody needs the rest.
    """
    left = limit

    async def receive_within() -> Message:
        nonlocal left
        if left < 0:
            await asyncio.Event().wait()  # until Ray stops asking, when the answer is sent
        message = await receive()
        left -= len(message.get("body", b""))
        return message

    return receive_within


def operators_limit_s(app: ASGIApp) -> float:
    """Return the time limit of what is inside of Ray's layers: `request_timeout_s`.

    That is Ray's proxy or, in HAProxy mode and with direct ingress, a replica's own server.
    """
    layer: Any = app
    while not (hasattr(layer, "request_timeout_s") or inspect.ismethod(layer)):
        layer = layer._app  # as Ray's layers keep the next one
    if inspect.ismethod(layer):
        layer = layer.__self__._http_options  # type: ignore[attr-defined]
    limit_s: float | None = layer.request_timeout_s
    return math.inf if limit_s is None else limit_s


def _body_too_large() -> ApiError:
    message = f"The body is too long; allowed are {MAX_BODY_BYTES} bytes"
    return too_large(message, status=413, code="body_too_large")
