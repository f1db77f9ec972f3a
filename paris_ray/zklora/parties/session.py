"""The base-model user's side of a session: try, close, ask for proofs. No Ray is needed.

with Channel(identity, address, manifest.contributor_certificate) as channel:
    session = Session(channel, identity, manifest)
    view = adapt(model, manifest.terms, manifest.scale, session.evaluate)
    ...  # whatever one does with the view
    evidence = session.verify()
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from paris_ray.artifacts import Folder, canonical_json
from paris_ray.errors import ArtifactError, ProtocolError, SignatureError, VerificationError
from paris_ray.signatures import SignedDocument
from paris_ray.zklora.fixed_point import Int16, Int64
from paris_ray.zklora.identity import Identity
from paris_ray.zklora.manifest import AdapterManifest
from paris_ray.zklora.merkle import check_inclusion
from paris_ray.zklora.parties.channel import Channel
from paris_ray.zklora.parties.frames import Message
from paris_ray.zklora.parties.messages import DrawRequest, parse
from paris_ray.zklora.proof import Claim, verify_named
from paris_ray.zklora.transcript import (
    Call,
    Log,
    LogSummary,
    Transcript,
    challenge_rows,
    closing_statement,
    leaf_index,
    new_nonce,
    proof_context,
    row_leaf,
    session_id,
)

TRANSCRIPT = "transcript.safetensors"
CLOSED = "closed.json"
DIGEST_BYTES = 32
EVIDENCE = "evidence.safetensors"
POLL_S = 0.5
PICTURES_WITHIN_S = 3600.0
MODULES_WITHIN_S = 3600.0  # the next few: an audit draws its pictures again before the first
Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False, slots=True)
class Drawing:
    """Pictures that the contributor drew with base and adapter.

    Attributes:
        pictures: `(n, S, S, 3)` uint8.
        log: Of all rows of all adapted modules, with the digest of what was asked for and came.
    """

    pictures: NDArray[np.uint8]
    log: LogSummary


@dataclass(frozen=True, slots=True)
class ClosedSession:
    """A session whose log both parties have signed.

    Attributes:
        sid: Its name.
        nonce_u: The user's nonce.
        nonce_c: The contributor's.
        by_user: The closing statement, signed by the user.
        by_contributor: The same, signed by the contributor.
        nonce_v: What the proofs are bound to; drawn after both had signed, so that none could be
            made before.
        audit_rows: Rows of each module that are opened, in audit mode; else None.
        transcript: All calls, in exact mode; else None.
    """

    sid: str
    nonce_u: str
    nonce_c: str
    by_user: SignedDocument
    by_contributor: SignedDocument
    nonce_v: str
    audit_rows: int | None
    transcript: Transcript | None

    @property
    def mode(self) -> str:
        """`exact` or `audit`."""
        return str(self.by_user.document["mode"])

    @property
    def root(self) -> str:
        """Root of the log."""
        return str(self.by_user.document["root"])

    @property
    def rows(self) -> dict[str, int]:
        """Number of rows of each module in the log."""
        return dict(self.by_user.document["rows"])

    def save(self, folder: Path) -> None:
        """Write the session into a folder of one's own, to go on after an interruption."""
        if self.transcript is not None:
            self.transcript.save(folder / TRANSCRIPT)
        Folder(str(folder)).write_json(
            CLOSED,
            {
                "sid": self.sid,
                "nonce_u": self.nonce_u,
                "nonce_c": self.nonce_c,
                "by_user": self.by_user.to_json(),
                "by_contributor": self.by_contributor.to_json(),
                "nonce_v": self.nonce_v,
                "audit_rows": self.audit_rows,
            },
        )

    @classmethod
    def load(cls, folder: Path) -> "ClosedSession":
        """Return the session in a folder; raises ArtifactError if it holds none."""
        fields = Folder(str(folder)).read_json(CLOSED)
        try:
            for name in ("by_user", "by_contributor"):
                fields[name] = SignedDocument.from_json(fields[name])
            exact = fields["audit_rows"] is None
            transcript = Transcript.load(folder / TRANSCRIPT) if exact else None
            return cls(**fields, transcript=transcript)
        except (LookupError, TypeError, SignatureError) as error:
            raise ArtifactError(f"{folder / CLOSED} holds no session: {error}") from None

    def check(self, manifest: AdapterManifest) -> None:
        """Raise VerificationError unless both parties signed this log of this adapter."""
        statement = self.by_contributor.check("close", manifest.contributor)
        self.by_user.check("close")
        said = statement.get("session"), statement.get("adapter_id")
        same = canonical_json(self.by_user.document) == canonical_json(statement)
        if not same or said != (self.sid, manifest.adapter_id):
            raise VerificationError("the parties have signed different logs, or another session")
        if self.transcript is not None and self.transcript.root != self.root:
            raise VerificationError("the transcript is not the one that was signed")


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
        fields = {"adapter_id": manifest.adapter_id, "nonce_u": self.nonce_u, "mode": mode}
        answer = channel.request("open", fields).fields
        self.nonce_c = str(answer.get("nonce_c"))
        self.rows_left = _row_counts(answer.get("rows_left"), manifest)
        _check_names("rows_left", list(self.rows_left), manifest)
        self.sid = session_id(
            manifest.protocol,
            manifest.adapter_id,
            manifest.base.digest,
            self.nonce_u,
            self.nonce_c,
        )
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
        fields = {"session": self.sid, "seq": seq, "module": module, "exponent": exponent}
        y = _tensor(self._channel.request("call", fields, {"x": x}), "y", np.int64, 2)
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
        fields: dict[str, Any] = {"session": self.sid, "prompts": list(prompts), "seed": seed}
        request = parse(DrawRequest, fields | {"audit_rows": audit_rows} | options)
        deadline = time.monotonic() + within_s
        while (answer := self._channel.request("draw", request.model_dump())).kind == "drawing":
            on_progress(0, len(prompts))
            if time.monotonic() > deadline:
                raise ProtocolError(f"no pictures were drawn in {within_s:.0f} s: ask again later")
            time.sleep(POLL_S)
        on_progress(len(prompts), len(prompts))
        pictures = _tensor(answer, "pictures", np.uint8, 4)
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
        by_user = SignedDocument.sign("close", statement, self._identity)
        fields = {"session": self.sid, "statement": by_user.to_json()}
        answer = self._channel.request("close", fields).fields.get("statement")
        by_contributor = SignedDocument.from_json(answer)
        signed = by_contributor.check("close", self._manifest.contributor)
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

    def verify(self, on_progress: Progress = lambda done, total: None) -> "Evidence":
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

    @property
    def _drawn(self) -> Drawing:
        if self._drawing is None:
            raise VerificationError("nothing was drawn: there is nothing to audit")
        return self._drawing


