"""One purchase, as its escrow tells of it, and what a buyer signs for the rows that it saw."""

import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from paris_ray.errors import ProtocolError
from paris_ray.receipts import DIGEST
from paris_ray.signatures import SignedDocument, Signer
from paris_ray.zklora.manifest import MAX_COUNT

ROWS = "rows"  # the kind of document by which a buyer owes
MAX_REASON = 1000  # characters


class TradeState(StrEnum):
    """Where a trade stands."""

    COMMITTED = "COMMITTED"  # a session's deposit is locked; its rows may be answered
    PAID = "PAID"  # the price is locked
    RELEASED = "RELEASED"  # the key passed the opening check; the buyer may fetch key and weights
    SETTLED = "SETTLED"  # the seller has the price
    REFUNDED = "REFUNDED"  # the buyer has back what it did not owe for rows


BOUGHT = (TradeState.RELEASED, TradeState.SETTLED)  # the buyer may have key and weights


@dataclass(frozen=True, slots=True)
class Trade:
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

    session: str
    adapter_id: str
    buyer: str
    seller: str
    price: int
    price_per_row: int
    deposit_rows: int
    rows: int
    state: TradeState
    since: float
    reason: str | None

    @property
    def deposit(self) -> int:
        """Credits that are locked for rows."""
        return self.deposit_rows * self.price_per_row

    @property
    def owed(self) -> int:
        """Credits that rows have cost so far."""
        return self.rows * self.price_per_row

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {**asdict(self), "state": str(self.state)}

    @classmethod
    def from_json(cls, document: Any) -> "Trade":
        """Return the trade that `to_json` wrote, or that anybody says it did.

        Raises:
            ProtocolError: naming a field that is missing, unknown or not allowed.
        """
        if not isinstance(document, Mapping) or document.keys() != _ALLOWED.keys():
            raise ProtocolError(f"not a trade: the fields of one are {', '.join(_ALLOWED)}")
        for name, is_allowed in _ALLOWED.items():
            if not is_allowed(value := document[name]):
                raise ProtocolError(f"not a trade: {name}={reprlib.repr(value)} is not allowed")
        return cls(**{**document, "state": TradeState(document["state"])})


def sign_rows(buyer: Signer, adapter_id: str, session: str, rows: int) -> SignedDocument:
    """Return a buyer's word that it owes for so many rows of a session, in all.

    Args:
        buyer: Who owes.
        adapter_id: What is tried.
        session: Where.
        rows: Of the module with the most, from the session's beginning: a later word replaces this.
    """
    document = {"adapter_id": adapter_id, "session": session, "rows": rows}
    return SignedDocument.sign(ROWS, document, buyer)


def signed_rows(signed: SignedDocument, buyer: str, adapter_id: str, session: str) -> int:
    """Return how many rows a buyer has signed for.

    Raises:
        SignatureError: if it is not signed by the buyer.
        ProtocolError: if it is about another session or adapter, or about no number of rows.
    """
    document = signed.check(ROWS, buyer)
    rows = document.get("rows")
    if document != {"adapter_id": adapter_id, "session": session, "rows": rows}:
        raise ProtocolError("what is signed for is another session or adapter, or none")
    if type(rows) is not int or not 0 <= rows <= MAX_COUNT:
        raise ProtocolError(f"rows={rows!r:.80} is not allowed: an integer from 0 to {MAX_COUNT}")
    return rows


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and DIGEST.fullmatch(value) is not None


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_COUNT


def _is_time(value: object) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and 0 <= value < math.inf


def _is_state(value: object) -> bool:
    return isinstance(value, str) and value in tuple(TradeState)


def _is_reason_or_null(value: object) -> bool:
    if value is None:
        return True
    return isinstance(value, str) and len(value) <= 2 * MAX_REASON and value.isprintable()


_ALLOWED: Mapping[str, Callable[[object], bool]] = {
    "session": _is_digest,
    "adapter_id": _is_digest,
    "buyer": _is_digest,  # a key has as many digits
    "seller": _is_digest,
    "price": _is_count,
    "price_per_row": _is_count,
    "deposit_rows": _is_count,
    "rows": _is_count,
    "state": _is_state,
    "since": _is_time,
    "reason": _is_reason_or_null,
}
