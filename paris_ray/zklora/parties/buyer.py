"""All that a base-model user does with an offer: try it, verify, pay, and open the weights.

    nonce.json    names the session, before it is opened
    plan.json     what is tried
    session/      what both signed, rows, proofs, results
    zklora.json   the pinned manifest
    receipt.json  how far the purchase is
    adapter/      the bought weights, in PEFT's layout

Each step leaves a file, so the same call goes on after an interruption; nothing is tried or paid
for twice.
"""

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from paris_ray.errors import BudgetError, ConfigError, TradeError
from paris_ray.folders import Folder
from paris_ray.identity import Identity, public_key_of
from paris_ray.receipts import RECEIPT, Receipt, State
from paris_ray.zklora.inference import NumericsLog
from paris_ray.zklora.manifest import MANIFEST, AdapterManifest
from paris_ray.zklora.parties.channel import Channel
from paris_ray.zklora.parties.escrow import EscrowClient
from paris_ray.zklora.parties.evidence import (
    EVIDENCE,
    SESSION,
    ClosedSession,
    Evidence,
    fetch_evidence,
    load_evidence,
    save_evidence,
)
from paris_ray.zklora.parties.purchase import Receipts, buy, new_receipt, receive, verified_facts
from paris_ray.zklora.parties.session import Session
from paris_ray.zklora.parties.user import RESULT, BaseUser, Trial
from paris_ray.zklora.parties.workers import result, verify_evidence
from paris_ray.zklora.sequential import Verdict
from paris_ray.zklora.trade import TradeState
from paris_ray.zklora.transcript import new_nonce

PLAN = "plan.json"
NONCE = "nonce.json"
ADAPTER = "adapter"
POLL_S = 0.5

Show = Callable[[str, int, int], None]
"""Is told what is being done, how much of it is done, and of how much."""

logger = logging.getLogger("paris_ray")


@dataclass(frozen=True, eq=False, slots=True)
class Outcome:
    """What came of it.

    Attributes:
        receipt: How far the purchase is.
        without: `(levels, examples)` losses of the base.
        with_adapter: The same with the adapter.
        verdict: What they show; None: nothing was wanted of them.
        adapter: The folder of the weights; None: they were not bought.
    """

    receipt: Receipt
    without: NDArray[np.float32]
    with_adapter: NDArray[np.float32]
    verdict: Verdict | None
    adapter: Path | None