@dataclass(frozen=True, eq=False, slots=True)
class Evidence:
    """What was computed in a session, and the proofs of it.

    That audited rows are those of the signed log is checked when they are fetched.

    Attributes:
        closed: The signed session.
        rows: Inputs and outputs of each module, all that its proof speaks of.
        proofs: By module.
    """

    closed: ClosedSession
    rows: dict[str, tuple[Int16, Int64]]
    proofs: dict[str, bytes]

    def claims(self, manifest: AdapterManifest) -> dict[str, Claim]:
        """Return what `verify_named` checks, after checking that nothing is left out.

        Raises:
            VerificationError: if a module has no proof or no row, a proof is of no module of the
                manifest, or other rows are proved than those that influenced the result.
        """
        _check_names("proofs", list(self.proofs), manifest)
        _check_names("rows", list(self.rows), manifest)
        closed, adapter_id = self.closed, manifest.adapter_id
        closed.check(manifest)
        claims = {}
        for terms in manifest.modules:
            x, y = self.rows[terms.name]
            expected = closed.audit_rows or closed.rows.get(terms.name, 0)
            if not 0 < len(x) == expected:
                raise VerificationError(
                    f"{terms.name}: {len(x)} rows are proved, {expected} must be"
                )
            context = proof_context(adapter_id, closed.sid, closed.root, terms.name, closed.nonce_v)
            claims[terms.name] = (terms.commitment, x, y, context, self.proofs[terms.name])
        return claims

    @property
    def digest(self) -> str:
        """SHA-256 of all proofs, in hexadecimal."""
        named = {name: proof.hex() for name, proof in self.proofs.items()}
        return hashlib.sha256(canonical_json(named)).hexdigest()


def fetch_evidence(
    channel: Channel,
    manifest: AdapterManifest,
    closed: ClosedSession,
    on_progress: Progress = lambda done, total: None,
) -> Evidence:
    """Challenge a closed session, and wait for its proofs.

    Args:
        channel: To the contributor.
        manifest: The pinned one.
        closed: The session.
        on_progress: Is told how many modules are proved, and of how many.

    Raises:
        ProtocolError: if the contributor refuses, gets no further, or its answer is malformed.
        VerificationError: if an opened row is not the one of the signed log.
    """
    answer = _await_proofs(channel, manifest, closed, on_progress)
    names = _check_names("proofs", answer.fields.get("modules"), manifest)
    on_progress(len(names), len(names))
    proofs, rows = {}, {}
    for i, name in enumerate(names):
        proofs[name] = _tensor(answer, f"{i}.proof", np.uint8, 1).tobytes()
        if closed.transcript is not None:
            rows[name] = closed.transcript.rows(name)
        else:
            rows[name] = _opened_rows(answer, i, name, closed)
    return Evidence(closed, rows, proofs)


