"""A stranger checks a purchase afterwards: each thing that was changed is refused by its name."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from paris_ray.config import LoRAConfig
from paris_ray.errors import ArtifactError, ParisError, ReceiptError, VerificationError
from paris_ray.folders import Folder
from paris_ray.identity import Identity
from paris_ray.receipts import KIND, RECEIPT, Receipt, State
from paris_ray.signatures import SignedDocument
from paris_ray.zklora.adapter import PeftAdapter
from paris_ray.zklora.escrow import Escrow, open_journal
from paris_ray.zklora.fixed_point import evaluate
from paris_ray.zklora.inference import ModuleNumerics, NumericsLog
from paris_ray.zklora.ledger import SQLiteLedger
from paris_ray.zklora.log import CLOSE, Call, closing_statement
from paris_ray.zklora.manifest import MANIFEST, AdapterManifest, Base
from paris_ray.zklora.offer import AskedTerms, open_offer
from paris_ray.zklora.parties.checking import check_purchase
from paris_ray.zklora.parties.evidence import (
    EVIDENCE,
    SESSION,
    ClosedSession,
    Evidence,
    load_evidence,
    save_evidence,
)
from paris_ray.zklora.parties.purchase import Receipts, new_receipt, receive, verified_facts
from paris_ray.zklora.proof import prove
from paris_ray.zklora.trade import sign_rows
from paris_ray.zklora.transcript import CALLS, ROWS, Transcript, new_nonce, proof_context

REPOSITORY = Path(__file__).resolve().parents[2]
MODULES, WIDTH, NUM_ROWS = ("layers.0.proj", "layers.1.proj"), 16, 4


class Purchase(NamedTuple):
    """The folder of a finished purchase, and who took part."""

    folder: Path
    buyer: Identity
    seller: Identity
    notary: Identity

    @property
    def manifest(self) -> AdapterManifest:
        return AdapterManifest.read(self.folder / MANIFEST)

    @property
    def receipt(self) -> Receipt:
        return Receipt.read(Folder(str(self.folder)), self.buyer.public_key)

    def check(self, receipt: Receipt | None = None, **changes: Any) -> list[str]:
        parts: dict[str, Any] = {
            "buyer": self.buyer.public_key,
            "manifest": self.manifest,
            "session": self.folder / SESSION,
            "adapter": self.folder / "adapter",
        }
        return list(check_purchase(receipt or self.receipt, **parts | changes))


def closed_session(folder: Path, buyer: Identity, seller: Identity, offer: Any) -> Evidence:
    """Return a session with its proofs, as both would have had it over a network."""
    manifest, openings, random = offer.manifest, offer.openings(), np.random.default_rng(1)
    nonces = new_nonce(), new_nonce()
    sid, transcript = manifest.session_id(*nonces), Transcript(path=folder / ROWS)
    for seq, name in enumerate(MODULES):
        x = random.integers(-999, 999, (NUM_ROWS, WIDTH), np.int16)
        transcript.append(Call(seq, name, 9, x, evaluate(openings[name].module, x)))
    statement = closing_statement(sid, manifest.adapter_id, transcript.log)
    both = [SignedDocument.sign(CLOSE, statement, party) for party in (buyer, seller)]
    closed = ClosedSession(sid, *nonces, *both, new_nonce(), transcript)
    proofs = {}
    for name in MODULES:
        context = proof_context(manifest.adapter_id, sid, closed.root, name, closed.nonce_v)
        proofs[name] = prove(openings[name], *transcript.rows(name), context)
    return Evidence(closed, proofs)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Purchase:
    root, random = tmp_path_factory.mktemp("purchase"), np.random.default_rng(0)
    buyer, seller, notary = (Identity.create(root / name) for name in ("b", "s", "n"))
    factors = {
        name: (random.normal(size=(WIDTH, 2)), random.normal(size=(2, 8))) for name in MODULES
    }
    adapter = PeftAdapter(
        LoRAConfig(r=2, lora_alpha=2, target_modules=MODULES),
        {name: (a.astype(np.float32), b.astype(np.float32)) for name, (a, b) in factors.items()},
    )
    terms = AskedTerms(
        base=Base(digest="c" * 64, expert=None, router_digest=None),
        name="verse",
        price=30,
        price_per_row=2,
        budget_rows=9,
        escrow_certificate=notary.certificate,
    )
    offer = open_offer(root / "offer", seller, adapter, terms)
    manifest, folder = offer.manifest, root / "bought"
    folder.mkdir()
    shutil.copy(root / "offer" / MANIFEST, folder)

    evidence = closed_session(folder / SESSION, buyer, seller, offer)
    evidence.closed.save(folder / SESSION)
    save_evidence(evidence, folder / SESSION)
    sid, mine, theirs = evidence.closed.sid, buyer.public_key, seller.public_key
    journal = open_journal(root / "escrow.sqlite")
    escrow = Escrow(journal, notary, SQLiteLedger(journal))
    escrow.listings.add(theirs, offer.signed)
    escrow.listings.upload(theirs, manifest.adapter_id, 0, offer.sealed)
    nonces = evidence.closed.nonce_u, evidence.closed.nonce_c
    escrow.open_trade(mine, manifest.adapter_id, sid, *nonces, NUM_ROWS)
    escrow.owe(theirs, sid, sign_rows(buyer, manifest.adapter_id, sid, NUM_ROWS))
    escrow.pay(mine, sid)
    escrow.deposit_key(theirs, sid, offer.key)

    numerics = NumericsLog()
    numerics.modules = {name: ModuleNumerics(3.0, 1e-4) for name in MODULES}
    receipts = Receipts(folder, buyer, new_receipt(manifest))
    receipts.advance(State.VERIFIED, **verified_facts(manifest, evidence, numerics))
    receive(offer.sealed, offer.key, manifest, folder / "adapter", receipts)
    escrow.opened(mine, sid)
    receipts.advance(State.OPENED, escrow_statement=escrow.statement(mine, sid).to_json())
    journal.close()
    return Purchase(folder, buyer, seller, notary)


@pytest.fixture
def purchase(original: Purchase, tmp_path: Path) -> Purchase:
    """A copy that a test may change."""
    shutil.copytree(original.folder, tmp_path / "copy")
    return original._replace(folder=tmp_path / "copy")


def run(*arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "jobs.check_receipt", *map(str, arguments)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_job_says_what_holds(original: Purchase, tmp_path: Path) -> None:
    path = original.folder / RECEIPT
    result = run(path, "--adapter", original.folder / "adapter")
    assert (result.returncode, result.stderr) == (0, "")
    said = result.stdout.splitlines()
    assert said[0] == f"receipt: OPENED, signed by {original.buyer.public_key}"
    assert f"signed by {original.seller.public_key}" in said[1]
    assert said[2].startswith("trade: SETTLED, 30 credits") and "proofs: 2 modules" in said[3]
    assert "holds the integers" in said[4]
    shutil.copytree(original.folder, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / SESSION)
    result = run(tmp_path / "copy" / RECEIPT)
    assert result.returncode == 2 and "error: " in result.stderr
    result = run(tmp_path / "copy" / RECEIPT, "--without-proofs")
    assert result.returncode == 0 and "proofs: NOT CHECKED" in result.stdout
    result = run(path, "--key", original.seller.public_key)
    assert result.returncode == 2 and "is not a receipt of yours" in result.stderr
    assert run(original.folder / MANIFEST).returncode == 2


def test_a_whole_purchase_holds(original: Purchase) -> None:
    assert len(original.check()) == 4
    assert original.check(session=None, adapter=None)[-1] == "proofs: NOT CHECKED"


CHANGED: dict[str, Callable[[Receipt], dict[str, Any]]] = {
    "protocol": lambda r: {"protocol": "other"},
    "adapter_id": lambda r: {"adapter_id": "0" * 64},
    "adapter": lambda r: {"adapter": "prose"},
    r"base\.digest": lambda r: {"base": replace(r.base, digest="0" * 64)},
    r"base\.expert": lambda r: {"base": replace(r.base, expert=1)},
    r"base\.router_digest": lambda r: {"base": replace(r.base, router_digest="0" * 64)},
    "price": lambda r: {"price": 3},
    "contributor": lambda r: {"contributor": "0" * 64},
    "escrow": lambda r: {"escrow": "0" * 64},
    "modules: layers.0.proj=None": lambda r: {"modules": r.modules[1:]},
    "modules: layers.0.proj=": lambda r: {
        "modules": (replace(r.modules[0], d_in=WIDTH + 1), r.modules[1])
    },
    r"modules=\['more'\]": lambda r: {"modules": (*r.modules, replace(r.modules[0], name="more"))},
    "modules: layers.1.proj: proof_bytes": lambda r: {
        "modules": (r.modules[0], replace(r.modules[1], proof_bytes=1))
    },
    "modules: layers.1.proj: rows": lambda r: {
        "modules": (r.modules[0], replace(r.modules[1], rows=1))
    },
    "escrow_statement: rows": lambda r: {"modules": (replace(r.modules[0], rows=5), r.modules[1])},
    "escrow_statement is missing": lambda r: {"escrow_statement": None},
    "escrow_statement: session": lambda r: {"session": replace(r.session, session="0" * 64)},
    "transcript_root": lambda r: {"session": replace(r.session, transcript_root="0" * 64)},
    "weights_sha256": lambda r: {"weights_sha256": "0" * 64},
    "config_sha256": lambda r: {"config_sha256": "0" * 64},
    "integers_sha256": lambda r: {"integers_sha256": "0" * 64},
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_changed_field_is_named(original: Purchase, name: str) -> None:
    """Its buyer has signed it so: a receipt that lies."""
    receipt = original.receipt
    with pytest.raises(ReceiptError, match=f"^{name}"):
        original.check(replace(receipt, **CHANGED[name](receipt)))


TRADES = ("session", "adapter_id", "buyer", "seller", "price", "price_per_row", "rows", "state")


@pytest.mark.parametrize("name", TRADES)
def test_a_statement_about_another_trade_is_named(original: Purchase, name: str) -> None:
    """The escrow has signed it, but it is about something else."""
    statement = original.receipt.escrow_statement
    assert statement is not None
    document = dict(statement["document"])
    other = {"state": "REFUNDED"}.get(name, "0" * 64 if isinstance(document[name], str) else 7)
    signed = SignedDocument.sign("escrow", document | {name: other}, original.notary).to_json()
    with pytest.raises(ReceiptError, match=f"^escrow_statement: {name}="):
        original.check(replace(original.receipt, escrow_statement=signed))


def test_nobody_elses_words_count(purchase: Purchase) -> None:
    statement = purchase.receipt.escrow_statement
    assert statement is not None
    theirs = SignedDocument.sign("escrow", statement["document"], purchase.seller).to_json()
    with pytest.raises(ParisError, match="the escrow is signed by"):
        purchase.check(replace(purchase.receipt, escrow_statement=theirs))
    with pytest.raises(ReceiptError, match=r"^escrow_statement: buyer"):
        purchase.check(buyer=purchase.seller.public_key)
    fields = json.loads((purchase.folder / RECEIPT).read_text())
    (purchase.folder / RECEIPT).write_text(json.dumps(fields | {"price": 3}))
    result = run(purchase.folder / RECEIPT)
    assert result.returncode == 2 and "signature" in result.stderr
    assert KIND in result.stderr


def test_an_unfinished_purchase_has_nothing_proved(original: Purchase) -> None:
    begun = new_receipt(original.manifest)
    begun = replace(begun, modules=original.receipt.modules)
    with pytest.raises(ReceiptError, match=r"^session is missing: of state=COMMITTED"):
        original.check(begun, adapter=None)


def test_rows_that_were_changed_are_not_what_was_signed(purchase: Purchase) -> None:
    path = purchase.folder / SESSION / ROWS
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    with pytest.raises(VerificationError, match="has signed another log"):
        purchase.check()


def test_proofs_that_were_changed_do_not_hold(purchase: Purchase) -> None:
    folder = purchase.folder / SESSION
    evidence = load_evidence(ClosedSession.load(folder), folder)
    first, second = (evidence.proofs[name] for name in MODULES)
    for proofs in ({MODULES[0]: second, MODULES[1]: first}, {MODULES[0]: first}):
        save_evidence(replace(evidence, proofs=proofs), folder)
        with pytest.raises(VerificationError, match=r"does not hold|proofs must be of|do not hold"):
            purchase.check()
    # Where proofs lay before, under other names: whoever continues there asks for them again.
    (folder / EVIDENCE).rename(folder / "evidence.safetensors")
    with pytest.raises(ArtifactError, match="holds no evidence"):
        purchase.check()


@pytest.mark.parametrize("name", ["nonce_u", "sid", "nonce_v"])
def test_another_session_is_refused(purchase: Purchase, name: str) -> None:
    path = purchase.folder / SESSION / "closed.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: "0" * 64}))
    with pytest.raises(ParisError, match=r"^session=|does not hold|do not hold"):
        purchase.check()


def test_a_claim_to_terabytes_takes_no_memory(purchase: Purchase) -> None:
    path = purchase.folder / SESSION / CALLS
    calls = json.loads(path.read_text())
    path.write_text(json.dumps([calls[0] | {"rows": 2**40}]))
    with pytest.raises(ParisError, match="holds no transcript"):
        purchase.check()
