"""The server's end of a channel: who may connect, how many at a time, and what they are answered.

A request carries a number that grows with every one of a connection; its answer carries the same.
"""

import contextlib
import itertools
import logging
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Self

from paris_ray.documents import printable
from paris_ray.errors import ConfigError, ProtocolError
from paris_ray.identity import Identity
from paris_ray.zklora.parties.connection import (
    ERROR,
    ERRORS,
    MAX_ERROR,
    Connection,
    Traffic,
    identify,
    pin,
    tls_context,
)
from paris_ray.zklora.parties.frames import DEFAULTS, ConnectionLost, Limits, Message, encode

POLL_S = 0.2

Handler = Callable[[str, Message], Message]
"""Returns the answer to a request of whom TLS has proved: a public key in hexadecimal."""

logger = logging.getLogger(__name__)


class Server:
    """Answers the requests of known clients until it is closed, a thread per connection.

    Nobody keeps others out: strangers take no place of those who are known, and are ended oldest
    first; a key has a few places.

    Args:
        identity: Who serves.
        host: Address to listen on.
        port: Port; 0 for a free one.
        clients: Certificates, as PEM text, of all who may connect.
        handler: Answers requests; called from several threads. The errors in `ERRORS` are raised
            again at the client, text included, others as an internal error.
        limits: What the protocol may use.

    Attributes:
        address: Host and port that it listens on.

    Raises:
        ConfigError: if there are no clients, or the address cannot be listened on.
        SignatureError: if a client's certificate is not allowed.
    """

    def __init__(
        self,
        identity: Identity,
        host: str,
        port: int,
        clients: Sequence[str],
        handler: Handler,
        limits: Limits = DEFAULTS,
    ) -> None:
        if not clients:
            raise ConfigError("clients names no certificate: nobody could connect")
        self._pinned, self._handler, self._limits = pin(clients), handler, limits
        self._context = tls_context(identity, ssl.PROTOCOL_TLS_SERVER, self._pinned)
        self._context.num_tickets = 0  # every connection proves its key
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._listener = socket.create_server((host, port), family=family)
        except OSError as error:
            raise ConfigError(f"{host}:{port} cannot be listened on: {error}") from None
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._arrivals = itertools.count()
        self._strangers: dict[int, ssl.SSLSocket] = {}  # by when they came, whenever a thread ran
        self._known: dict[ssl.SSLSocket, str] = {}
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening and break every connection off."""
        self._closed.set()
        self._accepting.join()
        self._listener.close()
        with self._lock:
            for connection in (*self._strangers.values(), *self._known):
                _shut_down(connection)

    def _accept(self) -> None:
        self._listener.settimeout(POLL_S)
        while not self._closed.is_set():
            try:
                accepted, _ = self._listener.accept()
                self._start(accepted)
            except TimeoutError:
                continue
            except (OSError, RuntimeError) as error:  # it is gone; no more files; no more threads
                logger.warning("a connection was not accepted: %s", error)
                self._closed.wait(POLL_S)

    def _start(self, accepted: socket.socket) -> None:
        with contextlib.ExitStack() as undo:
            undo.callback(accepted.close)
            arguments = (accepted, next(self._arrivals))
            threading.Thread(target=self._serve, args=arguments, daemon=True).start()
            undo.pop_all()  # it is the thread's now

    def _serve(self, accepted: socket.socket, arrival: int) -> None:
        try:
            with accepted:
                accepted.settimeout(self._limits.handshake_s)
                tls = self._context.wrap_socket(
                    accepted, server_side=True, do_handshake_on_connect=False
                )
                with tls, self._registered(tls, arrival):
                    tls.do_handshake()
                    caller = identify(tls, self._pinned)
                    self._admit(tls, arrival, caller)
                    self._converse(tls, caller)
        except ConnectionLost as error:
            logger.info("a connection ended: %s", error)
        except (ProtocolError, OSError) as error:
            logger.warning("a connection was closed: %s", printable(str(error), MAX_ERROR))
        except Exception:
            logger.exception("a connection was closed by an error of ours")

    @contextlib.contextmanager
    def _registered(self, connection: ssl.SSLSocket, arrival: int) -> Iterator[None]:
        """Count a stranger; if it is one too many, end the one that has had the most time."""
        with self._lock:
            self._strangers[arrival] = connection
            if len(self._strangers) > self._limits.strangers:
                _shut_down(self._strangers.pop(min(self._strangers)))
        try:
            if self._closed.is_set():
                raise ConnectionLost("the server is closed")
            yield
        finally:
            with self._lock:
                self._strangers.pop(arrival, None)
                self._known.pop(connection, None)

    def _admit(self, connection: ssl.SSLSocket, arrival: int, key: str) -> None:
        """Count a stranger as who it is; raises ProtocolError if there is no place."""
        with self._lock:
            keys = list(self._known.values())
            if len(keys) >= self._limits.connections:
                raise ProtocolError(f"{len(keys)} connections are open")
            if keys.count(key) >= self._limits.connections_a_peer:
                raise ProtocolError(f"{key} has {keys.count(key)} connections")
            self._strangers.pop(arrival, None)
            self._known[connection] = key

    def _converse(self, tls: ssl.SSLSocket, caller: str) -> None:
        limits = self._limits
        connection = Connection(tls, limits.requests, limits.frame_s, limits.idle_s, Traffic())
        last = 0
        while True:
            n, request = connection.receive()
            if n <= last:
                raise ProtocolError(f"request {n} came after request {last}")
            connection.send(self._answer(caller, request, n))
            last = n

    def _answer(self, caller: str, request: Message, n: int) -> bytes:
        """Return the frame of the handler's answer, or of the error that it raised."""
        try:
            return encode(self._handler(caller, request), n, self._limits.answers)
        except Exception as error:
            name, text = type(error).__name__, str(error)
            if ERRORS.get(name) is not type(error):
                logger.exception("request %s failed", printable(request.kind, MAX_ERROR))
                name, text = "ProtocolError", "internal error"
            # What it quotes may be the caller's own words, half surrogates among them.
            return encode(Message(ERROR, {"error": name, "message": printable(text, MAX_ERROR)}), n)


def _shut_down(connection: ssl.SSLSocket) -> None:
    """Wake the thread that waits on a connection; TLS itself is not ours to touch from here."""
    with contextlib.suppress(OSError):
        socket.socket.shutdown(connection, socket.SHUT_RDWR)
