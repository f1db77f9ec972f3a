"""The calls of all sessions, in the contributor's journal: what was asked, and what was answered.

The arrays of a row come last, so that whoever wants the log alone does not read them.
"""

from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from paris_ray.errors import ProtocolError
from paris_ray.zklora.fixed_point import Int16, Int64
from paris_ray.zklora.journal import Journal
from paris_ray.zklora.log import Call, Log

CALL_TABLES = (
    """CREATE TABLE calls (
        sid TEXT, seq INTEGER, module TEXT NOT NULL, exponent INTEGER NOT NULL,
        rows INTEGER NOT NULL, digest BLOB, x BLOB NOT NULL, y BLOB,
        PRIMARY KEY (sid, seq)) STRICT""",
)


class Request(NamedTuple):
    """What a call asks.

    Attributes:
        module: Name of the module.
        exponent: The inputs are `x * 2^-exponent`.
        x: `(rows, d_in)` int16.
    """

    module: str
    exponent: int
    x: Int16

    @property
    def stored(self) -> tuple[str, int, int, bytes]:
        """What the journal keeps of it."""
        return self.module, self.exponent, len(self.x), self.x.astype("<i2").tobytes()


class CallTable:
    """The calls in a journal, by session and number.

    Args:
        journal: It has CALL_TABLES.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def find(self, sid: str, seq: int, request: Request) -> tuple[bool, Int64 | None]:
        """Return whether a call that was paid for has asked just this, and its answer.

        The answer is `(rows, d_out)` int64; None: it is yet to be computed.
        """
        query = (
            "SELECT (module, exponent, rows, x) = (?, ?, ?, ?), rows, y FROM calls "
            "WHERE sid = ? AND seq = ?"
        )
        is_same, rows, y = self._journal.first(query, *request.stored, sid, seq)
        return bool(is_same), None if y is None else _matrix(y, "<i8", rows)

    def add(self, sid: str, seq: int, request: Request) -> None:
        """Keep a call that is paid for; it has no answer yet."""
        insert = "INSERT INTO calls (sid, seq, module, exponent, rows, x) VALUES (?, ?, ?, ?, ?, ?)"
        self._journal.execute(insert, sid, seq, *request.stored)

    def answer(self, sid: str, call: Call) -> Int64:
        """Keep an answer, and return it; of two that computed the same call, the first stays."""
        update = (
            "UPDATE calls SET y = COALESCE(y, ?), digest = COALESCE(digest, ?) "
            "WHERE sid = ? AND seq = ? RETURNING y"
        )
        y = call.y.astype("<i8").tobytes()
        (kept,) = self._journal.first(update, y, call.digest, sid, call.seq)
        return _matrix(kept, "<i8", len(call.x))

    def is_answered(self, sid: str, seq: int) -> bool:
        """Return whether a call that was paid for has its answer."""
        query = "SELECT digest IS NOT NULL FROM calls WHERE sid = ? AND seq = ?"
        return bool(self._journal.first(query, sid, seq)[0])

    def log(self, sid: str) -> Log:
        """Return what is signed of a session whose calls are answered.

        Raises:
            ProtocolError: if it has no calls.
        """
        query = "SELECT module, rows, digest FROM calls WHERE sid = ? ORDER BY seq"
        return Log.of(self._journal.execute(query, sid))

    def asked(self, sid: str) -> tuple[int, Counter[str]]:
        """Return how many calls a session has paid for, and how many rows of each module."""
        query = "SELECT module, COUNT(*), SUM(rows) FROM calls WHERE sid = ? GROUP BY module"
        found = self._journal.execute(query, sid)
        rows = Counter({module: asked for module, _, asked in found})
        return sum(count for _, count, _ in found), rows

    def inputs(self, adapter_id: str, module: str) -> list[Int16]:
        """Return all inputs of a module of an adapter, in all sessions, `(rows, d_in)` each."""
        query = (
            "SELECT rows, x FROM calls JOIN sessions USING (sid) "
            "WHERE adapter_id = ? AND module = ?"
        )
        found = self._journal.execute(query, adapter_id, module)
        return [_matrix(x, "<i2", rows) for rows, x in found]

    def rows(self, sid: str, module: str) -> tuple[Int16, Int64]:
        """Return all answered rows of a module in a session, in the order of the calls.

        Returns:
            `(rows, d_in)` int16 and `(rows, d_out)` int64.

        Raises:
            ProtocolError: if the module was never called.
        """
        query = (
            "SELECT rows, x, y FROM calls "
            "WHERE sid = ? AND module = ? AND y IS NOT NULL ORDER BY seq"
        )
        found = self._journal.execute(query, sid, module)
        if not found:
            raise ProtocolError(f"module={module!r} was never called in session {sid}")
        x = np.concatenate([_matrix(x, "<i2", rows) for rows, x, _ in found])
        return x, np.concatenate([_matrix(y, "<i8", rows) for rows, _, y in found])


def _matrix(payload: bytes, dtype: str, rows: int) -> Any:
    return np.frombuffer(payload, dtype).reshape(rows, -1)
