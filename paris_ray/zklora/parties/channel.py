"""The channel between two parties: mutual TLS with pinned certificates, frames as of `frames`.

A request carries a number that grows with every one of a connection; its answer carries the same.
What does not fit closes the connection, and nothing else.
"""

import contextlib
import itertools
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from numpy.typing import NDArray

from paris_ray.errors import (
    BudgetError,
    ConfigError,
    ParisError,
    ProtocolError,
    ReceiptError,
    SignatureError,
    TradeError,
    VerificationError,
)
from paris_ray.identity import CERTIFICATE, KEY, Identity, public_key_of
from paris_ray.zklora.parties.frames import (
    DEFAULTS,
    ConnectionLost,
    Limits,
    Message,
    Sizes,
    encode,
    read_message,
)
from paris_ray.zklora.printable import printable

MAX_ERROR = 2000  # characters
CHUNK_BYTES = 2**20
RECORD_BYTES = 2**14  # TLS gives no more at once
RETRY_S = 0.2
POLL_S = 0.2
ERROR = "error"
# What a handler may say to the other party. Errors about our own files are not among them.
ERRORS = {
    error.__name__: error
    for error in (
        ParisError,
        ProtocolError,
        BudgetError,
        SignatureError,
        VerificationError,
        TradeError,
        ReceiptError,
    )
}

logger = logging.getLogger(__name__)

Piece = TypeVar("Piece", memoryview, int)
Moved = TypeVar("Moved", int, bytes)


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end, proved by TLS.

    Attributes:
        public_key: In hexadecimal.
        certificate: PEM text.
    """

    public_key: str
    certificate: str


@dataclass(slots=True)
class Traffic:
    """Bytes of all frames so far.

    Attributes:
        bytes_sent: To the other side.
        bytes_received: From the other side.
    """

    bytes_sent: int = 0
    bytes_received: int = 0


class _Ended(ConnectionLost):
    """The other side ended the connection."""


class _Connection:
    """Frames over one TLS socket, each within its deadline."""

    def __init__(
        self, tls: ssl.SSLSocket, sizes: Sizes, frame_s: float, wait_s: float, traffic: Traffic
    ) -> None:
        tls.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._tls = tls
        self._sizes = sizes  # of what is received
        self._frame_s = frame_s
        self._wait_s = wait_s  # for the first byte of a frame
        self._traffic = traffic

    def close(self) -> None:
        """Close the socket."""
        self._tls.close()

    def send(self, frame: bytes) -> None:
        """Send a frame; raises ConnectionLost if it cannot be sent in time."""
        deadline = time.monotonic() + self._frame_s
        with memoryview(frame) as view:
            sent = 0
            while sent < len(view):
                piece = view[sent : sent + CHUNK_BYTES]
                sent += _in_time(self._tls, self._tls.send, piece, deadline)
        self._traffic.bytes_sent += sent

    def receive(self) -> tuple[int, Message]:
        """Return the next frame; raises ProtocolError, ConnectionLost if it does not come."""
        begun = self._read(1, time.monotonic() + self._wait_s)
        deadline = time.monotonic() + self._frame_s
        length = begun + self._read(3, deadline)
        return read_message(length, lambda size: self._read(size, deadline), self._sizes)

    def _read(self, size: int, deadline: float) -> bytearray:
        """Return so many bytes; memory is taken as they come, whatever was announced."""
        payload = bytearray()
        while len(payload) < size:
            most = min(size - len(payload), RECORD_BYTES)
            piece = _in_time(self._tls, self._tls.recv, most, deadline)
            if not piece:
                raise _Ended("the other side closed the connection")
            payload += piece
        self._traffic.bytes_received += size
        return payload


def _in_time(
    tls: ssl.SSLSocket,
    transfer: Callable[[Piece], Moved],
    piece: Piece,
    deadline: float,
) -> Moved:
    """Send or receive a piece; every socket operation has only what is left of the deadline."""
    remaining = deadline - time.monotonic()
    if remaining <= 0:
        raise ConnectionLost("the other side was too slow")
    tls.settimeout(remaining)
    try:
        return transfer(piece)
    except TimeoutError:
        raise ConnectionLost("the other side was too slow") from None
    except OSError as error:  # of TLS too
        raise _Ended(f"the connection broke: {error}") from None


def _context(identity: Identity, side: int, pinned: Mapping[bytes, Peer]) -> ssl.SSLContext:
    context = ssl.SSLContext(side)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # keys are pinned, names mean nothing
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(identity.folder / CERTIFICATE, identity.folder / KEY)
    for der in pinned:
        context.load_verify_locations(cadata=der)
    return context


def _pin(certificates: Sequence[str]) -> dict[bytes, Peer]:
    peers = {}
    for certificate in certificates:
        peer = Peer(public_key_of(certificate), certificate)
        loaded = x509.load_pem_x509_certificate(certificate.encode("ascii"))
        peers[loaded.public_bytes(Encoding.DER)] = peer
    return peers


def _identify(connection: ssl.SSLSocket, pinned: Mapping[bytes, Peer]) -> Peer:
    """Return who it is: a certificate that a pinned one vouches for is nobody's."""
    peer = pinned.get(connection.getpeercert(binary_form=True) or b"")
    if peer is None:
        raise ProtocolError("the other side has another certificate than the pinned one")
    return peer


