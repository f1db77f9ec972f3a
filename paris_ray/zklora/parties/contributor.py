"""The contributor's service: it answers users within the budget, proves, and releases the key.

`LoRAGateway` is the only endpoint: who calls, sessions, budget. The weights live in the processes
of `workers.py`; users never share a Ray cluster with them.
"""

import hashlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.util.metrics import Counter, Gauge
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from safetensors.numpy import load_file

from paris_ray.artifacts import canonical_json, sha256_hex
from paris_ray.errors import ConfigError, ParisError, ProtocolError, TradeError
from paris_ray.identity import Identity
from paris_ray.signatures import SignedDocument
from paris_ray.zklora.fixed_point import Int16, Int64, check_rows
from paris_ray.zklora.leakage import INPUTS, Span, draw_last_bits, predicted_error
from paris_ray.zklora.manifest import MANIFEST, AdapterManifest
from paris_ray.zklora.offer import KEY, SEALED, load_offer
from paris_ray.zklora.parties.channel import Peer, Server, serve
from paris_ray.zklora.parties.escrow import EscrowClient
from paris_ray.zklora.parties.frames import Message
from paris_ray.zklora.parties.messages import (
    CallRequest,
    CloseRequest,
    EndRequest,
    OpenRequest,
    ProveRequest,
    ReleaseRequest,
)
from paris_ray.zklora.parties.results import result
from paris_ray.zklora.parties.toll import Toll
from paris_ray.zklora.parties.workers import LoRAWorker, prove_modules
from paris_ray.zklora.sessions import SessionJournal, SessionRecord, SessionState
from paris_ray.zklora.trade import TradeState
from paris_ray.zklora.transcript import (
    CLOSE,
    closing_statement,
    new_nonce,
    proof_context,
)

MODULES_AT_ONCE = 4  # that one task proves: enough to pay for its start, few enough to share out
MAX_REPEATS = 3  # of proofs that failed
ANSWER_WITHIN_S = 5.0  # until a user who waits for proofs is told how far they are
SEEDS = b"paris_ray zklora seed\n"
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


