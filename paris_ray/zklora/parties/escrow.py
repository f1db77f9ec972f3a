"""The escrow as a service over the parties' channel, and its client.

A request names an operation of `paris_ray.zklora.escrow.Escrow`; texts and numbers are fields,
bytes and signed documents are tensors. Who calls is whom TLS has proved.
"""

import json
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from paris_ray.artifacts import canonical_json, sha256_hex
from paris_ray.errors import ProtocolError
from paris_ray.identity import Identity, public_key_of
from paris_ray.signatures import SignedDocument
from paris_ray.zklora.escrow import STATEMENT, Escrow
from paris_ray.zklora.listings import PIECE_BYTES
from paris_ray.zklora.manifest import MAX_BYTES, AdapterManifest
from paris_ray.zklora.parties.channel import Channel
from paris_ray.zklora.parties.connection import Peer, Traffic
from paris_ray.zklora.parties.frames import Limits, Message, Sizes
from paris_ray.zklora.parties.server import serve
from paris_ray.zklora.trade import Trade

SWEEP_S = 1.0  # between two looks for deadlines that have passed
TRADE, DONE = "trade", "done"  # kinds of answers
# Weights come in pieces, announced by a manifest: nobody holds more memory than this, before or
# after listing something.
LIMITS = Limits(
    requests=Sizes(
        frame_bytes=2 * PIECE_BYTES,
        of_kinds={"list_adapter": MAX_BYTES + 2**20},
    ),
    connections_a_peer=4,
)

# Operations that take texts and numbers alone, and answer with the trade.
PLAIN: Mapping[str, Mapping[str, type]] = {
    "open_trade": {
        "adapter_id": str,
        "session": str,
        "nonce_user": str,
        "nonce_contributor": str,
        "deposit_rows": int,
    },
    "pay": {"session": str},
    "opened": {"session": str},
    "trade": {"session": str},
}

logger = logging.getLogger(__name__)


