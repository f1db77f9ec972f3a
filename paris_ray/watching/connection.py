"""How long a client may take to ask: uvicorn bounds silence after an answer, and nothing else.

Of a head it bounds the length, but not how slowly it comes, and before the first one nobody is hung
up on. So a few idle clients could hold all the connections that there are.
"""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_TIMEOUT_S = 10.0  # from the connection, or from the answer before, to the end of a head


class Connection(H11Protocol):
    """One connection, which is closed where a request does not come in time."""

    _deadline: asyncio.TimerHandle | None = None  # while a head is waited for

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first head."""
        super().connection_made(transport)
        self._wait_or_answer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        self._stop_waiting()
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
