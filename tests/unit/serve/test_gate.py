"""The gate and the edge as plain ASGI: no Ray, no sockets, a clock where seconds matter."""

import asyncio
import json
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http import auto

from paris_ray.errors import ConfigError
from paris_ray.loopback import is_loopback
from serve import gate
from serve.access import Access, Frontage
from serve.connection import Connection
from serve.errors import too_many
from serve.gate import MAX_BODIES, MAX_BODY_BYTES, MAX_HEAD_BYTES, Edge, Gate, at_most, edge
from serve.keys import LOCAL

Headers = Sequence[tuple[bytes, bytes]]
JSON = (b"content-type", b"application/json")
LOCALHOST = (b"host", b"localhost:8000")


class Application:
    """What stands behind the gate: it keeps what it was given, and answers as it is told."""

    def __init__(self, status: int = 200, headers: Headers = (JSON,), body: bytes = b"{}") -> None:
        self.answer = status, headers, body
        self.requests: list[Scope] = []
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.requests.append(scope)
        message = await receive()
        self.bodies.append(message.get("body", b""))
        assert not message.get("more_body", False)
        status, headers, body = self.answer
        await send({"type": "http.response.start", "status": status, "headers": list(headers)})
        await send({"type": "http.response.body", "body": body})


@dataclass
class Reply:
    messages: list[Message] = field(default_factory=list)
    received: int = 0  # how often the body was asked for

    @property
    def status(self) -> int:
        return int(self.messages[0]["status"])

    @property
    def headers(self) -> dict[str, str]:
        pairs = [(n.decode(), v.decode()) for n, v in self.messages[0]["headers"]]
        assert len(dict(pairs)) == len(pairs), f"a header is there twice: {pairs}"
        return dict(pairs)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages[1:])

    @property
    def error(self) -> dict[str, Any]:
        assert self.headers["content-type"] == "application/json"
        (error,) = json.loads(self.body).values()
        assert set(error) == {"message", "type", "param", "code"}
        return error


def scope_of(
    path: str = "/v1/models", method: str = "GET", headers: Headers = (LOCALHOST,), **other: object
) -> Scope:
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "client": ("127.0.0.1", 50000),
        "headers": list(headers),
    }
    return scope | other


async def ask_async(app: ASGIApp, scope: Scope, chunks: Sequence[bytes] = ()) -> Reply:
    """Send a request whose body comes in chunks; without any it is announced and never comes."""
    reply = Reply()
    waiting = [
        {"type": "http.request", "body": chunk, "more_body": i + 1 < len(chunks)}
        for i, chunk in enumerate(chunks)
    ]
    if not gate.has_body(scope):
        waiting = [{"type": "http.request", "body": b"", "more_body": False}]

    async def receive() -> Message:
        reply.received += 1
        if not waiting:
            await asyncio.Event().wait()
        return waiting.pop(0)

    async def send(message: Message) -> None:
        reply.messages.append(message)

    await app(scope, receive, send)
    return reply


def ask(app: ASGIApp, scope: Scope, chunks: Sequence[bytes] = ()) -> Reply:
    return asyncio.run(ask_async(app, scope, chunks))


def keyless(app: ASGIApp, **options: Any) -> Gate:
    access = Access(None)
    return Gate(app, find_access=lambda: access, **options)


@pytest.fixture
def keyed(tmp_path: Path) -> Callable[..., Gate]:
    def build(app: ASGIApp, **options: Any) -> Gate:
        (tmp_path / "key").write_text("s3cret")
        access = Access(str(tmp_path / "key"))
        return Gate(app, find_access=lambda: access, open_paths=("/", "/healthz", "/f/"), **options)

    return build


def post(*headers: tuple[bytes, bytes], length: int | None = None) -> Scope:
    size = [] if length is None else [(b"content-length", str(length).encode())]
    return scope_of("/v1/x", "POST", [LOCALHOST, *size, *headers])


def test_a_body_is_handed_on_whole() -> None:
    app = Application()
    assert ask(keyless(app), post(length=6), [b"abc", b"", b"def"]).status == 200
    assert app.bodies == [b"abcdef"]


CHUNKED = (b"transfer-encoding", b"chunked")