class Server:
    """Answers requests, a thread per connection; made by `serve`.

    Nobody keeps others out: strangers take no place of those who are known, and are ended oldest
    first; a key has a few places.

    Attributes:
        address: Host and port that it listens on.
    """

    def __init__(
        self,
        listener: socket.socket,
        context: ssl.SSLContext,
        pinned: Mapping[bytes, Peer],
        handler: Callable[[Peer, Message], Message],
        limits: Limits,
    ) -> None:
        self.address: tuple[str, int] = listener.getsockname()[:2]
        self._listener = listener
        self._context = context
        self._pinned = pinned
        self._handler = handler
        self._limits = limits
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
                    peer = _identify(tls, self._pinned)
                    self._admit(tls, arrival, peer.public_key)
                    self._converse(tls, peer)
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

    def _converse(self, tls: ssl.SSLSocket, peer: Peer) -> None:
        limits = self._limits
        connection = _Connection(tls, limits.requests, limits.frame_s, limits.idle_s, Traffic())
        last = 0
        while True:
            n, request = connection.receive()
            if n <= last:
                raise ProtocolError(f"request {n} came after request {last}")
            connection.send(self._answer(peer, request, n))
            last = n

    def _answer(self, peer: Peer, request: Message, n: int) -> bytes:
        """Return the frame of the handler's answer, or of the error that it raised."""
        try:
            return encode(self._handler(peer, request), n, self._limits.answers)
        except Exception as error:
            name, text = type(error).__name__, str(error)
            if ERRORS.get(name) is not type(error):
                logger.exception("request %s failed", printable(request.kind, MAX_ERROR))
                name, text = "ProtocolError", "internal error"
            return encode(Message(ERROR, {"error": name, "message": text[:MAX_ERROR]}), n)


def _shut_down(connection: ssl.SSLSocket) -> None:
    """Wake the thread that waits on a connection; TLS itself is not ours to touch from here."""
    with contextlib.suppress(OSError):
        socket.socket.shutdown(connection, socket.SHUT_RDWR)


def serve(
    identity: Identity,
    host: str,
    port: int,
    clients: Sequence[str],
    handler: Callable[[Peer, Message], Message],
    limits: Limits = DEFAULTS,
) -> Server:
    """Answer the requests of known clients until the server is closed.

    Args:
        identity: Who serves.
        host: Address to listen on.
        port: Port; 0 for a free one.
        clients: Certificates, as PEM text, of all who may connect.
        handler: Returns the answer to a request; called from several threads. The errors in
            `ERRORS` are raised again at the client, text included, others as an internal error.
        limits: What the protocol may use.

    Raises:
        ConfigError: if there are no clients, or the address cannot be listened on.
        SignatureError: if a client's certificate is not allowed.
    """
    if not clients:
        raise ConfigError("clients names no certificate: nobody could connect")
    pinned = _pin(clients)
    context = _context(identity, ssl.PROTOCOL_TLS_SERVER, pinned)
    context.num_tickets = 0  # every connection proves its key
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(f"{host}:{port} cannot be listened on: {error}") from None
    return Server(listener, context, pinned, handler, limits)


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
        self._pinned = _pin([server_certificate])
        self._context = _context(identity, ssl.PROTOCOL_TLS_CLIENT, self._pinned)
        self._lock = threading.Lock()
        self._connection: _Connection | None = None
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
            for attempt in range(1, self._attempts + 1):
                try:
                    return self._ask(message)
                except ConnectionLost:
                    if attempt == self._attempts:
                        raise
                    time.sleep(RETRY_S * 2**attempt)
        raise AssertionError("unreachable")

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
            if isinstance(error, _Ended) and self._last == 1:
                raise self._refused() from None
            raise
        if answer.kind == ERROR:
            raise _remote_error(answer.fields)
        return answer

    def _connected(self) -> _Connection:
        if self._connection is None:
            tls = self._handshake()
            limits = self._limits
            self._connection = _Connection(
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
            _identify(tls, self._pinned)
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