def _await_proofs(
    channel: Channel, manifest: AdapterManifest, closed: ClosedSession, on_progress: Progress
) -> Message:
    """Return the answer that has the proofs; until then every one must say how many there are."""
    fields = {"session": closed.sid, "nonce_v": closed.nonce_v}
    total, most, deadline = len(manifest.modules), -1, 0.0
    while (answer := channel.request("prove", fields)).kind != "evidence":
        done = answer.fields.get("done")
        if answer.kind != "proving" or type(done) is not int or not 0 <= done <= total:
            raise ProtocolError(f"{answer.kind!r} with done={done!r} is no answer about proofs")
        if done > most:
            most, deadline = done, time.monotonic() + MODULES_WITHIN_S
        elif time.monotonic() > deadline:
            raise ProtocolError(f"no module was proved in {MODULES_WITHIN_S:.0f} s: {done} are")
        on_progress(done, total)
        time.sleep(POLL_S)
    return answer


def _opened_rows(answer: Message, i: int, name: str, closed: ClosedSession) -> tuple[Int16, Int64]:
    """Return the audited rows of a module, each found in the signed log at the place drawn."""
    counts, audit_rows = closed.rows, closed.audit_rows
    assert audit_rows is not None
    numbers = challenge_rows(closed.nonce_v, closed.root, name, counts[name], audit_rows)
    x, y = _tensor(answer, f"{i}.x", np.int16, 2), _tensor(answer, f"{i}.y", np.int64, 2)
    places = _tensor(answer, f"{i}.places", np.int64, 2)
    paths = _tensor(answer, f"{i}.paths", np.uint8, 2)
    widths = places.shape[1], paths.shape[1]
    if not len(x) == len(y) == len(places) == len(numbers) or widths != (3, DIGEST_BYTES):
        raise VerificationError(f"{name}: {len(numbers)} rows were to be opened, not {len(x)}")
    start = 0
    for number, x_row, y_row, (call, exponent, length) in zip(
        numbers, x, y, places.tolist(), strict=True
    ):
        path = [bytes(node) for node in paths[start : start + max(length, 0)]]
        start += len(path)
        leaf = row_leaf(name, call, number, exponent, x_row, y_row)
        index = leaf_index(counts, name, number)
        check_inclusion(closed.root, sum(counts.values()), index, leaf, path)
    return x, y


def save_evidence(evidence: Evidence, folder: Path) -> None:
    """Write rows and proofs into a folder of one's own."""
    tensors: dict[str, NDArray[Any]] = {}
    for i, (name, (x, y)) in enumerate(evidence.rows.items()):
        proof = np.frombuffer(evidence.proofs[name], np.uint8)
        tensors |= {f"{i}.x": x, f"{i}.y": y, f"{i}.proof": proof}
    metadata = {"modules": json.dumps(list(evidence.rows))}
    with Folder(str(folder)).writing(EVIDENCE) as path:
        save_file(tensors, path, metadata)


def load_evidence(closed: ClosedSession, folder: Path) -> Evidence:
    """Return the evidence for a session in a folder; raises ArtifactError if there is none."""
    rows, proofs = {}, {}
    try:
        with safe_open(folder / EVIDENCE, framework="numpy") as file:
            for i, name in enumerate(json.loads(file.metadata()["modules"])):
                rows[name] = file.get_tensor(f"{i}.x"), file.get_tensor(f"{i}.y")
                proofs[name] = file.get_tensor(f"{i}.proof").tobytes()
    except (OSError, SafetensorError, ValueError, LookupError, TypeError) as error:
        raise ArtifactError(f"{folder / EVIDENCE} holds no evidence: {error}") from None
    return Evidence(closed, rows, proofs)


def _check_names(what: str, found: object, manifest: AdapterManifest) -> list[str]:
    """Return the names of the manifest's modules, if exactly they were found, each once."""
    names = [terms.name for terms in manifest.modules]
    if not isinstance(found, list) or sorted(map(str, found)) != sorted(names):
        differing = set(map(str, found)) ^ set(names) if isinstance(found, list) else names
        raise VerificationError(
            f"{what} must be of the {len(names)} modules of the manifest, each once: "
            f"{', '.join(sorted(differing)) or 'one is there twice'}"
        )
    return [str(name) for name in found]


def _row_counts(counts: object, manifest: AdapterManifest) -> dict[str, int]:
    names = {terms.name for terms in manifest.modules}
    if not isinstance(counts, dict) or not counts.keys() <= names:
        raise ProtocolError("numbers of rows must be given by the names of modules")
    for name, count in counts.items():
        if type(count) is not int or count < 0:
            raise ProtocolError(f"{name}: {count!r} is no number of rows")
    return counts


def _tensor(message: Message, name: str, dtype: type[np.generic], ndim: int) -> NDArray[Any]:
    tensor = message.tensors.get(name)
    if tensor is None or tensor.dtype != dtype or tensor.ndim != ndim:
        raise ProtocolError(
            f"the answer {message.kind!r} has no {np.dtype(dtype).name} {name!r} of {ndim} "
            "dimensions"
        )
    return tensor
