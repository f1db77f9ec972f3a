"""The contributor's journal: what every user asked, what it cost, and how far each session is.

One SQLite file. Rows are paid for on disk before anything is computed, so whatever dies afterwards,
no row is given away unpaid and none is paid for twice.
"""

import json
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

import numpy as np

from paris_ray.artifacts import canonical_json
from paris_ray.errors import ArtifactError, BudgetError, ProtocolError
from paris_ray.signatures import SignedDocument
from paris_ray.zklora.fixed_point import Int16, Int64
from paris_ray.zklora.journal import Journal
from paris_ray.zklora.transcript import (
    CLOSE,
    Call,
    Transcript,
    check_digest,
    check_request,
    closing_statement,
)

SCHEMA_VERSION = 2
SCHEMA = (
    """CREATE TABLE budgets (
        adapter_id TEXT, module TEXT, budget INTEGER NOT NULL,
        spent INTEGER NOT NULL DEFAULT 0 CHECK (spent BETWEEN 0 AND budget),
        PRIMARY KEY (adapter_id, module))""",
    """CREATE TABLE sessions (
        sid TEXT PRIMARY KEY, adapter_id TEXT NOT NULL, user TEXT NOT NULL,
        nonce_u TEXT NOT NULL, nonce_c TEXT NOT NULL, state TEXT NOT NULL,
        reason TEXT, closing TEXT, nonce_v TEXT,
        UNIQUE (adapter_id, user, nonce_u))""",
    """CREATE TABLE calls (
        sid TEXT REFERENCES sessions, seq INTEGER, module TEXT NOT NULL, exponent INTEGER NOT NULL,
        rows INTEGER NOT NULL, x BLOB NOT NULL, y BLOB,
        PRIMARY KEY (sid, seq))""",
)
OPENING = "sid, adapter_id, user, nonce_u, nonce_c, state"
COLUMNS = f"{OPENING}, reason, closing, nonce_v"


class SessionState(StrEnum):
    """How far a session is."""

    OPEN = "OPEN"  # calls are answered
    CLOSED = "CLOSED"  # both signed the log
    CHALLENGED = "CHALLENGED"  # the user's nonce is fixed: proofs may be made
    ENDED = "ENDED"  # broken off


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """One user's session, as the journal has it.

    Attributes:
        sid: Its name.
        adapter_id: Digest of the manifest.
        user: Public key, in hexadecimal.
        nonce_u: The user's nonce.
        nonce_c: The contributor's.
        state: How far it is.
        reason: Why it ended, else None.
        closing: The closing statement, signed by the user and by the contributor; None if open.
        nonce_v: What the user drew after the close; None before.
    """

    sid: str
    adapter_id: str
    user: str
    nonce_u: str
    nonce_c: str
    state: SessionState
    reason: str | None
    closing: tuple[SignedDocument, SignedDocument] | None
    nonce_v: str | None


