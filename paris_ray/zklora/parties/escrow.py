"""The escrow as a service over the parties' channel, and its client.

A request names an operation of `paris_ray.zklora.escrow.Escrow`. Who calls is whom TLS has proved.
"""

import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self, TypeVar

from paris_ray.artifacts import canonical_json, sha256_hex
from paris_ray.errors import ConfigError, ProtocolError
from paris_ray.identity import Identity, public_key_of
from paris_ray.json_documents import load_json
from paris_ray.signatures import SignedDocument
from paris_ray.zklora.escrow import STATEMENT, Escrow
from paris_ray.zklora.listings import PIECE_BYTES
from paris_ray.zklora.manifest import MAX_BYTES, AdapterManifest
from paris_ray.zklora.parties.channel import Channel
from paris_ray.zklora.parties.frames import Limits, Message, Sizes
from paris_ray.zklora.parties.messages import OPERATIONS, Value, message_of, values_of
from paris_ray.zklora.parties.server import Server
from paris_ray.zklora.trade import Trade

ANSWER_S = 60.0  # until an answer begins; an opening check takes about a second
SWEEP_S = 1.0  # between two looks for deadlines that have passed
# Weights come in pieces, announced by a manifest: nobody holds more memory than this, before or
# after listing something.
LIMITS = Limits(
    requests=Sizes(
        frame_bytes=2 * PIECE_BYTES,
        of_kinds={"list_adapter": MAX_BYTES + 2**20},
    ),
    connections_a_peer=4,
)

TRADE, DONE = "trade", "done"  # kinds of answers: how a trade stands, or one other value
VALUE = "value"
Kind = TypeVar("Kind", int, bytes, SignedDocument)

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
        self._own: Mapping[str, Callable[..., Any]] = {
            "list_adapter": self._list_adapter,
            "upload": escrow.listings.upload,
        }
        self._closed = threading.Event()
        self._listing = threading.Lock()
        self._server = Server(escrow.identity, host, port, clients, self._answer, LIMITS)
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

    def _answer(self, caller: str, request: Message) -> Message:
        if request.kind not in OPERATIONS:
            raise ProtocolError(f"the escrow has no operation {request.kind[:80]!r}")
        operation = self._own.get(request.kind) or getattr(self._escrow, request.kind)
        done = operation(caller, *values_of(request, OPERATIONS[request.kind]))
        if isinstance(done, Trade):
            logger.info("trade %s: %s, now %s", done.session, request.kind, done.state)
            return Message(TRADE, done.to_json())
        return message_of(DONE, {} if done is None else {VALUE: done})

    def _list_adapter(self, caller: str, manifest: bytes) -> int:
        with self._listing:  # one at a time: a large manifest takes seconds and much memory
            next_piece = self._escrow.listings.add(caller, _signed_manifest(manifest))
        logger.info(
            "an adapter is listed by %s, pieces of its weights here: %d", caller, next_piece
        )
        return next_piece


def _signed_manifest(payload: bytes) -> SignedDocument:
    if len(payload) > MAX_BYTES:
        raise ProtocolError(f"a manifest of {len(payload)} bytes is not allowed: {MAX_BYTES}")
    try:
        return SignedDocument.from_json(load_json(payload))
    except ValueError as error:
        raise ProtocolError(f"manifest is no signed document: {error}") from None


