"""The page and its answers over HTTP: only known routes, and nothing that a client names is opened.

Whoever has no key is answered on this machine alone. Answers carry the digest of what they say, so
that a page which asks again and finds nothing new moves a few bytes.
"""

import hmac
import json
import logging
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import resources
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from paris_ray.api_keys import Key, digest_of
from paris_ray.artifacts import sha256_hex
from paris_ray.errors import ConfigError, ParisError
from paris_ray.loopback import is_loopback, why_not_local
from paris_ray.watching.connection import Connection
from paris_ray.watching.facts import differences
from paris_ray.watching.models import WatchedModel
from paris_ray.watching.runs import WatchedRun

logger = logging.getLogger(__name__)

MAX_RUNS = 2
MAX_CONNECTIONS = 64
PAGE = {"/": "index.html", "/watch.js": "watch.js", "/watch.css": "watch.css"}
TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css"}
# What browsers say of requests that no other page has sent. Others could not read the answers, but
# keep the server busy while their visitor looks at them.
OWN_PAGE = ("same-origin", "none")
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "private, no-cache",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
}


def watch_app(runs: Sequence[WatchedRun], keys: Sequence[Key] | None) -> ASGIApp:
    """Return the application.

    Args:
        runs: One run, or two to be compared.
        keys: Whoever has one of them is answered; None: this machine alone is.
    """
    by_number = {str(number): run for number, run in enumerate(runs)}
    routes = [
        *(Route(path, _page(name)) for path, name in PAGE.items()),
        Route("/api/state", lambda request: _json(request, _state(runs))),
        Route("/api/differences", lambda request: _json(request, _differences(runs))),
        Route("/api/runs/{run}/clusters", _of_run(by_number, WatchedRun.clusters)),
        Route("/api/runs/{run}/router", _of_run(by_number, WatchedRun.router)),
        Route("/api/runs/{run}/curves/{model}", _of_model(by_number, _curves)),
        Route("/api/runs/{run}/captions/{model}", _of_model(by_number, _captions)),
        Route("/api/runs/{run}/grids/{model}/{grid}", _of_model(by_number, _grid)),
        Route("/api/runs/{run}/grids/{model}/{grid}/small", _of_model(by_number, _small_grid)),
    ]
    handlers = {HTTPException: _refused, ParisError: _unreadable}
    return Gate(Starlette(routes=routes, exception_handlers=handlers), keys)  # type: ignore[arg-type]


