"""The escrow: it holds the key of a sealed adapter and the buyer's money, and swaps them.

A trade is a session's purchase and goes

    COMMITTED -> INFERRED -> PROVED -> VERIFIED -> PAID -> KEY_RELEASED -> OPENED | DISPUTED
    -> SETTLED | REFUNDED

Before the swap the escrow runs the opening check itself: the sealed weights under this key are the
committed ones. So neither party can take without giving, and whoever falls silent is timed out.

Every operation may be repeated: one that has happened returns the trade as it is and changes
nothing. Journal and ledger are one SQLite file and a step moves state and money in one
transaction, so a trade survives the end of the process at any moment. No trade rests in OPENED or
DISPUTED: both are passed through within one operation.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from paris_ray.artifacts import canonical_json, sha256_hex
from paris_ray.errors import ParisError, TradeError
from paris_ray.identity import Identity
from paris_ray.receipts import State
from paris_ray.signatures import SignedDocument
from paris_ray.zklora.journal import Journal
from paris_ray.zklora.ledger import LEDGER_TABLES, Ledger
from paris_ray.zklora.manifest import AdapterManifest
from paris_ray.zklora.printable import printable
from paris_ray.zklora.sealing import KEY_BYTES, check_opening
from paris_ray.zklora.trade import MAX_REASON, Trade
from paris_ray.zklora.transcript import CLOSE, check_digest

STATEMENT = "escrow"  # the kind of document that the escrow signs
MAX_LISTED = 1000  # adapters of one seller
MAX_LISTED_BYTES = 2**34  # of their sealed weights
MAX_OPEN_TRADES = 100  # of one buyer
MANIFESTS_KEPT = 16  # in memory, parsed: each may have some MB

HOUR = 3600.0
# Seconds that a trade may rest in a state. A buyer who has paid waits for the key an hour.
DEADLINES: Mapping[State, float] = {
    State.COMMITTED: 24 * HOUR,
    State.INFERRED: 24 * HOUR,
    State.PROVED: 24 * HOUR,
    State.VERIFIED: 24 * HOUR,
    State.PAID: HOUR,
    State.KEY_RELEASED: 72 * HOUR,
}


@dataclass(frozen=True, slots=True)
class _Rule:
    """Who may take a step, from where to where."""

    parties: tuple[str, ...]
    before: State
    after: State


_RULES = {
    "close": _Rule(("buyer", "seller"), State.COMMITTED, State.INFERRED),
    "proved": _Rule(("buyer", "seller"), State.INFERRED, State.PROVED),
    "verified": _Rule(("buyer",), State.PROVED, State.VERIFIED),
    "pay": _Rule(("buyer",), State.VERIFIED, State.PAID),
    "deposit_key": _Rule(("seller",), State.PAID, State.KEY_RELEASED),
    "opened": _Rule(("buyer",), State.KEY_RELEASED, State.OPENED),
    "dispute": _Rule(("buyer",), State.KEY_RELEASED, State.DISPUTED),
}

SCHEMA_VERSION = 1
SCHEMA = (  # IF NOT EXISTS: the first journals had no version
    *LEDGER_TABLES,
    "CREATE TABLE IF NOT EXISTS adapters (adapter_id TEXT PRIMARY KEY,"
    " seller TEXT NOT NULL, manifest TEXT NOT NULL, sealed BLOB NOT NULL) STRICT",
    "CREATE INDEX IF NOT EXISTS adapters_by_seller ON adapters (seller)",
    "CREATE TABLE IF NOT EXISTS trades (session TEXT PRIMARY KEY,"
    " adapter_id TEXT NOT NULL, buyer TEXT NOT NULL, seller TEXT NOT NULL,"
    " price INTEGER NOT NULL, state TEXT NOT NULL, since REAL NOT NULL) STRICT",
    "CREATE INDEX IF NOT EXISTS trades_by_state ON trades (state, since)",
    "CREATE INDEX IF NOT EXISTS trades_by_buyer ON trades (buyer, state)",
    # What was done, by which content; never changed. An operation happens once in a trade.
    "CREATE TABLE IF NOT EXISTS steps (number INTEGER PRIMARY KEY,"
    " session TEXT NOT NULL, operation TEXT NOT NULL, content TEXT NOT NULL,"
    " state TEXT NOT NULL, UNIQUE (session, operation)) STRICT",
)


def open_journal(path: Path) -> Journal:
    """Return an escrow's journal, with its ledger; raises ArtifactError as `Journal` does."""
    return Journal(path, SCHEMA, SCHEMA_VERSION)


