"""The purchase: what a verified session becomes, step by step, until the weights are opened.

Every step may be repeated, so an interrupted purchase goes on where it was.
"""

import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from paris_ray.artifacts import canonical_json, file_sha256, read_manifest, sha256_hex
from paris_ray.config.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from paris_ray.errors import ArtifactError, TradeError
from paris_ray.folders import Folder
from paris_ray.identity import Identity, public_key_of
from paris_ray.models.peft_layout import LORA
from paris_ray.receipts import (
    ADAPTER_ID,
    RECEIPT,
    BaseFacts,
    ModuleFacts,
    Receipt,
    SessionFacts,
    State,
)
from paris_ray.zklora.adapter import write_peft
from paris_ray.zklora.fixed_point import QuantisedModule
from paris_ray.zklora.inference import NumericsLog
from paris_ray.zklora.manifest import AdapterManifest
from paris_ray.zklora.parties.channel import Channel
from paris_ray.zklora.parties.escrow import EscrowClient
from paris_ray.zklora.parties.evidence import Evidence
from paris_ray.zklora.sealing import check_opening
from paris_ray.zklora.trade import BOUGHT, TradeState

RELEASED_WITHIN_S = 120.0
POLL_S = 0.5


class Receipts:
    """The receipt of a purchase, kept on disk as the trade goes on.

    Args:
        folder: Where `receipt.json` is.
        identity: The buyer's, who signs it.
        receipt: What is known so far.
    """

    def __init__(self, folder: Path, identity: Identity, receipt: Receipt) -> None:
        self._folder, self._identity, self.receipt = Folder(str(folder)), identity, receipt

    def advance(self, state: State, **changes: Any) -> None:
        """Write the receipt of a later state; going through a finished step again changes none."""
        order = list(State)
        if order.index(state) >= order.index(self.receipt.state):
            self.receipt = replace(self.receipt, state=state, **changes)
            self.write(self._folder)

    def write(self, folder: Folder) -> None:
        """Write the signed receipt into another folder too."""
        folder.write_json(RECEIPT, self.receipt.sign(self._identity))


def new_receipt(manifest: AdapterManifest) -> Receipt:
    """Return the receipt of a purchase of which only the manifest is pinned."""
    escrow = manifest.escrow_certificate
    return Receipt(
        protocol=manifest.protocol,
        adapter_id=manifest.adapter_id,
        adapter=manifest.adapter,
        base=BaseFacts(
            digest=manifest.base.digest,
            expert=manifest.base.expert,
            router_digest=manifest.base.router_digest,
        ),
        state=State.COMMITTED,
        session=None,
        weights_sha256=None,
        config_sha256=None,
        integers_sha256=None,
        price=manifest.price,
        contributor=manifest.contributor,
        escrow=None if escrow is None else public_key_of(escrow),
        escrow_statement=None,
        modules=(),
        totals={},
        created=datetime.now(UTC).isoformat(),
    )


def verified_facts(
    manifest: AdapterManifest, evidence: Evidence, numerics: NumericsLog
) -> dict[str, Any]:
    """Return the fields of a receipt that a verified session fills in.

    Args:
        manifest: The pinned one.
        evidence: Of the session.
        numerics: What was measured of the inputs.
    """
    modules, rows = [], evidence.closed.transcript.log.rows
    for terms in manifest.modules:
        seen = numerics.modules[terms.name]  # every module was called
        modules.append(
            ModuleFacts(
                name=terms.name,
                d_in=terms.commitment.d_in,
                r=terms.commitment.r,
                d_out=terms.commitment.d_out,
                rows=rows[terms.name],
                proof_bytes=len(evidence.proofs[terms.name]),
                peak_to_rms=seen.peak_to_rms,
                input_error=seen.input_error,
            )
        )
    closed = evidence.closed
    session = SessionFacts(session=closed.sid, transcript_root=closed.root)
    return {"modules": tuple(modules), "session": session}


def buy(
    escrow: EscrowClient, contributor: Channel, manifest: AdapterManifest, evidence: Evidence
) -> tuple[bytes, bytes]:
    """Pay for an adapter whose session is verified; return the sealed weights and their key.

    Args:
        escrow: Who holds both.
        contributor: Is asked to hand over the key.
        manifest: The pinned one.
        evidence: Of the session that the trade is about.

    Raises:
        TradeError: if the trade was refunded, or the key was not released in time: the escrow
            refunds the price then.
    """
    closed = evidence.closed
    sid = closed.sid
    escrow.open_trade(manifest.adapter_id, sid, closed.nonce_u, closed.nonce_c)
    escrow.pay(sid)
    _await_key(escrow, contributor, sid)
    return escrow.sealed(sid, manifest), escrow.key(sid)


def _await_key(escrow: EscrowClient, contributor: Channel, sid: str) -> None:
    deadline = time.monotonic() + RELEASED_WITHIN_S
    contributor.request("release", {"session": sid})
    while (trade := escrow.trade(sid)).state not in BOUGHT:
        if trade.state is TradeState.REFUNDED:
            raise TradeError(f"trade {sid} is {trade.state}: {trade.reason}")
        if time.monotonic() > deadline:
            raise TradeError(
                f"trade {sid} is {trade.state}: the contributor has not released the key; the "
                "escrow refunds the price when its deadline has passed"
            )
        time.sleep(POLL_S)


def receive(
    sealed: bytes, key: bytes, manifest: AdapterManifest, adapter: Path, receipts: Receipts
) -> None:
    """Check that the delivered weights are the committed ones, and write them as a PEFT folder.

    The receipt is OPENED from then on, and lies in the folder too.

    Args:
        sealed: The encrypted weights.
        key: What unseals them.
        manifest: The pinned one.
        adapter: The new folder.
        receipts: The purchase so far.

    Raises:
        VerificationError: if they are others, naming the module.
        ArtifactError: if something else has the folder's name.
    """
    openings = check_opening(manifest, sealed, key)
    modules = {name: opening.module for name, opening in openings.items()}
    part = adapter.with_name(f"{adapter.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # what an interrupted attempt left
    write_peft(part, modules, manifest)
    folder = Folder(str(part))
    receipts.advance(
        State.OPENED,
        weights_sha256=file_sha256(folder, ADAPTER_WEIGHTS),
        config_sha256=file_sha256(folder, ADAPTER_CONFIG),
        integers_sha256=integers_digest(modules),
    )
    receipts.write(folder)
    _replace(adapter, part, manifest)


def _replace(adapter: Path, part: Path, manifest: AdapterManifest) -> None:
    """Let the folder appear whole; nothing is replaced but an earlier delivery of this adapter."""
    if adapter.exists():
        facts = read_manifest(Folder(str(adapter)), LORA).facts
        if facts.get(ADAPTER_ID) != manifest.adapter_id:
            raise ArtifactError(f"{adapter} holds another adapter: choose another folder")
        shutil.rmtree(adapter)
    part.rename(adapter)


def integers_digest(modules: Mapping[str, QuantisedModule]) -> str:
    """Return the SHA-256 of all integers of an adapter, by module."""
    return sha256_hex(canonical_json({name: module.digest for name, module in modules.items()}))