class EscrowService:
    """An escrow that listens, and ends by itself the trades whose deadline has passed.

    Args:
        escrow: The trades.
        host: Address to listen on.
        port: Port; 0 for a free one.
        clients: Certificates, as PEM text, of all who may connect.

    Attributes:
        address: Host and port that it listens on.

    Raises:
        ConfigError: if there are no clients, or the address cannot be listened on.
        SignatureError: if a client's certificate is not allowed.
    """

    def __init__(self, escrow: Escrow, host: str, port: int, clients: Sequence[str]) -> None:
        self._escrow = escrow
        self._operations: Mapping[str, Callable[[str, Message], Message]] = {
            "list_adapter": self._list_adapter,
            "upload": self._upload,
            "owe": self._owe,
            "deposit_key": self._deposit_key,
            "key": self._key,
            "sealed": self._sealed,
            "statement": self._statement,
            "balance": self._balance,
        }
        self._closed = threading.Event()
        self._listing = threading.Lock()
        self._server = serve(escrow.identity, host, port, clients, self._answer, LIMITS)
        self.address = self._server.address
        self._sweeper = threading.Thread(target=self._sweep, daemon=True)
        self._sweeper.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening; trades stay as they are."""
        self._server.close()
        self._closed.set()
        self._sweeper.join()

    def _sweep(self) -> None:
        while not self._closed.wait(SWEEP_S):
            try:
                for trade in self._escrow.expire():
                    logger.info("trade %s: %s after %s", trade.session, trade.state, trade.reason)
            except Exception:  # such as a full disk: the next look may succeed
                logger.exception("deadlines could not be looked at")

    def _answer(self, peer: Peer, request: Message) -> Message:
        caller = peer.public_key
        if request.kind in PLAIN:
            fields = _fields(request, **PLAIN[request.kind])
            trade: Trade = getattr(self._escrow, request.kind)(caller, **fields)
            return _trade(trade, request)
        if request.kind not in self._operations:
            raise ProtocolError(f"the escrow has no operation {request.kind[:80]!r}")
        return self._operations[request.kind](caller, request)

    def _list_adapter(self, caller: str, request: Message) -> Message:
        with self._listing:  # one at a time: a large manifest takes seconds and much memory
            next_piece = self._escrow.listings.add(caller, _document(request, "manifest"))
        logger.info(
            "an adapter is listed by %s, pieces of its weights here: %d", caller, next_piece
        )
        return Message(DONE, {"next_piece": next_piece})

    def _upload(self, caller: str, request: Message) -> Message:
        fields, piece = _fields(request, adapter_id=str, piece=int), _bytes(request, "content")
        self._escrow.listings.upload(caller, fields["adapter_id"], fields["piece"], piece)
        return Message(DONE)

    def _owe(self, caller: str, request: Message) -> Message:
        session, signed = _fields(request, session=str)["session"], _document(request, "by_buyer")
        return _trade(self._escrow.owe(caller, session, signed), request)

    def _deposit_key(self, caller: str, request: Message) -> Message:
        session, key = _fields(request, session=str)["session"], _bytes(request, "key")
        return _trade(self._escrow.deposit_key(caller, session, key), request)

    def _key(self, caller: str, request: Message) -> Message:
        key = self._escrow.key(caller, _fields(request, session=str)["session"])
        return Message(DONE, tensors={"key": _tensor(key)})

    def _sealed(self, caller: str, request: Message) -> Message:
        fields = _fields(request, session=str, piece=int)
        piece = self._escrow.sealed(caller, fields["session"], fields["piece"])
        return Message(DONE, tensors={"content": _tensor(piece)})

    def _statement(self, caller: str, request: Message) -> Message:
        statement = self._escrow.statement(caller, _fields(request, session=str)["session"])
        return Message(DONE, {"statement": statement.to_json()})

    def _balance(self, caller: str, request: Message) -> Message:
        _fields(request)
        return Message(DONE, {"balance": self._escrow.balance(caller)})


class EscrowClient:
    """The escrow, seen by one party; every operation is that of `Escrow` and may be repeated.

    Args:
        identity: Who calls.
        address: Host and port of the escrow.
        certificate: That of the escrow, as PEM text: the one in the manifest.
        timeout: Seconds until an answer begins; an opening check takes about one.

    Raises:
        SignatureError: if the certificate is not allowed.
    """

    def __init__(
        self,
        identity: Identity,
        address: tuple[str, int],
        certificate: str,
        timeout: float = 60,
    ) -> None:
        self._escrow_key = public_key_of(certificate)
        self._channel = Channel(identity, address, certificate, timeout, limits=LIMITS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close_channel()

    @property
    def traffic(self) -> Traffic:
        """Bytes of all messages so far."""
        return self._channel.traffic

    def close_channel(self) -> None:
        """Close the connection; the next operation opens another."""
        self._channel.close()

    def list_adapter(self, manifest: SignedDocument, sealed: bytes) -> None:
        """Offer an adapter: its signed manifest, then what is not there yet of its weights."""
        listed = self._channel.request("list_adapter", {}, {"manifest": _envelope(manifest)})
        next_piece = listed.fields.get("next_piece")
        if type(next_piece) is not int or next_piece < 0:
            raise ProtocolError("the escrow answered with no number of the next piece")
        adapter_id = sha256_hex(canonical_json(manifest.document))
        for start in range(next_piece * PIECE_BYTES, len(sealed), PIECE_BYTES):
            fields = {"adapter_id": adapter_id, "piece": start // PIECE_BYTES}
            piece = {"content": _tensor(sealed[start : start + PIECE_BYTES])}
            self._channel.request("upload", fields, piece)

    def sealed(self, session: str, manifest: AdapterManifest) -> bytes:
        """Return the sealed weights once they are paid for, as the buyer."""
        sealed = bytearray()
        while len(sealed) < manifest.sealed_bytes:
            fields = {"session": session, "piece": len(sealed) // PIECE_BYTES}
            piece = _bytes(self._channel.request("sealed", fields), "content")
            if len(piece) != min(PIECE_BYTES, manifest.sealed_bytes - len(sealed)):
                raise ProtocolError(f"the escrow sent {len(piece)} bytes as a piece of the weights")
            sealed += piece
        return bytes(sealed)

    def open_trade(
        self,
        adapter_id: str,
        session: str,
        nonce_user: str,
        nonce_contributor: str,
        deposit_rows: int = 0,
    ) -> Trade:
        """Begin the trade that belongs to a session, as its buyer, with a deposit for rows."""
        return self._ask(
            "open_trade",
            session,
            adapter_id=adapter_id,
            nonce_user=nonce_user,
            nonce_contributor=nonce_contributor,
            deposit_rows=deposit_rows,
        )

    def owe(self, session: str, by_buyer: SignedDocument) -> Trade:
        """Show the buyer's word for rows, as the seller, before they are answered."""
        return self._ask("owe", session, {"by_buyer": _envelope(by_buyer)})

    def pay(self, session: str) -> Trade:
        """Have the price locked, as the buyer."""
        return self._ask("pay", session)

    def deposit_key(self, session: str, key: bytes) -> Trade:
        """Hand over the key, as the seller; if it opens other weights, the trade is REFUNDED."""
        return self._ask("deposit_key", session, {"key": _tensor(key)})

    def key(self, session: str) -> bytes:
        """Return the key once it is released, as the buyer."""
        return _bytes(self._channel.request("key", {"session": session}), "key")

    def opened(self, session: str) -> Trade:
        """Report that the weights were opened, as the buyer; the seller is paid."""
        return self._ask("opened", session)

    def trade(self, session: str) -> Trade:
        """Return the trade as it stands."""
        return self._ask("trade", session)

    def statement(self, session: str, adapter_id: str) -> SignedDocument:
        """Return what the escrow has signed about a trade of this adapter.

        Raises:
            SignatureError: if it has not signed it.
            ProtocolError: if it speaks of another trade or adapter, or of none.
        """
        answer = self._channel.request("statement", {"session": session})
        statement = SignedDocument.from_json(answer.fields.get("statement"))
        trade = Trade.from_json(statement.check(STATEMENT, self._escrow_key))
        if (trade.session, trade.adapter_id) != (session, adapter_id):
            raise ProtocolError(
                f"the escrow's statement is about trade {trade.session} of adapter "
                f"{trade.adapter_id}, not {session} of {adapter_id}"
            )
        return statement

    def balance(self) -> int:
        """Return the credits that this party may spend."""
        balance = self._channel.request("balance").fields.get("balance")
        if type(balance) is not int:
            raise ProtocolError("the escrow answered with a balance that is no integer")
        return balance

    def _ask(
        self,
        operation: str,
        session: str,
        tensors: Mapping[str, NDArray[np.uint8]] | None = None,
        **fields: str | int,
    ) -> Trade:
        answer = self._channel.request(operation, {"session": session, **fields}, tensors)
        trade = Trade.from_json(answer.fields)
        if trade.session != session:
            raise ProtocolError(f"the escrow answered about trade {trade.session}, not {session}")
        return trade


