"""What a stranger can check of a purchase afterwards: signatures, trade, transcript and proofs.

Nothing is believed that the buyer says alone, but for what it measured: how long it took, how well
inputs were rounded, and that the delivered weights opened the commitments. Of the latter there is
the escrow's word, which checks it before it releases the key.
"""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from paris_ray.artifacts import file_sha256
from paris_ray.config.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from paris_ray.errors import ReceiptError
from paris_ray.folders import Folder
from paris_ray.receipts import DIGEST, RECEIPT, Receipt, State
from paris_ray.signatures import SignedDocument
from paris_ray.zklora.adapter import quantise_adapter, read_peft
from paris_ray.zklora.escrow import STATEMENT
from paris_ray.zklora.manifest import AdapterManifest
from paris_ray.zklora.parties.evidence import ClosedSession, load_evidence
from paris_ray.zklora.parties.purchase import integers_digest, new_receipt
from paris_ray.zklora.proof import verify_named
from paris_ray.zklora.trade import BOUGHT, Trade


def signer_of(folder: Path) -> str:
    """Return who says that they signed the receipt in a folder; raises ReceiptError: nobody."""
    fields = Folder(str(folder)).read_json(RECEIPT)
    key = fields.get("public_key") if isinstance(fields, dict) else None
    if not isinstance(key, str) or not DIGEST.fullmatch(key):  # a key has as many digits
        raise ReceiptError(f"{folder / RECEIPT}: public_key={key!r:.80} is nobody's")
    return key


def check_purchase(
    receipt: Receipt,
    buyer: str,
    manifest: AdapterManifest,
    session: Path | None,
    adapter: Path | None,
) -> Iterator[str]:
    """Check a purchase; yield a line for people for each part that holds.

    Args:
        receipt: As it was read.
        buyer: Public key that signed it.
        manifest: The contributor's.
        session: Folder of the session; None: proofs are not checked.
        adapter: Folder of the weights; None: they are not looked at.

    Raises:
        ReceiptError: naming the field of the receipt that says otherwise than what it is about.
        VerificationError: if a proof does not hold, or something is left out or not signed.
        ParisError: if a document or a folder is damaged, or signed by somebody else.
    """
    _check_offer(receipt, manifest)
    yield f"offer: {manifest.adapter} ({manifest.adapter_id}), signed by {manifest.contributor}"
    if (trade := _check_trade(receipt, buyer, manifest)) is None:
        yield f"trade: none; the receipt's state is {receipt.state}"
    else:
        paid = max(trade.owed, receipt.price if trade.state in BOUGHT else 0)
        yield f"trade: {trade.state}, {paid} credits, signed by the escrow {receipt.escrow}"
    if session is None:
        yield "proofs: NOT CHECKED"
    else:
        count = _check_session(receipt, buyer, manifest, session)
        yield f"proofs: {count} modules, all rows of the session that both have signed"
    if adapter is not None:
        _check_adapter(receipt, adapter)
        yield f"weights: {adapter} holds the integers of the receipt"


def _check_offer(receipt: Receipt, manifest: AdapterManifest) -> None:
    """Check that a receipt is about the offer of a manifest."""
    offered = new_receipt(manifest)
    for field in ("protocol", "adapter_id", "adapter", "price", "contributor", "escrow"):
        stated, expected = getattr(receipt, field), getattr(offered, field)
        _require_same(field, stated, expected, "the manifest")
    for field, expected in asdict(offered.base).items():
        _require_same(f"base.{field}", getattr(receipt.base, field), expected, "the manifest")
    found_modules = {m.name: (m.d_in, m.r, m.d_out) for m in receipt.modules}
    for name, terms in manifest.terms.items():
        _require_same(f"modules: {name}", found_modules.pop(name, None), terms.dimensions, "it")
    _require_same("modules", sorted(found_modules), [], "the manifest beyond its own")


def _check_trade(receipt: Receipt, buyer: str, manifest: AdapterManifest) -> Trade | None:
    """Return what the escrow has signed, if it fits; None: nothing, and nothing was bought."""
    if receipt.escrow_statement is None:
        if receipt.state == State.OPENED:
            raise ReceiptError("escrow_statement is missing, but state='OPENED'")
        return None
    signed = SignedDocument.from_json(receipt.escrow_statement)
    trade, session = Trade.from_json(signed.check(STATEMENT, receipt.escrow)), receipt.session
    rows = max((module.rows for module in receipt.modules), default=0)
    expected = {
        "session": None if session is None else session.session,
        "adapter_id": receipt.adapter_id,
        "buyer": buyer,
        "seller": receipt.contributor,
        "price": receipt.price,
        "price_per_row": manifest.price_per_row,
        "rows": rows if manifest.price_per_row else 0,
    }
    for name, value in expected.items():
        found = getattr(trade, name)
        _require_same(f"escrow_statement: {name}", found, value, "the receipt and its manifest")
    if receipt.state == State.OPENED and trade.state not in BOUGHT:
        raise ReceiptError(f"escrow_statement: state={trade.state}, but the receipt's is OPENED")
    return trade


def _check_session(receipt: Receipt, buyer: str, manifest: AdapterManifest, folder: Path) -> int:
    """Check the session of a purchase, with every proof; return how many modules are proved."""
    if receipt.session is None:
        raise ReceiptError(f"session is missing: of state={receipt.state} nothing is proved")
    evidence = load_evidence(ClosedSession.load(folder), folder)
    closed = evidence.closed
    named = manifest.session_id(closed.nonce_u, closed.nonce_c)
    _require_same("session", receipt.session.session, named, "its nonces")
    _require_same("session", closed.sid, named, "its nonces")
    _require_same("transcript_root", receipt.session.transcript_root, closed.root, "what is signed")
    _require_same("public_key", buyer, closed.by_user.public_key, "the session's user")
    claims = evidence.claims(manifest)
    rows = closed.transcript.log.rows
    for module in receipt.modules:
        where = f"modules: {module.name}: "
        _require_same(f"{where}rows", module.rows, rows[module.name], "the transcript")
        size = len(evidence.proofs[module.name])
        _require_same(f"{where}proof_bytes", module.proof_bytes, size, "the proof")
    verify_named(claims)
    return len(claims)


def _check_adapter(receipt: Receipt, folder: Path) -> None:
    """Check that a PEFT folder is what was bought."""
    files = {"weights_sha256": ADAPTER_WEIGHTS, "config_sha256": ADAPTER_CONFIG}
    for name, file in files.items():
        found = file_sha256(Folder(str(folder)), file)
        _require_same(name, getattr(receipt, name), found, file)
    integers = integers_digest(quantise_adapter(read_peft(folder)))
    _require_same("integers_sha256", receipt.integers_sha256, integers, ADAPTER_WEIGHTS)


def _require_same(name: str, stated: object, found: object, where: str) -> None:
    if stated != found:
        raise ReceiptError(f"{name}={stated!r:.80}, but {where} has {found!r:.80}")
