"""What a closed session leaves: the log that both parties signed, and the proofs of its rows."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from paris_ray.artifacts import canonical_json
from paris_ray.documents import printable
from paris_ray.errors import ArtifactError, ProtocolError, SignatureError, VerificationError
from paris_ray.folders import Folder
from paris_ray.signatures import SignedDocument
from paris_ray.zklora.log import CLOSE, closing_statement
from paris_ray.zklora.manifest import AdapterManifest
from paris_ray.zklora.parties.channel import Channel
from paris_ray.zklora.parties.frames import Message
from paris_ray.zklora.parties.messages import values_of
from paris_ray.zklora.proof import Claim, Proof
from paris_ray.zklora.transcript import Transcript, proof_context

SESSION = "session"  # folder of one, in that of a purchase
CLOSED = "closed.json"
# Proofs of before, under numbers, lie in evidence.safetensors: they are asked for again, so that a
# purchase that was paid for by then can be finished.
EVIDENCE = "proofs.safetensors"
POLL_S = 0.5
MODULES_WITHIN_S = 3600.0  # the next few
MAX_NAMES = 1000  # characters of names that are not those of the manifest
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

    def save(self, folder: Path) -> None:
        """Write the session into a folder of one's own, to go on after an interruption."""
        self.transcript.save(folder)
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
            return cls(**fields, transcript=Transcript.load(folder))
        except (LookupError, TypeError, SignatureError) as error:
            raise ArtifactError(f"{folder / CLOSED} holds no session: {error}") from None

    def check(self, manifest: AdapterManifest) -> None:
        """Check that both parties signed this very transcript of this adapter.

        Raises:
            VerificationError: if one has signed something else.
            SignatureError: if a signature does not hold.
            ProtocolError: if the transcript has no calls.
        """
        statement = closing_statement(self.sid, manifest.adapter_id, self.transcript.log)
        for party, signed, key in (
            ("contributor", self.by_contributor, manifest.contributor),
            ("user", self.by_user, None),
        ):
            if canonical_json(signed.check(CLOSE, key)) != canonical_json(statement):
                raise VerificationError(f"the {party} has signed another log than this session's")


@dataclass(frozen=True, eq=False)
class Evidence:
    """What was computed in a session, and the proofs of it.

    Attributes:
        closed: The signed session.
        proofs: By module.
    """

    closed: ClosedSession
    proofs: dict[str, bytes]

    def claims(self, manifest: AdapterManifest) -> "Claims":
        """Return what `verify_named` checks, after checking that nothing is left out.

        Raises:
            VerificationError: if a module has no proof or no row, a proof is of no module of the
                manifest, or a party has signed other rows.
            ParisError: as `ClosedSession.check`.
        """
        self.closed.check(manifest)
        check_names("proofs", self.proofs, manifest)
        check_names("rows", self.closed.transcript.log.rows, manifest)
        return Claims(self, manifest)


class Claims(Mapping[str, Claim]):
    """What is checked of each module; its rows are read when it is asked for.

    Args:
        evidence: Of which nothing is left out.
        manifest: The pinned one.
    """

    def __init__(self, evidence: Evidence, manifest: AdapterManifest) -> None:
        self._evidence, self._manifest = evidence, manifest

    def __len__(self) -> int:
        return len(self._manifest.modules)

    def __iter__(self) -> Iterator[str]:
        return iter(self._manifest.terms)

    def __getitem__(self, name: str) -> Claim:
        closed, terms = self._evidence.closed, self._manifest.terms[name]
        context = proof_context(
            self._manifest.adapter_id, closed.sid, closed.root, name, closed.nonce_v
        )
        rows, proof = closed.transcript.rows(name), self._evidence.proofs[name]
        return terms.commitment, *rows, context, proof


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
    names = list(manifest.terms)
    check_names("proofs", answer.tensors, manifest)
    on_progress(len(names), len(names))
    proofs = dict(zip(names, values_of(answer, dict.fromkeys(names, bytes)), strict=True))
    for name, proof in proofs.items():
        _check_form(name, proof, manifest)
    return Evidence(closed, proofs)


def _await_proofs(
    channel: Channel, manifest: AdapterManifest, closed: ClosedSession, on_progress: Progress
) -> Message:
    """Return the answer that has the proofs; until then every one must say how many there are."""
    request = {"session": closed.sid, "nonce_v": closed.nonce_v}
    total, most, deadline = len(manifest.modules), -1, 0.0
    while (answer := channel.request("prove", request)).kind != "evidence":
        done = answer.fields.get("done")
        if answer.kind != "proving" or type(done) is not int or not 0 <= done <= total:
            raise ProtocolError(
                f"{answer.kind!r:.80} with done={done!r:.80} is no answer about proofs"
            )
        if done > most:
            most, deadline = done, time.monotonic() + MODULES_WITHIN_S
        elif time.monotonic() > deadline:
            raise ProtocolError(f"no module was proved in {MODULES_WITHIN_S:.0f} s: {done} are")
        on_progress(done, total)
        time.sleep(POLL_S)
    return answer


def _check_form(name: str, proof: bytes, manifest: AdapterManifest) -> None:
    """Raise VerificationError unless a proof has the length that the module's dimensions imply."""
    try:
        Proof.from_bytes(proof, manifest.module(name).commitment)
    except VerificationError as error:
        raise VerificationError(f"{name}: {error}") from None


def save_evidence(evidence: Evidence, folder: Path) -> None:
    """Write the proofs into the folder of the session, where `ClosedSession.save` put its rows."""
    tensors = {name: np.frombuffer(proof, np.uint8) for name, proof in evidence.proofs.items()}
    with Folder(str(folder)).writing(EVIDENCE) as path:
        save_file(tensors, path)


def load_evidence(closed: ClosedSession, folder: Path) -> Evidence:
    """Return the evidence for a session in a folder; raises ArtifactError if there is none."""
    try:
        with safe_open(folder / EVIDENCE, framework="numpy") as file:
            proofs = {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        raise ArtifactError(f"{folder / EVIDENCE} holds no evidence: {error}") from None
    return Evidence(closed, proofs)


def check_names(what: str, found: Iterable[str], manifest: AdapterManifest) -> None:
    """Raise VerificationError unless exactly the manifest's modules were found, by name."""
    if differing := set(found) ^ manifest.terms.keys():
        named = printable(", ".join(sorted(differing)), MAX_NAMES)  # a stranger's own words
        raise VerificationError(
            f"{what} must be of the {len(manifest.terms)} modules of the manifest: {named}"
        )
