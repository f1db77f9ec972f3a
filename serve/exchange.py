"""One HTTP request and its answer: how long it took, how it ended, how it is received again."""

import time

from starlette.types import Message, Receive, Send

CLIENT_GONE = 499  # as nginx has it
EMPTY: Message = {"type": "http.request", "body": b"", "more_body": False}


class Exchange:
    """Stands between the server and an application, and watches what passes.

    Args:
        receive: How the server gives the request.
        send: How it takes the answer.
    """

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self._began = time.monotonic()
        self._ended: float | None = None
        self._status, self._has_begun, self._is_gone = CLIENT_GONE, False, False

    async def receive(self) -> Message:
        """Return the next message of the client."""
        message = await self._receive()
        if message["type"] == "http.disconnect" and self._ended is None:
            self._is_gone = True
        return message

    async def send(self, message: Message) -> None:
        """Send one message to the client."""
        if message["type"] == "http.response.start":
            self._status, self._has_begun = message["status"], True
        await self._send(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._ended = time.monotonic()

    @property
    def is_unanswered(self) -> bool:
        """Whether the client still waits for the beginning of an answer."""
        return not (self._has_begun or self._is_gone)

    @property
    def status(self) -> int:
        """The status of the answer; `CLIENT_GONE` if the client hung up or it broke off."""
        return CLIENT_GONE if self._is_gone or self._ended is None else self._status

    @property
    def seconds(self) -> float:
        """From the beginning to the last byte of the answer, or to now where there was none."""
        return (self._ended or time.monotonic()) - self._began


class Replay:
    """A request that can be received again from its beginning, until it is forgotten.

    Args:
        receive: How it is received; each message once.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._messages: list[Message] = []

    def from_start(self) -> Receive:
        """Return a `receive` that gives every message; who used an earlier one must have ended."""
        position = 0

        async def receive() -> Message:
            nonlocal position
            if position == len(self._messages):
                self._messages.append(await self._receive())
            position += 1
            return self._messages[position - 1]

        return receive

    def forget(self) -> None:
        """Keep nothing of what has been received: a body may be large, and its answer long."""
        self._messages = [EMPTY] * len(self._messages)