class _Job:
    """An answer in the making, which is asked for until it is there.

    Args:
        kind: Of the answers until then.
        total: How many pieces it has.
        make: Returns the answer; it is given a function to call as pieces are done.
        attempt: How often it is made, with this one.
    """

    def __init__(
        self,
        kind: str,
        total: int,
        make: Callable[[Callable[[int], None]], Message],
        attempt: int = 1,
    ) -> None:
        self.attempt, self.was_told = attempt, False
        self._kind, self._done, self._total, self._make = kind, 0, total, make
        self._answer: Message | None = None
        self._error: ParisError | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._answer = self._make(self._count)
        except ParisError as error:
            self._error = error
        except Exception:
            logger.exception("%s failed", self._kind)
            self._error = ProtocolError(f"{self._kind} failed, by no fault of yours: ask again")

    def _count(self, pieces: int) -> None:
        self._done += pieces

    @property
    def may_be_repeated(self) -> bool:
        """Whether the user knows that it failed, and may have it tried again."""
        return self._error is not None and self.was_told and self.attempt <= MAX_REPEATS

    def wait(self, seconds: float) -> Message:
        """Return the answer, or how far it is; raises what went wrong."""
        self._thread.join(seconds)
        if self._error is not None:
            self.was_told = True
            raise self._error
        if self._answer is None:
            return Message(self._kind, {"done": self._done, "total": self._total})
        self.was_told = True
        return self._answer


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
        self._proofs: dict[str, _Job] = {}
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
        self._journal.add_adapter(manifest.adapter_id, list(manifest.terms), manifest.budget_rows)
        self._escrow = _connect_escrow(service, signed, manifest, self._identity)
        self._toll = Toll(manifest, self._escrow, self._journal)
        self._metrics.update(self._journal, manifest.adapter_id)

    def news(self) -> list[str]:
        """Return a line for each thing that happened since this was last asked."""
        return [self._news.popleft() for _ in range(len(self._news))]

    def _say(self, sid: str, user: str, what: str) -> None:
        left = min(self.rows_left().values())
        line = f"session {sid[:SHORT]} of user {user[:SHORT]}: {what}; {left} rows left"
        logger.info("%s", line)
        self._news.append(line)

    def _say_what_is_learned(self) -> None:
        """Tell what all users together know by now, of the module of which they know most."""
        adapter_id = self._manifest.adapter_id
        file = self._service.folder / INPUTS
        inputs = load_file(file) if file.exists() else {}
        known, of_all, errors = 0, 1, []
        for name, terms in self._manifest.terms.items():
            d_in = terms.commitment.d_in
            span = Span.of(d_in, self._journal.answered(adapter_id, name))
            if span.dimensions * of_all >= known * d_in:
                known, of_all = span.dimensions, d_in
            if name in inputs:
                errors.append(predicted_error(span, inputs[name]))
        line = f"learned by all users so far: at most {known} of {of_all} directions of a module"
        if errors:
            line += f"; a thief's updates are off by {np.mean(errors):.2f}, relative to real ones"
        logger.info("%s", line)
        self._news.append(line)

    def rows_left(self) -> dict[str, int]:
        """Return how many rows of each module may still be seen."""
        return self._journal.rows_left(self._manifest.adapter_id)

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
        request, manifest = OpenRequest(**message.fields), self._manifest
        if request.adapter_id != manifest.adapter_id:
            raise ProtocolError(f"adapter_id={request.adapter_id}: it is {manifest.adapter_id}")
        nonce_c = new_nonce()
        sid = manifest.session_id(request.nonce_u, nonce_c)
        session = self._journal.open_session(
            sid, manifest.adapter_id, user, request.nonce_u, nonce_c
        )
        if session.sid == sid:
            self._say(sid, user, "opened")
        left = self._journal.rows_left(manifest.adapter_id, user)
        return Message("opened", {"nonce_c": session.nonce_c, "rows_left": left})

    def _call(self, user: str, message: Message) -> Message:
        request = CallRequest(**message.fields)
        x = message.tensors.get("x", np.empty(0))
        check_rows(x, np.int16, self._manifest.module(request.module).commitment.d_in, "x")
        session, seq, module = request.session, request.seq, request.module
        seed = self._seed(session, seq, module, x)
        drawn = draw_last_bits(x, seed)
        # Not signed for in vain: the journal refuses what is more than the budget.
        if len(x) <= self._journal.rows_left(self._manifest.adapter_id, user)[module]:
            self._toll.collect(session, user, seq, module, len(x), request.owed)
        worker = self._workers[seq % len(self._workers)]
        y = self._journal.record_call(
            session,
            user,
            seq,
            module,
            request.exponent,
            drawn,
            lambda: result(worker.evaluate.remote(module, drawn)),
        )
        self._toll.answered(session, seq, module, len(x))
        return Message("answer", {"seed": seed.hex()}, {"y": y})

    def _seed(self, session: str, seq: int, module: str, x: Int16) -> bytes:
        """Return what draws the last bits of a call: the same whenever it is repeated."""
        asked = {"session": session, "seq": seq, "module": module, "x": sha256_hex(x.tobytes())}
        return hashlib.sha256(self._identity.sign(SEEDS + canonical_json(asked))).digest()

    def _end(self, user: str, message: Message) -> Message:
        request = EndRequest(**message.fields)
        self._journal.end(request.session, user, "its user broke it off")
        self._toll.close(request.session)
        self._say(request.session, user, "broken off")
        return Message("ended")

    def _close(self, user: str, message: Message) -> Message:
        request = CloseRequest(**message.fields)
        by_user = SignedDocument.from_json(request.statement)
        session = self._journal.session(request.session, user)
        transcript = self._journal.transcript(session.sid)
        statement = closing_statement(session.sid, session.adapter_id, transcript)
        by_contributor = SignedDocument.sign(CLOSE, statement, self._identity)
        self._journal.close(session.sid, user, by_user, by_contributor)
        if session.state == SessionState.OPEN:
            rows, owed = sum(transcript.counts.values()), self._toll.close(session.sid)
            self._say(
                session.sid,
                user,
                f"closed, with {rows} rows in its log and {owed} credits for them",
            )
            threading.Thread(target=self._say_what_is_learned, daemon=True).start()
        return Message("closed", {"statement": by_contributor.to_json()})

    def _prove(self, user: str, message: Message) -> Message:
        request = ProveRequest(**message.fields)
        session = self._journal.challenge(request.session, user, request.nonce_v)
        with self._lock:
            job = self._proofs.get(session.sid)
            if job is None or job.may_be_repeated:
                total, attempt = len(self._manifest.modules), 1 if job is None else job.attempt + 1
                self._say(session.sid, user, f"challenged, {total} modules are proved")
                job = _Job(
                    "proving", total, lambda count: self._make_evidence(session, count), attempt
                )
                self._proofs[session.sid] = job
        return job.wait(ANSWER_WITHIN_S)

    def _make_evidence(self, session: SessionRecord, count: Callable[[int], None]) -> Message:
        start = time.perf_counter()
        assert session.closing is not None
        assert session.nonce_v is not None
        root = session.closing[0].document["root"]
        transcript, claims = self._journal.transcript(session.sid), {}
        for name in self._manifest.terms:
            context = proof_context(session.adapter_id, session.sid, root, name, session.nonce_v)
            claims[name] = *transcript.rows(name), context
        proofs = self._prove_all(claims, count)
        tensors = {
            f"{i}.proof": np.frombuffer(proofs[name], np.uint8) for i, name in enumerate(claims)
        }
        seconds = time.perf_counter() - start
        self._say(session.sid, session.user, f"proofs are done, {seconds:.1f} s")
        return Message("evidence", {"modules": list(claims)}, tensors)

    def _prove_all(
        self, claims: Mapping[str, tuple[Int16, Int64, bytes]], count: Callable[[int], None]
    ) -> dict[str, bytes]:
        names, waiting = list(claims), []
        proofs: dict[str, bytes] = {}
        for start in range(0, len(names), MODULES_AT_ONCE):
            chunk = {name: claims[name] for name in names[start : start + MODULES_AT_ONCE]}
            waiting.append(prove_modules.remote(self._openings[0], chunk))
        while waiting:
            ready, waiting = ray.wait(waiting)
            proved = result(ready[0])
            proofs |= proved
            count(len(proved))
        self._metrics.proved(proofs)
        return proofs

    def _release(self, user: str, message: Message) -> Message:
        request = ReleaseRequest(**message.fields)
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
        self._rows_left.set(min(journal.rows_left(adapter_id).values()))
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


