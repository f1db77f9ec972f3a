"""A journal: one SQLite file that a party keeps, in which every step is whole or never was."""

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from paris_ray.errors import ArtifactError

BUSY_S = 60

Value = str | int | float | bytes | None


class Journal:
    """One SQLite file that several threads, and other processes, may write.

    Args:
        path: The file; made if it is missing. It may hold keys, so that its owner alone may read
            it, whatever it was before.
        schema: Statements that make the tables of a new file.
        version: Of the schema.

    Raises:
        ArtifactError: if it cannot be opened, is no journal, or has another version.
    """

    def __init__(self, path: Path, schema: Sequence[str], version: int) -> None:
        self._lock = threading.RLock()
        try:
            path.touch(mode=0o600)
            for name in (path.name, f"{path.name}-wal", f"{path.name}-shm"):  # the latter SQLite's
                if (file := path.with_name(name)).exists():
                    file.chmod(0o600)
            self._database = sqlite3.connect(
                path, timeout=BUSY_S, isolation_level=None, check_same_thread=False
            )
            for setting in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
                self._database.execute(f"PRAGMA {setting}")
            found = self._prepare(schema, version)
        except (OSError, sqlite3.Error) as error:
            raise ArtifactError(f"{path} cannot be used as a journal: {error}") from None
        if found != version:
            raise ArtifactError(f"{path} has schema {found}, this version reads {version}")

    def _prepare(self, schema: Sequence[str], version: int) -> int:
        """Return the version of the schema, after making that of a new file."""
        with self.transaction() as database:
            ((found,),) = database.execute("PRAGMA user_version").fetchall()
            if found != 0:
                return int(found)
            for statement in schema:
                database.execute(statement)
            database.execute(f"PRAGMA user_version = {version}")
        return version

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Hold the write lock; what is done inside happens as a whole or not at all.

        One inside another joins it.
        """
        with self._lock:
            if self._database.in_transaction:
                yield self._database
                return
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
                self._database.execute("COMMIT")
            finally:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")

    def execute(self, statement: str, *values: Value) -> list[Any]:
        """Run one SQL statement and return its rows."""
        with self.transaction() as database:
            return database.execute(statement, values).fetchall()

    def first(self, statement: str, *values: Value) -> Any:
        """Run one SQL statement and return its first row; None: there is none."""
        rows = self.execute(statement, *values)
        return rows[0] if rows else None

    def update(self, table: str, key: str, value: str, /, **columns: Value) -> None:
        """Change columns of the row that has this key."""
        changes = ", ".join(f"{name} = ?" for name in columns)
        self.execute(f"UPDATE {table} SET {changes} WHERE {key} = ?", *columns.values(), value)

    def close(self) -> None:
        """Close the file; a journal that is not closed loses nothing."""
        with self._lock:
            self._database.close()
