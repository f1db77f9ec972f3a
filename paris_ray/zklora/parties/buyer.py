"""All that a base-model user does with an offer: try it, verify, pay, and open the weights.

    nonces.json    names of the sessions, before they are opened
    plan.json      what is tried, in which sessions
    exact/ audit/  of each session: what both signed, rows, proofs, results
    receipt.json   how far the purchase is
    adapter/       the bought weights, in PEFT's layout

Each step leaves a file, so the same call goes on after an interruption; nothing is tried or paid
for twice.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from paris_ray.artifacts import Folder, sha256_hex
from paris_ray.bundle import load_bundle
from paris_ray.errors import BudgetError, ConfigError, VerificationError
from paris_ray.identity import Identity, public_key_of
from paris_ray.receipts import RECEIPT, Mode, Receipt, State
from paris_ray.reports import picture_grid, png_bytes
from paris_ray.zklora.inference import NumericsLog
from paris_ray.zklora.manifest import AdapterManifest
from paris_ray.zklora.parties.channel import Channel
from paris_ray.zklora.parties.escrow import EscrowClient
from paris_ray.zklora.parties.evidence import (
    CLOSED,
    EVIDENCE,
    ClosedSession,
    Evidence,
    fetch_evidence,
    load_evidence,
    save_evidence,
)
from paris_ray.zklora.parties.messages import MIN_ROWS_A_PICTURE
from paris_ray.zklora.parties.purchase import Receipts, complete, new_receipt, verified_facts
from paris_ray.zklora.parties.results import result
from paris_ray.zklora.parties.session import Session
from paris_ray.zklora.parties.user import BaseUser, check_base, verify_evidence
from paris_ray.zklora.transcript import new_nonce

PLAN = "plan.json"
NONCES = "nonces.json"
EXACT, AUDIT = Mode.EXACT.value, Mode.AUDIT.value
RESULT = "result.json"
AUDIT_PICTURES = "audit.png"
ADAPTER = "adapter"
AUDIT_ROWS = 64
NOTICED_SHARE = 0.05  # of wrong rows, for which the user is told how likely an audit notices them
POLL_S = 0.5
SHOWN_PIXELS = 128  # of a small picture in a grid

Show = Callable[[str, int, int], None]
"""Is told what is being done, how much of it is done, and of how much."""

logger = logging.getLogger("paris_ray")


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """What a user wants to try, and with whom.

    Attributes:
        bundle: Where the user's base is.
        peer: Host and port of the contributor.
        manifest: The file of the pinned manifest.
        identity: The user's folder with key and certificate.
        output: The purchase's own folder.
        prompts: Of the pictures that the contributor draws in audit mode; none: no audit.
        pictures: `(n, S, S, 3)`, for the losses in exact mode; none: no losses.
        captions: One a picture.
        levels: Noise levels of the losses.
        audit_rows: Rows of each module that an audit opens; None: at most 64, and half of the
            budget if there are pictures.
        seed: Of the audit's pictures.
        options: Of them: `num_inference_steps`, `guidance_scale`, `routing`; None: the bundle's.
        escrow: Host and port of the escrow; None: the adapter is tried and verified, not bought.
        escrow_certificate: That of the escrow that the user trusts, as PEM.
        threads: Torch threads.
        num_gpus: GPUs for the user's own expert; 0 computes on the CPU.
    """

    bundle: str
    peer: tuple[str, int]
    manifest: Path
    identity: Path
    output: Path
    prompts: Sequence[str] = ()
    pictures: NDArray[np.uint8] | None = None
    captions: Sequence[str] = ()
    levels: Sequence[float] = (0.3, 0.7)
    audit_rows: int | None = None
    seed: int = 0
    options: Mapping[str, str | float | None] = field(default_factory=dict)
    escrow: tuple[str, int] | None = None
    escrow_certificate: str | None = None
    threads: int = 1
    num_gpus: float = 0


@dataclass(slots=True)
class Outcome:
    """What came of it.

    Attributes:
        receipt: How far the purchase is.
        without: `(levels, pictures)` losses of the base; None: none were computed.
        with_adapter: The same with the adapter.
        adapter: The folder of the weights; None: they were not bought.
    """

    receipt: Receipt
    without: NDArray[np.float32] | None = None
    with_adapter: NDArray[np.float32] | None = None
    adapter: Path | None = None


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
        self._totals: dict[str, float] = {}
        self._numerics: NumericsLog | None = None
        self._exact_bytes = 0
        self._started = time.perf_counter()

    def run(self) -> Outcome:
        """Try, verify and, if there is an escrow, buy.

        Raises:
            VerificationError: if a proof or the delivered weights do not hold, naming the module.
            BudgetError: if the contributor has too few rows left.
            TradeError: if the trade failed; nothing is paid then.
            ParisError: if a party refuses or says what does not fit.
        """
        outcome = Outcome(self._receipts.receipt)
        if outcome.receipt.escrow_statement is not None:
            logger.info("purchase: already finished, kept: %s", self._folder.uri)
            outcome.adapter = self._trial.output / ADAPTER
            if self._exact.exists(RESULT):
                self._read_result(outcome)
            return outcome
        check_base(load_bundle(self._trial.bundle), self.manifest)
        plan = self._plan()
        # The audit comes first: should it be refused, no other row is spent yet.
        evidence = [self._try_audit(plan)] if plan["audit_rows"] else []
        if plan["num_pictures"]:
            evidence.insert(0, self._try_exact(plan, outcome))
        self._verify(evidence)
        if self._escrow is not None:
            self._buy(self._escrow, evidence[0])
            outcome.adapter = self._trial.output / ADAPTER
        outcome.receipt = self._receipts.receipt
        return outcome

    def _open_escrow(self) -> EscrowClient | None:
        trial, named = self._trial, self.manifest.escrow_certificate
        if trial.escrow is None:
            return None
        if named is None or named != trial.escrow_certificate:
            raise ConfigError(
                "escrow_certificate is not allowed: the manifest names "
                + ("no escrow" if named is None else f"the escrow {public_key_of(named)}")
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
        trial, pictures = self._trial, self._trial.pictures
        wanted = {
            "prompts": list(trial.prompts),
            "pictures": None if pictures is None else sha256_hex(pictures.tobytes()),
            "captions": list(trial.captions),
            "levels": list(trial.levels),
            "seed": trial.seed,
            "options": dict(trial.options),
            "audit_rows_wanted": trial.audit_rows,
            # Others may compute other last bits, and a call that was sent is repeated exactly.
            "threads": trial.threads,
        }
        if not self._folder.exists(PLAN):
            nonces = self._nonces()
            rows = self._share_budget(nonces)
            self._folder.write_json(PLAN, wanted | rows | {"nonces": nonces})
        plan: dict[str, Any] = self._folder.read_json(PLAN)
        differ = [name for name, value in wanted.items() if plan[name] != value]
        if differ:
            raise ConfigError(
                f"output={self._folder.uri!r} is not allowed: a trial with another "
                f"{', '.join(differ)} was begun there; choose another --output for another trial"
            )
        return plan

    def _nonces(self) -> dict[str, str]:
        """Return what names the sessions; kept before any is opened, since few may be open."""
        if not self._folder.exists(NONCES):
            self._folder.write_json(NONCES, {EXACT: new_nonce(), AUDIT: new_nonce()})
        nonces: dict[str, str] = self._folder.read_json(NONCES)
        return nonces

    def _share_budget(self, nonces: dict[str, str]) -> dict[str, int]:
        """Decide how many rows are audited, and how many pictures compared."""
        trial, pictures = self._trial, self._trial.pictures
        for level in trial.levels:
            if not 0 <= level <= 1:
                raise ConfigError(f"levels={level} is not allowed: noise levels between 0 and 1")
        if pictures is None and not trial.prompts:
            raise ConfigError("there is nothing to try: give prompts, pictures, or both")
        mode = AUDIT if trial.prompts else EXACT
        session = Session(self._channel, self.identity, self.manifest, mode, nonces[mode])
        left = min(session.rows_left.values())
        logger.info("budget: %d of %d rows a module left", left, self.manifest.budget_rows)
        audit_rows = self._share_of_audit(left)
        if pictures is None:
            return {"audit_rows": audit_rows, "num_pictures": 0}
        rows_a_picture = len(trial.levels) * result(self._user.rows_a_pair.remote())
        affordable = (left - audit_rows) // rows_a_picture
        if affordable < 1:
            raise BudgetError(
                f"a picture at {len(trial.levels)} noise levels takes {rows_a_picture} rows a "
                f"module, and {left} are left, {audit_rows} of them for the audit: give fewer "
                "levels or audit rows, or no pictures"
            )
        return {"audit_rows": audit_rows, "num_pictures": min(len(pictures), affordable)}

    def _share_of_audit(self, left: int) -> int:
        trial = self._trial
        if not trial.prompts:
            return 0
        least = MIN_ROWS_A_PICTURE * len(trial.prompts)
        share = left if trial.pictures is None else left // 2
        rows = min(max(AUDIT_ROWS, least), share) if trial.audit_rows is None else trial.audit_rows
        if trial.audit_rows is not None and not least <= rows <= left:
            raise BudgetError(
                f"audit_rows={rows} is not allowed: {len(trial.prompts)} prompts take at least "
                f"{least}, and {left} are left"
            )
        if rows < least:
            raise BudgetError(
                f"{len(trial.prompts)} prompts take at least {least} rows a module, and there are "
                f"{share} of the {left} that are left: half of them are kept for pictures if there "
                "are some; give fewer prompts, audit_rows, or no pictures"
            )
        noticed = 1 - (1 - NOTICED_SHARE) ** rows
        logger.info(
            "audit: %d rows a module, which notice %.0f%% of wrong rows with %.0f%% probability",
            rows,
            100 * NOTICED_SHARE,
            100 * noticed,
        )
        return rows

    @cached_property
    def _user(self) -> Any:
        trial = self._trial
        user: Any = BaseUser
        device = "cuda" if trial.num_gpus else "cpu"
        # Two calls at once: one computes, the other asks how far it is.
        return user.options(num_cpus=0, num_gpus=trial.num_gpus, max_concurrency=2).remote(
            trial.bundle, self.manifest, trial.identity, trial.peer, trial.threads, device
        )

    @property
    def _exact(self) -> Folder:
        return Folder(str(self._trial.output / EXACT))

    def _try_exact(self, plan: dict[str, Any], outcome: Outcome) -> Evidence:
        folder = self._trial.output / EXACT
        if not self._exact.exists(RESULT):
            self._infer(folder, plan)
        self._read_result(outcome)
        self._receipts.advance(State.INFERRED)
        return self._prove(folder)

    def _read_result(self, outcome: Outcome) -> None:
        found = self._exact.read_json(RESULT)
        outcome.without = np.array(found["without"], np.float32)
        outcome.with_adapter = np.array(found["with_adapter"], np.float32)
        self._numerics = NumericsLog.from_json(found["numerics"])
        self._exact_bytes = found["bytes"]

    def _infer(self, folder: Path, plan: dict[str, Any]) -> None:
        trial, number = self._trial, plan["num_pictures"]
        assert trial.pictures is not None
        reference = self._user.try_adapter.remote(
            trial.pictures[:number], trial.captions[:number], trial.levels, plan["nonces"][EXACT]
        )
        total = len(self.manifest.modules)
        while not ray.wait([reference], timeout=POLL_S)[0]:
            self._show("multi-party inference", result(self._user.num_calls.remote()), total)
        tried = result(reference)
        self._show("multi-party inference", total, total)
        tried.closed.save(folder)
        self._exact.write_json(
            RESULT,
            {
                "without": tried.without.tolist(),
                "with_adapter": tried.with_adapter.tolist(),
                "numerics": tried.numerics.to_json(),
                "bytes": tried.num_bytes,
            },
        )

    def _try_audit(self, plan: dict[str, Any]) -> Evidence:
        folder = self._trial.output / AUDIT
        if not Folder(str(folder)).exists(CLOSED):
            nonce = plan["nonces"][AUDIT]
            session = Session(self._channel, self.identity, self.manifest, AUDIT, nonce)
            drawing = session.draw(
                plan["prompts"],
                plan["seed"],
                plan["audit_rows"],
                partial(self._show, "pictures by the contributor"),
                **plan["options"],
            )
            scale = max(1, SHOWN_PIXELS // drawing.pictures.shape[1])
            grid = picture_grid(drawing.pictures, columns=4, scale=scale)
            self._folder.write(AUDIT_PICTURES, png_bytes(grid))
            session.close().save(folder)
        self._receipts.advance(State.INFERRED)
        return self._prove(folder)

    def _prove(self, folder: Path) -> Evidence:
        closed = ClosedSession.load(folder)
        if not Folder(str(folder)).exists(EVIDENCE):
            evidence = fetch_evidence(
                self._channel,
                self.manifest,
                closed,
                partial(self._show, f"proofs, {closed.mode}"),
            )
            save_evidence(evidence, folder)
        self._receipts.advance(State.PROVED)
        return load_evidence(closed, folder)

    def _verify(self, evidence: Sequence[Evidence]) -> None:
        if not evidence:
            raise VerificationError("nothing was tried: there is nothing to verify")
        start = time.perf_counter()
        for part in evidence:
            verify_evidence(
                part, self.manifest, partial(self._show, f"verification, {part.closed.mode}")
            )
        self._totals["verify_seconds"] = time.perf_counter() - start
        facts = verified_facts(self.manifest, evidence, self._numerics)
        self._receipts.advance(State.VERIFIED, **facts, totals=self._sums())

    def _buy(self, escrow: EscrowClient, evidence: Evidence) -> None:
        """Pay, open the weights and settle, from wherever the trade is."""
        adapter, progress = self._trial.output / ADAPTER, partial(self._show, "purchase")
        complete(escrow, self._channel, self.manifest, evidence, adapter, self._receipts, progress)
        self._receipts.advance(State.OPENED, totals=self._sums())
        self._receipts.write(Folder(str(adapter)))

    def _sums(self) -> dict[str, float]:
        seen = [self._channel.traffic]
        if self._escrow is not None:
            seen.append(self._escrow.traffic)
        exchanged = sum(traffic.bytes_sent + traffic.bytes_received for traffic in seen)
        return self._totals | {
            "seconds": time.perf_counter() - self._started,
            "bytes": self._exact_bytes + exchanged,
        }
