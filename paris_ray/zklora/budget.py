"""How many rows of each module may still be seen, by all users together and by each.

A policy that the contributor's own service keeps: no proof can replace it.
"""

from collections.abc import Iterable

from paris_ray.errors import ArtifactError, BudgetError, ProtocolError
from paris_ray.zklora.journal import Journal

BUDGET_TABLES = (
    """CREATE TABLE budgets (
        adapter_id TEXT, module TEXT, budget INTEGER NOT NULL,
        spent INTEGER NOT NULL DEFAULT 0 CHECK (spent BETWEEN 0 AND budget),
        PRIMARY KEY (adapter_id, module)) STRICT""",
    "CREATE INDEX fewest_left ON budgets (adapter_id, budget - spent)",
    """CREATE TABLE rows_seen (
        adapter_id TEXT, user TEXT, module TEXT, rows INTEGER NOT NULL,
        PRIMARY KEY (adapter_id, user, module)) STRICT""",
)
# Rows of each module that are left, and rows that one user has seen.
LEFT = (
    "SELECT b.module, budget - spent, COALESCE(rows, 0) FROM budgets b LEFT JOIN rows_seen s "
    "ON s.adapter_id = b.adapter_id AND s.user = ? AND s.module = b.module WHERE b.adapter_id = ?"
)


class RowBudget:
    """The rows that were paid for, in the contributor's journal.

    Args:
        journal: It has BUDGET_TABLES.
        max_rows_per_user: Of each module that one user may ever see; None: all of the budget.
    """

    def __init__(self, journal: Journal, max_rows_per_user: int | None) -> None:
        self._journal = journal
        self._max_rows_per_user = max_rows_per_user

    def add_adapter(self, adapter_id: str, modules: Iterable[str], budget_rows: int) -> None:
        """Give every module of an adapter its budget, once in the adapter's life.

        All users together may ever see `budget_rows` of each module.

        Raises:
            ArtifactError: if the journal has other modules or another budget for it.
        """
        wanted = dict.fromkeys(modules, budget_rows)
        with self._journal.transaction():
            select = "SELECT module, budget FROM budgets WHERE adapter_id = ?"
            known = dict(self._journal.execute(select, adapter_id))
            if known and known != wanted:
                raise ArtifactError(f"the journal has another budget for adapter {adapter_id}")
            if not known:
                insert = "INSERT INTO budgets (adapter_id, module, budget) VALUES (?, ?, ?)"
                for module in wanted:
                    self._journal.execute(insert, adapter_id, module, budget_rows)

    def rows_left(self, adapter_id: str, user: str | None = None) -> dict[str, int]:
        """Return how many rows of each module may still be seen, by anybody or by one user.

        Raises:
            ProtocolError: if the adapter is unknown.
        """
        found = self._journal.execute(LEFT, user or "", adapter_id)
        if not found:
            raise ProtocolError(f"adapter_id={adapter_id!r} is not served here")
        if user is None:
            return {module: left for module, left, _ in found}
        return {module: self._allowed(left, seen) for module, left, seen in found}

    def fewest_left(self, adapter_id: str) -> int:
        """Return the rows left of the module with the fewest.

        Raises:
            ProtocolError: if the adapter is unknown.
        """
        query = (
            "SELECT budget - spent FROM budgets WHERE adapter_id = ? ORDER BY budget - spent "
            "LIMIT 1"
        )
        found = self._journal.first(query, adapter_id)
        if found is None:
            raise ProtocolError(f"adapter_id={adapter_id!r} is not served here")
        return int(found[0])

    def check(self, adapter_id: str, user: str, module: str, rows: int) -> None:
        """Raise as `debit` would, without paying."""
        found = self._journal.first(f"{LEFT} AND b.module = ?", user, adapter_id, module)
        if found is None:
            raise ProtocolError(f"module={module!r} is not one of adapter {adapter_id}")
        left = self._allowed(*found[1:])
        if rows > left:
            most = self._max_rows_per_user
            why = "" if most is None else f"; a user may see {most} of a module"
            raise BudgetError(f"{module} has {left} rows left, {rows} are asked for{why}")

    def debit(self, adapter_id: str, user: str, module: str, rows: int) -> None:
        """Pay for rows that a user asks for; the caller's transaction decides whether it stays.

        Raises:
            BudgetError: if fewer are left.
            ProtocolError: if the adapter has no such module.
        """
        with self._journal.transaction():
            self.check(adapter_id, user, module, rows)
            update = "UPDATE budgets SET spent = spent + ? WHERE adapter_id = ? AND module = ?"
            self._journal.execute(update, rows, adapter_id, module)
            upsert = (
                "INSERT INTO rows_seen VALUES (?, ?, ?, ?) "
                "ON CONFLICT DO UPDATE SET rows = rows + excluded.rows"
            )
            self._journal.execute(upsert, adapter_id, user, module, rows)

    def _allowed(self, left: int, seen: int) -> int:
        """Return how many rows a user may see who has seen some."""
        most = self._max_rows_per_user
        return left if most is None else max(0, min(left, most - seen))
