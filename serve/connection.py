"""How Ray's HTTP server reads the head of a request: neither for ever nor without an end.

uvicorn, which Ray uses, sets no limit of time or size to a head, and answers what is no HTTP in
plain text. Ray lets nobody choose the class of its connections, so `serve.gate.edge` sets uvicorn's
default before the proxy reads it.
"""

import asyncio

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from serve.errors import ApiError, as_response, malformed, too_large, too_slow

HEAD_TIMEOUT_S = 10.0
# Far more than the gate takes: a chunk read from the socket may hold a body and the next head.
MAX_READ_BYTES = 512 * 1024


class Connection(HttpToolsProtocol):
    """One connection of Ray's HTTP server."""

    _timer: asyncio.TimerHandle | None = None  # while a head is on its way
    _num_read = 0  # bytes of it, or a little more

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first head."""
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        self._stop_waiting()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """Wait for the rest of a head."""
        super().on_message_begin()
        self._await_head()

    def on_headers_complete(self) -> None:
        """Wait no more: the gate bounds the body."""
        self._stop_waiting()
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        """Read on, unless the head has become too long."""
        super().data_received(data)
        if self._timer is not None:
            self._num_read += len(data)
            if self._num_read > MAX_READ_BYTES:
                message = "Path, query and headers are too long"
                self._refuse(too_large(message, status=431, code="headers_too_large"))

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP."""
        self._refuse(malformed(msg))

    def _await_head(self) -> None:
        self._stop_waiting()
        self._num_read = 0
        self._timer = self.loop.call_later(HEAD_TIMEOUT_S, self._on_timeout)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_timeout(self) -> None:
        if self._num_read:
            self._refuse(too_slow(f"The head did not arrive within {HEAD_TIMEOUT_S:g} s"))
        else:  # browsers connect in advance, and ask for nothing
            self.transport.close()

    def _refuse(self, error: ApiError) -> None:
        self._stop_waiting()
        response = as_response(error)
        response.headers["connection"] = "close"
        lines = [name + b": " + value + b"\r\n" for name, value in response.raw_headers]
        self.transport.write(b"".join([STATUS_LINE[error.status], *lines, b"\r\n", response.body]))
        self.transport.close()