class Gate:
    """The outermost layer: who is answered, and the headers of every answer.

    Args:
        app: What answers.
        keys: See `watch_app`.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[Key] | None) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or refuse it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = [(n.lower().encode(), v.encode()) for n, v in SECURITY_HEADERS.items()]
                message["headers"] = [*message["headers"], *added]
            await send(message)

        refusal = self._refusal(HTTPConnection(scope))
        await (refusal or self._app)(scope, receive, send_with_headers)

    def _refusal(self, connection: HTTPConnection) -> Response | None:
        # Of the request alone: an address that Starlette puts together has the Host header in it.
        is_page = connection.scope["path"] in PAGE
        if self._keys is None:
            client = connection.client.host if connection.client else ""
            version = connection.scope["http_version"]
            reason = why_not_local(client, connection.headers, version)
            if reason is not None:
                message = f"Without --api-key-file only this machine is answered ({reason})"
                return JSONResponse({"error": message}, 403)
            if is_page or connection.headers.get("sec-fetch-site", "none") in OWN_PAGE:
                return None
            return JSONResponse({"error": "Only the page of this server may ask"}, 403)
        if is_page or self._holds_key(connection):
            return None
        headers = {"WWW-Authenticate": "Bearer"}
        message = "Send the API key as 'Authorization: Bearer KEY'"
        return JSONResponse({"error": message}, 401, headers)

    def _holds_key(self, connection: HTTPConnection) -> bool:
        scheme, _, secret = connection.headers.get("authorization", "").partition(" ")
        digest, found = digest_of(secret), False
        for key in self._keys or ():  # all of them, each in constant time: the delay tells nothing
            found |= hmac.compare_digest(key.sha256, digest)
        return found and scheme.lower() == "bearer"


def _page(name: str) -> Callable[[Request], Response]:
    payload = (resources.files("paris_ray.watching") / "web" / name).read_bytes()
    media_type = TYPES[name.rpartition(".")[2]]
    return lambda request: _answer(request, payload, media_type)


def _of_run(
    runs: Mapping[str, WatchedRun], tell: Callable[[WatchedRun], Mapping[str, Any]]
) -> Callable[[Request], Response]:
    return lambda request: _json(request, tell(_run(runs, request)))


def _of_model(
    runs: Mapping[str, WatchedRun], answer: Callable[[Request, WatchedRun, WatchedModel], Response]
) -> Callable[[Request], Response]:
    def endpoint(request: Request) -> Response:
        run = _run(runs, request)
        model = run.model(request.path_params["model"])
        if model is None:
            raise HTTPException(404, "there is no such model")
        return answer(request, run, model)

    return endpoint


def _run(runs: Mapping[str, WatchedRun], request: Request) -> WatchedRun:
    run = runs.get(request.path_params["run"])
    if run is None:
        raise HTTPException(404, "there is no such run")
    return run


def _state(runs: Sequence[WatchedRun]) -> dict[str, Any]:
    return {"runs": [run.overview() for run in runs]}


def _differences(runs: Sequence[WatchedRun]) -> dict[str, Any]:
    settings = [run.settings() for run in runs]
    return {"differences": differences(*settings) if len(settings) == MAX_RUNS else []}


def _curves(request: Request, run: WatchedRun, model: WatchedModel) -> Response:
    return _json(request, run.curves(model))


def _captions(request: Request, run: WatchedRun, model: WatchedModel) -> Response:
    return _json(request, {"captions": run.captions(model.place)})


def _grid(request: Request, run: WatchedRun, model: WatchedModel) -> Response:
    return _picture(request, run.grid(model, request.path_params["grid"], small=False))


def _small_grid(request: Request, run: WatchedRun, model: WatchedModel) -> Response:
    return _picture(request, run.grid(model, request.path_params["grid"], small=True))


def _picture(request: Request, payload: bytes | None) -> Response:
    if payload is None:
        raise HTTPException(404, "there is no such grid")
    return _answer(request, payload, "image/png")


def _json(request: Request, value: Mapping[str, Any]) -> Response:
    payload = json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
    return _answer(request, payload, "application/json")


def _answer(request: Request, payload: bytes, media_type: str) -> Response:
    """Return an answer, or that it is the one that the page has."""
    tag = f'"{sha256_hex(payload)[:32]}"'
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers={"ETag": tag})
    return Response(payload, media_type=media_type, headers={"ETag": tag})


def _refused(_request: Request, error: HTTPException) -> Response:
    return JSONResponse({"error": error.detail}, error.status_code)


def _unreadable(_request: Request, error: ParisError) -> Response:
    logger.warning("%s", error)
    return JSONResponse({"error": str(error)}, 503)


def listen(host: str, port: int | None, *, keyless: bool, usual_port: int) -> socket.socket:
    """Return a socket to serve on.

    Args:
        host: Name or address of an interface of this machine.
        port: Which port; None: the usual one or, where that is taken, any.
        keyless: Whether there are no keys.
        usual_port: The usual one.

    Raises:
        ConfigError: if it cannot be had, or others could reach a server without keys.
    """
    if keyless and not is_loopback(host):
        raise ConfigError(
            f"--host={host!r} is not allowed without --api-key-file: only 127.0.0.1, ::1 or "
            "localhost. Make a key: python -m jobs.new_key NAME --file keys.yaml"
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for candidate in (usual_port, 0) if port is None else (port,):
        try:
            return socket.create_server((host, candidate), family=family)
        except (OSError, OverflowError, TypeError) as error:  # the last of no name of a host
            problem = error
    raise ConfigError(f"--host={host!r} --port={port} cannot be listened on: {problem}")


def server_of(app: ASGIApp) -> uvicorn.Server:
    """Return what serves an application: few connections, none of which waits for long."""
    config = uvicorn.Config(
        app,
        http=Connection,
        log_level="warning",
        limit_concurrency=MAX_CONNECTIONS,
        server_header=False,
        proxy_headers=False,
        ws="none",
    )
    return uvicorn.Server(config)


def serve(app: ASGIApp, listener: socket.socket) -> None:
    """Answer until the process is interrupted, which returns after Ctrl-C."""
    with suppress(KeyboardInterrupt):  # which uvicorn raises again when it has ended
        server_of(app).run(sockets=[listener])
