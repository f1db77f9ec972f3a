"""The escrow's journal, one SQLite file, and the ledger of who owns how much.

The shipped ledger is a stand-in for payment: credits that the escrow gives away and keeps itself.
"""

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from paris_ray.errors import ArtifactError, TradeError

OPENING_BALANCE = 1000


class Journal:
    """One SQLite file that several threads, and other processes, may write.

    Args:
        path: The file; made if it is missing. It will hold keys, so that its owner alone may read
            it, whatever it was before.

    Raises:
        ArtifactError: if it cannot be opened or is no journal.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.RLock()
        try:
            path.touch(mode=0o600)
            for name in (path.name, f"{path.name}-wal", f"{path.name}-shm"):  # the latter SQLite's
                if (file := path.with_name(name)).exists():
                    file.chmod(0o600)
            self._database = sqlite3.connect(
                path, timeout=30, isolation_level=None, check_same_thread=False
            )
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = FULL")
        except (OSError, sqlite3.Error) as error:
            raise ArtifactError(f"{path} cannot be used as a journal: {error}") from None

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Hold the write lock; what is done inside happens as a whole or not at all.

        One inside another joins it.
        """
        with self._lock:
            if self._database.in_transaction:
                yield
                return
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._database.execute("COMMIT")
            finally:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")

    def execute(self, statement: str, *values: str | int | float | bytes) -> list[Any]:
        """Run one SQL statement and return its rows."""
        with self.transaction():
            return self._database.execute(statement, values).fetchall()

    def close(self) -> None:
        """Close the file; a journal that is not closed loses nothing."""
        with self._lock:
            self._database.close()


class Ledger(Protocol):
    """Who owns how much. Every movement is named by its trade and happens once."""

    def balance(self, account: str) -> int:
        """Return what the account may spend."""

    def lock(self, trade: str, account: str, amount: int) -> None:
        """Set the amount aside for the trade; raises TradeError if the account cannot cover it."""

    def pay(self, trade: str, account: str) -> None:
        """Give the locked amount to the account; raises TradeError if none is locked."""

    def refund(self, trade: str) -> None:
        """Give the amount back, if one is locked; raises TradeError if it was paid."""


_TABLES = (
    "CREATE TABLE IF NOT EXISTS accounts (account TEXT PRIMARY KEY,"
    " balance INTEGER NOT NULL CHECK (balance >= 0)) STRICT",
    "CREATE TABLE IF NOT EXISTS locks (trade TEXT PRIMARY KEY, account TEXT NOT NULL,"
    " amount INTEGER NOT NULL CHECK (amount >= 0), payee TEXT) STRICT",
)


class SQLiteLedger:
    """Credits in the escrow's own journal: a stand-in for payment, not money.

    Living in the journal it shares the transaction of the step that moves it.

    Args:
        journal: The escrow's.
        opening_balance: Credits that every new account starts with.
    """

    def __init__(self, journal: Journal, opening_balance: int = OPENING_BALANCE) -> None:
        if opening_balance < 0:
            raise TradeError(f"opening_balance={opening_balance} is not allowed: at least 0")
        self._journal = journal
        self._opening_balance = opening_balance
        with journal.transaction():
            for table in _TABLES:
                journal.execute(table)

    def balance(self, account: str) -> int:
        """Return what the account may spend."""
        rows = self._journal.execute("SELECT balance FROM accounts WHERE account = ?", account)
        return rows[0][0] if rows else self._opening_balance

    def lock(self, trade: str, account: str, amount: int) -> None:
        """Set the amount aside for the trade; raises TradeError if the account cannot cover it."""
        with self._journal.transaction():
            held = self._held(trade)
            if held:
                if held[:2] != (account, amount):
                    raise TradeError(f"trade {trade} has locked another amount or account")
                return
            balance = self.balance(account)
            if amount > balance:
                raise TradeError(f"the price is {amount} credits, the balance is {balance}")
            self._move(account, -amount)
            self._journal.execute(
                "INSERT INTO locks VALUES (?, ?, ?, NULL)", trade, account, amount
            )

    def pay(self, trade: str, account: str) -> None:
        """Give the locked amount to the account; raises TradeError if none is locked."""
        with self._journal.transaction():
            held = self._held(trade)
            if not held:
                raise TradeError(f"nothing is locked for trade {trade}")
            _, amount, payee = held
            if payee not in (None, account):
                raise TradeError(f"the money of trade {trade} has gone to {payee}")
            if payee is None:
                self._move(account, amount)
                self._journal.execute("UPDATE locks SET payee = ? WHERE trade = ?", account, trade)

    def refund(self, trade: str) -> None:
        """Give the amount back, if one is locked; raises TradeError if it was paid."""
        with self._journal.transaction():
            held = self._held(trade)
            if held:
                self.pay(trade, held[0])

    def _held(self, trade: str) -> tuple[str, int, str | None] | None:
        rows = self._journal.execute(
            "SELECT account, amount, payee FROM locks WHERE trade = ?", trade
        )
        return rows[0] if rows else None

    def _move(self, account: str, amount: int) -> None:
        self._journal.execute(
            "INSERT OR IGNORE INTO accounts VALUES (?, ?)", account, self._opening_balance
        )
        self._journal.execute(
            "UPDATE accounts SET balance = balance + ? WHERE account = ?", amount, account
        )
