"""How far every session is, in the contributor's journal."""

import json
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from paris_ray.errors import ProtocolError
from paris_ray.signatures import SignedDocument
from paris_ray.zklora.journal import Journal
from paris_ray.zklora.transcript import check_digest, proof_context


class SessionState(StrEnum):
    """How far a session is."""

    OPEN = "OPEN"  # calls are answered
    CLOSED = "CLOSED"  # both signed the log
    CHALLENGED = "CHALLENGED"  # the user's nonce is fixed: proofs may be made
    ENDED = "ENDED"  # broken off


# How many sessions there are in every state is counted as they move, never by looking at all.
COUNT = "INSERT INTO states VALUES (NEW.state, 1) ON CONFLICT DO UPDATE SET sessions = sessions + 1"
DISCOUNT = "UPDATE states SET sessions = sessions - 1 WHERE state = OLD.state"
IS_OPEN = f"state = '{SessionState.OPEN}'"  # spelled out, or the index would not be used
SESSION_TABLES = (
    """CREATE TABLE sessions (
        sid TEXT PRIMARY KEY, adapter_id TEXT NOT NULL, user TEXT NOT NULL, nonce_u TEXT NOT NULL,
        nonce_c TEXT NOT NULL, state TEXT NOT NULL, calls INTEGER NOT NULL DEFAULT 0,
        reason TEXT, closing TEXT, nonce_v TEXT, UNIQUE (adapter_id, user, nonce_u)) STRICT""",
    f"CREATE INDEX open_sessions ON sessions (user) WHERE {IS_OPEN}",
    "CREATE INDEX unpaid_sessions ON sessions (user) WHERE calls = 0",
    "CREATE TABLE states (state TEXT PRIMARY KEY, sessions INTEGER NOT NULL) STRICT",
    f"CREATE TRIGGER opened AFTER INSERT ON sessions BEGIN {COUNT}; END",
    f"CREATE TRIGGER moved AFTER UPDATE OF state ON sessions BEGIN {DISCOUNT}; {COUNT}; END",
    f"CREATE TRIGGER forgotten AFTER DELETE ON sessions BEGIN {DISCOUNT}; END",
)
OPENING = "sid, adapter_id, user, nonce_u, nonce_c, state"
COLUMNS = f"{OPENING}, calls, reason, closing, nonce_v"


class Closing(NamedTuple):
    """The closing statement, as both parties signed it.

    Attributes:
        by_user: By the user.
        by_contributor: By the contributor.
    """

    by_user: SignedDocument
    by_contributor: SignedDocument


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
        calls: How many were paid for: the number of the next.
        reason: Why it ended, else None.
        closing: What both signed; None before.
        nonce_v: What the user drew after the close; None before.
    """

    sid: str
    adapter_id: str
    user: str
    nonce_u: str
    nonce_c: str
    state: SessionState
    calls: int
    reason: str | None
    closing: Closing | None
    nonce_v: str | None

    def require(self, state: SessionState) -> None:
        """Raise ProtocolError unless this is its state."""
        if self.state != state:
            why = f" ({self.reason})" if self.reason else ""
            raise ProtocolError(f"session {self.sid} is {self.state}{why}, not {state}")

    @property
    def signed(self) -> Closing:
        """What both signed; raises ProtocolError if the session is not closed."""
        if self.closing is None:
            raise ProtocolError(f"session {self.sid} is {self.state}: nobody has signed its log")
        return self.closing

    def proof_context(self, module: str) -> bytes:
        """Return what the proof of a module is bound to.

        Raises:
            ProtocolError: if the user's nonce is not fixed yet.
        """
        if self.nonce_v is None:
            raise ProtocolError(f"session {self.sid} is {self.state}: it has no nonce for proofs")
        root = self.signed.by_user.document["root"]
        return proof_context(self.adapter_id, self.sid, root, module, self.nonce_v)


class SessionTable:
    """The sessions in a journal.

    Args:
        journal: It has SESSION_TABLES.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def count(self) -> dict[str, int]:
        """Return the number of sessions in every state."""
        counts = dict(self._journal.execute("SELECT state, sessions FROM states"))
        return {state: counts.get(state, 0) for state in SessionState}

    def find(self, sid: str, user: str) -> SessionRecord:
        """Return a user's session; raises ProtocolError if the user has no such session."""
        check_digest("session", sid)
        query = f"SELECT {COLUMNS} FROM sessions WHERE sid = ? AND user = ?"
        found = self._journal.execute(query, sid, user)
        if not found:  # of somebody else: the same words, so that nobody learns of it
            raise ProtocolError(f"session {sid} does not exist for user {user}")
        fields: dict[str, Any] = dict(zip(COLUMNS.split(", "), found[0], strict=True))
        fields["state"] = SessionState(fields["state"])
        if fields["closing"] is not None:
            fields["closing"] = Closing(
                *map(SignedDocument.from_json, json.loads(fields["closing"]))
            )
        return SessionRecord(**fields)

    def find_nonce(self, adapter_id: str, user: str, nonce_u: str) -> str | None:
        """Return the name of the session that a user opened with a nonce; None: there is none."""
        query = "SELECT sid FROM sessions WHERE adapter_id = ? AND user = ? AND nonce_u = ?"
        found = self._journal.execute(query, adapter_id, user, nonce_u)
        return found[0][0] if found else None

    def add(self, sid: str, adapter_id: str, user: str, nonce_u: str, nonce_c: str) -> None:
        """Keep a new session, which is open."""
        insert = f"INSERT INTO sessions ({OPENING}) VALUES (?, ?, ?, ?, ?, ?)"
        opening = (sid, adapter_id, user, nonce_u, nonce_c, SessionState.OPEN)
        self._journal.execute(insert, *opening)

    def make_room(self, user: str, most: int) -> None:
        """Let a user open one more session, of whom few are open, and few have paid for nothing.

        The oldest that has paid for nothing is forgotten, if that is needed.

        Args:
            user: Public key, in hexadecimal.
            most: How many may be open; likewise, how many of all may have paid for nothing.

        Raises:
            ProtocolError: if all that are open have paid for rows.
        """
        count = f"SELECT COUNT(*) FROM sessions WHERE user = ? AND {IS_OPEN}"
        ((num_open,),) = self._journal.execute(count, user)
        query = "SELECT sid, state FROM sessions WHERE user = ? AND calls = 0 ORDER BY rowid"
        unpaid = self._journal.execute(query, user)
        if num_open >= most:
            unpaid = [row for row in unpaid if row[1] == SessionState.OPEN]
            if not unpaid:
                raise ProtocolError(
                    f"{num_open} sessions are open, the most allowed: close or end one"
                )
        elif len(unpaid) < most:
            return
        self._journal.execute("DELETE FROM sessions WHERE sid = ?", unpaid[0][0])

    def count_call(self, sid: str) -> None:
        """Note that one more call of a session was paid for."""
        self._journal.execute("UPDATE sessions SET calls = calls + 1 WHERE sid = ?", sid)

    def move(self, sid: str, state: SessionState, **columns: str) -> None:
        """Note that a session has come to a state, and what goes with it."""
        changes = "".join(f", {name} = ?" for name in columns)
        update = f"UPDATE sessions SET state = ?{changes} WHERE sid = ?"
        self._journal.execute(update, state, *columns.values(), sid)