class Buyer:
    """One user's way from a manifest to the weights.

    Args:
        trial: What is wanted.
        show: Is told about the progress.

    Raises:
        ParisError: if the manifest is not signed, or names another escrow than the trusted one.
    """

    def __init__(self, trial: Trial, show: Show = lambda stage, done, total: None) -> None:
        self._trial, self._show = trial, show
        self.identity = Identity.load(trial.identity)
        self.manifest = AdapterManifest.read(trial.manifest)
        self._folder = Folder(str(trial.output))
        self._escrow = self._open_escrow()
        self._receipts = Receipts(trial.output, self.identity, self._known_receipt())
        self._channel = Channel(self.identity, trial.peer, self.manifest.contributor_certificate)
        self._session_folder = trial.output / SESSION
        self._session = Folder(str(self._session_folder))
        self._started = time.perf_counter()

    def run(self) -> Outcome:
        """Try, verify and, if there is an escrow and the adapter is worth it, buy.

        Raises:
            VerificationError: if a proof or the delivered weights do not hold, naming the module.
            BudgetError: if the contributor has too few rows left.
            TradeError: if the trade failed; nothing is paid then.
            ParisError: if a party refuses or says what does not fit.
        """
        if self._receipts.receipt.escrow_statement is not None:
            logger.info("purchase: already finished, kept: %s", self._folder.uri)
            return self._outcome(bought=True)
        self._trial.subject.check(self.manifest.base)
        plan = self._plan()
        if not self._session.exists(RESULT):
            self._infer(plan["num_examples"])
        self._receipts.advance(State.INFERRED)
        evidence = self._prove()
        self._verify(evidence)
        outcome = self._outcome(bought=False)
        if self._escrow is None or outcome.verdict not in (None, Verdict.WORTH):
            return outcome
        self._buy(self._escrow, evidence)
        return self._outcome(bought=True)

    def _outcome(self, bought: bool) -> Outcome:
        found, wanted = self._session.read_json(RESULT), self._trial.wanted
        without, adapted = (
            np.array(found[name], np.float32) for name in ("without", "with_adapter")
        )
        return Outcome(
            receipt=self._receipts.receipt,
            without=without,
            with_adapter=adapted,
            verdict=None if wanted is None else wanted.verdict(without, adapted),
            adapter=self._trial.output / ADAPTER if bought else None,
        )

    def _open_escrow(self) -> EscrowClient | None:
        trial, named = self._trial, self.manifest.escrow_certificate
        if trial.escrow is None:
            return None
        if named is not None and named != trial.escrow_certificate:
            raise ConfigError(
                "escrow_certificate is not allowed: the manifest names the escrow "
                + public_key_of(named)
            )
        return EscrowClient(self.identity, trial.escrow, named)

    def _known_receipt(self) -> Receipt:
        if not self._folder.exists(RECEIPT):
            return new_receipt(self.manifest)
        receipt = Receipt.read(self._folder, self.identity.public_key)
        if receipt.adapter_id != self.manifest.adapter_id:
            raise ConfigError(
                f"output={self._folder.uri!r} is not allowed: it holds the purchase of another "
                f"adapter, {receipt.adapter} ({receipt.adapter_id})"
            )
        return receipt

    def _plan(self) -> dict[str, Any]:
        """Return what is tried, as decided when it was begun."""
        trial = self._trial
        wanted = {
            **trial.subject.plan(),
            "wanted": None if trial.wanted is None else asdict(trial.wanted),
            # Others may compute other last bits, and a call that was sent is repeated exactly.
            "threads": trial.threads,
        }
        if not self._folder.exists(PLAN):
            # With it, the folder has all that `jobs.check_receipt` needs.
            self._folder.write(MANIFEST, trial.manifest.read_bytes())
            self._folder.write_json(PLAN, wanted | {"num_examples": self._affordable_examples()})
        plan: dict[str, Any] = self._folder.read_json(PLAN)
        differ = [name for name, value in wanted.items() if plan.get(name) != value]
        if differ:
            raise ConfigError(
                f"output={self._folder.uri!r} is not allowed: a trial with another "
                f"{', '.join(differ)} was begun there; choose another --output for another trial"
            )
        return plan

    def _nonce(self) -> str:
        """Return what names the session; kept before it is opened, since few may be open."""
        if not self._folder.exists(NONCE):
            self._folder.write_json(NONCE, {"nonce": new_nonce()})
        return str(self._folder.read_json(NONCE)["nonce"])

    def _affordable_examples(self) -> int:
        """Return how many examples can be compared within the budget."""
        trial = self._trial
        session = Session(self._channel, self.identity, self.manifest, self._nonce())
        left, price = min(session.rows_left.values()), self.manifest.price_per_row
        logger.info(
            "budget: %d of %d rows a module left for us, %d credits each",
            left,
            self.manifest.budget_rows,
            price,
        )
        if price:
            if self._escrow is None:
                raise ConfigError(f"escrow is missing: a row costs {price}, from a deposit there")
            left = min(left, self._escrow.balance() // price)
        rows = result(self._user.rows_an_example.remote())
        if left < rows:
            raise BudgetError(
                f"{trial.subject.example} takes {rows} rows a module, and {left} are left"
            )
        return min(trial.subject.num_examples, left // rows)

    @cached_property
    def _user(self) -> Any:
        user: Any = BaseUser
        # Two calls at once: one computes, the other asks how far it is.
        options = {"num_cpus": 0, "num_gpus": self._trial.num_gpus, "max_concurrency": 2}
        return user.options(**options).remote(self._trial, self.manifest)

    def _infer(self, num_examples: int) -> None:
        reference = self._user.try_adapter.remote(num_examples, self._nonce())
        total = num_examples * len(self.manifest.modules)
        while not ray.wait([reference], timeout=POLL_S)[0]:
            self._show("multi-party inference", result(self._user.num_calls.remote()), total)
        result(reference)
        self._show("multi-party inference", total, total)

    def _prove(self) -> Evidence:
        closed = ClosedSession.load(self._session_folder)
        if not self._session.exists(EVIDENCE):
            evidence = fetch_evidence(
                self._channel, self.manifest, closed, partial(self._show, "proofs")
            )
            save_evidence(evidence, self._session_folder)
        self._receipts.advance(State.PROVED)
        return load_evidence(closed, self._session_folder)

    def _verify(self, evidence: Evidence) -> None:
        start = time.perf_counter()
        verify_evidence(evidence, self.manifest, partial(self._show, "verification"))
        seconds = time.perf_counter() - start
        numerics = NumericsLog.from_json(self._session.read_json(RESULT)["numerics"])
        facts = verified_facts(self.manifest, evidence, numerics)
        totals = self._totals() | {"verify_seconds": seconds}
        self._receipts.advance(State.VERIFIED, **facts, totals=totals)

    def _buy(self, escrow: EscrowClient, evidence: Evidence) -> None:
        """Pay, open the weights and settle, from wherever the trade is."""
        sid, receipts = evidence.closed.sid, self._receipts
        adapter, show = self._trial.output / ADAPTER, partial(self._show, "purchase")
        show(0, 3)
        try:
            sealed, key = buy(escrow, self._channel, self.manifest, evidence)
        except TradeError:
            with suppress(TradeError):  # there may be no trade yet
                if escrow.trade(sid).state is TradeState.REFUNDED:
                    receipts.advance(State.REFUNDED)
            raise
        receipts.advance(State.RELEASED)
        show(1, 3)
        receive(sealed, key, self.manifest, adapter, receipts)
        show(2, 3)
        escrow.opened(sid)
        statement = escrow.statement(sid, self.manifest.adapter_id).to_json()
        totals = receipts.receipt.totals | self._totals()
        receipts.advance(State.OPENED, escrow_statement=statement, totals=totals)
        receipts.write(Folder(str(adapter)))
        show(3, 3)

    def _totals(self) -> dict[str, float]:
        exchanged = self._channel.traffic.total
        if self._escrow is not None:
            exchanged += self._escrow.num_bytes
        return {
            "seconds": time.perf_counter() - self._started,
            "bytes": self._session.read_json(RESULT)["bytes"] + exchanged,
        }
