"""What a closed session leaves: the log that both parties signed, and the proofs of its rows."""

import hashlib
import json
import time
from collections.abc import Callable
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
from paris_ray.zklora.manifest import AdapterManifest
from paris_ray.zklora.parties.channel import Channel
from paris_ray.zklora.parties.frames import Message
from paris_ray.zklora.parties.messages import ProveRequest, tensor_of
from paris_ray.zklora.proof import Claim
from paris_ray.zklora.transcript import CLOSE, Transcript, proof_context

TRANSCRIPT = "transcript.safetensors"
CLOSED = "closed.json"
EVIDENCE = "evidence.safetensors"
POLL_S = 0.5
MODULES_WITHIN_S = 3600.0  # the next few
Progress = Callable[[int, int], None]


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
        transcript: All calls.
    """

    sid: str
    nonce_u: str
    nonce_c: str
    by_user: SignedDocument
    by_contributor: SignedDocument
    nonce_v: str
    transcript: Transcript

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
            },
        )

    @classmethod
    def load(cls, folder: Path) -> "ClosedSession":
        """Return the session in a folder; raises ArtifactError if it holds none."""
        fields = Folder(str(folder)).read_json(CLOSED)
        try:
            for name in ("by_user", "by_contributor"):
                fields[name] = SignedDocument.from_json(fields[name])
            return cls(**fields, transcript=Transcript.load(folder / TRANSCRIPT))
        except (LookupError, TypeError, SignatureError) as error:
            raise ArtifactError(f"{folder / CLOSED} holds no session: {error}") from None

    def check(self, manifest: AdapterManifest) -> None:
        """Raise VerificationError unless both parties signed this log of this adapter."""
        statement = self.by_contributor.check(CLOSE, manifest.contributor)
        self.by_user.check(CLOSE)
        said = statement.get("session"), statement.get("adapter_id")
        same = canonical_json(self.by_user.document) == canonical_json(statement)
        if not same or said != (self.sid, manifest.adapter_id):
            raise VerificationError("the parties have signed different logs, or another session")
        if self.transcript.root != self.root:
            raise VerificationError("the transcript is not the one that was signed")


@dataclass(frozen=True, eq=False, slots=True)
class Evidence:
    """What was computed in a session, and the proofs of it.

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
        check_names("proofs", list(self.proofs), manifest)
        check_names("rows", list(self.rows), manifest)
        closed, adapter_id = self.closed, manifest.adapter_id
        closed.check(manifest)
        claims = {}
        for terms in manifest.modules:
            x, y = self.rows[terms.name]
            expected = closed.rows.get(terms.name, 0)
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
        VerificationError: if it has not a proof of each module.
    """
    answer = _await_proofs(channel, manifest, closed, on_progress)
    names = check_names("proofs", answer.fields.get("modules"), manifest)
    on_progress(len(names), len(names))
    proofs, rows = {}, {}
    for i, name in enumerate(names):
        proofs[name] = tensor_of(answer, f"{i}.proof", np.uint8, 1).tobytes()
        rows[name] = closed.transcript.rows(name)
    return Evidence(closed, rows, proofs)


def _await_proofs(
    channel: Channel, manifest: AdapterManifest, closed: ClosedSession, on_progress: Progress
) -> Message:
    """Return the answer that has the proofs; until then every one must say how many there are."""
    request = ProveRequest(session=closed.sid, nonce_v=closed.nonce_v).model_dump()
    total, most, deadline = len(manifest.modules), -1, 0.0
    while (answer := channel.request("prove", request)).kind != "evidence":
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


def check_names(what: str, found: object, manifest: AdapterManifest) -> list[str]:
    """Return the names of the manifest's modules, if exactly they were found, each once."""
    names = [terms.name for terms in manifest.modules]
    if not isinstance(found, list) or sorted(map(str, found)) != sorted(names):
        differing = set(map(str, found)) ^ set(names) if isinstance(found, list) else names
        raise VerificationError(
            f"{what} must be of the {len(names)} modules of the manifest, each once: "
            f"{', '.join(sorted(differing)) or 'one is there twice'}"
        )
    return [str(name) for name in found]
