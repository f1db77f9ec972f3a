"""Rows have a price: the user signs for them as it goes, and none is answered before.

What is signed is a running total of the session: the rows of the module with the most. The
contributor shows it to the escrow, where the deposit is, and answers once that has taken it. So a
user who walks away has paid for what it saw, and for at most one call more.
"""

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from paris_ray.errors import ConfigError, TradeError
from paris_ray.signatures import SignedDocument
from paris_ray.zklora.manifest import AdapterManifest
from paris_ray.zklora.parties.escrow import EscrowClient
from paris_ray.zklora.sessions import SessionJournal
from paris_ray.zklora.trade import signed_rows


@dataclass(slots=True)
class _Account:
    """What a session was answered, and has signed for."""

    calls: int
    rows: Counter[str]
    signed: int


class Toll:
    """What a contributor is owed for the rows of every open session.

    Args:
        manifest: Of the offer, with the price.
        escrow: Where deposits are; None: rows must be free.
        journal: Of the sessions.

    Raises:
        ConfigError: if rows have a price, and there is no escrow.
    """

    def __init__(
        self, manifest: AdapterManifest, escrow: EscrowClient | None, journal: SessionJournal
    ) -> None:
        if manifest.price_per_row and escrow is None:
            raise ConfigError(
                f"escrow is missing: the manifest's price_per_row is {manifest.price_per_row}"
            )
        self._manifest, self._escrow, self._journal = manifest, escrow, journal
        self._accounts: dict[str, _Account] = {}
        self._lock = threading.Lock()

    def collect(
        self,
        session: str,
        user: str,
        seq: int,
        modules: Sequence[str],
        rows: int,
        by_user: object,
    ) -> None:
        """Have the rows of some calls signed for, unless they were made before.

        Args:
            session: Its name.
            user: Public key of the connection, in hexadecimal.
            seq: Number of the first call.
            modules: That the calls ask, in their order.
            rows: How many of each.
            by_user: The running total that it came with, as JSON, or None.

        Raises:
            TradeError: if the session has no deposit, or too little is signed for.
            ParisError: if what is signed is not the user's word for this session.
        """
        if not self._manifest.price_per_row:
            return
        assert self._escrow is not None
        account = self._account(session, self._escrow)
        with self._lock:
            needed = max(account.rows[module] for module in modules) + rows
            covered = account.signed
            if seq + len(modules) <= account.calls or needed <= covered:
                return
        signed = None if by_user is None else SignedDocument.from_json(by_user)
        adapter_id = self._manifest.adapter_id
        if signed is None or signed_rows(signed, user, adapter_id, session) < needed:
            raise TradeError(f"{needed} rows must be signed for, {covered} are")
        taken = self._escrow.owe(session, signed).rows
        with self._lock:  # never while the escrow is asked: it may be slow, and other buyers wait
            account.signed = max(account.signed, taken)

    def answered(self, session: str, seq: int, modules: Sequence[str], rows: int) -> None:
        """Count calls that were answered."""
        with self._lock:
            account = self._accounts.get(session)
            if account is not None and seq == account.calls:
                account.calls += len(modules)
                account.rows.update(dict.fromkeys(modules, rows))

    def close(self, session: str) -> int:
        """Forget a session; return how many credits were signed for, as far as is known here."""
        with self._lock:
            account = self._accounts.pop(session, None)
        return 0 if account is None else account.signed * self._manifest.price_per_row

    def _account(self, session: str, escrow: EscrowClient) -> _Account:
        with self._lock:
            if session in self._accounts:
                return self._accounts[session]
        signed = escrow.trade(session).rows
        with self._lock:
            if session not in self._accounts:
                self._accounts[session] = _Account(*self._journal.calls.asked(session), signed)
            return self._accounts[session]
