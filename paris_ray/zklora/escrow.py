r"""The escrow: it holds the key of a sealed adapter and the buyer's money, and swaps them.

A trade belongs to a session, is there before the first row is answered, and goes

    COMMITTED -> PAID -> RELEASED -> SETTLED
        \__________\____________________ REFUNDED

In COMMITTED a deposit is locked, and the seller shows what the buyer has signed for: so many rows.
Whatever becomes of the trade, they are paid for. Whether a session and its proofs hold is between
the parties: the buyer pays if they do, and there is nothing that the escrow could add. It checks
what only it can: the sealed weights under the seller's key are the committed ones, before either
has what it wants. Whoever falls silent is timed out.

Every operation may be repeated: one that has happened returns the trade as it is. Journal and
ledger are one SQLite file, and a step moves state and money in one transaction.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from paris_ray.errors import TradeError
from paris_ray.identity import Identity
from paris_ray.signatures import SignedDocument
from paris_ray.zklora.journal import Journal, Value
from paris_ray.zklora.ledger import LEDGER_TABLES, SQLiteLedger
from paris_ray.zklora.listings import LISTING_TABLES, Listings
from paris_ray.zklora.manifest import AdapterManifest
from paris_ray.zklora.sealing import KEY_BYTES
from paris_ray.zklora.trade import BOUGHT, TRADE_TABLES, Trade, TradeState, signed_rows

STATEMENT = "escrow"  # the kind of document that the escrow signs
MAX_OPEN_TRADES = 100  # of one buyer

HOUR = 3600.0
# Seconds that a trade may rest in a state. A buyer who has paid waits for the key an hour.
DEADLINES: Mapping[TradeState, float] = {
    TradeState.COMMITTED: 24 * HOUR,
    TradeState.PAID: HOUR,
    TradeState.RELEASED: 72 * HOUR,
}

SCHEMA_VERSION = 2
SCHEMA = (*LEDGER_TABLES, *LISTING_TABLES, *TRADE_TABLES)
COLUMNS = ", ".join(Trade.model_fields)


def open_journal(path: Path) -> Journal:
    """Return an escrow's journal, with its ledger; raises ArtifactError as `Journal` does."""
    return Journal(path, SCHEMA, SCHEMA_VERSION)