@given(st.lists(st.integers(0, MAX_BODY_BYTES // 2), min_size=1, max_size=8))
def test_a_chunked_body_is_handed_on_whole_or_refused(sizes: list[int]) -> None:
    app = Application()
    reply = ask(keyless(app), post(CHUNKED), [b"x" * size for size in sizes])
    if sum(sizes) <= MAX_BODY_BYTES:
        assert (reply.status, len(app.bodies[0])) == (200, sum(sizes))
    else:
        assert (reply.status, reply.error["code"]) == (413, "body_too_large")
        assert reply.headers["connection"] == "close"
        assert not app.requests


def test_a_length_beyond_the_cap_is_refused_unread() -> None:
    app = Application()
    for length in (MAX_BODY_BYTES + 1, 10**30):
        reply = ask(keyless(app), post(length=length), [b"x"])
        assert (reply.status, reply.error["code"], reply.received) == (413, "body_too_large", 0)
    assert ask(keyless(app), post(length=MAX_BODY_BYTES), [b"x" * MAX_BODY_BYTES]).status == 200
    assert len(app.requests) == 1


@pytest.mark.parametrize("length", [b"", b"-1", b"1e3", b"\xb2", b"0x10"])
def test_a_length_that_is_no_number_is_refused(length: bytes) -> None:
    reply = ask(keyless(Application()), post((b"content-length", length)), [b"x"])
    assert (reply.status, reply.error["code"], reply.received) == (400, "malformed_request", 0)


def test_a_body_that_does_not_come_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "BODY_TIMEOUT_S", 0.01)
    app = Application()
    reply = ask(keyless(app), post(length=5))
    assert (reply.status, reply.error["type"]) == (408, "timeout_error")
    assert reply.headers["connection"] == "close"
    assert not app.requests


def test_half_sent_bodies_take_half_of_the_places_at_most() -> None:
    async def flood() -> list[Reply]:
        app = keyless(Application())
        slow = [asyncio.create_task(ask_async(app, post(length=5))) for _ in range(MAX_BODIES)]
        await asyncio.sleep(0)
        replies = [await ask_async(app, post(length=1), [b"x"])]
        replies.append(await ask_async(app, scope_of("/healthz")))
        for task in slow:
            task.cancel()
        await asyncio.wait(slow)
        return [*replies, await ask_async(app, post(length=1), [b"x"])]

    one_more, cheap, later = asyncio.run(flood())
    assert (one_more.status, one_more.error["code"]) == (429, "rate_limit_exceeded")
    assert one_more.headers["retry-after"] == "1"
    assert (cheap.status, later.status) == (200, 200)


def test_nothing_is_answered_to_a_client_that_hung_up() -> None:
    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        raise AssertionError(message)

    app = Application()
    asyncio.run(keyless(app)(post(length=5), receive, send))
    assert not app.requests


def test_heads_that_are_too_long_are_refused() -> None:
    for scope in (
        scope_of(headers=[LOCALHOST, (b"x", b"y" * MAX_HEAD_BYTES)]),
        scope_of(headers=[LOCALHOST, *[(b"a", b"b")] * MAX_HEAD_BYTES]),
        scope_of("/" + "x" * MAX_HEAD_BYTES),
        scope_of(query_string=b"x" * MAX_HEAD_BYTES),
    ):
        for app in (keyless(Application()), Edge(Proxy(Application()))):
            reply = ask(app, scope | {"headers": list(scope["headers"])})
            assert (reply.status, reply.error["code"]) == (431, "headers_too_large")


PROXIED = [
    (b"x-forwarded-for", b"127.0.0.1"),
    (b"x-forwarded-proto", b"https"),
    (b"forwarded", b"for=127.0.0.1"),
    (b"via", b"1.1 proxy"),
    (b"x-real-ip", b"127.0.0.1"),
]


@pytest.mark.parametrize("header", PROXIED)
def test_without_keys_whoever_speaks_for_others_is_refused(header: tuple[bytes, bytes]) -> None:
    app = Application()
    reply = ask(keyless(app), scope_of("/", "POST", [LOCALHOST, header, CHUNKED]), [b"x"])
    assert (reply.status, reply.error["type"], reply.received) == (403, "permission_error", 0)
    assert not app.requests


@pytest.mark.parametrize(
    "other",
    [
        {"headers": [(b"host", b"evil.example")]},
        {"headers": [(b"host", b"localhost.evil.example")]},
        {"headers": [(b"host", b"[")]},
        {"headers": []},
        {"client": ("192.0.2.1", 1)},
        {"client": None},
        {"http_version": "1.0"},  # as nginx speaks to what is behind it
    ],
)
def test_without_keys_only_this_machine_is_answered(other: dict[str, Any]) -> None:
    for path in ("/", "/healthz", "/v1/models", "/openapi.json"):
        assert ask(keyless(Application()), scope_of(path) | other).status == 403


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:8000", "[::1]:8000", "127.1.2.3"])
def test_without_keys_this_machine_is_answered(host: str) -> None:
    app = Application()
    assert ask(keyless(app), scope_of(headers=[(b"host", host.encode())])).status == 200
    assert app.requests[0]["state"]["client"] == LOCAL


@pytest.mark.parametrize("host", ["", "0.0.0.0", "192.0.2.1", "localhost.evil.example", "::2", "1"])
def test_other_hosts_are_not_this_machine(host: str) -> None:
    assert not is_loopback(host)


def test_with_keys_only_their_holders_are_answered(keyed: Callable[..., Gate]) -> None:
    app = Application()
    strangers = [
        b"",
        b"Bearer",
        b"Bearer wrong",
        b"Basic s3cret",
        b"Bearer \xff",
        b"Bearer s3cret ",
    ]
    for value in strangers:
        head = post((b"authorization", value), length=5)
        reply = ask(keyed(app), head, [b"12345"])
        assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")
        assert (reply.received, reply.headers["www-authenticate"]) == (0, "Bearer")
    assert not app.requests
    far = {"client": ("192.0.2.1", 1), "http_version": "1.0"}
    good = [(b"host", b"pictures.example"), (b"authorization", b"bearer s3cret"), *PROXIED]
    assert ask(keyed(app), scope_of("/v1/models", "GET", good) | far).status == 200
    assert app.requests[0]["state"]["client"].name == "api_key"


def test_open_paths_need_no_key(keyed: Callable[..., Gate]) -> None:
    app = Application()
    for path in ("/", "/healthz", "/f/x.png", "/f/"):
        assert ask(keyed(app), scope_of(path)).status == 200
        assert ask(keyed(app), scope_of("/p" + path, root_path="/p")).status == 200
    assert {request["state"]["client"] for request in app.requests} == {None}
    for path in ("/f", "/healthz/", "//healthz", "/v1/models", "/x", "/healthz/../v1/models"):
        assert ask(keyed(app), scope_of(path)).status == 401


def test_head_is_get_without_a_body() -> None:
    app = Application(body=b"12345")
    reply = ask(keyless(app), scope_of(method="HEAD"))
    assert (app.requests[0]["method"], reply.status, reply.body) == ("GET", 200, b"")
    missing = Application(404, [(b"content-type", b"text/plain")], b"no")
    reply = ask(keyless(missing), scope_of(method="HEAD"))
    assert (reply.status, reply.body) == (404, b"")


@pytest.mark.parametrize("given_id", [b"abc-1.2_3", b"x" * 64])
def test_a_plain_request_id_is_kept(given_id: bytes) -> None:
    app = Application()
    scope = scope_of(headers=[LOCALHOST, (b"x-request-id", given_id)])
    reply = ask(Edge(Proxy(keyless(app))), scope)
    assert reply.headers["x-request-id"] == app.requests[0]["state"]["request_id"]
    assert reply.headers["x-request-id"].encode() == given_id


@pytest.mark.parametrize("given_id", [b"", b"x" * 65, b"\xff", b"a b", b"a\r\nb", b"<b>"])
def test_another_request_id_is_replaced(given_id: bytes) -> None:
    app = Application()
    scope = scope_of(headers=[LOCALHOST, (b"x-request-id", given_id), (b"x-request-id", b"2")])
    reply = ask(Edge(Proxy(keyless(app))), scope)
    ours = reply.headers["x-request-id"]
    assert (len(ours), ours) == (32, app.requests[0]["state"]["request_id"])
    assert [v for n, v in app.requests[0]["headers"] if n == b"x-request-id"] == [ours.encode()]


def test_answers_have_security_headers_and_may_bring_their_own() -> None:
    own = (b"content-security-policy", b"default-src 'none'")
    reply = ask(keyless(Application(headers=[JSON, own])), scope_of())
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert reply.headers["content-security-policy"] == "default-src 'none'"
    reply = ask(keyless(Application()), scope_of(headers=[]))
    assert reply.status == 403
    policy = reply.headers["content-security-policy"]
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy


def test_a_bug_is_not_shown() -> None:
    async def broken(*_: object) -> None:
        raise RuntimeError("secret")

    for app in (keyless(broken), Edge(Proxy(broken))):
        reply = ask(app, scope_of())
        assert (reply.status, reply.error["type"]) == (500, "server_error")
        assert b"secret" not in reply.body


def test_a_bug_after_the_answers_start_is_raised() -> None:
    async def broken(_: Scope, __: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("late")

    with pytest.raises(RuntimeError, match="late"):
        ask(keyless(broken), scope_of())


def preflight(origin: bytes) -> Scope:
    asks = (b"access-control-request-method", b"POST")
    return scope_of("/v1/x", "OPTIONS", [LOCALHOST, (b"origin", origin), asks])


def test_other_origins_are_told_nothing_by_default(keyed: Callable[..., Gate]) -> None:
    reply = ask(keyed(Application()), preflight(b"https://a.example"))
    assert reply.status == 401
    assert not [name for name in reply.headers if name.startswith("access-control")]


def test_configured_origins_may_use_the_api(keyed: Callable[..., Gate]) -> None:
    app = keyed(Application(), cors_origins=["https://a.example"])
    reply = ask(app, preflight(b"https://a.example"))
    assert reply.status == 200
    assert reply.headers["access-control-allow-origin"] == "https://a.example"
    refused = ask(app, scope_of(headers=[(b"origin", b"https://a.example")]))
    assert refused.status == 401
    assert refused.headers["access-control-allow-origin"] == "https://a.example"
    assert refused.headers["access-control-expose-headers"] == "*"  # X-Paris-Seed, Retry-After ...
    assert "access-control-allow-credentials" not in refused.headers  # with them * is no wildcard
    other = ask(app, preflight(b"https://b.example"))
    assert (other.status, other.error["type"]) == (400, "invalid_request_error")
    assert "access-control-allow-origin" not in other.headers


class Proxy:
    """In the place of Ray's proxy: a limit, and a layer around it as Ray has one."""

    def __init__(self, app: ASGIApp, limit_s: float | None = 120.0) -> None:
        self.inner = app
        inner = self

        class Innermost:
            request_timeout_s = limit_s

            async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
                await inner.inner(scope, receive, send)

        self._app = Innermost()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


def handed_on(*headers: tuple[bytes, bytes], limit_s: float | None = 120.0) -> dict[bytes, bytes]:
    app = Application()
    ask(Edge(Proxy(app, limit_s)), scope_of(headers=[LOCALHOST, *headers]))
    return {n: v for n, v in app.requests[0]["headers"] if n not in (b"host", b"x-request-id")}


@pytest.mark.parametrize("value", [b"0.5", b"120", b"1e1"])
def test_clients_may_shorten_the_operators_limit(value: bytes) -> None:
    header = (b"x-request-timeout-seconds", value)
    assert handed_on(header) == dict([header])


@pytest.mark.parametrize("value", [b"200", b"0", b"-1", b"inf", b"nan", b"", b"x", b"\xff", b"121"])
def test_clients_cannot_lengthen_the_operators_limit(value: bytes) -> None:
    assert handed_on((b"x-request-timeout-seconds", value)) == {}
    both = [(b"x-request-timeout-seconds", b"5"), (b"x-request-timeout-seconds", value)]
    assert handed_on(*both) == dict(both[:1])


def test_a_replicas_own_server_has_the_limit_of_its_options() -> None:
    """As in HAProxy mode, where the edge is around a method of Ray's replica."""

    class Replica:
        _http_options = SimpleNamespace(request_timeout_s=7.0)

        async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
            raise AssertionError

    layer = SimpleNamespace(_app=Replica().serve)
    assert gate.operators_limit_s(layer) == 7.0


def test_without_a_limit_any_is_shorter() -> None:
    header = (b"x-request-timeout-seconds", b"1000")
    assert handed_on(header, limit_s=None) == dict([header])
    assert math.isinf(Edge(Proxy(Application(), None))._limit_s)


def test_headers_between_ray_and_us_are_no_clients() -> None:
    kept = (b"x-other", b"1")
    gone = (
        b"x-request-disconnect-disabled",
        b"x-session-id",
        b"x_session_id",
        b"serve_multiplexed_model_id",
        b"serve-multiplexed-model-id",
        gate.SENT_AGAIN_HEADER,
    )
    assert handed_on(kept, *[(name, b"?1") for name in gone]) == dict([kept])


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (404, "invalid_request_error"),
        (408, "timeout_error"),
        (429, "rate_limit_error"),
        (500, "server_error"),
        (503, "unavailable_error"),
    ],
)
def test_rays_own_errors_get_our_shape(status: int, kind: str) -> None:
    ray = Application(status, [(b"content-type", b"text/plain")], b"Actor ab12 pid=7 ip=10.0.0.1")
    reply = ask(Edge(Proxy(ray)), scope_of())
    assert (reply.status, reply.error["type"]) == (status, kind)
    assert b"Actor" not in reply.body
    assert int(reply.headers["content-length"]) == len(reply.body)
    assert ("retry-after" in reply.headers) == (status in (429, 503))


def test_rays_retry_after_is_kept_and_our_errors_are_left_alone() -> None:
    ray = Application(503, [(b"content-type", b"text/plain"), (b"retry-after", b"7")], b"busy")
    assert ask(Edge(Proxy(ray)), scope_of()).headers["retry-after"] == "7"

    async def ours(*_: object) -> None:
        raise too_many("three at a time", 2.1)

    reply = ask(Edge(Proxy(keyless(ours))), scope_of())
    assert (reply.status, reply.error["message"]) == (429, "three at a time")
    assert reply.headers["retry-after"] == "3"


def test_who_asks_whether_it_lives_waits_for_no_crowd() -> None:
    """Of two hundred that come first, a few have begun when a health check is answered."""
    begun: list[str] = []

    async def busy(scope: Scope, receive: Receive, send: Send) -> None:
        begun.append(scope["path"])
        for _ in range(5):  # as often as one waits on the way through a proxy
            await asyncio.sleep(0)
        await Application()(scope, receive, send)

    async def crowd() -> int:
        edge = Edge(Proxy(busy))
        others = [asyncio.create_task(ask_async(edge, scope_of())) for _ in range(200)]
        await asyncio.sleep(0)
        assert (await ask_async(edge, scope_of("/app/healthz"))).status == 200
        seen = len(begun)
        assert {reply.status for reply in await asyncio.gather(*others)} == {200}
        return seen

    assert asyncio.run(crowd()) < 20
    assert begun.count("/v1/models") == 200


class Dying:
    """In the place of Ray's proxy, which says nothing of a request whose replica has died.

    Args:
        deaths: Of how many requests.
        reads: How many messages of each of them the replica had received.
        begins: Whether it had begun to answer them.
    """

    def __init__(self, deaths: int, *, reads: int = 0, begins: bool = False) -> None:
        self._deaths, self._reads, self._begins = deaths, reads, begins
        self.living, self.scopes = Application(), []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scopes.append(scope)
        scope["root_path"] = scope.get("root_path", "") + "/app"  # as Ray does
        if len(self.scopes) > self._deaths:
            await self.living(scope, receive, send)
            return
        for _ in range(self._reads):
            await receive()
        if self._begins:
            await send({"type": "http.response.start", "status": 200, "headers": []})


@pytest.mark.parametrize("reads", [0, 1])
def test_a_request_whose_replica_died_is_sent_to_another(reads: int) -> None:
    ray = Dying(1, reads=reads)
    reply = ask(Edge(Proxy(ray)), post(length=6), [b"abcdef"])
    assert (reply.status, reply.received) == (200, 1)
    assert ray.living.bodies == [b"abcdef"]
    first, second = ray.scopes
    assert (first["root_path"], second["root_path"]) == ("/app", "/app")
    (limit,) = [value for name, value in second["headers"] if name == gate.TIMEOUT_HEADER]
    assert 0 < float(limit) < 120  # what is left of the operator's
    assert first["headers"] == second["headers"][:-2]
    assert gate.SENT_AGAIN_HEADER in dict(second["headers"])


def test_a_body_that_was_on_its_way_is_received_whole() -> None:
    app = Application()
    ray = Dying(1, reads=1)
    ray.living = keyless(app)
    assert ask(Edge(Proxy(ray)), post(length=6), [b"abc", b"", b"def"]).status == 200
    assert app.bodies == [b"abcdef"]


def test_a_request_that_two_replicas_died_with_is_an_error_in_our_shape() -> None:
    ray = Dying(9)
    reply = ask(Edge(Proxy(ray)), scope_of())
    assert (reply.status, reply.error["code"]) == (503, "unavailable")
    assert reply.headers["retry-after"] == "1"
    assert len(ray.scopes) == 2  # perhaps they died of it


def test_a_request_is_not_sent_again_whose_time_is_over() -> None:
    ray = Dying(1)
    soon = (gate.TIMEOUT_HEADER, b"1e-9")
    assert ask(Edge(Proxy(ray)), scope_of(headers=[LOCALHOST, soon])).status == 503
    assert len(ray.scopes) == 1


def test_a_request_is_not_sent_again_whose_answer_has_begun() -> None:
    ray = Dying(1, begins=True)
    assert ask(Edge(Proxy(ray)), scope_of()).status == 200
    assert len(ray.scopes) == 1


def test_a_request_is_not_sent_again_whose_client_hung_up() -> None:
    ray = Dying(1, reads=1)

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(_: Message) -> None:
        pass

    asyncio.run(Edge(Proxy(ray))(post(length=5), receive, send))
    assert len(ray.scopes) == 1


def test_names_of_applications_are_not_told() -> None:
    ray = Application()
    assert ask(Edge(Proxy(ray)), scope_of("/-/routes")).status == 404
    assert ask(Edge(Proxy(ray)), scope_of("/-/healthz")).status == 200


def test_the_edge_reads_no_more_of_a_body_than_the_gate_takes() -> None:
    reads = []

    async def receive() -> Message:
        reads.append(1)
        return {"type": "http.request", "body": b"x" * 60, "more_body": True}

    async def read_all(bounded: Callable[[], Awaitable[Message]]) -> None:
        while True:
            await asyncio.wait_for(bounded(), 0.05)

    with pytest.raises(TimeoutError):
        asyncio.run(read_all(at_most(100, receive)))
    assert len(reads) == 2  # the second goes beyond it, which the gate must see


@pytest.mark.parametrize("app", [keyless(Application()), Edge(Proxy(Application()))])
def test_web_sockets_are_refused(app: ASGIApp) -> None:
    scope = scope_of() | {"type": "websocket", "extensions": {"websocket.http.response": {}}}
    messages: list[Message] = []

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        messages.append(message)

    asyncio.run(app(scope, receive, send))
    assert [m["type"].rpartition(".")[2] for m in messages] == ["start", "body"]
    assert messages[0]["status"] == 404
    assert json.loads(messages[1]["body"])["error"]["type"] == "invalid_request_error"


def test_ray_is_given_the_edge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "AutoHTTPProtocol", None)
    (middleware,) = edge()
    assert middleware.cls is Edge
    config = uvicorn.Config("", lifespan="off")
    config.load_app = lambda: None
    config.load()
    assert config.http_protocol_class is Connection


