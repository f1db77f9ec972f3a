"""The ledger of who owns how much, a stand-in for payment.

Whoever has real money puts another in its place. As that is called before the escrow's step is
committed, perhaps twice, every movement is named by its trade and may be repeated.
"""

from paris_ray.errors import TradeError
from paris_ray.zklora.journal import Journal

OPENING_BALANCE = 1000

LEDGER_TABLES = (
    "CREATE TABLE accounts (account TEXT PRIMARY KEY,"
    " balance INTEGER NOT NULL CHECK (balance >= 0)) STRICT",
    "CREATE TABLE locks (trade TEXT PRIMARY KEY, account TEXT NOT NULL,"
    " amount INTEGER NOT NULL CHECK (amount >= 0), payee TEXT, paid INTEGER) STRICT",
)


class SQLiteLedger:
    """Credits that the escrow gives away, in its own journal: so they share its transactions.

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
        found = self._journal.first("SELECT balance FROM accounts WHERE account = ?", account)
        return self._opening_balance if found is None else int(found[0])

    def lock(self, trade: str, account: str, amount: int) -> None:
        """Set so much aside for the trade, in all; less than before changes nothing.

        Raises:
            TradeError: if the account cannot cover it, or the trade has come to its end.
        """
        with self._journal.transaction():
            owner, held, payee, _ = self._held(trade, account)
            if owner != account or payee is not None:
                raise TradeError(f"trade {trade} has another account, or has come to its end")
            if (more := amount - held) <= 0:
                return
            if more > (balance := self.balance(account)):
                raise TradeError(f"{more} credits are to be locked, the balance is {balance}")
            self._move(account, -more)
            upsert = (
                "INSERT INTO locks VALUES (?, ?, ?, NULL, NULL)"
                " ON CONFLICT (trade) DO UPDATE SET amount = excluded.amount"
            )
            self._journal.execute(upsert, trade, account, amount)

    def settle(self, trade: str, payee: str, amount: int) -> None:
        """Give so much of what is locked to the payee, and the rest back.

        Raises:
            TradeError: if less is locked, or it was settled otherwise.
        """
        with self._journal.transaction():
            account, held, paid_to, paid = self._held(trade, payee)
            if paid_to is not None:
                if (paid_to, paid) != (payee, amount):
                    raise TradeError(f"the money of trade {trade} has gone: {paid} to {paid_to}")
                return
            if amount > held:
                raise TradeError(f"{held} credits are locked for trade {trade}, not {amount}")
            if held:
                self._move(payee, amount)
                self._move(account, held - amount)
                update = "UPDATE locks SET payee = ?, paid = ? WHERE trade = ?"
                self._journal.execute(update, payee, amount, trade)

    def _held(self, trade: str, account: str) -> tuple[str, int, str | None, int | None]:
        """Return whose money is locked, how much, and who got how much of it."""
        query = "SELECT account, amount, payee, paid FROM locks WHERE trade = ?"
        return self._journal.first(query, trade) or (account, 0, None, None)

    def _move(self, account: str, amount: int) -> None:
        insert = "INSERT OR IGNORE INTO accounts VALUES (?, ?)"
        self._journal.execute(insert, account, self._opening_balance)
        update = "UPDATE accounts SET balance = balance + ? WHERE account = ?"
        self._journal.execute(update, amount, account)
