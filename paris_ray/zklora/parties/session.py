"""The base-model user's side of a session: try, close, ask for proofs. No Ray is needed.

with Channel(identity, address, manifest.contributor_certificate) as channel:
    session = Session(channel, identity, manifest)
    view = adapt(model, manifest.terms, manifest.scale, session.evaluate)
    ...  # whatever one does with the view
    evidence = session.verify()
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from paris_ray.artifacts import canonical_json
from paris_ray.errors import ProtocolError, VerificationError
from paris_ray.identity import Identity
from paris_ray.signatures import SignedDocument
from paris_ray.zklora.fixed_point import Int16, Int64
from paris_ray.zklora.leakage import SEED_BYTES, draw_last_bits
from paris_ray.zklora.log import CLOSE, MAX_ROWS, Call, closing_statement
from paris_ray.zklora.manifest import AdapterManifest
from paris_ray.zklora.parties.channel import Channel
from paris_ray.zklora.parties.escrow import EscrowClient
from paris_ray.zklora.parties.evidence import (
    ClosedSession,
    Evidence,
    Progress,
    check_names,
    fetch_evidence,
)
from paris_ray.zklora.parties.messages import MAX_ASKED, MAX_CALLS_BYTES, Form, tensors_of
from paris_ray.zklora.proof import verify_named
from paris_ray.zklora.trade import sign_rows
from paris_ray.zklora.transcript import Transcript, new_nonce


class Session:
    """One session with a contributor.

    Args:
        channel: To the contributor.
        identity: The user's.
        manifest: The pinned one.
        nonce: The user's; the same one returns to the same session after an interruption. None:
            a new session.
        rows: File of what is asked and answered, begun anew; None: one without a name.

    Raises:
        ProtocolError: if the contributor refuses.
    """

    def __init__(
        self,
        channel: Channel,
        identity: Identity,
        manifest: AdapterManifest,
        nonce: str | None = None,
        rows: Path | None = None,
    ) -> None:
        self._channel, self._identity, self._manifest = channel, identity, manifest
        self.nonce_u = nonce or new_nonce()
        request = {"adapter_id": manifest.adapter_id, "nonce_u": self.nonce_u}
        answer = channel.request("open", request).fields
        self.nonce_c = str(answer.get("nonce_c"))
        self.rows_left = _row_counts(answer.get("rows_left"), manifest)
        self.sid = manifest.session_id(self.nonce_u, self.nonce_c)
        self.transcript = Transcript(path=rows)
        self._rows = Counter[str]()

    def deposit(self, escrow: EscrowClient, rows: int) -> None:
        """Have a deposit locked that covers so many rows of every module, at the manifest's price.

        Raises:
            TradeError: if it is more than the balance, or the budget.
        """
        escrow.open_trade(self._manifest.adapter_id, self.sid, self.nonce_u, self.nonce_c, rows)

    def evaluate(self, module: str, x: Int16, exponent: int) -> Int64:
        """Return the exact update of some rows of one module, as `evaluate_all` does."""
        return self.evaluate_all([module], x, exponent)[0]

    def evaluate_all(self, modules: Sequence[str], x: Int16, exponent: int) -> list[Int64]:
        """Return the exact updates of modules that share their inputs, in one round trip.

        Rows are signed for first, if they have a price; so many that no message may hold them take
        several. The last bit of every entry is drawn by the contributor, of each module anew; the
        rows as they were answered become part of the transcript.

        Args:
            modules: Their names; inputs must have one width.
            x: `(rows, d_in)` int16.
            exponent: The inputs are `x * 2^-exponent`.

        Returns:
            `(rows, d_out)` int64 of each.

        Raises:
            BudgetError: if fewer rows are left, over all users.
            TradeError: if the deposit does not cover them.
            ProtocolError: if an answer has another shape or dtype.
        """
        row_bytes = sum(self._manifest.module(name).row_bytes for name in modules)
        most = min(MAX_ROWS, MAX_ASKED // (2 * x.shape[1]), MAX_CALLS_BYTES // row_bytes)
        at_once = max(1, most)
        parts = [
            self._ask(modules, x[first : first + at_once], exponent)
            for first in range(0, max(1, len(x)), at_once)
        ]
        return [np.concatenate(part) for part in zip(*parts, strict=True)]

    def _ask(self, modules: Sequence[str], x: Int16, exponent: int) -> list[Int64]:
        seq = len(self.transcript)
        call = {"session": self.sid, "seq": seq, "modules": list(modules), "exponent": exponent}
        owed = self._sign_for(modules, len(x))
        answer = self._channel.request("call", call | {"owed": owed}, {"x": x})
        forms: dict[str, Form] = {}
        for i, name in enumerate(modules):
            d_out = self._manifest.module(name).commitment.d_out
            forms[f"{i}.y"] = (np.int64, (len(x), d_out))
            forms[f"{i}.seeds"] = (np.uint8, (len(x), SEED_BYTES))
        tensors = tensors_of(answer, forms)
        for i, name in enumerate(modules):
            drawn = draw_last_bits(x, tensors[f"{i}.seeds"])
            self.transcript.append(Call(seq + i, name, exponent, drawn, tensors[f"{i}.y"]))
            self._rows[name] += len(x)
        return [tensors[f"{i}.y"] for i in range(len(modules))]

    def _sign_for(self, modules: Sequence[str], rows: int) -> dict[str, Any] | None:
        """Return a signed running total, if rows have a price and these are not covered yet."""
        needed = max(self._rows[name] for name in modules) + rows
        if not self._manifest.price_per_row or needed <= max(self._rows.values(), default=0):
            return None
        return sign_rows(self._identity, self._manifest.adapter_id, self.sid, needed).to_json()

    def close(self) -> ClosedSession:
        """Sign the log, and have the contributor sign it.

        Raises:
            VerificationError: if a module of the adapter was never tried.
            ProtocolError: if the contributor has another log.
        """
        for terms in self._manifest.modules:
            if not self._rows[terms.name]:
                raise VerificationError(f"{terms.name}: no row was computed: none can be proved")
        statement = closing_statement(self.sid, self._manifest.adapter_id, self.transcript.log)
        by_user = SignedDocument.sign(CLOSE, statement, self._identity)
        request = {"session": self.sid, "statement": by_user.to_json()}
        answer = self._channel.request("close", request).fields.get("statement")
        by_contributor = SignedDocument.from_json(answer)
        signed = by_contributor.check(CLOSE, self._manifest.contributor)
        if canonical_json(signed) != canonical_json(statement):
            raise ProtocolError("the contributor signed another log than ours")
        return ClosedSession(
            self.sid,
            self.nonce_u,
            self.nonce_c,
            by_user,
            by_contributor,
            new_nonce(),
            self.transcript,
        )

    def verify(self, on_progress: Progress = lambda done, total: None) -> Evidence:
        """Close the session, have it proved, and check every proof in this process.

        Args:
            on_progress: Is told how many modules are proved, and of how many.

        Returns:
            What was checked. From then on every update of the session is that of the adapter
            which the manifest commits to.

        Raises:
            VerificationError: if a module was never tried, or naming those that do not hold.
            ProtocolError: if the contributor refuses, or has another log.
        """
        evidence = fetch_evidence(self._channel, self._manifest, self.close(), on_progress)
        verify_named(evidence.claims(self._manifest))
        return evidence

    def end(self) -> None:
        """Break the session off; rows that it has paid for stay spent."""
        self._channel.request("end", {"session": self.sid})


def _row_counts(counts: object, manifest: AdapterManifest) -> dict[str, int]:
    if not isinstance(counts, dict):
        raise ProtocolError("numbers of rows must be given by the names of modules")
    check_names("rows_left", counts, manifest)
    for name, count in counts.items():
        if type(count) is not int or count < 0:
            raise ProtocolError(f"{name}: {count!r:.80} is no number of rows")
    return counts