class Contribution:
    """A service that runs until it is closed.

    Args:
        service: How to serve the offer in its folder.

    Attributes:
        address: Host and port that it listens on.

    Raises:
        ParisError: if the offer cannot be served so.
    """

    def __init__(self, service: Service) -> None:
        offer = load_offer(service.folder)
        openings = self._openings = ray.put(offer.openings())  # kept: an actor may be restarted
        actors: Any = (LoRAWorker, LoRAGateway)
        worker, gateway = actors
        self._workers = [worker.remote(openings) for _ in range(service.workers)]
        # Its address is one of this machine, and the journal a file here.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.gateway = gateway.options(scheduling_strategy=here).remote(
            service, self._workers, [openings]
        )
        try:
            self.address: tuple[str, int] = result(self.gateway.start.remote())
        except BaseException:
            self.close()
            raise

    def news(self) -> list[str]:
        """Return a line for people for each thing that happened since this was last asked."""
        return list(result(self.gateway.news.remote()))

    def status(self) -> str:
        """Return rows left and sessions, in one line for people."""
        try:
            self.address = result(self.gateway.start.remote())  # tried again, after it was replaced
        except ParisError as error:
            return f"not listening: {error}"
        left = result(self.gateway.rows_left.remote())
        sessions = result(self.gateway.sessions.remote())
        counts = ", ".join(f"{count} {state}" for state, count in sessions.items())
        return f"rows left: {min(left.values())} (fewest of a module); sessions: {counts}"

    def close(self) -> None:
        """Stop the service; sessions, budget and offer stay as they are."""
        for actor in (self.gateway, *self._workers):
            ray.kill(actor)