def frontage(**changes: Any) -> Frontage:
    """Return that of a start that is allowed, but for some changes."""
    safe = Frontage(host="127.0.0.1", direct=False, has_edge=True, request_timeout_s=120)
    return replace(safe, **changes)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_a_keyless_start_on_loopback(host: str) -> None:
    frontage(host=host).check(keyless=True, timeout_s=110)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"host": "0.0.0.0"}, "http_options.host='0.0.0.0'"),
        ({"host": "192.0.2.1"}, "api_key_file"),
        ({"host": None}, "http_options.host=None"),
        ({"direct": True}, "RAY_SERVE_ENABLE_HA_PROXY"),
        ({"has_edge": False}, "serve.gate:edge"),
    ],
)
def test_a_keyless_start_elsewhere_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        frontage(**changes).check(keyless=True, timeout_s=110)


def test_a_start_with_keys() -> None:
    frontage(host="0.0.0.0").check(keyless=False, timeout_s=110)
    frontage(host="0.0.0.0", direct=True).check(keyless=False, timeout_s=110)
    with pytest.raises(ConfigError, match=r"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serve\.gate"):
        frontage(host="0.0.0.0", has_edge=False).check(keyless=False, timeout_s=110)
    with pytest.raises(ConfigError, match=r"serve\.gate:edge"):
        frontage(host="0.0.0.0", direct=True, has_edge=False).check(keyless=False, timeout_s=110)


@pytest.mark.parametrize("limit_s", [110, 60])
def test_ray_may_not_give_requests_up_first(limit_s: float) -> None:
    with pytest.raises(ConfigError, match=rf"timeout_s=110 .*request_timeout_s={limit_s}"):
        frontage(request_timeout_s=limit_s).check(keyless=False, timeout_s=110)
    frontage(request_timeout_s=None).check(keyless=False, timeout_s=1e6)
