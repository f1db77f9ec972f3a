"""How far every session is, in the contributor's journal."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any, NamedTuple, Self

from paris_ray.errors import ProtocolError
from paris_ray.signatures import SignedDocument
from paris_ray.zklora.transcript import proof_context


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


class Closing(NamedTuple):
    """The closing statement, as both parties signed it.

    Attributes:
        by_user: By the user.
        by_contributor: By the contributor.
    """

    by_user: SignedDocument
    by_contributor: SignedDocument


@dataclass(frozen=True)
class SessionRecord:
    """One user's session, as the journal has it.

    Attributes:
        sid: Its name.
        adapter_id: Digest of the manifest.
        user: Public key, in hexadecimal.
        nonce_c: The contributor's nonce.
        state: How far it is.
        calls: How many were paid for: the number of the next.
        reason: Why it ended, else None.
        closing: What both signed, as JSON; None before.
        nonce_v: What the user drew after the close; None before.
    """

    sid: str
    adapter_id: str
    user: str
    nonce_c: str
    state: SessionState
    calls: int
    reason: str | None
    closing: str | None
    nonce_v: str | None

    @classmethod
    def of(cls, row: Sequence[Any]) -> Self:
        """Return the session of a row of the table: its columns, in the order of the fields."""
        values = dict(zip(cls.__dataclass_fields__, row, strict=True))
        return cls(**values | {"state": SessionState(values["state"])})

    def require(self, state: SessionState) -> None:
        """Raise ProtocolError unless this is its state."""
        if self.state != state:
            why = f" ({self.reason})" if self.reason else ""
            raise ProtocolError(f"session {self.sid} is {self.state}{why}, not {state}")

    @cached_property
    def signed(self) -> Closing:
        """What both signed; raises ProtocolError if the session is not closed."""
        if self.closing is None:
            raise ProtocolError(f"session {self.sid} is {self.state}: nobody has signed its log")
        return Closing(*map(SignedDocument.from_json, json.loads(self.closing)))

    def proof_context(self, module: str) -> bytes:
        """Return what the proof of a module is bound to.

        Raises:
            ProtocolError: if the user's nonce is not fixed yet.
        """
        if self.nonce_v is None:
            raise ProtocolError(f"session {self.sid} is {self.state}: it has no nonce for proofs")
        root = self.signed.by_user.document["root"]
        return proof_context(self.adapter_id, self.sid, root, module, self.nonce_v)