class Escrow:
    """The trades of one escrow. Safe to call from several threads.

    `caller` is always the public key of whoever calls, as the channel has proved it. All operations
    raise TradeError if the caller has no such trade, may not take this step, or if the trade's
    state does not allow it; nothing is changed then.

    Args:
        journal: Where everything is kept: `open_journal(...)`.
        identity: Whose certificate the manifests name, and who signs statements.
        ledger: Who owns how much.
        clock: Seconds since 1970.

    Attributes:
        identity: See above.
        listings: The adapters that are for sale.
    """

    def __init__(
        self,
        journal: Journal,
        identity: Identity,
        ledger: SQLiteLedger,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._journal = journal
        self.identity = identity
        self._ledger = ledger
        self._clock = clock
        self.listings = Listings(journal, identity.certificate)

    def open_trade(
        self,
        caller: str,
        adapter_id: str,
        session: str,
        nonce_user: str,
        nonce_contributor: str,
        deposit_rows: int = 0,
    ) -> Trade:
        """Begin the trade that belongs to a session, and lock a deposit; the caller is the buyer.

        The deposit covers `deposit_rows` of each module; asked again with more, it grows.

        Raises:
            TradeError: if the session's id is not made of this adapter, its base and the nonces,
                the adapter's weights are not all here, the deposit is not allowed or not covered,
                or if the caller has too many trades that have not ended.
        """
        self.expire()
        manifest = self.listings.manifest(adapter_id)
        if session != manifest.session_id(nonce_user, nonce_contributor):
            raise TradeError("the session's id is not that of this adapter, its base and nonces")
        if not 0 <= deposit_rows <= manifest.budget_rows:
            budget = manifest.budget_rows
            raise TradeError(f"deposit_rows={deposit_rows} is not allowed: 0 to {budget}")
        with self._journal.transaction():
            found = self._journal.first("SELECT buyer FROM trades WHERE session = ?", session)
            if found is None:
                self._check_may_open(caller, manifest)
                terms = (caller, manifest.contributor, manifest.price, manifest.price_per_row)
                insert = "INSERT INTO trades VALUES (?, ?, ?, ?, ?, ?, 0, 0, ?, ?, NULL, NULL)"
                state = (TradeState.COMMITTED, self._clock())
                self._journal.execute(insert, session, adapter_id, *terms, *state)
            elif found != (caller,):
                raise TradeError(f"session {session} has another buyer")
            trade = self._trade(session)
            if deposit_rows > trade.deposit_rows:
                trade.require(TradeState.COMMITTED, "a larger deposit")
                self._ledger.lock(session, trade.buyer, deposit_rows * trade.price_per_row)
                self._set(session, deposit_rows=deposit_rows)
            return self._trade(session)

    def _check_may_open(self, buyer: str, manifest: AdapterManifest) -> None:
        query = "SELECT count(*) FROM trades WHERE buyer = ? AND state NOT IN (?, ?)"
        (trades,) = self._journal.first(query, buyer, TradeState.SETTLED, TradeState.REFUNDED)
        if trades >= MAX_OPEN_TRADES:
            raise TradeError(
                f"{buyer} has {trades} trades that have not ended: at most {MAX_OPEN_TRADES}"
            )
        if missing := self.listings.missing(manifest):
            raise TradeError(
                f"adapter {manifest.adapter_id} misses {missing} pieces of its weights"
            )

    def owe(self, caller: str, session: str, by_buyer: SignedDocument) -> Trade:
        """Take from the seller the buyer's word for rows, before they are answered.

        Raises:
            TradeError: if the deposit does not cover them.
            ParisError: if the buyer has not signed this for this session.
        """
        with self._journal.transaction():
            trade = self._of(caller, session, "seller", "owe")
            rows = signed_rows(by_buyer, trade.buyer, trade.adapter_id, session)
            if rows > trade.rows:
                trade.require(TradeState.COMMITTED, "owe")
                if rows > trade.deposit_rows:
                    raise TradeError(
                        f"{rows} rows are signed for, the deposit covers {trade.deposit_rows}"
                    )
                self._set(session, rows=rows)
            return self._trade(session)

    def pay(self, caller: str, session: str) -> Trade:
        """Lock the price, of which the deposit is a part.

        Raises:
            TradeError: if the buyer's balance does not cover the rest.
        """
        with self._journal.transaction():
            trade = self._of(caller, session, "buyer", "pay")
            if trade.state not in (TradeState.PAID, *BOUGHT):
                trade.require(TradeState.COMMITTED, "pay")
                self._ledger.lock(session, trade.buyer, max(trade.price, trade.deposit))
                self._move(session, TradeState.PAID)
            return self._trade(session)

    def deposit_key(self, caller: str, session: str, key: bytes) -> Trade:
        """Take the seller's key and run the opening check.

        Returns:
            The trade: RELEASED, or REFUNDED with the reason if the check failed; the seller has
            nothing of a trade with wrong weights, not even for rows.
        """
        if len(key) != KEY_BYTES:
            raise TradeError(f"a key of {len(key)} bytes is not allowed: {KEY_BYTES}")
        trade = self._of(caller, session, "seller", "deposit_key")
        if not self._is_new_key(trade, key):
            return trade
        # It may take a second: not within a transaction.
        fault = self.listings.opening_fault(trade.adapter_id, key)
        with self._journal.transaction():
            trade = self._of(caller, session, "seller", "deposit_key")
            if self._is_new_key(trade, key):
                self._set(session, key=key)
                if fault is None:
                    self._move(session, TradeState.RELEASED)
                else:
                    reason = f"the opening check failed: {fault}"
                    self._end(trade, TradeState.REFUNDED, 0, reason)
            return self._trade(session)

    def _is_new_key(self, trade: Trade, key: bytes) -> bool:
        (known,) = self._journal.first("SELECT key FROM trades WHERE session = ?", trade.session)
        if known not in (None, key):
            raise TradeError(f"another key was deposited for trade {trade.session}")
        if known is None:
            trade.require(TradeState.PAID, "deposit_key")
        return known is None

    def key(self, caller: str, session: str) -> bytes:
        """Return the key that passed the opening check, to the buyer who has paid."""
        self._check_bought(caller, session)
        (key,) = self._journal.first("SELECT key FROM trades WHERE session = ?", session)
        return bytes(key)

    def sealed(self, caller: str, session: str, number: int) -> bytes:
        """Return a piece of the sealed weights, to the buyer who has paid."""
        return self.listings.piece(self._check_bought(caller, session).adapter_id, number)

    def _check_bought(self, caller: str, session: str) -> Trade:
        trade = self.trade(caller, session)
        if caller != trade.buyer or trade.state not in BOUGHT:
            raise TradeError(
                "key and weights go to the buyer once the key is released, not to "
                f"{caller} in {trade.state}"
            )
        return trade

    def opened(self, caller: str, session: str) -> Trade:
        """Record that the buyer has opened the weights, and pay the seller."""
        with self._journal.transaction():
            trade = self._of(caller, session, "buyer", "opened")
            if trade.state is not TradeState.SETTLED:
                trade.require(TradeState.RELEASED, "opened")
                self._end(trade, TradeState.SETTLED, max(trade.price, trade.owed))
            return self._trade(session)

    def trade(self, caller: str, session: str) -> Trade:
        """Return a trade of the caller's."""
        self.expire()
        trade = self._find(session)
        if trade is None or caller not in (trade.buyer, trade.seller):
            # A foreign trade reads like none at all.
            raise TradeError(f"{caller} has no trade {session}")
        return trade

    def statement(self, caller: str, session: str) -> SignedDocument:
        """Return what the escrow signs about a trade of the caller's, of kind STATEMENT."""
        return SignedDocument.sign(STATEMENT, self.trade(caller, session).to_json(), self.identity)

    def balance(self, caller: str) -> int:
        """Return the credits that the caller may spend."""
        return self._ledger.balance(caller)

    def expire(self) -> list[Trade]:
        """End the trades whose deadline has passed, and return them.

        Without a key the buyer gets back what it does not owe for rows; with one that passed the
        opening check the silence of the buyer is consent.
        """
        now, ended = self._clock(), []
        with self._journal.transaction():
            for state, seconds in DEADLINES.items():
                query = "SELECT session FROM trades WHERE state = ? AND since <= ?"
                for (session,) in self._journal.execute(query, state, now - seconds):
                    trade, reason = self._trade(session), f"{seconds:g} s in {state}"
                    if state is TradeState.RELEASED:
                        self._end(trade, TradeState.SETTLED, max(trade.price, trade.owed), reason)
                    else:
                        self._end(trade, TradeState.REFUNDED, trade.owed, reason)
                    ended.append(self._trade(session))
        return ended

    def _of(self, caller: str, session: str, party: str, operation: str) -> Trade:
        trade = self.trade(caller, session)
        if caller != getattr(trade, party):
            raise TradeError(f"{operation} is for the {party} of a trade")
        return trade

    def _end(self, trade: Trade, state: TradeState, paid: int, reason: str | None = None) -> None:
        self._ledger.settle(trade.session, trade.seller, paid)
        self._move(trade.session, state)
        self._set(trade.session, reason=reason)

    def _move(self, session: str, state: TradeState) -> None:
        self._set(session, state=state, since=self._clock())

    def _set(self, session: str, **columns: Value) -> None:
        self._journal.update("trades", "session", session, **columns)

    def _find(self, session: str) -> Trade | None:
        row = self._journal.first(f"SELECT {COLUMNS} FROM trades WHERE session = ?", session)
        return None if row is None else Trade(**dict(zip(Trade.model_fields, row, strict=True)))

    def _trade(self, session: str) -> Trade:
        trade = self._find(session)
        assert trade is not None
        return trade
