"""The contributor's journal: what every user asked, what it cost, and how far each session is.

One SQLite file. Rows are paid for on disk before anything is computed, so whatever dies afterwards,
no row is given away unpaid and none is paid for twice. What a call costs does not depend on how
many there were; what a user keeps here without having paid for a row is bounded.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

from paris_ray.artifacts import canonical_json
from paris_ray.errors import ProtocolError
from paris_ray.signatures import SignedDocument, Signer
from paris_ray.zklora.budget import BUDGET_TABLES, RowBudget
from paris_ray.zklora.calls import CALL_TABLES, CallTable, Request
from paris_ray.zklora.fixed_point import Int16, Int64
from paris_ray.zklora.journal import Journal
from paris_ray.zklora.session_records import (
    SESSION_TABLES,
    SessionRecord,
    SessionState,
    SessionTable,
)
from paris_ray.zklora.transcript import (
    CLOSE,
    Call,
    Log,
    check_digest,
    check_request,
    closing_statement,
)

SCHEMA_VERSION = 2
SCHEMA = (*SESSION_TABLES, *BUDGET_TABLES, *CALL_TABLES)


class SessionJournal:
    """All sessions of a contributor; safe from several threads and processes.

    Args:
        path: The file; made if it does not exist, readable by its owner alone.
        max_open_sessions: That one user may have at a time; a new one takes the place of the oldest
            that has paid for nothing.
        max_rows_per_call: That one call may have.
        max_rows_per_user: Of each module that one user may ever see; None: all of the budget.

    Attributes:
        budget: The rows that may still be seen.

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
        self._max_open_sessions = max_open_sessions
        self._max_rows_per_call = max_rows_per_call
        path.parent.mkdir(parents=True, exist_ok=True)
        self._journal = Journal(path, SCHEMA, SCHEMA_VERSION)
        self._sessions, self._calls = SessionTable(self._journal), CallTable(self._journal)
        self.budget = RowBudget(self._journal, max_rows_per_user)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._journal.close()

    def sessions_by_state(self) -> dict[str, int]:
        """Return the number of sessions in every state."""
        return self._sessions.count()

    def open_session(
        self, sid: str, adapter_id: str, user: str, nonce_u: str, nonce_c: str
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
        with self._journal.transaction():
            self.budget.fewest_left(adapter_id)  # raises if there is no such adapter
            known = self._sessions.find_nonce(adapter_id, user, nonce_u)
            if known is None:
                self._sessions.make_room(user, self._max_open_sessions)
                self._sessions.add(sid, adapter_id, user, nonce_u, nonce_c)
            return self._sessions.find(known or sid, user)

    def session(self, sid: str, user: str) -> SessionRecord:
        """Return a user's session; raises ProtocolError if the user has no such session."""
        return self._sessions.find(sid, user)

    def check_turn(self, sid: str, user: str, seq: int, modules: Sequence[str], rows: int) -> None:
        """Raise as `record_calls` would, as far as that is known before any row is looked at.

        Args:
            sid: The session.
            user: Public key of the connection, in hexadecimal.
            seq: Number of the first call.
            modules: Of the calls, in their order.
            rows: How many each has.
        """
        if rows > self._max_rows_per_call:
            raise ProtocolError(f"{rows} rows are not allowed: {self._max_rows_per_call} a call")
        with self._journal.transaction():
            session = self.session(sid, user)
            if self._is_new(session, seq, len(modules)):
                for module in modules:
                    self.budget.check(session.adapter_id, user, module, rows)

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
            sid: The session.
            user: Public key of the connection, in hexadecimal.
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
            if len(request.x) > self._max_rows_per_call:
                most = self._max_rows_per_call
                raise ProtocolError(f"{len(request.x)} rows are not allowed: {most} a call")
        known = self._pay(sid, user, seq, requests)
        if all(y is not None for y in known):
            return [y for y in known if y is not None]
        calls = [
            Call(number, *request, y)
            for number, (request, y) in enumerate(zip(requests, compute(), strict=True), seq)
        ]
        with self._journal.transaction():
            return [self._calls.answer(sid, call) for call in calls]

    def _pay(
        self, sid: str, user: str, seq: int, requests: Sequence[Request]
    ) -> list[Int64 | None]:
        """Return the answers; None of one that is paid for and yet to be computed."""
        with self._journal.transaction():
            session = self.session(sid, user)
            if self._is_new(session, seq, len(requests)):
                for number, request in enumerate(requests, seq):
                    self.budget.debit(session.adapter_id, user, request.module, len(request.x))
                    self._calls.add(sid, number, request)
                    self._sessions.count_call(sid)
                return [None] * len(requests)
            answers: list[Int64 | None] = []
            for number, request in enumerate(requests, seq):
                known = self._calls.find(sid, number)
                assert known is not None  # all calls below the session's count are there
                if known.asked != request.stored:
                    reason = f"call {number} was sent again with other content"
                    self._sessions.move(sid, SessionState.ENDED, reason=reason)
                    break
                answers.append(known.y)
            else:
                return answers
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

    def asked(self, sid: str) -> tuple[int, Counter[str]]:
        """Return how many calls of a session are paid for, and how many rows of each module."""
        return self._calls.asked(sid)

    def answered(self, adapter_id: str, module: str) -> list[Int16]:
        """Return all inputs of a module that users have paid for, `(rows, d_in)` each."""
        return self._calls.inputs(adapter_id, module)

    def _check_answered(self, session: SessionRecord) -> None:
        last = session.calls - 1
        if last >= 0 and not self._calls.is_answered(session.sid, last):
            raise ProtocolError(f"call {last} has no answer yet: send it again")

    def rows(self, sid: str, module: str) -> tuple[Int16, Int64]:
        """Return all answered rows of a module in a session, as `CallTable.rows` does."""
        return self._calls.rows(sid, module)

    def log(self, sid: str) -> Log:
        """Return what is signed of a session whose calls are answered."""
        return self._calls.log(sid)

    def close(
        self, sid: str, user: str, by_user: SignedDocument, contributor: Signer
    ) -> SessionRecord:
        """Close a session whose log the user signed, and sign it; a repetition changes nothing.

        Args:
            sid: The session.
            user: Public key of the connection, in hexadecimal.
            by_user: `closing_statement(...)`, kind CLOSE, signed by the user.
            contributor: Who signs the same.

        Raises:
            SignatureError: if the signature does not hold.
            ProtocolError: if the statement is not that of the journal's log, a call is unanswered,
                or the session is not open and was closed with another signature, or not at all.
        """
        stated = by_user.check(CLOSE, user)
        with self._journal.transaction():
            session = self.session(sid, user)
            if session.closing is not None and session.closing.by_user == by_user:
                return session
            session.require(SessionState.OPEN)
            self._check_answered(session)
            expected = closing_statement(sid, session.adapter_id, self._calls.log(sid))
            # As bytes: to Python 2 and 2.0 are equal, to the escrow they are not.
            if canonical_json(stated) != canonical_json(expected):
                raise ProtocolError(f"session {sid}: the statement differs from the journal's")
            by_contributor = SignedDocument.sign(CLOSE, expected, contributor)
            envelopes = json.dumps([by_user.to_json(), by_contributor.to_json()])
            self._sessions.move(sid, SessionState.CLOSED, closing=envelopes)
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
            self._sessions.move(sid, SessionState.CHALLENGED, nonce_v=nonce_v)
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
                self._sessions.move(sid, SessionState.ENDED, reason=reason)