class SessionJournal:
    """All sessions of a contributor; safe from several threads and processes.

    Args:
        path: The file; made if it does not exist, readable by its owner alone.
        max_open_sessions: That one user may have at a time; a new one ends the oldest that has
            paid for nothing.
        max_rows_per_call: That one call may have.
        max_rows_per_user: Of each module that one user may ever see; None: all of the budget.

    Raises:
        ArtifactError: if the file is no journal of this version.
    """

    def __init__(
        self,
        path: Path,
        *,
        max_open_sessions: int = 16,
        max_rows_per_call: int = 4096,
        max_rows_per_user: int | None = None,
    ) -> None:
        self._path = path
        self._max_open_sessions = max_open_sessions
        self._max_rows_per_call = max_rows_per_call
        self._max_rows_per_user = max_rows_per_user
        path.parent.mkdir(parents=True, exist_ok=True)
        self._journal = Journal(path, SCHEMA, SCHEMA_VERSION)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._journal.close()

    def add_adapter(self, adapter_id: str, modules: Iterable[str], budget_rows: int) -> None:
        """Give every module of an adapter its budget, once in the adapter's life.

        Args:
            adapter_id: Digest of the manifest.
            modules: Their names.
            budget_rows: Rows that all users together may ever see of each module.

        Raises:
            ArtifactError: if the journal has other modules or another budget for it.
        """
        wanted = dict.fromkeys(modules, budget_rows)
        with self._journal.transaction() as db:
            select = "SELECT module, budget FROM budgets WHERE adapter_id = ?"
            known = dict(db.execute(select, (adapter_id,)))
            if not known:
                insert = "INSERT INTO budgets (adapter_id, module, budget) VALUES (?, ?, ?)"
                db.executemany(insert, [(adapter_id, *item) for item in wanted.items()])
            elif known != wanted:
                raise ArtifactError(f"{self._path} has another budget for adapter {adapter_id}")

    def rows_left(self, adapter_id: str, user: str | None = None) -> dict[str, int]:
        """Return how many rows of each module may still be seen, by anybody or by one user.

        Raises:
            ProtocolError: if the adapter is unknown.
        """
        with self._journal.transaction() as db:
            return self._rows_left(db, adapter_id, user)

    def _rows_left(
        self, db: sqlite3.Connection, adapter_id: str, user: str | None
    ) -> dict[str, int]:
        left, most = _rows_left(db, adapter_id), self._max_rows_per_user
        if user is None or most is None:
            return left
        seen = _rows_seen(db, adapter_id, user)
        return {name: max(0, min(count, most - seen.get(name, 0))) for name, count in left.items()}

    def _debit(
        self, db: sqlite3.Connection, session: SessionRecord, module: str, count: int
    ) -> None:
        left = self._rows_left(db, session.adapter_id, session.user)
        if module not in left:
            raise ProtocolError(f"module={module!r} is not one of adapter {session.adapter_id}")
        if count > left[module]:
            most = self._max_rows_per_user
            why = "" if most is None else f"; a user may see {most} of a module"
            raise BudgetError(f"{module} has {left[module]} rows left, {count} are asked for{why}")
        update = "UPDATE budgets SET spent = spent + ? WHERE adapter_id = ? AND module = ?"
        db.execute(update, (count, session.adapter_id, module))

    def sessions_by_state(self) -> dict[str, int]:
        """Return the number of sessions in every state."""
        with self._journal.transaction() as db:
            counts = dict(db.execute("SELECT state, COUNT(*) FROM sessions GROUP BY state"))
        return {state: counts.get(state, 0) for state in SessionState}

    def open_session(
        self,
        sid: str,
        adapter_id: str,
        user: str,
        nonce_u: str,
        nonce_c: str,
    ) -> SessionRecord:
        """Open a session, or return the one that this user opened with this nonce before.

        The caller sends back the nonce and name of the session returned, not its own: whoever
        repeats the question after a lost answer gets the same session.

        Args:
            sid: `session_id(...)` of the nonces, if the session is new.
            adapter_id: Digest of the manifest.
            user: Public key of the connection, in hexadecimal.
            nonce_u: The user's nonce.
            nonce_c: A fresh nonce.

        Raises:
            ProtocolError: if the adapter is unknown, a nonce malformed, or the user has too many
                open sessions that have paid for rows.
        """
        check_digest("nonce_u", nonce_u)
        identity = (adapter_id, user, nonce_u)
        with self._journal.transaction() as db:
            _rows_left(db, adapter_id)
            query = "SELECT sid FROM sessions WHERE adapter_id = ? AND user = ? AND nonce_u = ?"
            if (known := db.execute(query, identity).fetchone()) is None:
                self._make_room(db, user)
                insert = f"INSERT INTO sessions ({OPENING}) VALUES (?, ?, ?, ?, ?, ?)"
                row = (sid, adapter_id, user, nonce_u, nonce_c, SessionState.OPEN)
                db.execute(insert, row)
            return _find(db, known[0] if known else sid, user)

    def _make_room(self, db: sqlite3.Connection, user: str) -> None:
        """End the oldest session of a user that is open for nothing, if too many are open."""
        query = "SELECT COUNT(*) FROM sessions WHERE user = ? AND state = ?"
        (count,) = db.execute(query, (user, SessionState.OPEN)).fetchone()
        if count < self._max_open_sessions:
            return
        query = (
            "SELECT sid FROM sessions s WHERE user = ? AND state = ? "
            "AND NOT EXISTS (SELECT 1 FROM calls WHERE sid = s.sid) ORDER BY s.rowid LIMIT 1"
        )
        unpaid = db.execute(query, (user, SessionState.OPEN)).fetchone()
        if unpaid is None:
            raise ProtocolError(f"{count} sessions are open, the most allowed: close or end one")
        _end(db, unpaid[0], "a newer session took its place, before it had asked for a row")

    def session(self, sid: str, user: str) -> SessionRecord:
        """Return a user's session; raises ProtocolError if the user has no such session."""
        with self._journal.transaction() as db:
            return _find(db, sid, user)

    def record_call(
        self,
        sid: str,
        user: str,
        seq: int,
        module: str,
        exponent: int,
        x: Int16,
        compute: Callable[[], Int64],
    ) -> Int64:
        """Pay for the rows of a call, compute the answer and keep it.

        A call that was answered is answered again from the journal; one whose computation failed
        or was killed is computed without paying again.

        Args:
            sid: The session.
            user: Public key of the connection, in hexadecimal.
            seq: Number of the call in the session.
            module: Name of the module.
            exponent: The inputs are `x * 2^-exponent`.
            x: `(rows, d_in)` int16; its width is the caller's to check.
            compute: Returns the answers `(rows, d_out)`; called after the rows were paid for.

        Returns:
            `(rows, d_out)` int64.

        Raises:
            BudgetError: if the module has fewer rows left; nothing is paid.
            ProtocolError: if the call is malformed, not the next, not of this user's open session,
                or was made before with other bytes, which ends the session.
        """
        check_request(seq, module, exponent, x)
        if len(x) > self._max_rows_per_call:
            raise ProtocolError(f"{len(x)} rows are not allowed: {self._max_rows_per_call} a call")
        answer = self._pay(sid, user, seq, module, exponent, x)
        if answer is not None:
            return answer
        y = compute()
        assert (y.dtype, y.ndim, len(y)) == (np.dtype(np.int64), 2, len(x))
        with self._journal.transaction() as db:
            # Of two that computed the same call, the first to come is the answer.
            update = "UPDATE calls SET y = COALESCE(y, ?) WHERE sid = ? AND seq = ? RETURNING y"
            payload = y.astype("<i8").tobytes()
            ((kept,),) = db.execute(update, (payload, sid, seq)).fetchall()
        return _matrix(kept, "<i8", len(x))

    def _pay(
        self, sid: str, user: str, seq: int, module: str, exponent: int, x: Int16
    ) -> Int64 | None:
        """Return the answer, or None if it is paid for and yet to be computed."""
        sent = (module, exponent, len(x), x.astype("<i2").tobytes())
        with self._journal.transaction() as db:
            session = _find(db, sid, user)
            if session.state == SessionState.ENDED:
                _require(session, SessionState.OPEN)
            query = "SELECT module, exponent, rows, x, y FROM calls WHERE sid = ? AND seq = ?"
            known = db.execute(query, (sid, seq)).fetchone()
            if known is None:
                _require(session, SessionState.OPEN)
                _check_next(db, sid, seq)
                self._debit(db, session, module, len(x))
                insert = "INSERT INTO calls VALUES (?, ?, ?, ?, ?, ?, NULL)"
                db.execute(insert, (sid, seq, *sent))
                return None
            *before, y = known
            if tuple(before) == sent:
                return None if y is None else _matrix(y, "<i8", len(x))
            reason = f"call {seq} was sent again with other content"
            _end(db, sid, reason)
        raise ProtocolError(f"session {sid} is ended: {reason}")

    def asked(self, sid: str) -> tuple[int, Counter[str]]:
        """Return how many calls a session has made, and how many rows of each module."""
        query = "SELECT module, COUNT(*), SUM(rows) FROM calls WHERE sid = ? GROUP BY module"
        calls, rows = 0, Counter[str]()
        for module, count, asked in self._journal.execute(query, sid):
            calls += count
            rows[module] = asked
        return calls, rows

    def answered(self, adapter_id: str, module: str) -> list[Int16]:
        """Return all inputs of a module that any user has asked for, `(rows, d_in)` each."""
        query = (
            "SELECT rows, x FROM calls JOIN sessions USING (sid)"
            " WHERE adapter_id = ? AND module = ?"
        )
        found = self._journal.execute(query, adapter_id, module)
        return [_matrix(x, "<i2", rows) for rows, x in found]

    def transcript(self, sid: str) -> Transcript:
        """Return all answered calls of a session."""
        with self._journal.transaction() as db:
            return _transcript(db, sid)

    def close(
        self,
        sid: str,
        user: str,
        by_user: SignedDocument,
        by_contributor: SignedDocument,
    ) -> SessionRecord:
        """Close a session whose log both parties signed; a repetition changes nothing.

        Args:
            sid: The session.
            user: Public key of the connection, in hexadecimal.
            by_user: `closing_statement(...)`, kind CLOSE, signed by the user.
            by_contributor: The same, signed by the contributor.

        Raises:
            SignatureError: if a signature does not hold.
            ProtocolError: if a statement is not that of the journal's log, a call is unanswered, or
                the session is not open and was closed with other signatures, or not at all.
        """
        signed = by_user.check(CLOSE, user), by_contributor.check(CLOSE)
        with self._journal.transaction() as db:
            session = _find(db, sid, user)
            if session.closing == (by_user, by_contributor):
                return session
            _require(session, SessionState.OPEN)
            _check_answered(db, sid)
            expected = closing_statement(sid, session.adapter_id, _transcript(db, sid))
            # As bytes: to Python 2 and 2.0 are equal, to the escrow they are not.
            if canonical_json(list(signed)) != canonical_json([expected, expected]):
                raise ProtocolError(f"session {sid}: the statements differ from the journal's")
            envelopes = json.dumps([by_user.to_json(), by_contributor.to_json()])
            update = "UPDATE sessions SET state = ?, closing = ? WHERE sid = ?"
            db.execute(update, (SessionState.CLOSED, envelopes, sid))
            return _find(db, sid, user)

    def challenge(self, sid: str, user: str, nonce_v: str) -> SessionRecord:
        """Fix the user's nonce of a closed session, for good.

        Raises:
            ProtocolError: if the session is not closed, or has another nonce already.
        """
        check_digest("nonce_v", nonce_v)
        with self._journal.transaction() as db:
            session = _find(db, sid, user)
            if session.state == SessionState.CHALLENGED and session.nonce_v == nonce_v:
                return session
            _require(session, SessionState.CLOSED)
            update = "UPDATE sessions SET state = ?, nonce_v = ? WHERE sid = ?"
            db.execute(update, (SessionState.CHALLENGED, nonce_v, sid))
            return _find(db, sid, user)

    def end(self, sid: str, user: str, reason: str) -> None:
        """Break an open session off; the first reason stays.

        Raises:
            ProtocolError: if the user has no such session, or it is closed.
        """
        with self._journal.transaction() as db:
            session = _find(db, sid, user)
            if session.state != SessionState.ENDED:
                _require(session, SessionState.OPEN)
                _end(db, sid, reason)