def _trade(trade: Trade, request: Message) -> Message:
    logger.info("trade %s: %s, now %s", trade.session, request.kind, trade.state)
    return Message(TRADE, trade.to_json())


def _fields(request: Message, **types: type) -> dict[str, Any]:
    if request.fields.keys() != types.keys():
        raise ProtocolError(f"{request.kind} has the fields {', '.join(types) or 'none'}")
    for name, kind in types.items():
        if type(request.fields[name]) is not kind:
            raise ProtocolError(f"{name} of {request.kind} must be of type {kind.__name__}")
    return dict(request.fields)


def _bytes(message: Message, name: str) -> bytes:
    tensor = message.tensors.get(name)
    if tensor is None or tensor.dtype != np.uint8 or tensor.ndim != 1:
        raise ProtocolError(f"{name} of {message.kind} must be a vector of uint8")
    return tensor.tobytes()


def _document(message: Message, name: str) -> SignedDocument:
    payload = _bytes(message, name)
    if len(payload) > MAX_BYTES:
        raise ProtocolError(f"{name} of {message.kind} has {len(payload)} bytes, not {MAX_BYTES}")
    try:
        envelope: Any = json.loads(payload)
        canonical_json(envelope)  # Python reads NaN and infinity, which cannot have been signed
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"{name} of {message.kind} is not JSON: {error}") from None
    return SignedDocument.from_json(envelope)


def _tensor(payload: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(payload, np.uint8)


def _envelope(document: SignedDocument) -> NDArray[np.uint8]:
    return _tensor(canonical_json(document.to_json()))
