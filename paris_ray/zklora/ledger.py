"""The ledger of who owns how much.

The shipped one is a stand-in for payment: credits that the escrow gives away and keeps itself.
"""

from typing import Protocol

from paris_ray.errors import TradeError
from paris_ray.zklora.journal import Journal

OPENING_BALANCE = 1000


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


LEDGER_TABLES = (  # IF NOT EXISTS: the first journals had no version
    "CREATE TABLE IF NOT EXISTS accounts (account TEXT PRIMARY KEY,"
    " balance INTEGER NOT NULL CHECK (balance >= 0)) STRICT",
    "CREATE TABLE IF NOT EXISTS locks (trade TEXT PRIMARY KEY, account TEXT NOT NULL,"
    " amount INTEGER NOT NULL CHECK (amount >= 0), payee TEXT) STRICT",
)


class SQLiteLedger:
    """Credits in the escrow's own journal: a stand-in for payment, not money.

    Living in the journal it shares the transaction of the step that moves it.

    Args:
        journal: The escrow's, with the tables LEDGER_TABLES.
        opening_balance: Credits that every new account starts with.
    """

    def __init__(self, journal: Journal, opening_balance: int = OPENING_BALANCE) -> None:
        if opening_balance < 0:
            raise TradeError(f"opening_balance={opening_balance} is not allowed: at least 0")
        self._journal = journal
        self._opening_balance = opening_balance

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