def _find(db: sqlite3.Connection, sid: str, user: str) -> SessionRecord:
    check_digest("session", sid)
    query = f"SELECT {COLUMNS} FROM sessions WHERE sid = ? AND user = ?"
    row = db.execute(query, (sid, user)).fetchone()
    if row is None:  # of somebody else: the same words, so that nobody learns of it
        raise ProtocolError(f"session {sid} does not exist for user {user}")
    fields: dict[str, Any] = dict(zip(COLUMNS.split(", "), row, strict=True))
    fields["state"] = SessionState(fields["state"])
    if fields["closing"] is not None:
        by_user, by_contributor = json.loads(fields["closing"])
        fields["closing"] = (
            SignedDocument.from_json(by_user),
            SignedDocument.from_json(by_contributor),
        )
    return SessionRecord(**fields)


def _require(session: SessionRecord, state: SessionState) -> None:
    if session.state != state:
        why = f" ({session.reason})" if session.reason else ""
        raise ProtocolError(f"session {session.sid} is {session.state}{why}, not {state}")


def _end(db: sqlite3.Connection, sid: str, reason: str) -> None:
    update = "UPDATE sessions SET state = ?, reason = ? WHERE sid = ?"
    db.execute(update, (SessionState.ENDED, reason, sid))


def _rows_left(db: sqlite3.Connection, adapter_id: str) -> dict[str, int]:
    query = "SELECT module, budget - spent FROM budgets WHERE adapter_id = ?"
    left = dict(db.execute(query, (adapter_id,)))
    if not left:
        raise ProtocolError(f"adapter_id={adapter_id!r} is not served here")
    return left


