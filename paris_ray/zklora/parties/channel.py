"""The client's end of a channel: requests to one server, repeated where a connection broke."""

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from typing import Any, Self

from numpy.typing import NDArray

from paris_ray.documents import printable
from paris_ray.errors import ParisError, ProtocolError
from paris_ray.identity import CERTIFICATE, Identity
from paris_ray.zklora.parties.connection import (
    ERROR,
    ERRORS,
    MAX_ERROR,
    Connection,
    Ended,
    Traffic,
    identify,
    pin,
    tls_context,
)
from paris_ray.zklora.parties.frames import DEFAULTS, ConnectionLost, Limits, Message, encode

RETRY_S = 0.2


class Channel:
    """Requests to one server, one at a time; safe from several threads.

    A request whose connection broke is sent again over a new one: handlers answer a repeated
    request as they did before.

    Args:
        identity: Who asks.
        address: Host and port of the server.
        server_certificate: The only one that the server may have, as PEM text.
        timeout: Seconds until an answer begins.
        attempts: How often a request is sent before its loss is an error.
        limits: What the protocol may use: those of the server.

    Attributes:
        traffic: Bytes of all its connections.

    Raises:
        SignatureError: if the certificate is not allowed.
    """

    def __init__(
        self,
        identity: Identity,
        address: tuple[str, int],
        server_certificate: str,
        timeout: float = 600,
        *,
        attempts: int = 3,
        limits: Limits = DEFAULTS,
    ) -> None:
        self._address = address
        self._where = f"{address[0]}:{address[1]}"
        self._timeout = timeout
        self._attempts = attempts
        self._limits = limits
        self._pinned = pin([server_certificate])
        self._context = tls_context(identity, ssl.PROTOCOL_TLS_CLIENT, self._pinned)
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._last = 0
        self.traffic = Traffic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; the next request opens another."""
        with self._lock:
            self._drop()

    def request(
        self,
        kind: str,
        fields: Mapping[str, Any] | None = None,
        tensors: Mapping[str, NDArray[Any]] | None = None,
    ) -> Message:
        """Return the server's answer.

        Args:
            kind: What the request is about.
            fields: JSON values.
            tensors: int16, int64, uint8 or float32.

        Raises:
            ConnectionLost: if the connection broke in every attempt.
            ProtocolError: if the request is too large, the server is not the pinned one, or its
                answer is malformed.
            ParisError: what the handler raised.
        """
        message = Message(kind, fields or {}, tensors or {})
        with self._lock:
            for attempt in range(1, self._attempts):
                with contextlib.suppress(ConnectionLost):
                    return self._ask(message)
                time.sleep(RETRY_S * 2**attempt)
            return self._ask(message)

    def _ask(self, message: Message) -> Message:
        connection = self._connected()
        self._last += 1
        frame = encode(message, self._last, self._limits.requests)
        try:
            connection.send(frame)
            n, answer = connection.receive()
            if n != self._last:
                raise ProtocolError(f"request {self._last} was answered with number {n}")
        except BaseException as error:
            self._drop()  # whatever comes next on it belongs to no request
            # TLS 1.3 tells a client that it was refused only after the handshake.
            if isinstance(error, Ended) and self._last == 1:
                raise self._refused() from None
            raise
        if answer.kind == ERROR:
            raise _remote_error(answer.fields)
        return answer

    def _connected(self) -> Connection:
        if self._connection is None:
            tls = self._handshake()
            limits = self._limits
            self._connection = Connection(
                tls, limits.answers, limits.frame_s, self._timeout, self.traffic
            )
            self._last = 0
        return self._connection

    def _handshake(self) -> ssl.SSLSocket:
        with contextlib.ExitStack() as undo:
            try:
                seconds = self._limits.connect_s
                plain = undo.enter_context(socket.create_connection(self._address, seconds))
                tls = undo.enter_context(self._context.wrap_socket(plain))
            except ssl.SSLCertVerificationError as error:
                raise ProtocolError(f"{self._where} is not the pinned server: {error}") from None
            except (ssl.SSLEOFError, ConnectionResetError):
                raise self._refused() from None
            except OSError as error:
                raise ConnectionLost(f"{self._where} cannot be reached: {error}") from None
            identify(tls, self._pinned)
            undo.pop_all()
        return tls

    def _refused(self) -> ConnectionLost:
        return ConnectionLost(
            f"{self._where} ended the connection: does it have your {CERTIFICATE} among its "
            "clients?"
        )

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _remote_error(fields: Mapping[str, Any]) -> ParisError:
    error = ERRORS.get(str(fields.get("error")), ProtocolError)
    return error(printable(str(fields.get("message")), MAX_ERROR))
