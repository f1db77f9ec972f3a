"""The contributor's only endpoint: who calls, what it costs, and how far each session is.

The weights live in the processes of `workers.py`; users never share a Ray cluster with them.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.util.metrics import Counter, Gauge

from paris_ray.errors import ConfigError, ParisError, ProtocolError, TradeError
from paris_ray.identity import Identity
from paris_ray.signatures import SignedDocument
from paris_ray.zklora.calls import Request
from paris_ray.zklora.fixed_point import Int16, Int64
from paris_ray.zklora.leakage import INPUTS, describe_leak, draw_last_bits, row_seeds
from paris_ray.zklora.manifest import MANIFEST, AdapterManifest
from paris_ray.zklora.parties.escrow import LIMITS, EscrowClient
from paris_ray.zklora.parties.evidence import Progress
from paris_ray.zklora.parties.frames import Message
from paris_ray.zklora.parties.messages import MAX_CALLS_BYTES, REQUESTS, message_of, values_of
from paris_ray.zklora.parties.proving import Proofs
from paris_ray.zklora.parties.server import Server
from paris_ray.zklora.parties.toll import Toll
from paris_ray.zklora.parties.workers import prove_all, result
from paris_ray.zklora.sealing import KEY, SEALED
from paris_ray.zklora.session_records import SessionRecord, SessionState
from paris_ray.zklora.sessions import SessionJournal
from paris_ray.zklora.trade import TradeState
from paris_ray.zklora.transcript import new_nonce

SECRET = b"paris_ray zklora secret of last bits\n"
MAX_NEWS = 1000
# Users do not wait for each other's opening checks; one place is for whoever follows a dead actor.
ESCROW_CONNECTIONS = LIMITS.connections_a_peer - 1
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
        self._service, self._workers, self._openings = service, workers, openings
        self._news: deque[str] = deque(maxlen=MAX_NEWS)
        self._metrics = _Metrics()
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
            where = self._service.host, self._service.port
            self._server = Server(self._identity, *where, self._service.clients, self._answer)
        return self._server.address

    def _load(self) -> None:
        service = self._service
        self._identity = Identity.load(service.identity)
        signed = SignedDocument.read(service.folder / MANIFEST)
        manifest = self._manifest = AdapterManifest.from_signed(signed)
        path, most = service.folder / "sessions.sqlite", service.max_rows_per_user
        self._journal = SessionJournal(path, max_rows_per_user=most)
        self._budget = self._journal.budget
        self._budget.add_adapter(manifest.adapter_id, manifest.terms, manifest.budget_rows)
        self._escrow: EscrowClient | None = None
        if service.escrow is not None:
            where = service.escrow, manifest.escrow_certificate
            self._escrow = EscrowClient(self._identity, *where, ESCROW_CONNECTIONS)
            self._escrow.list_adapter(signed, (service.folder / SEALED).read_bytes())
        # A signature that is never shown is as good as a file that is never lost.
        self._secret = self._identity.sign(SECRET + bytes.fromhex(manifest.adapter_id))
        self._toll = Toll(manifest, self._escrow, self._journal)
        self._proofs = Proofs(len(manifest.modules))
        self._metrics.update(self._journal, manifest.adapter_id)

    def news(self) -> list[str]:
        """Return a line for each thing that happened since this was last asked."""
        return [self._news.popleft() for _ in range(len(self._news))]

    def _tell(self, line: str) -> None:
        logger.info("%s", line)
        self._news.append(line)

    def _say(self, sid: str, user: str, what: str) -> None:
        left = self._budget.fewest_left(self._manifest.adapter_id)
        self._tell(f"session {sid[:SHORT]} of user {user[:SHORT]}: {what}; {left} rows left")

    def _say_what_is_learned(self) -> None:
        inputs = self._service.folder / INPUTS
        self._tell(describe_leak(self._journal, self._manifest, inputs))

    def status(self) -> str:
        """Return rows left and sessions, in one line for people."""
        counts = self._journal.sessions_by_state()
        sessions = ", ".join(f"{count} {state}" for state, count in counts.items())
        left = self._budget.fewest_left(self._manifest.adapter_id)
        return f"rows left: {left} (fewest of a module); sessions: {sessions}"

    def _answer(self, user: str, request: Message) -> Message:
        if request.kind not in REQUESTS:
            raise ProtocolError(f"there is no request {request.kind[:80]!r}")
        operation: Callable[..., Message] = getattr(self, f"_{request.kind}")
        try:
            return operation(user, *values_of(request, REQUESTS[request.kind]))
        finally:
            self._metrics.update(self._journal, self._manifest.adapter_id)

    def _open(self, user: str, adapter_id: str, nonce_u: str) -> Message:
        manifest, nonces = self._manifest, (nonce_u, new_nonce())
        if adapter_id != manifest.adapter_id:
            raise ProtocolError(f"adapter_id={adapter_id[:80]}: it is {manifest.adapter_id}")
        sid = manifest.session_id(*nonces)
        session = self._journal.open_session(sid, manifest.adapter_id, user, *nonces)
        if session.sid == sid:
            self._say(sid, user, "opened")
        left = self._budget.rows_left(manifest.adapter_id, user)
        return Message("opened", {"nonce_c": session.nonce_c, "rows_left": left})

    def _call(
        self,
        user: str,
        session: str,
        seq: int,
        modules: list[Any],
        exponent: int,
        owed: object,
        x: Int16,
    ) -> Message:
        self._check_rows(modules, x)
        # Before anything is computed, or signed for in vain.
        self._journal.check_turn(session, user, seq, modules, len(x))
        self._toll.collect(session, user, seq, modules, len(x), owed)
        seeds = [row_seeds(self._secret, module, x) for module in modules]
        drawn = {name: draw_last_bits(x, own) for name, own in zip(modules, seeds, strict=True)}
        requests = [Request(name, exponent, rows) for name, rows in drawn.items()]
        worker = self._workers[seq % len(self._workers)]
        answers = self._journal.record_calls(
            session, user, seq, requests, lambda: result(worker.evaluate.remote(drawn))
        )
        self._toll.answered(session, seq, modules, len(x))
        tensors = {f"{i}.y": y for i, y in enumerate(answers)}
        return Message("answer", tensors=tensors | {f"{i}.seeds": s for i, s in enumerate(seeds)})

    def _check_rows(self, modules: Sequence[Any], x: Int16) -> None:
        """Raise ProtocolError unless these modules may be asked for these rows at once."""
        if not modules or not all(isinstance(name, str) for name in modules):
            raise ProtocolError("modules must be the names of one or more modules")
        terms = [self._manifest.module(name) for name in modules]
        if len(set(modules)) < len(modules):
            raise ProtocolError("modules of one request must differ")
        for module in terms:
            if module.commitment.d_in != x.shape[1]:
                raise ProtocolError(f"{module.name} has not inputs of {x.shape[1]} columns")
        size = len(x) * sum(module.row_bytes for module in terms)
        if size > MAX_CALLS_BYTES:
            raise ProtocolError(f"calls of {size} bytes are not allowed: {MAX_CALLS_BYTES} at once")

    def _end(self, user: str, session: str) -> Message:
        self._journal.end(session, user, "its user broke it off")
        self._toll.close(session)
        self._say(session, user, "broken off")
        return Message("ended")

    def _close(self, user: str, session: str, statement: SignedDocument) -> Message:
        was_open = self._journal.session(session, user).state == SessionState.OPEN
        closed = self._journal.close(session, user, statement, self._identity)
        by_contributor = closed.signed.by_contributor
        if was_open:
            rows = sum(by_contributor.document["rows"].values())
            owed = self._toll.close(session)
            self._say(
                session, user, f"closed, with {rows} rows in its log, {owed} credits for them"
            )
            threading.Thread(target=self._say_what_is_learned, daemon=True).start()
        return Message("closed", {"statement": by_contributor.to_json()})

    def _prove(self, user: str, session: str, nonce_v: str) -> Message:
        challenged = self._journal.challenge(session, user, nonce_v)
        return self._proofs.answer(session, partial(self._make_proofs, challenged))

    def _make_proofs(self, session: SessionRecord, on_progress: Progress) -> Message:
        names, start = list(self._manifest.terms), time.perf_counter()
        self._say(session.sid, session.user, f"challenged, {len(names)} modules are proved")

        def claim(name: str) -> tuple[Int16, Int64, bytes]:
            return *self._journal.calls.rows(session.sid, name), session.proof_context(name)

        proofs = prove_all(self._openings[0], names, claim, on_progress)
        self._metrics.proof_bytes.inc(sum(map(len, proofs.values())))
        seconds = time.perf_counter() - start
        self._say(session.sid, session.user, f"proofs are done, {seconds:.1f} s")
        return message_of("evidence", proofs)

    def _release(self, user: str, session: str) -> Message:
        state = self._journal.session(session, user).state
        if self._escrow is None or state != SessionState.CHALLENGED:
            raise TradeError(f"session {session} is {state}: nothing is for sale")
        trade = self._escrow.trade(session)
        if trade.state is TradeState.PAID:
            key = (self._service.folder / KEY).read_bytes()  # nowhere else in this process
            trade = self._escrow.deposit_key(session, key)
            self._say(session, user, f"key handed to the escrow, trade {trade.state}")
        return Message("released", {"state": trade.state})


class _Metrics:
    """What Ray's metrics tell of the service."""

    def __init__(self) -> None:
        self._rows_left = Gauge(
            "paris_zklora_rows_left", "Rows of the module with the fewest left in its budget."
        )
        self._sessions = Gauge("paris_zklora_sessions", "Sessions by state.", tag_keys=("state",))
        self.proof_bytes = Counter("paris_zklora_proof_bytes", "Bytes of all proofs.")

    def update(self, journal: SessionJournal, adapter_id: str) -> None:
        self._rows_left.set(journal.budget.fewest_left(adapter_id))
        for state, count in journal.sessions_by_state().items():
            self._sessions.set(count, tags={"state": str(state)})