def _rows_seen(db: sqlite3.Connection, adapter_id: str, user: str) -> dict[str, int]:
    """Return how many rows of each module a user has paid for, in all sessions."""
    query = (
        "SELECT module, SUM(rows) FROM calls JOIN sessions USING (sid) "
        "WHERE adapter_id = ? AND user = ? GROUP BY module"
    )
    return dict(db.execute(query, (adapter_id, user)))


def _counts(db: sqlite3.Connection, sid: str) -> tuple[int, int]:
    """Return the number of calls and of answers."""
    query = "SELECT COUNT(*), COUNT(y) FROM calls WHERE sid = ?"
    calls, answers = db.execute(query, (sid,)).fetchone()
    return calls, answers


def _check_answered(db: sqlite3.Connection, sid: str) -> None:
    calls, answers = _counts(db, sid)
    if answers != calls:
        raise ProtocolError(f"call {calls - 1} has no answer yet: send it again")


def _check_next(db: sqlite3.Connection, sid: str, seq: int) -> None:
    _check_answered(db, sid)
    calls, _ = _counts(db, sid)
    if seq != calls:
        raise ProtocolError(f"seq={seq} is not allowed: the next call is {calls}")


def _transcript(db: sqlite3.Connection, sid: str) -> Transcript:
    query = (
        "SELECT seq, module, exponent, rows, x, y FROM calls "
        "WHERE sid = ? AND y IS NOT NULL ORDER BY seq"
    )
    return Transcript(
        Call(seq, module, exponent, _matrix(x, "<i2", rows), _matrix(y, "<i8", rows))
        for seq, module, exponent, rows, x, y in db.execute(query, (sid,))
    )


def _matrix(payload: bytes, dtype: str, rows: int) -> Any:
    return np.frombuffer(payload, dtype).reshape(rows, -1)