class EscrowClient:
    """The escrow, seen by one party; every operation is that of `Escrow` and may be repeated.

    Safe from several threads; as many operations go on at a time as there are connections.

    Args:
        identity: Who calls.
        address: Host and port of the escrow.
        certificate: That of the escrow, as PEM text: the one in the manifest, or None.
        connections: At most; the escrow has `LIMITS.connections_a_peer`.

    Raises:
        ConfigError: if there is no certificate.
        SignatureError: if the certificate is not allowed.
    """

    def __init__(
        self,
        identity: Identity,
        address: tuple[str, int],
        certificate: str | None,
        connections: int = 1,
    ) -> None:
        if certificate is None:
            raise ConfigError("escrow is not allowed: the manifest names none")
        self._escrow_key = public_key_of(certificate)
        self._channels = [
            Channel(identity, address, certificate, ANSWER_S, limits=LIMITS)
            for _ in range(connections)
        ]
        self._idle: queue.PriorityQueue[int] = queue.PriorityQueue()
        for number in range(connections):
            self._idle.put(number)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for channel in self._channels:
            channel.close()

    @property
    def num_bytes(self) -> int:
        """Bytes of all messages so far."""
        return sum(channel.traffic.total for channel in self._channels)

    def list_adapter(self, manifest: SignedDocument, sealed: bytes) -> None:
        """Offer an adapter: its signed manifest, then what is not there yet of its weights."""
        envelope = canonical_json(manifest.to_json())
        next_piece = self._value("list_adapter", int, manifest=envelope)
        if next_piece < 0:
            raise ProtocolError(f"the escrow has no next piece {next_piece}")
        adapter_id = sha256_hex(canonical_json(manifest.document))
        for start in range(next_piece * PIECE_BYTES, len(sealed), PIECE_BYTES):
            content = sealed[start : start + PIECE_BYTES]
            piece = start // PIECE_BYTES
            self._ask("upload", adapter_id=adapter_id, piece=piece, content=content)

    def sealed(self, session: str, manifest: AdapterManifest) -> bytes:
        """Return the sealed weights once they are paid for, as the buyer."""
        sealed = bytearray()
        while len(sealed) < manifest.sealed_bytes:
            number = len(sealed) // PIECE_BYTES
            piece = self._value("sealed", bytes, session=session, piece=number)
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
        return self._trade(
            "open_trade",
            session,
            adapter_id=adapter_id,
            nonce_user=nonce_user,
            nonce_contributor=nonce_contributor,
            deposit_rows=deposit_rows,
        )

    def owe(self, session: str, by_buyer: SignedDocument) -> Trade:
        """Show the buyer's word for rows, as the seller, before they are answered."""
        return self._trade("owe", session, by_buyer=by_buyer)

    def pay(self, session: str) -> Trade:
        """Have the price locked, as the buyer."""
        return self._trade("pay", session)

    def deposit_key(self, session: str, key: bytes) -> Trade:
        """Hand over the key, as the seller; if it opens other weights, the trade is REFUNDED."""
        return self._trade("deposit_key", session, key=key)

    def key(self, session: str) -> bytes:
        """Return the key once it is released, as the buyer."""
        return self._value("key", bytes, session=session)

    def opened(self, session: str) -> Trade:
        """Report that the weights were opened, as the buyer; the seller is paid."""
        return self._trade("opened", session)

    def trade(self, session: str) -> Trade:
        """Return the trade as it stands."""
        return self._trade("trade", session)

    def statement(self, session: str, adapter_id: str) -> SignedDocument:
        """Return what the escrow has signed about a trade of this adapter.

        Raises:
            SignatureError: if it has not signed it.
            ProtocolError: if it speaks of another trade or adapter, or of none.
        """
        statement = self._value("statement", SignedDocument, session=session)
        trade = Trade.from_json(statement.check(STATEMENT, self._escrow_key))
        if (trade.session, trade.adapter_id) != (session, adapter_id):
            raise ProtocolError(
                f"the escrow's statement is about trade {trade.session} of adapter "
                f"{trade.adapter_id}, not {session} of {adapter_id}"
            )
        return statement

    def balance(self) -> int:
        """Return the credits that this party may spend."""
        return self._value("balance", int)

    def _trade(self, operation: str, session: str, **values: Value) -> Trade:
        trade = Trade.from_json(self._ask(operation, session=session, **values).fields)
        if trade.session != session:
            raise ProtocolError(f"the escrow answered about trade {trade.session}, not {session}")
        return trade

    def _value(self, operation: str, kind: type[Kind], **values: Value) -> Kind:
        (value,) = values_of(self._ask(operation, **values), {VALUE: kind})
        return value

    def _ask(self, operation: str, **values: Value) -> Message:
        request, number = message_of(operation, values), self._idle.get()
        try:
            return self._channels[number].request(request.kind, request.fields, request.tensors)
        finally:
            # Only the first one stays open: the escrow has few places for a key, and whoever serves
            # two offers with one key would keep them from itself.
            if number:
                self._channels[number].close()
            self._idle.put(number)
