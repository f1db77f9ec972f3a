"""The contributor's journal: what every user asked, what it cost, and how far each session is.

One SQLite file. Rows are paid for on disk before anything is computed, so whatever dies afterwards,
no row is given away unpaid and none is paid for twice. What a call costs does not depend on how
many there were; what a user keeps here without having paid for a row is bounded.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

from paris_ray.artifacts import canonical_json
from paris_ray.errors import ProtocolError
from paris_ray.signatures import SignedDocument, Signer
from paris_ray.zklora.budget import BUDGET_TABLES, RowBudget
from paris_ray.zklora.calls import CALL_TABLES, CallTable, Request
from paris_ray.zklora.fixed_point import Int64
from paris_ray.zklora.journal import Journal, Value
from paris_ray.zklora.log import CLOSE, MAX_ROWS, Call, check_request, closing_statement
from paris_ray.zklora.session_records import (
    IS_OPEN,
    SESSION_TABLES,
    SessionRecord,
    SessionState,
)
from paris_ray.zklora.transcript import check_digest

# Of one user at a time; a new one takes the place of the oldest that has paid for nothing.
MAX_OPEN_SESSIONS = 16

SCHEMA_VERSION = 2
SCHEMA = (*SESSION_TABLES, *BUDGET_TABLES, *CALL_TABLES)
COLUMNS = ", ".join(SessionRecord.__dataclass_fields__)


class SessionJournal:
    """All sessions of a contributor; safe from several threads and processes.

    `sid` is always the name of a session, and `user` the public key of the connection, in
    hexadecimal. Whoever has no such session gets a ProtocolError.

    Args:
        path: The file; made if it does not exist, readable by its owner alone.
        max_rows_per_user: Of each module that one user may ever see; None: all of the budget.

    Attributes:
        budget: The rows that may still be seen.
        calls: What was asked and answered.

    Raises:
        ArtifactError: if the file is no journal of this version.
    """

    def __init__(self, path: Path, *, max_rows_per_user: int | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._journal = Journal(path, SCHEMA, SCHEMA_VERSION)
        self.budget = RowBudget(self._journal, max_rows_per_user)
        self.calls = CallTable(self._journal)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._journal.close()

    def sessions_by_state(self) -> dict[str, int]:
        """Return the number of sessions in every state."""
        counts = dict(self._journal.execute("SELECT state, sessions FROM states"))
        return {state: counts.get(state, 0) for state in SessionState}

    def open_session(
        self, sid: str, adapter_id: str, user: str, nonce_u: str, nonce_c: str
    ) -> SessionRecord:
        """Open a session, or return the one that this user opened with this nonce before.

        The caller sends back the nonce and name of the session returned, not its own: whoever
        repeats the question after a lost answer gets the same session.

        Args:
            sid: `session_id(...)` of the nonces, if the session is new.
            adapter_id: Digest of the manifest.
            user: See the class.
            nonce_u: The user's nonce.
            nonce_c: A fresh nonce.

        Raises:
            ProtocolError: if the adapter is unknown, a nonce malformed, or the user has too many
                open sessions that have paid for rows.
        """
        check_digest("nonce_u", nonce_u)
        with self._journal.transaction():
            self.budget.fewest_left(adapter_id)  # raises if there is no such adapter
            query = "SELECT sid FROM sessions WHERE adapter_id = ? AND user = ? AND nonce_u = ?"
            known = self._journal.first(query, adapter_id, user, nonce_u)
            if known is None:
                self._make_room(user)
                insert = (
                    "INSERT INTO sessions (sid, adapter_id, user, nonce_u, nonce_c, state) "
                    "VALUES (?, ?, ?, ?, ?, ?)"
                )
                new = (sid, adapter_id, user, nonce_u, nonce_c, SessionState.OPEN)
                self._journal.execute(insert, *new)
            return self.session(sid if known is None else known[0], user)

    def _make_room(self, user: str) -> None:
        """Let a user open one more session.

        Few of a user's sessions may be open, and few of all may have paid for nothing: if that is
        needed, the oldest that has not is forgotten. Raises ProtocolError if all that are open
        have paid for rows.
        """
        count = f"SELECT COUNT(*) FROM sessions WHERE user = ? AND {IS_OPEN}"
        (num_open,) = self._journal.first(count, user)
        query = "SELECT sid, state FROM sessions WHERE user = ? AND calls = 0 ORDER BY rowid"
        unpaid = self._journal.execute(query, user)
        if num_open >= MAX_OPEN_SESSIONS:
            unpaid = [row for row in unpaid if row[1] == SessionState.OPEN]
            if not unpaid:
                raise ProtocolError(
                    f"{num_open} sessions are open, the most allowed: close or end one"
                )
        elif len(unpaid) < MAX_OPEN_SESSIONS:
            return
        self._journal.execute("DELETE FROM sessions WHERE sid = ?", unpaid[0][0])

    def session(self, sid: str, user: str) -> SessionRecord:
        """Return a user's session."""
        check_digest("session", sid)
        query = f"SELECT {COLUMNS} FROM sessions WHERE sid = ? AND user = ?"
        row = self._journal.first(query, sid, user)
        if row is None:  # of somebody else: the same words, so that nobody learns of it
            raise ProtocolError(f"session {sid} does not exist for user {user}")
        return SessionRecord.of(row)

    def check_turn(self, sid: str, user: str, seq: int, modules: Sequence[str], rows: int) -> None:
        """Raise as `record_calls` would, as far as that is known before any row is looked at.

        That is: of calls numbered from `seq` on, one of each module, with so many rows each.
        """
        self._check_rows(rows)
        with self._journal.transaction():
            session = self.session(sid, user)
            if self._is_new(session, seq, len(modules)):
                for module in modules:
                    self.budget.check(session.adapter_id, user, module, rows)

    def _check_rows(self, rows: int) -> None:
        if rows > MAX_ROWS:
            raise ProtocolError(f"{rows} rows are not allowed: {MAX_ROWS} a call")

    def record_calls(
        self,
        sid: str,
        user: str,
        seq: int,
        requests: Sequence[Request],
        compute: Callable[[], Sequence[Int64]],
    ) -> list[Int64]:
        """Pay for the rows of some calls, compute the answers and keep them.

        Calls that were answered are answered again from the journal; where a computation failed or
        was killed, it is done again without paying again.

        Args:
            sid: See the class.
            user: See the class.
            seq: Number of the first call in the session.
            requests: The calls; widths are the caller's to check.
            compute: Returns the answers `(rows, d_out)` of all; called after they were paid for.

        Returns:
            `(rows, d_out)` int64 of each.

        Raises:
            BudgetError: if a module has fewer rows left; nothing is paid.
            ProtocolError: if a call is malformed, not the next, not of this user's open session, or
                was made before with other bytes, which ends the session.
        """
        for number, request in enumerate(requests, seq):
            check_request(number, *request)
            self._check_rows(len(request.x))
        known = self._pay(sid, user, seq, requests)
        if all(y is not None for y in known):
            return [y for y in known if y is not None]
        calls = [
            Call(number, *request, y)
            for number, (request, y) in enumerate(zip(requests, compute(), strict=True), seq)
        ]
        with self._journal.transaction():
            return [self.calls.answer(sid, call) for call in calls]

    def _pay(
        self, sid: str, user: str, seq: int, requests: Sequence[Request]
    ) -> list[Int64 | None]:
        """Return the answers; None of one that is paid for and yet to be computed."""
        with self._journal.transaction():
            session = self.session(sid, user)
            if self._is_new(session, seq, len(requests)):
                for number, request in enumerate(requests, seq):
                    self.budget.debit(session.adapter_id, user, request.module, len(request.x))
                    self.calls.add(sid, number, request)
                self._set(sid, calls=seq + len(requests))
                return [None] * len(requests)
            known = [self.calls.find(sid, i, request) for i, request in enumerate(requests, seq)]
            changed = [number for number, (is_same, _) in enumerate(known, seq) if not is_same]
            if not changed:
                return [answer for _, answer in known]
            reason = f"call {changed[0]} was sent again with other content"
            self._set(sid, state=SessionState.ENDED, reason=reason)
        raise ProtocolError(f"session {sid} is ended: {reason}")

    def _is_new(self, session: SessionRecord, seq: int, count: int) -> bool:
        """Return whether calls are the next ones, and not earlier ones sent again.

        Raises:
            ProtocolError: if they are neither, or it is no time for them.
        """
        if session.state == SessionState.ENDED:
            session.require(SessionState.OPEN)
        if seq >= 0 and seq + count <= session.calls:
            return False
        session.require(SessionState.OPEN)
        self._check_answered(session)
        if seq != session.calls:
            raise ProtocolError(f"seq={seq} is not allowed: the next call is {session.calls}")
        return True

    def _check_answered(self, session: SessionRecord) -> None:
        last = session.calls - 1
        if last >= 0 and not self.calls.is_answered(session.sid, last):
            raise ProtocolError(f"call {last} has no answer yet: send it again")

    def close(
        self, sid: str, user: str, by_user: SignedDocument, contributor: Signer
    ) -> SessionRecord:
        """Close a session whose log the user signed, and sign it; a repetition changes nothing.

        What the user has signed is `closing_statement(...)`, as kind CLOSE; the contributor signs
        the same.

        Raises:
            SignatureError: if the signature does not hold.
            ProtocolError: if the statement is not that of the journal's log, a call is unanswered,
                or the session is not open and was closed with another signature, or not at all.
        """
        stated = by_user.check(CLOSE, user)
        with self._journal.transaction():
            session = self.session(sid, user)
            if session.closing is not None and session.signed.by_user == by_user:
                return session
            session.require(SessionState.OPEN)
            self._check_answered(session)
            expected = closing_statement(sid, session.adapter_id, self.calls.log(sid))
            # As bytes: to Python 2 and 2.0 are equal, to the escrow they are not.
            if canonical_json(stated) != canonical_json(expected):
                raise ProtocolError(f"session {sid}: the statement differs from the journal's")
            by_contributor = SignedDocument.sign(CLOSE, expected, contributor)
            envelopes = json.dumps([by_user.to_json(), by_contributor.to_json()])
            self._set(sid, state=SessionState.CLOSED, closing=envelopes)
            return self.session(sid, user)

    def challenge(self, sid: str, user: str, nonce_v: str) -> SessionRecord:
        """Fix the user's nonce of a closed session, for good.

        Raises:
            ProtocolError: if the session is not closed, or has another nonce already.
        """
        check_digest("nonce_v", nonce_v)
        with self._journal.transaction():
            session = self.session(sid, user)
            if session.state == SessionState.CHALLENGED and session.nonce_v == nonce_v:
                return session
            session.require(SessionState.CLOSED)
            self._set(sid, state=SessionState.CHALLENGED, nonce_v=nonce_v)
            return self.session(sid, user)

    def end(self, sid: str, user: str, reason: str) -> None:
        """Break an open session off; the first reason stays.

        Raises:
            ProtocolError: if the user has no such session, or it is closed.
        """
        with self._journal.transaction():
            session = self.session(sid, user)
            if session.state != SessionState.ENDED:
                session.require(SessionState.OPEN)
                self._set(sid, state=SessionState.ENDED, reason=reason)

    def _set(self, sid: str, **columns: Value) -> None:
        self._journal.update("sessions", "sid", sid, **columns)
