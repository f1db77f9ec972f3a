"""How a request ended, and when, as its client saw it; and the line that is logged of it."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from serve.access import Access
from serve.exchange import CLIENT_GONE, Exchange, Replay
from serve.gate import Gate

START: Message = {"type": "http.response.start", "status": 200, "headers": []}
GONE: Message = {"type": "http.disconnect"}


def body(*, more: bool) -> Message:
    return {"type": "http.response.body", "body": b"x", "more_body": more}


Say = Callable[[Exchange], Awaitable[object]]


def exchange(*steps: Say, received: Message = GONE) -> Exchange:
    """Return an exchange in which some things have happened."""

    async def receive() -> Message:
        return received

    async def send(message: Message) -> None:
        pass

    async def happen() -> Exchange:
        made = Exchange(receive, send)
        for step in steps:
            await step(made)
        return made

    return asyncio.run(happen())


def sends(message: Message) -> Say:
    return lambda exchange: exchange.send(message)


def receives(exchange: Exchange) -> Awaitable[Message]:
    return exchange.receive()


def test_an_answer_has_its_status_when_its_last_byte_is_sent() -> None:
    whole = [sends(START), sends(body(more=True)), sends(body(more=False))]
    assert exchange(*whole).status == 200
    assert exchange(*whole[:2]).status == CLIENT_GONE  # it broke off
    assert exchange().status == CLIENT_GONE


def test_who_hangs_up_before_the_end_has_no_answer() -> None:
    before = [sends(START), receives, sends(body(more=False))]
    assert exchange(*before).status == CLIENT_GONE
    after = [sends(START), sends(body(more=False)), receives]
    assert exchange(*after).status == 200
    request: Message = {"type": "http.request", "body": b"", "more_body": False}
    assert exchange(*before, received=request).status == 200


def test_time_runs_to_the_last_byte_and_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def at(time: float, message: Message) -> Say:
        async def say(exchange: Exchange) -> None:
            now[0] = time
            await exchange.send(message)

        return say

    made = exchange(at(12, START), at(13, body(more=True)), at(17, body(more=False)))
    now[0] = 100.0
    assert made.seconds == 7
    broken = exchange(at(102, START))
    now[0] = 105.0
    assert broken.seconds == 5


def test_a_request_that_is_forgotten_is_kept_no_longer_and_goes_on() -> None:
    def request(body: bytes) -> Message:
        return {"type": "http.request", "body": body, "more_body": True}

    async def receive() -> Message:
        return messages.pop(0)

    async def receive_all() -> None:
        replay = Replay(receive)
        first = replay.from_start()
        assert [(await first())["body"] for _ in "ab"] == [b"a", b"b"]
        again = replay.from_start()
        assert (await again())["body"] == b"a"
        replay.forget()
        assert (await again())["body"] == b""
        assert await first() == GONE

    messages = [request(b"a"), request(b"b"), GONE]
    asyncio.run(receive_all())


@pytest.fixture
def lines() -> Iterator[list[logging.LogRecord]]:
    """What the gate logs."""
    records: list[logging.LogRecord] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    logger, handler = logging.getLogger("ray.serve"), Keep()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield records
    logger.removeHandler(handler)
    logger.setLevel(level)


def ask(app: Callable[[Scope, Receive, Send], Awaitable[None]], **scope: Any) -> None:
    """Send a request through a gate that answers this machine alone."""
    access = Access(None)

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        pass

    head = {
        "type": "http",
        "http_version": "1.1",
        "method": "GET",
        "path": "/secret",
        "query_string": b"secret",
        "client": ("127.0.0.1", 1),
        "headers": [(b"host", b"localhost")],
    }
    asyncio.run(Gate(app, find_access=lambda: access)(head | scope, receive, send))


def test_a_line_says_who_how_long_and_what_the_endpoint_adds(
    lines: list[logging.LogRecord],
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["logged"].update(n=3, steps=8)
        await send(START)
        await send(body(more=False))

    ask(app)
    ask(app, client=("10.0.0.1", 1))
    drawn, refused = (vars(line) for line in lines)
    told = ("method", "status", "client", "n", "steps")
    assert [drawn.get(name) for name in told] == ["GET", 200, "local", 3, 8]
    assert [refused.get(name) for name in told] == ["GET", 403, None, None, None]
    assert 0 <= drawn["seconds"] < 60
    assert not any("secret" in str(value) for value in drawn.values())


def test_a_request_that_is_cancelled_has_a_line_too(lines: list[logging.LogRecord]) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        ask(app)
    (line,) = lines
    assert vars(line)["status"] == CLIENT_GONE
