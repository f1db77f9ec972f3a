"""How long a client may take to ask, and to take an answer.

uvicorn bounds silence after an answer, and nothing else. Of a head it bounds the length, but not
how slowly it comes; before the first one nobody is hung up on, nor is who takes nothing of what was
asked for. So a few idle clients could hold all the connections that there are.
"""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_TIMEOUT_S = 10.0  # from the connection, or from the answer before, to the end of a head
# In which a client takes something of an answer: a slow one may take hours for all of it. A kernel
# tells of room again when a third of its megabytes is free, which a slow client takes a while for.
ANSWER_TIMEOUT_S = 120.0


class Connection(H11Protocol):
    """One connection, which is closed where a request does not come, or an answer does not go."""

    _deadline: asyncio.TimerHandle | None = None  # while a head is waited for
    _next_look: asyncio.TimerHandle | None = None  # at what was not taken
    _left = 0  # bytes that were not taken when they were last looked at

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first head."""
        super().connection_made(transport)
        self._wait_or_answer()
        self._look_at_answers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        self._stop_waiting()
        if self._next_look is not None:
            self._next_look.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read on: a head that has come whole is being answered."""
        super().data_received(data)
        self._wait_or_answer()

    def on_response_complete(self) -> None:
        """Wait for the next head, unless it has come meanwhile."""
        super().on_response_complete()
        self._wait_or_answer()

    def _wait_or_answer(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()
        elif self._deadline is None and not self.transport.is_closing():
            self._deadline = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _look_at_answers(self) -> None:
        """Hang up on who took nothing since the last look; `close` would wait for them, too."""
        left = self.transport.get_write_buffer_size()
        if left and left == self._left:
            self.transport.abort()
            return
        self._left = left
        self._next_look = self.loop.call_later(ANSWER_TIMEOUT_S, self._look_at_answers)