class Escrow:
    """The trades of one escrow. Safe to call from several threads.

    `caller` is always the public key of whoever calls, as the channel has proved it. All operations
    raise TradeError if the caller has no such trade, may not take this step, took it with other
    content, or if the trade's state does not allow it; nothing is changed then.

    Args:
        journal: Where everything is kept: `open_journal(...)`.
        identity: Whose certificate the manifests name, and who signs statements; an attribute.
        ledger: Who owns how much. One outside of the journal is called before the step is
            committed, perhaps twice: its movements are named by their trade.
        deadlines: Seconds that a trade may rest in a state, in place of those of DEADLINES.
        max_listed: Adapters that one seller may list.
        max_open_trades: Trades that one buyer may have before their end.
        clock: Seconds since 1970.
    """

    def __init__(
        self,
        journal: Journal,
        identity: Identity,
        ledger: Ledger,
        *,
        deadlines: Mapping[State, float] = MappingProxyType({}),
        max_listed: int = MAX_LISTED,
        max_open_trades: int = MAX_OPEN_TRADES,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if endless := sorted(deadlines.keys() - DEADLINES.keys()):
            raise TradeError(f"no deadline is allowed for {', '.join(endless)}")
        self._journal = journal
        self.identity = identity
        self._ledger = ledger
        self._deadlines = {**DEADLINES, **deadlines}
        self._max_listed = max_listed
        self._max_open_trades = max_open_trades
        self._clock = clock
        self._manifest = lru_cache(MANIFESTS_KEPT)(self._read_manifest)

    def list_adapter(self, caller: str, manifest: SignedDocument, sealed: bytes) -> str:
        """Store a sealed adapter and its manifest; return the adapter's id.

        Raises:
            TradeError: if the caller is not the contributor or has listed too many, the manifest
                names another escrow, or the bytes are not those of the manifest.
            ParisError: if the manifest is malformed or not signed by its contributor.
        """
        terms = AdapterManifest.from_signed(manifest)
        if terms.contributor != caller:
            raise TradeError(f"an adapter is listed by its contributor, {terms.contributor}")
        if terms.escrow_certificate != self.identity.certificate:
            raise TradeError("the manifest's escrow_certificate is not that of this escrow")
        if len(sealed) != terms.sealed_bytes:
            raise TradeError(f"{len(sealed)} sealed bytes, the manifest says {terms.sealed_bytes}")
        if sha256_hex(sealed) != terms.sealed_digest:
            raise TradeError("the sealed bytes are not those of the manifest's sealed_digest")
        with self._journal.transaction():
            if not self._is_listed(terms.adapter_id):
                self._check_may_list(caller, len(sealed))
                self._journal.execute(
                    "INSERT INTO adapters VALUES (?, ?, ?, ?)",
                    terms.adapter_id,
                    caller,
                    json.dumps(terms.document),
                    sealed,
                )
        return terms.adapter_id

    def _check_may_list(self, seller: str, size: int) -> None:
        ((listed, listed_bytes),) = self._journal.execute(
            "SELECT count(*), coalesce(sum(length(sealed)), 0) FROM adapters WHERE seller = ?",
            seller,
        )
        if listed >= self._max_listed or listed_bytes + size > MAX_LISTED_BYTES:
            raise TradeError(
                f"{listed} adapters of {seller} are listed, with {listed_bytes} bytes: at most "
                f"{self._max_listed} with {MAX_LISTED_BYTES} are allowed"
            )

    def sealed(self, adapter_id: str) -> bytes:
        """Return the ciphertext of a listed adapter: anybody may have it."""
        return bytes(self._listed(adapter_id, "sealed"))

    def open_trade(
        self, caller: str, adapter_id: str, session: str, nonce_user: str, nonce_contributor: str
    ) -> Trade:
        """Begin the purchase that belongs to a session; the caller is the buyer.

        Raises:
            TradeError: if the session's id is not made of this adapter, its base and the nonces,
                or if the caller has too many trades that have not ended.
        """
        self.expire()
        manifest = self._manifest(adapter_id)
        if session != manifest.session_id(nonce_user, nonce_contributor):
            raise TradeError("the session's id is not that of this adapter, its base and nonces")
        with self._journal.transaction():
            rows = self._journal.execute("SELECT buyer FROM trades WHERE session = ?", session)
            if not rows:
                self._check_may_open(caller)
                terms = (session, adapter_id, caller, manifest.contributor, manifest.price)
                self._journal.execute(
                    "INSERT INTO trades VALUES (?, ?, ?, ?, ?, ?, 0)", *terms, State.COMMITTED
                )
                self._append(session, "open_trade", {}, State.COMMITTED)
            elif rows[0][0] != caller:
                raise TradeError(f"session {session} has another buyer")
            return self._trade(session)

    def _check_may_open(self, buyer: str) -> None:
        ((trades,),) = self._journal.execute(
            "SELECT count(*) FROM trades WHERE buyer = ? AND state NOT IN (?, ?)",
            buyer,
            State.SETTLED,
            State.REFUNDED,
        )
        if trades >= self._max_open_trades:
            raise TradeError(
                f"{buyer} has {trades} trades that have not ended: at most "
                f"{self._max_open_trades} are allowed"
            )

    def close(
        self, caller: str, session: str, by_buyer: SignedDocument, by_seller: SignedDocument
    ) -> Trade:
        """Record that both parties have signed the same transcript.

        Raises:
            SignatureError: if a statement is not signed by its party.
        """

        def check(trade: Trade) -> None:
            statement = by_buyer.check(CLOSE, trade.buyer)
            if canonical_json(by_seller.check(CLOSE, trade.seller)) != canonical_json(statement):
                raise TradeError("buyer and seller have signed different transcripts")
            for name in ("session", "adapter_id"):
                if statement.get(name) != getattr(trade, name):
                    raise TradeError(f"the closing statement is of another {name}")
            check_digest("root", statement.get("root"))

        content = {"by_buyer": by_buyer.to_json(), "by_seller": by_seller.to_json()}
        return self._perform("close", caller, session, content, check)

    def proved(self, caller: str, session: str, proofs_digest: str) -> Trade:
        """Record that the proofs were handed over, by the SHA-256 of them all."""
        content = {"proofs_digest": check_digest("proofs_digest", proofs_digest)}
        return self._perform("proved", caller, session, content)

    def verified(self, caller: str, session: str, proofs_digest: str) -> Trade:
        """Record that the buyer accepts these proofs: the ones that `proved` spoke of."""

        def check(trade: Trade) -> None:
            if proofs_digest != trade.proofs_digest:
                raise TradeError(
                    f"proofs_digest={proofs_digest} was not handed over: {trade.proofs_digest} was"
                )

        return self._perform("verified", caller, session, {"proofs_digest": proofs_digest}, check)

    def pay(self, caller: str, session: str) -> Trade:
        """Lock the price; raises TradeError if the buyer's balance does not cover it."""

        def lock(trade: Trade) -> None:
            self._ledger.lock(session, trade.buyer, trade.price)

        return self._perform("pay", caller, session, {}, lock)

    def deposit_key(self, caller: str, session: str, key: bytes) -> Trade:
        """Take the seller's key and run the opening check.

        Returns:
            The trade: KEY_RELEASED, or REFUNDED with the reason if the check failed.
        """
        if len(key) != KEY_BYTES:
            raise TradeError(f"a key of {len(key)} bytes is not allowed: {KEY_BYTES}")
        content = {"key": key.hex()}
        if not self._is_due("deposit_key", caller, session, content):
            return self.trade(caller, session)
        fault = self._opening_fault(session, key)
        if fault is None:
            return self._perform("deposit_key", caller, session, content)
        return self._perform(
            "deposit_key",
            caller,
            session,
            content,
            lambda trade: self._refund(trade, f"the opening check failed: {fault}"),
            after=State.DISPUTED,
        )

    def key(self, caller: str, session: str) -> bytes:
        """Return the key that passed the opening check, to the buyer who has paid."""
        trade = self.trade(caller, session)
        if caller != trade.buyer or trade.state not in (State.KEY_RELEASED, State.SETTLED):
            raise TradeError(f"the key goes to the buyer once it is released, not in {trade.state}")
        return bytes.fromhex(self._contents(session)["deposit_key"]["key"])

    def opened(self, caller: str, session: str) -> Trade:
        """Record that the buyer has opened the weights, and pay the seller."""
        return self._perform("opened", caller, session, {}, self._settle)

    def dispute(self, caller: str, session: str, reason: str) -> Trade:
        """Repeat the opening check because the buyer asks for it.

        Returns:
            The trade: SETTLED if the check holds, else REFUNDED.
        """
        if not 0 < len(reason) <= MAX_REASON:
            raise TradeError(f"a reason of {len(reason)} characters: 1 to {MAX_REASON} are allowed")
        reason = printable(reason, MAX_REASON)  # it may quote the seller
        content = {"reason": reason}
        if not self._is_due("dispute", caller, session, content):
            return self.trade(caller, session)
        fault = self._opening_fault(session, self.key(caller, session))

        def decide(trade: Trade) -> None:
            if fault is None:
                self._settle(trade, f"disputed ({reason}), but the opening check holds")
            else:
                self._refund(trade, f"the opening check failed: {fault}")

        return self._perform("dispute", caller, session, content, decide)

    def trade(self, caller: str, session: str) -> Trade:
        """Return a trade of the caller's."""
        self.expire()
        return self._trade_of(caller, session)

    def statement(self, caller: str, session: str) -> SignedDocument:
        """Return what the escrow signs about a trade of the caller's, of kind STATEMENT."""
        return SignedDocument.sign(STATEMENT, self.trade(caller, session).to_json(), self.identity)

    def balance(self, caller: str) -> int:
        """Return the credits that the caller may spend."""
        return self._ledger.balance(caller)

    def expire(self) -> list[Trade]:
        """End the trades whose deadline has passed, and return them.

        Without a key the buyer gets the money back; with one that passed the opening check the
        silence of the buyer is consent.
        """
        now = self._clock()
        with self._journal.transaction():
            late = [
                self._trade(session)
                for state, seconds in self._deadlines.items()
                for (session,) in self._journal.execute(
                    "SELECT session FROM trades WHERE state = ? AND since <= ?",
                    state,
                    now - seconds,
                )
            ]
            for trade in late:
                reason = f"{self._deadlines[trade.state]:g} s in {trade.state}"
                if trade.state is State.KEY_RELEASED:
                    self._settle(trade, reason)
                else:
                    self._refund(trade, reason)
            return [self._trade(trade.session) for trade in late]

    def _perform(
        self,
        operation: str,
        caller: str,
        session: str,
        content: dict[str, Any],
        effect: Callable[[Trade], None] = lambda trade: None,
        after: State | None = None,
    ) -> Trade:
        """Take a step and what it brings about as one; whatever `effect` raises undoes it."""
        self.expire()
        with self._journal.transaction():
            if self._is_due(operation, caller, session, content):
                trade = self._trade(session)
                self._append(session, operation, content, after or _RULES[operation].after)
                effect(trade)
            return self._trade(session)

    def _is_due(self, operation: str, caller: str, session: str, content: dict[str, Any]) -> bool:
        """Return whether the step is to be taken now: False if just this has happened before."""
        rule, trade = _RULES[operation], self._trade_of(caller, session)
        if caller not in [getattr(trade, party) for party in rule.parties]:
            raise TradeError(f"{operation} is for the {' or '.join(rule.parties)} of a trade")
        contents = self._contents(session)
        if operation in contents:
            if contents[operation] != content:
                raise TradeError(f"{operation} of trade {session} was done with other content")
            return False
        if trade.state is not rule.before:
            raise TradeError(
                f"{operation} needs a trade in {rule.before}: {session} is in {trade.state}"
                + (f" ({trade.reason})" if trade.reason else "")
            )
        return True

    def _settle(self, trade: Trade, reason: str | None = None) -> None:
        self._append(trade.session, "settle", {"reason": reason}, State.SETTLED)
        self._ledger.pay(trade.session, trade.seller)

    def _refund(self, trade: Trade, reason: str) -> None:
        self._append(trade.session, "refund", {"reason": reason}, State.REFUNDED)
        self._ledger.refund(trade.session)

    def _append(self, session: str, operation: str, content: dict[str, Any], state: State) -> None:
        now = self._clock()
        with self._journal.transaction():
            self._journal.execute(
                "INSERT INTO steps (session, operation, content, state) VALUES (?, ?, ?, ?)",
                session,
                operation,
                json.dumps(content),
                state,
            )
            self._journal.execute(
                "UPDATE trades SET state = ?, since = ? WHERE session = ?", state, now, session
            )

    def _trade_of(self, caller: str, session: str) -> Trade:
        if not self._journal.execute(
            "SELECT 1 FROM trades WHERE session = ? AND ? IN (buyer, seller)", session, caller
        ):
            # A foreign trade reads like none at all.
            raise TradeError(f"{caller} has no trade {session}")
        return self._trade(session)

    def _trade(self, session: str) -> Trade:
        with self._journal.transaction():
            trades = self._journal.execute("SELECT * FROM trades WHERE session = ?", session)
            steps = self._journal.execute(
                "SELECT state FROM steps WHERE session = ? ORDER BY number", session
            )
            contents = self._contents(session)
        _, adapter_id, buyer, seller, price, state, since = trades[0]
        closed, proved = contents.get("close"), contents.get("proved")
        reasons = [content["reason"] for content in contents.values() if "reason" in content]
        return Trade(
            session=session,
            adapter_id=adapter_id,
            buyer=buyer,
            seller=seller,
            price=price,
            state=State(state),
            since=since,
            states=tuple(State(step) for (step,) in steps),
            transcript_root=closed["by_buyer"]["document"]["root"] if closed else None,
            proofs_digest=proved["proofs_digest"] if proved else None,
            reason=reasons[-1] if reasons else None,
        )

    def _contents(self, session: str) -> dict[str, dict[str, Any]]:
        """Return what each operation of a trade said, in order."""
        rows = self._journal.execute(
            "SELECT operation, content FROM steps WHERE session = ? ORDER BY number", session
        )
        return {operation: json.loads(content) for operation, content in rows}

    def _read_manifest(self, adapter_id: str) -> AdapterManifest:
        """Return a manifest whose signature and points were checked when it was listed."""
        return AdapterManifest.from_document(json.loads(self._listed(adapter_id, "manifest")))

    def _is_listed(self, adapter_id: str) -> bool:
        return bool(
            self._journal.execute("SELECT 1 FROM adapters WHERE adapter_id = ?", adapter_id)
        )

    def _listed(self, adapter_id: str, column: str) -> Any:
        rows = self._journal.execute(
            f"SELECT {column} FROM adapters WHERE adapter_id = ?", adapter_id
        )
        if not rows:
            raise TradeError(f"no adapter {adapter_id} is listed")
        return rows[0][0]

    def _opening_fault(self, session: str, key: bytes) -> str | None:
        """Return why a key does not open what was committed, if so.

        It takes about a second for a large adapter: never call it within a transaction.
        """
        adapter_id = self._trade(session).adapter_id
        manifest, sealed = self._manifest(adapter_id), self.sealed(adapter_id)
        try:
            check_opening(manifest, sealed, key)
        except ParisError as error:
            return printable(str(error), MAX_REASON)
        return None
