"""One purchase, as its escrow tells of it, and what a buyer signs for the rows that it saw."""

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from paris_ray.documents import Count, Digest, Document, Printable
from paris_ray.errors import ProtocolError, TradeError
from paris_ray.signatures import SignedDocument, Signer

ROWS = "rows"  # the kind of document by which a buyer owes
MAX_REASON = 1000  # characters

# An escrow's; what the key is, nobody is told with the trade.
TRADE_TABLES = (
    "CREATE TABLE trades (session TEXT PRIMARY KEY, adapter_id TEXT NOT NULL,"
    " buyer TEXT NOT NULL, seller TEXT NOT NULL, price INTEGER NOT NULL,"
    " price_per_row INTEGER NOT NULL, deposit_rows INTEGER NOT NULL, rows INTEGER NOT NULL,"
    " state TEXT NOT NULL, since REAL NOT NULL, reason TEXT, key BLOB) STRICT",
    "CREATE INDEX trades_by_state ON trades (state, since)",
    "CREATE INDEX trades_by_buyer ON trades (buyer, state)",
)


class TradeState(StrEnum):
    """Where a trade stands."""

    COMMITTED = "COMMITTED"  # a session's deposit is locked; its rows may be answered
    PAID = "PAID"  # the price is locked
    RELEASED = "RELEASED"  # the key passed the opening check; the buyer may fetch key and weights
    SETTLED = "SETTLED"  # the seller has the price
    REFUNDED = "REFUNDED"  # the buyer has back what it did not owe for rows


BOUGHT = (TradeState.RELEASED, TradeState.SETTLED)  # the buyer may have key and weights


class Trade(Document):
    """One purchase, as it stands.

    Attributes:
        session: Its id: that of the session in which the adapter is tried.
        adapter_id: What is bought.
        buyer: Public key.
        seller: Public key: the manifest's contributor.
        price: Credits.
        price_per_row: Credits that a row of every module costs, part of the price if it is bought.
        deposit_rows: Rows that are covered by the deposit.
        rows: Rows that the buyer has signed for, as far as the seller has shown it.
        state: Where it stands.
        since: When it came there, seconds since 1970.
        reason: Why it was refunded, or settled without the buyer's word.
    """

    session: Digest
    adapter_id: Digest
    buyer: Digest  # a key has as many digits
    seller: Digest
    price: Count
    price_per_row: Count
    deposit_rows: Count
    rows: Count
    state: Annotated[TradeState, Field(strict=False)]
    since: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    reason: Annotated[Printable, Field(max_length=2 * MAX_REASON)] | None

    def require(self, state: TradeState, operation: str) -> None:
        """Raise TradeError unless it stands there, as an operation needs it."""
        if self.state is not state:
            why = f" ({self.reason})" if self.reason else ""
            raise TradeError(
                f"{operation} needs a trade in {state}: {self.session} is in {self.state}{why}"
            )

    @property
    def deposit(self) -> int:
        """Credits that are locked for rows."""
        return self.deposit_rows * self.price_per_row

    @property
    def owed(self) -> int:
        """Credits that rows have cost so far."""
        return self.rows * self.price_per_row


class _Word(Document):
    """A buyer's word that it owes for so many rows of a session, in all."""

    adapter_id: Digest
    session: Digest
    rows: Count


def sign_rows(buyer: Signer, adapter_id: str, session: str, rows: int) -> SignedDocument:
    """Return a buyer's word that it owes for so many rows of a session.

    They are those of the module with the most, from the session's beginning: a later word replaces
    an earlier one.
    """
    document = {"adapter_id": adapter_id, "session": session, "rows": rows}
    return SignedDocument.sign(ROWS, document, buyer)


def signed_rows(signed: SignedDocument, buyer: str, adapter_id: str, session: str) -> int:
    """Return how many rows a buyer has signed for.

    Raises:
        SignatureError: if it is not signed by the buyer.
        ProtocolError: if it is about another session or adapter, or about no number of rows.
    """
    word = _Word.from_json(signed.check(ROWS, buyer))
    if (word.adapter_id, word.session) != (adapter_id, session):
        raise ProtocolError("what is signed for is another session or adapter")
    return word.rows
