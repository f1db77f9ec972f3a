"""A connection between two parties: mutual TLS with pinned certificates, frames as of `frames`.

What does not fit closes the connection, and nothing else.
"""

import socket
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from paris_ray.errors import (
    BudgetError,
    ParisError,
    ProtocolError,
    ReceiptError,
    SignatureError,
    TradeError,
    VerificationError,
)
from paris_ray.identity import CERTIFICATE, KEY, Identity, public_key_of
from paris_ray.zklora.parties.frames import ConnectionLost, Message, Sizes, read_message

# What is agreed on in the handshake (ALPN, RFC 7301): whoever frames, names or asks otherwise than
# this release is refused before anything is asked. A change of any of that changes the number.
WIRE = "paris_ray-zklora/2"
CHUNK_BYTES = 2**20
RECORD_BYTES = 2**14  # TLS gives no more at once
MAX_ERROR = 2000  # characters
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

Piece = TypeVar("Piece", memoryview, int)
Moved = TypeVar("Moved", int, bytes)


@dataclass(slots=True)
class Traffic:
    """Bytes of all frames so far.

    Attributes:
        bytes_sent: To the other side.
        bytes_received: From the other side.
    """

    bytes_sent: int = 0
    bytes_received: int = 0

    @property
    def total(self) -> int:
        """Both together."""
        return self.bytes_sent + self.bytes_received


class Ended(ConnectionLost):
    """The other side ended the connection."""


class Connection:
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
                raise Ended("the other side closed the connection")
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
        raise Ended(f"the connection broke: {error}") from None


def tls_context(identity: Identity, side: int, pinned: Mapping[bytes, str]) -> ssl.SSLContext:
    """Return the TLS context of one side, which only the pinned certificates may connect to."""
    context = ssl.SSLContext(side)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols([WIRE])
    context.check_hostname = False  # keys are pinned, names mean nothing
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(identity.folder / CERTIFICATE, identity.folder / KEY)
    for der in pinned:
        context.load_verify_locations(cadata=der)
    return context


def pin(certificates: Sequence[str]) -> dict[bytes, str]:
    """Return whose each certificate is: the public key in hexadecimal, by the certificate's DER.

    Args:
        certificates: As PEM text.

    Raises:
        SignatureError: if one is not allowed.
    """
    keys = {}
    for certificate in certificates:
        key = public_key_of(certificate)
        loaded = x509.load_pem_x509_certificate(certificate.encode("ascii"))
        keys[loaded.public_bytes(Encoding.DER)] = key
    return keys


def identify(connection: ssl.SSLSocket, pinned: Mapping[bytes, str]) -> str:
    """Return the public key of who it is, in hexadecimal.

    A certificate that a pinned one vouches for is nobody's.

    Raises:
        ProtocolError: if it is nobody who is known, or does not speak WIRE.
    """
    if connection.selected_alpn_protocol() != WIRE:
        told = f"the other side does not speak {WIRE}"
        raise ProtocolError(f"{told}: both need releases of paris_ray that do")
    key = pinned.get(connection.getpeercert(binary_form=True) or b"")
    if key is None:
        raise ProtocolError("the other side has another certificate than the pinned one")
    return key
