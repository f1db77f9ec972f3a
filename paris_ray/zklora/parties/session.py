"""The base-model user's side of a session: try, close, ask for proofs. No Ray is needed.

with Channel(identity, address, manifest.contributor_certificate) as channel:
    session = Session(channel, identity, manifest)
    view = adapt(model, manifest.terms, manifest.scale, session.evaluate)
    ...  # whatever one does with the view
    evidence = session.verify()
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paris_ray.artifacts import canonical_json
from paris_ray.errors import ProtocolError, VerificationError
from paris_ray.identity import Identity
from paris_ray.signatures import SignedDocument
from paris_ray.zklora.fixed_point import Int16, Int64
from paris_ray.zklora.manifest import AdapterManifest
from paris_ray.zklora.parties.channel import Channel
from paris_ray.zklora.parties.evidence import (
    POLL_S,
    ClosedSession,
    Evidence,
    Progress,
    check_names,
    fetch_evidence,
)
from paris_ray.zklora.parties.messages import (
    CallRequest,
    CloseRequest,
    DrawRequest,
    EndRequest,
    OpenRequest,
    tensor_of,
)
from paris_ray.zklora.proof import verify_named
from paris_ray.zklora.transcript import (
    CLOSE,
    Call,
    Log,
    LogSummary,
    Transcript,
    closing_statement,
    new_nonce,
)

PICTURES_WITHIN_S = 3600.0


@dataclass(frozen=True, eq=False, slots=True)
class Drawing:
    """Pictures that the contributor drew with base and adapter.

    Attributes:
        pictures: `(n, S, S, 3)` uint8.
        log: Of all rows of all adapted modules, with the digest of what was asked for and came.
    """

    pictures: NDArray[np.uint8]
    log: LogSummary


class Session:
    """One session with a contributor.

    Args:
        channel: To the contributor.
        identity: The user's.
        manifest: The pinned one.
        mode: `exact`: the user computes the model and asks for updates; `audit`: the contributor
            computes all of it.
        nonce: The user's; the same one returns to the same session after an interruption. None:
            a new session.

    Raises:
        ProtocolError: if the contributor refuses.
    """

    def __init__(
        self,
        channel: Channel,
        identity: Identity,
        manifest: AdapterManifest,
        mode: str = "exact",
        nonce: str | None = None,
    ) -> None:
        self._channel, self._identity, self._manifest = channel, identity, manifest
        self.mode, self.nonce_u = mode, nonce or new_nonce()
        request = OpenRequest(adapter_id=manifest.adapter_id, nonce_u=self.nonce_u, mode=mode)
        answer = channel.request("open", request.model_dump()).fields
        self.nonce_c = str(answer.get("nonce_c"))
        self.rows_left = _row_counts(answer.get("rows_left"), manifest)
        check_names("rows_left", list(self.rows_left), manifest)
        self.sid = manifest.session_id(self.nonce_u, self.nonce_c)
        self.transcript = Transcript()
        self._drawing: Drawing | None = None
        self._audit_rows: int | None = None

    def evaluate(self, module: str, x: Int16, exponent: int) -> Int64:
        """Return the exact update of some rows, which become part of the transcript.

        Args:
            module: Its name.
            x: `(rows, d_in)` int16.
            exponent: The inputs are `x * 2^-exponent`.

        Returns:
            `(rows, d_out)` int64.

        Raises:
            BudgetError: if fewer rows are left, over all users.
            ProtocolError: if the answer has another shape or dtype.
        """
        seq = len(self.transcript.calls)
        request = CallRequest(session=self.sid, seq=seq, module=module, exponent=exponent)
        answer = self._channel.request("call", request.model_dump(), {"x": x})
        y = tensor_of(answer, "y", np.int64, 2)
        if y.shape != (len(x), self._manifest.module(module).commitment.d_out):
            raise ProtocolError(f"{module}: the answer has shape {y.shape}")
        self.transcript.append(Call(seq, module, exponent, x, y))
        return y

    def draw(
        self,
        prompts: Sequence[str],
        seed: int,
        audit_rows: int,
        on_progress: Progress = lambda done, total: None,
        within_s: float = PICTURES_WITHIN_S,
        **options: str | float | None,
    ) -> Drawing:
        """Return pictures that the contributor draws with base and adapter.

        Args:
            prompts: One a picture.
            seed: Picture i has `seed + i`.
            audit_rows: Rows of each module that will be opened, and count against the budget; at
                least `MIN_ROWS_A_PICTURE` a prompt.
            on_progress: Is told how many pictures are drawn, and of how many.
            within_s: Seconds to wait for them; asked again, the contributor goes on.
            options: `num_inference_steps`, `guidance_scale`, `routing`.

        Raises:
            BudgetError: if fewer rows are left, over all users.
            ProtocolError: if the contributor refuses, needs longer, or its answer is malformed.
        """
        asked: dict[str, Any] = dict(options)
        request = DrawRequest(
            session=self.sid, prompts=list(prompts), seed=seed, audit_rows=audit_rows, **asked
        )
        deadline = time.monotonic() + within_s
        while (answer := self._channel.request("draw", request.model_dump())).kind == "drawing":
            on_progress(0, len(prompts))
            if time.monotonic() > deadline:
                raise ProtocolError(f"no pictures were drawn in {within_s:.0f} s: ask again later")
            time.sleep(POLL_S)
        on_progress(len(prompts), len(prompts))
        pictures = tensor_of(answer, "pictures", np.uint8, 4)
        if len(pictures) != len(prompts) or pictures.shape[3] != 3 or not pictures.size:
            raise ProtocolError(f"the pictures have shape {pictures.shape}")
        counts = _row_counts(answer.fields.get("rows"), self._manifest)
        log = LogSummary(
            "audit",
            str(answer.fields.get("root")),
            sum(counts.values()),
            counts,
            request.digest(pictures),
        )
        self._drawing = Drawing(pictures, log)
        self._audit_rows = audit_rows
        return self._drawing

    def close(self) -> ClosedSession:
        """Sign the log, and have the contributor sign it.

        Raises:
            VerificationError: if a module of the adapter was never tried, or has fewer rows than
                are to be audited.
            ProtocolError: if the contributor has another log.
        """
        exact = self.mode == "exact"
        log: Log = self.transcript if exact else self._drawn.log
        least = self._audit_rows or 1
        for terms in self._manifest.modules:
            rows = log.counts.get(terms.name, 0)
            if rows < least:
                raise VerificationError(
                    f"{terms.name}: {rows} rows were computed, {least} must be proved"
                )
        statement = closing_statement(self.sid, self._manifest.adapter_id, log)
        by_user = SignedDocument.sign(CLOSE, statement, self._identity)
        request = CloseRequest(session=self.sid, statement=by_user.to_json())
        answer = self._channel.request("close", request.model_dump()).fields.get("statement")
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
            self._audit_rows,
            self.transcript if exact else None,
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
        self._channel.request("end", EndRequest(session=self.sid).model_dump())

    @property
    def _drawn(self) -> Drawing:
        if self._drawing is None:
            raise VerificationError("nothing was drawn: there is nothing to audit")
        return self._drawing


def _row_counts(counts: object, manifest: AdapterManifest) -> dict[str, int]:
    names = {terms.name for terms in manifest.modules}
    if not isinstance(counts, dict) or not counts.keys() <= names:
        raise ProtocolError("numbers of rows must be given by the names of modules")
    for name, count in counts.items():
        if type(count) is not int or count < 0:
            raise ProtocolError(f"{name}: {count!r} is no number of rows")
    return counts
