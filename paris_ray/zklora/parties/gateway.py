"""The contributor's only endpoint: who calls, what it costs, and how far each session is.

The weights live in the processes of `workers.py`; users never share a Ray cluster with them.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.util.metrics import Counter, Gauge

from paris_ray.errors import ConfigError, ParisError, ProtocolError, TradeError
from paris_ray.identity import Identity
from paris_ray.signatures import SignedDocument
from paris_ray.zklora.calls import Request
from paris_ray.zklora.fixed_point import Int16, Int64
from paris_ray.zklora.leakage import INPUTS, describe_leak, draw_last_bits, row_seeds
from paris_ray.zklora.manifest import MANIFEST, AdapterManifest
from paris_ray.zklora.parties.connection import Peer
from paris_ray.zklora.parties.escrow import EscrowClient
from paris_ray.zklora.parties.frames import Message
from paris_ray.zklora.parties.messages import (
    MAX_CALLS_BYTES,
    CallRequest,
    CloseRequest,
    EndRequest,
    OpenRequest,
    ProveRequest,
    ReleaseRequest,
    tensors_of,
)
from paris_ray.zklora.parties.proving import Proving, evidence, prove_all
from paris_ray.zklora.parties.results import result
from paris_ray.zklora.parties.server import Server, serve
from paris_ray.zklora.parties.toll import Toll
from paris_ray.zklora.sealing import KEY, SEALED
from paris_ray.zklora.session_records import SessionRecord, SessionState
from paris_ray.zklora.sessions import SessionJournal
from paris_ray.zklora.trade import TradeState
from paris_ray.zklora.transcript import new_nonce

ANSWER_WITHIN_S = 5.0  # until a user who waits for proofs is told how far they are
SECRET = b"paris_ray zklora secret of last bits\n"
MAX_NEWS = 1000
SHORT = 8  # characters of a digest, enough to tell a few sessions apart

logger = logging.getLogger("paris_ray")


@dataclass(frozen=True, kw_only=True, slots=True)
class Service:
    """How an offer is served.

    Attributes:
        folder: Of the offer; the journal of sessions is kept there too.
        identity: Folder of the contributor's identity.
        host: Address to listen on.
        port: Port; 0 for a free one.
        clients: Certificates, as PEM text, of all users who may connect.
        escrow: Host and port of the escrow that the manifest names; None: nothing can be bought.
        workers: Processes that answer updates.
        max_rows_per_user: Of each module that one user may ever see; None: all of the budget.

    Raises:
        ConfigError: if `max_rows_per_user` is below 1.
    """

    folder: Path
    identity: Path
    host: str
    port: int
    clients: tuple[str, ...]
    escrow: tuple[str, int] | None = None
    workers: int = 1
    max_rows_per_user: int | None = None

    def __post_init__(self) -> None:
        if self.max_rows_per_user is not None and self.max_rows_per_user < 1:
            raise ConfigError(
                f"max_rows_per_user={self.max_rows_per_user} is not allowed: at least 1"
            )


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=3)
class LoRAGateway:
    """The only endpoint: who may ask, what it costs, and how far each session is.

    It listens once `start` was called; one that is replaced after it died listens by itself.

    Args:
        service: How to serve.
        workers: `LoRAWorker`s.
        openings: A list with the reference of the weights, which is only handed on.
    """

    def __init__(self, service: Service, workers: list[Any], openings: list[Any]) -> None:
        logging.basicConfig(level=logging.INFO)
        self._service = service
        self._workers, self._openings = workers, openings
        self._proofs: dict[str, Proving] = {}
        self._lock = threading.Lock()
        self._news: deque[str] = deque(maxlen=MAX_NEWS)
        self._metrics = _Metrics()
        self._operations: dict[str, Callable[[str, Message], Message]] = {
            "open": self._open,
            "call": self._call,
            "end": self._end,
            "close": self._close,
            "prove": self._prove,
            "release": self._release,
        }
        self._server: Server | None = None
        if ray.get_runtime_context().was_current_actor_reconstructed:
            try:  # whatever is raised here, Ray would keep only the text of it
                self.start()
            except ParisError as error:
                logger.error("not listening: %s", error)

    def start(self) -> tuple[str, int]:
        """Listen, unless it does already; return host and port.

        Raises:
            ParisError: if the offer, the escrow or the address is not what it must be.
        """
        if self._server is None:
            self._load()
            service = self._service
            self._server = serve(
                self._identity, service.host, service.port, service.clients, self._answer
            )
        return self._server.address

    def _load(self) -> None:
        service = self._service
        self._identity = Identity.load(service.identity)
        signed = SignedDocument.read(service.folder / MANIFEST)
        manifest = self._manifest = AdapterManifest.from_signed(signed)
        self._journal = SessionJournal(
            service.folder / "sessions.sqlite", max_rows_per_user=service.max_rows_per_user
        )
        self._budget = self._journal.budget
        self._budget.add_adapter(manifest.adapter_id, manifest.terms, manifest.budget_rows)
        self._escrow = _connect_escrow(service, signed, manifest, self._identity)
        # A signature that is never shown is as good as a file that is never lost.
        self._secret = self._identity.sign(SECRET + bytes.fromhex(manifest.adapter_id))
        self._toll = Toll(manifest, self._escrow, self._journal)
        self._metrics.update(self._journal, manifest.adapter_id)

    def news(self) -> list[str]:
        """Return a line for each thing that happened since this was last asked."""
        return [self._news.popleft() for _ in range(len(self._news))]

    def _say(self, sid: str, user: str, what: str) -> None:
        left = self._budget.fewest_left(self._manifest.adapter_id)
        line = f"session {sid[:SHORT]} of user {user[:SHORT]}: {what}; {left} rows left"
        logger.info("%s", line)
        self._news.append(line)

    def _say_what_is_learned(self) -> None:
        line = describe_leak(self._journal, self._manifest, self._service.folder / INPUTS)
        logger.info("%s", line)
        self._news.append(line)

    def rows_left(self) -> dict[str, int]:
        """Return how many rows of each module may still be seen."""
        return self._budget.rows_left(self._manifest.adapter_id)

    def sessions(self) -> dict[str, int]:
        """Return the number of sessions in every state."""
        return self._journal.sessions_by_state()

    def _answer(self, peer: Peer, request: Message) -> Message:
        if request.kind not in self._operations:
            raise ProtocolError(f"there is no request {request.kind[:80]!r}")
        try:
            return self._operations[request.kind](peer.public_key, request)
        finally:
            self._metrics.update(self._journal, self._manifest.adapter_id)

    def _open(self, user: str, message: Message) -> Message:
        request, manifest = OpenRequest.read(message), self._manifest
        if request.adapter_id != manifest.adapter_id:
            raise ProtocolError(f"adapter_id={request.adapter_id}: it is {manifest.adapter_id}")
        nonce_c = new_nonce()
        sid = manifest.session_id(request.nonce_u, nonce_c)
        session = self._journal.open_session(
            sid, manifest.adapter_id, user, request.nonce_u, nonce_c
        )
        if session.sid == sid:
            self._say(sid, user, "opened")
        left = self._budget.rows_left(manifest.adapter_id, user)
        return Message("opened", {"nonce_c": session.nonce_c, "rows_left": left})

    def _call(self, user: str, message: Message) -> Message:
        request = CallRequest(**message.fields)
        session, seq, modules = request.session, request.seq, request.modules
        x = self._asked_rows(modules, message)
        # Before anything is computed, or signed for in vain.
        self._journal.check_turn(session, user, seq, modules, len(x))
        self._toll.collect(session, user, seq, modules, len(x), request.owed)
        seeds = [row_seeds(self._secret, module, x) for module in modules]
        drawn = [draw_last_bits(x, seeds_of_one) for seeds_of_one in seeds]
        worker = self._workers[seq % len(self._workers)]
        answers = self._journal.record_calls(
            session,
            user,
            seq,
            [
                Request(name, request.exponent, rows)
                for name, rows in zip(modules, drawn, strict=True)
            ],
            lambda: result(worker.evaluate.remote(dict(zip(modules, drawn, strict=True)))),
        )
        self._toll.answered(session, seq, modules, len(x))
        tensors = {f"{i}.y": y for i, y in enumerate(answers)}
        return Message("answer", tensors=tensors | {f"{i}.seeds": s for i, s in enumerate(seeds)})

    def _asked_rows(self, modules: Sequence[str], message: Message) -> Int16:
        """Return the rows of a request, if these modules may be asked for them at once."""
        terms = [self._manifest.module(name) for name in modules]
        if len(set(modules)) < len(modules):
            raise ProtocolError("modules of one request must differ")
        d_in = terms[0].commitment.d_in
        for other in terms:
            if other.commitment.d_in != d_in:
                raise ProtocolError(f"{other.name} has inputs of another width than {modules[0]}")
        x: Int16 = tensors_of(message, {"x": (np.int16, (None, d_in))})["x"]
        size = len(x) * sum(other.row_bytes for other in terms)
        if size > MAX_CALLS_BYTES:
            raise ProtocolError(f"calls of {size} bytes are not allowed: {MAX_CALLS_BYTES} at once")
        return x

    def _end(self, user: str, message: Message) -> Message:
        request = EndRequest.read(message)
        self._journal.end(request.session, user, "its user broke it off")
        self._toll.close(request.session)
        self._say(request.session, user, "broken off")
        return Message("ended")

    def _close(self, user: str, message: Message) -> Message:
        request = CloseRequest.read(message)
        by_user = SignedDocument.from_json(request.statement)
        before = self._journal.session(request.session, user)
        session = self._journal.close(before.sid, user, by_user, self._identity)
        by_contributor = session.signed.by_contributor
        if before.state == SessionState.OPEN:
            rows = sum(by_contributor.document["rows"].values())
            owed = self._toll.close(session.sid)
            self._say(
                session.sid, user, f"closed, with {rows} rows in its log, {owed} credits for them"
            )
            threading.Thread(target=self._say_what_is_learned, daemon=True).start()
        return Message("closed", {"statement": by_contributor.to_json()})

    def _prove(self, user: str, message: Message) -> Message:
        request = ProveRequest.read(message)
        session = self._journal.challenge(request.session, user, request.nonce_v)
        with self._lock:
            job = self._proofs.get(session.sid)
            if job is None or job.may_be_repeated:
                total, attempt = len(self._manifest.modules), 1 if job is None else job.attempt + 1
                self._say(session.sid, user, f"challenged, {total} modules are proved")
                job = Proving(total, lambda count: self._make_evidence(session, count), attempt)
                self._proofs[session.sid] = job
        return job.wait(ANSWER_WITHIN_S)

    def _make_evidence(self, session: SessionRecord, count: Callable[[int], None]) -> Message:
        start = time.perf_counter()

        def claim(name: str) -> tuple[Int16, Int64, bytes]:
            return *self._journal.calls.rows(session.sid, name), session.proof_context(name)

        proofs = prove_all(self._openings[0], list(self._manifest.terms), claim, count)
        self._metrics.proved(proofs)
        seconds = time.perf_counter() - start
        self._say(session.sid, session.user, f"proofs are done, {seconds:.1f} s")
        return evidence(proofs)

    def _release(self, user: str, message: Message) -> Message:
        request = ReleaseRequest.read(message)
        session = self._journal.session(request.session, user)
        if self._escrow is None or session.state != SessionState.CHALLENGED:
            raise TradeError(f"session {session.sid} is {session.state}: nothing is for sale")
        trade = self._escrow.trade(session.sid)
        if trade.state is TradeState.PAID:
            key = (self._service.folder / KEY).read_bytes()  # nowhere else in this process
            trade = self._escrow.deposit_key(session.sid, key)
            self._say(session.sid, user, f"key handed to the escrow, trade {trade.state}")
        return Message("released", {"state": trade.state})


class _Metrics:
    """What Ray's metrics tell of the service."""

    def __init__(self) -> None:
        self._rows_left = Gauge(
            "paris_zklora_rows_left", "Rows of the module with the fewest left in its budget."
        )
        self._sessions = Gauge("paris_zklora_sessions", "Sessions by state.", tag_keys=("state",))
        self._proof_bytes = Counter("paris_zklora_proof_bytes", "Bytes of all proofs.")

    def update(self, journal: SessionJournal, adapter_id: str) -> None:
        self._rows_left.set(journal.budget.fewest_left(adapter_id))
        for state, count in journal.sessions_by_state().items():
            self._sessions.set(count, tags={"state": str(state)})

    def proved(self, proofs: Mapping[str, bytes]) -> None:
        self._proof_bytes.inc(sum(map(len, proofs.values())))


def _connect_escrow(
    service: Service, signed: SignedDocument, manifest: AdapterManifest, identity: Identity
) -> EscrowClient | None:
    """Return the escrow, with the sealed adapter deposited there."""
    if service.escrow is None:
        return None
    if manifest.escrow_certificate is None:
        raise ConfigError("escrow is not allowed: the manifest names none")
    client = EscrowClient(identity, service.escrow, manifest.escrow_certificate)
    client.list_adapter(signed, (service.folder / SEALED).read_bytes())
    return client
