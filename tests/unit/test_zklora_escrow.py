"""The escrow: honest trades, restarts, time-outs, and parties that cheat."""

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from paris_ray.artifacts import sha256_hex
from paris_ray.config import LoRAConfig
from paris_ray.errors import (
    ArtifactError,
    ProtocolError,
    SignatureError,
    TradeError,
    VerificationError,
)
from paris_ray.identity import Identity
from paris_ray.receipts import State
from paris_ray.signatures import SignedDocument
from paris_ray.zklora import escrow as escrow_module
from paris_ray.zklora.commitment import ModuleCommitment, ModuleOpening, commit
from paris_ray.zklora.curve import BLINDING, encode, generators, multiply, random_scalar
from paris_ray.zklora.escrow import (
    DEADLINES,
    STATEMENT,
    Escrow,
    open_journal,
)
from paris_ray.zklora.field import ORDER
from paris_ray.zklora.fixed_point import QuantisedModule
from paris_ray.zklora.journal import Journal
from paris_ray.zklora.ledger import SQLiteLedger
from paris_ray.zklora.manifest import AdapterManifest, Base, ModuleTerms, build_manifest
from paris_ray.zklora.sealing import NONCE, check_opening, seal
from paris_ray.zklora.trade import Trade
from paris_ray.zklora.transcript import Call, Transcript, closing_statement, new_nonce, session_id

D_IN, R, D_OUT = 6, 2, 5
PRICE, OPENING_BALANCE = 300, 1000
PROOFS = "ab" * 32
REPOSITORY = Path(__file__).resolve().parents[2]

Openings = Mapping[str, ModuleOpening]


def openings_of(seed: int) -> dict[str, ModuleOpening]:
    rng = np.random.default_rng(seed)
    result = {}
    for name in ("block.0", "block.1"):
        a = rng.integers(-99, 99, (D_IN, R), np.int16)
        b = rng.integers(-99, 99, (R, D_OUT), np.int16)
        result[name] = commit(QuantisedModule(a, b, 7, 7))[1]
    return result


@dataclass
class Offer:
    """An adapter as its seller offers it: honest, unless something else is sealed."""

    seller: Identity
    manifest: AdapterManifest
    sealed: bytes
    key: bytes

    @property
    def signed(self) -> SignedDocument:
        return self.manifest.sign(self.seller)


@dataclass
class Parties:
    """Identities, a clock to turn, and an escrow: a new one each time, unless one is running."""

    folder: Path
    now: float = 1e9
    journals: list[Journal] = field(default_factory=list)
    running: Escrow | None = None

    def __post_init__(self) -> None:
        self.buyer, self.seller, self.stranger, self.notary = (
            Identity.create(self.folder / name)
            for name in ("buyer", "seller", "stranger", "notary")
        )

    @property
    def escrow(self) -> Escrow:
        """An escrow that has only the file, as after a restart."""
        return self.new_escrow() if self.running is None else self.running

    def new_escrow(self, **limits: int) -> Escrow:
        journal = open_journal(self.folder / "journal.sqlite")
        self.journals.append(journal)
        ledger = SQLiteLedger(journal, OPENING_BALANCE)
        return Escrow(journal, self.notary, ledger, clock=lambda: self.now, **limits)

    def offer(self, sold: Openings, sealed: bytes, key: bytes, price: int = PRICE) -> Offer:
        manifest = build_manifest(
            sold,
            LoRAConfig(r=R, lora_alpha=2.0 * R),
            base=Base("c" * 64, None, None),
            adapter="ink",
            price=price,
            sealed=sealed,
            key=key,
            contributor_certificate=self.seller.certificate,
            escrow_certificate=self.notary.certificate,
        )
        return Offer(self.seller, manifest, sealed, key)

    def honest_offer(self, price: int = PRICE) -> Offer:
        sold = openings_of(1)
        return self.offer(sold, *seal(sold), price)

    def balances(self) -> tuple[int, int]:
        escrow = self.escrow
        return escrow.balance(self.buyer.public_key), escrow.balance(self.seller.public_key)


@pytest.fixture
def parties(tmp_path: Path) -> Iterator[Parties]:
    result = Parties(tmp_path)
    yield result
    for journal in result.journals:
        journal.close()


class Purchase:
    """What both parties do, step by step, each with an escrow that has just been started."""

    def __init__(self, parties: Parties, offer: Offer) -> None:
        self.parties, self.offer = parties, offer
        self.buyer, self.seller = parties.buyer.public_key, parties.seller.public_key
        manifest = offer.manifest
        self.nonces = new_nonce(), new_nonce()
        self.session = session_id(
            manifest.protocol, manifest.adapter_id, manifest.base.digest, *self.nonces
        )
        parties.escrow.list_adapter(self.seller, offer.signed, offer.sealed)

    def closing(self, **changed: object) -> tuple[SignedDocument, SignedDocument]:
        x, y = np.ones((1, D_IN), np.int16), np.ones((1, D_OUT), np.int64)
        log = Transcript([Call(0, "block.0", 0, x, y)])
        document = closing_statement(self.session, self.offer.manifest.adapter_id, log) | changed
        parties = self.parties
        return (
            SignedDocument.sign("close", document, parties.buyer),
            SignedDocument.sign("close", document, parties.seller),
        )

    @property
    def steps(self) -> dict[str, Callable[[], Trade]]:
        """Operations by name, in order."""
        closing, session = self.closing(), self.session
        return {
            "open_trade": lambda: self.parties.escrow.open_trade(
                self.buyer, self.offer.manifest.adapter_id, session, *self.nonces
            ),
            "close": lambda: self.parties.escrow.close(self.seller, session, *closing),
            "proved": lambda: self.parties.escrow.proved(self.seller, session, PROOFS),
            "verified": lambda: self.parties.escrow.verified(self.buyer, session, PROOFS),
            "pay": lambda: self.parties.escrow.pay(self.buyer, session),
            "deposit_key": lambda: self.parties.escrow.deposit_key(
                self.seller, session, self.offer.key
            ),
            "opened": lambda: self.parties.escrow.opened(self.buyer, session),
        }

    def until(self, last: str) -> Trade:
        """Do all steps up to this one."""
        for name, step in self.steps.items():
            trade = step()
            if name == last:
                return trade
        raise AssertionError(last)


REACHED = {
    "open_trade": State.COMMITTED,
    "close": State.INFERRED,
    "proved": State.PROVED,
    "verified": State.VERIFIED,
    "pay": State.PAID,
    "deposit_key": State.KEY_RELEASED,
    "opened": State.SETTLED,
}
LOCKED = {State.PAID, State.KEY_RELEASED}
KEY_IS_OUT = {State.KEY_RELEASED, State.SETTLED}


@pytest.fixture
def purchase(parties: Parties) -> Purchase:
    return Purchase(parties, parties.honest_offer())


def test_an_honest_trade_survives_a_restart_after_every_step(purchase: Purchase) -> None:
    parties = purchase.parties
    for name, step in purchase.steps.items():
        trade = step()
        assert trade.state is REACHED[name]
        locked = PRICE if trade.state in LOCKED else 0
        paid = PRICE if trade.state is State.SETTLED else 0
        assert parties.balances() == (OPENING_BALANCE - locked - paid, OPENING_BALANCE + paid)
        assert parties.escrow.trade(purchase.seller, purchase.session) == trade
    assert trade.states == tuple(state for state in State if state not in (
        State.DISPUTED, State.REFUNDED
    ))  # fmt: skip
    escrow = parties.escrow
    key = escrow.key(purchase.buyer, purchase.session)
    sealed = escrow.sealed(purchase.offer.manifest.adapter_id)
    delivered = check_opening(purchase.offer.manifest, sealed, key)
    assert {name: opening.module.digest for name, opening in delivered.items()} == {
        name: opening.module.digest for name, opening in openings_of(1).items()
    }


def test_repeating_what_has_happened_changes_nothing(purchase: Purchase) -> None:
    done: list[Callable[[], Trade]] = []
    for step in purchase.steps.values():
        trade = step()
        done.append(step)
        balances = purchase.parties.balances()
        assert [repeat() for repeat in done] == [trade] * len(done)
        assert purchase.parties.balances() == balances
    offer = purchase.offer
    listed = purchase.parties.escrow.list_adapter(purchase.seller, offer.signed, offer.sealed)
    assert listed == offer.manifest.adapter_id


def test_steps_out_of_order_are_refused(purchase: Purchase) -> None:
    names = list(purchase.steps)
    for at, name in enumerate(names):
        trade = purchase.steps[name]() if at == 0 else purchase.until(name)
        for later in names[at + 2 :]:
            with pytest.raises(TradeError, match=f"{later} needs a trade in"):
                purchase.steps[later]()
        if trade.state not in (State.KEY_RELEASED, State.SETTLED):
            with pytest.raises(TradeError, match="once it is released"):
                purchase.parties.escrow.key(purchase.buyer, purchase.session)
            with pytest.raises(TradeError, match="dispute needs"):
                purchase.parties.escrow.dispute(purchase.buyer, purchase.session, "late")
        assert purchase.parties.escrow.trade(purchase.buyer, purchase.session) == trade


def test_other_content_under_the_same_step_is_refused(purchase: Purchase) -> None:
    trade = purchase.until("deposit_key")
    escrow, session, offer = purchase.parties.escrow, purchase.session, purchase.offer
    for attempt in (
        lambda: escrow.close(purchase.buyer, session, *purchase.closing(root="e" * 64)),
        lambda: escrow.proved(purchase.buyer, session, "cd" * 32),
        lambda: escrow.verified(purchase.buyer, session, "cd" * 32),
        lambda: escrow.deposit_key(purchase.seller, session, bytes(32)),
    ):
        with pytest.raises(TradeError, match="other content"):
            attempt()
    with pytest.raises(TradeError, match="another buyer"):
        escrow.open_trade(purchase.seller, offer.manifest.adapter_id, session, *purchase.nonces)
    assert escrow.trade(purchase.buyer, session) == trade


def test_only_the_right_party_may_take_a_step(purchase: Purchase) -> None:
    stranger = purchase.parties.stranger.public_key
    escrow, session, key = purchase.parties.escrow, purchase.session, purchase.offer.key
    calls: dict[str, Callable[[str], object]] = {
        "close": lambda caller: escrow.close(caller, session, *purchase.closing()),
        "proved": lambda caller: escrow.proved(caller, session, PROOFS),
        "verified": lambda caller: escrow.verified(caller, session, PROOFS),
        "pay": lambda caller: escrow.pay(caller, session),
        "deposit_key": lambda caller: escrow.deposit_key(caller, session, key),
        "opened": lambda caller: escrow.opened(caller, session),
        "dispute": lambda caller: escrow.dispute(caller, session, "mine"),
        "key": lambda caller: escrow.key(caller, session),
        "trade": lambda caller: escrow.trade(caller, session),
        "statement": lambda caller: escrow.statement(caller, session),
    }
    wrong = {
        "verified": purchase.seller,
        "pay": purchase.seller,
        "deposit_key": purchase.buyer,
        "opened": purchase.seller,
        "dispute": purchase.seller,
        "key": purchase.seller,
    }
    for step in purchase.steps.values():
        trade = step()
        for call in calls.values():
            with pytest.raises(TradeError, match="has no trade"):
                call(stranger)
        for name, caller in wrong.items():
            with pytest.raises(TradeError, match=r"is for the|goes to the buyer"):
                calls[name](caller)
        assert escrow.trade(purchase.buyer, session) == trade


def test_a_trade_is_bound_to_adapter_base_and_nonces(purchase: Purchase) -> None:
    escrow, adapter_id = purchase.parties.escrow, purchase.offer.manifest.adapter_id
    nonce_u, nonce_c = purchase.nonces
    for session, nonces in (
        ("d" * 64, (nonce_u, nonce_c)),
        (purchase.session, (nonce_c, nonce_u)),
        (purchase.session, (nonce_u, new_nonce())),
    ):
        with pytest.raises(TradeError, match="the session's id"):
            escrow.open_trade(purchase.buyer, adapter_id, session, *nonces)
    with pytest.raises(TradeError, match="no adapter"):
        escrow.open_trade(purchase.buyer, "f" * 64, purchase.session, nonce_u, nonce_c)


def test_a_closing_statement_must_be_signed_by_both_and_be_of_this_trade(
    purchase: Purchase,
) -> None:
    trade = purchase.until("open_trade")
    escrow, session = purchase.parties.escrow, purchase.session
    by_buyer, by_seller = purchase.closing()
    forged = SignedDocument.sign("close", by_buyer.document, purchase.parties.stranger)
    kind = SignedDocument.sign("manifest", by_buyer.document, purchase.parties.seller)
    for statements in (
        (by_buyer, by_buyer),
        (by_seller, by_buyer),
        (by_buyer, forged),
        (forged, by_seller),
        (by_seller, by_seller),
        (by_buyer, kind),
        (replace(by_buyer, document=by_buyer.document | {"leaves": 2}), by_seller),
    ):
        with pytest.raises(SignatureError):
            escrow.close(purchase.buyer, session, *statements)
    with pytest.raises(TradeError, match="different transcripts"):
        escrow.close(purchase.buyer, session, by_buyer, purchase.closing(leaves=2)[1])
    with pytest.raises(TradeError, match="another session"):
        escrow.close(purchase.buyer, session, *purchase.closing(session="d" * 64))
    with pytest.raises(TradeError, match="another adapter_id"):
        escrow.close(purchase.buyer, session, *purchase.closing(adapter_id="d" * 64))
    with pytest.raises(ProtocolError, match="root"):
        escrow.close(purchase.buyer, session, *purchase.closing(root=None))
    assert escrow.trade(purchase.buyer, session) == trade


def test_the_buyer_accepts_the_proofs_that_were_handed_over(purchase: Purchase) -> None:
    purchase.until("close")
    escrow, session = purchase.parties.escrow, purchase.session
    with pytest.raises(ProtocolError, match="proofs_digest"):
        escrow.proved(purchase.seller, session, PROOFS.upper())
    escrow.proved(purchase.seller, session, PROOFS)
    with pytest.raises(TradeError, match="was not handed over"):
        escrow.verified(purchase.buyer, session, "cd" * 32)
    assert escrow.verified(purchase.buyer, session, PROOFS).proofs_digest == PROOFS


def test_an_adapter_is_listed_by_its_contributor_as_the_manifest_says(parties: Parties) -> None:
    escrow, offer, seller = parties.escrow, parties.honest_offer(), parties.seller.public_key
    with pytest.raises(TradeError, match="by its contributor"):
        escrow.list_adapter(parties.stranger.public_key, offer.signed, offer.sealed)
    forged = SignedDocument.sign("manifest", offer.manifest.document, parties.stranger)
    with pytest.raises(SignatureError):
        escrow.list_adapter(seller, forged, offer.sealed)
    with pytest.raises(TradeError, match="sealed bytes"):
        escrow.list_adapter(seller, offer.signed, offer.sealed[:-1])
    with pytest.raises(TradeError, match="sealed_digest"):
        escrow.list_adapter(seller, offer.signed, offer.sealed[:-1] + b"?")
    for other in (parties.stranger.certificate, None):
        elsewhere = replace(offer.manifest, escrow_certificate=other)
        with pytest.raises(TradeError, match="escrow_certificate"):
            escrow.list_adapter(seller, elsewhere.sign(parties.seller), offer.sealed)
    with pytest.raises(TradeError, match="no adapter"):
        escrow.sealed(offer.manifest.adapter_id)


def test_a_seller_lists_so_many_adapters(parties: Parties) -> None:
    escrow = parties.new_escrow(max_listed=2)
    first, second, third = (parties.honest_offer(price) for price in (1, 2, 3))
    seller, other = parties.seller.public_key, parties.stranger
    for offer in (first, second):
        escrow.list_adapter(seller, offer.signed, offer.sealed)
    with pytest.raises(TradeError, match=r"2 adapters of .* are listed, .*at most 2"):
        escrow.list_adapter(seller, third.signed, third.sealed)
    escrow.list_adapter(seller, first.signed, first.sealed)  # again
    theirs = replace(third.manifest, contributor_certificate=other.certificate)
    escrow.list_adapter(other.public_key, theirs.sign(other), third.sealed)
    assert escrow.sealed(theirs.adapter_id) == third.sealed


def test_a_seller_lists_so_many_bytes(parties: Parties, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = parties.honest_offer(1), parties.honest_offer(2)
    size = len(first.sealed) + len(second.sealed)
    monkeypatch.setattr(escrow_module, "MAX_LISTED_BYTES", size - 1)
    escrow, seller = parties.escrow, parties.seller.public_key
    escrow.list_adapter(seller, first.signed, first.sealed)
    with pytest.raises(TradeError, match=rf"are listed, with {len(first.sealed)} bytes"):
        escrow.list_adapter(seller, second.signed, second.sealed)


def test_a_buyer_has_so_many_open_trades(parties: Parties) -> None:
    offer = parties.honest_offer()
    parties.running = parties.new_escrow(max_open_trades=2)
    first, second, third, fourth = (Purchase(parties, offer) for _ in range(4))
    first.until("deposit_key")
    second.until("open_trade")
    with pytest.raises(TradeError, match="has 2 trades that have not ended: at most 2"):
        third.until("open_trade")
    assert second.until("open_trade").state is State.COMMITTED  # again
    fourth.buyer = parties.stranger.public_key
    assert fourth.until("open_trade").state is State.COMMITTED
    first.until("opened")
    assert third.until("open_trade").state is State.COMMITTED


def test_points_are_decoded_when_an_adapter_is_listed(
    parties: Parties, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded, check = [], ModuleTerms.check_points

    def record(terms: ModuleTerms) -> None:
        decoded.append(terms.name)
        check(terms)

    purchase = Purchase(parties, parties.honest_offer())
    monkeypatch.setattr(ModuleTerms, "check_points", record)
    purchase.until("open_trade")
    assert decoded == []
    Purchase(parties, purchase.offer)
    assert decoded == ["block.0", "block.1"]


def test_a_price_that_the_balance_does_not_cover_is_not_locked(parties: Parties) -> None:
    purchase = Purchase(parties, parties.honest_offer(price=OPENING_BALANCE + 1))
    trade = purchase.until("verified")
    with pytest.raises(TradeError, match="the balance is 1000"):
        parties.escrow.pay(purchase.buyer, purchase.session)
    assert parties.escrow.trade(purchase.buyer, purchase.session) == trade
    assert parties.balances() == (OPENING_BALANCE, OPENING_BALANCE)


def test_two_trades_of_one_adapter_are_paid_one_by_one(parties: Parties) -> None:
    first = Purchase(parties, parties.honest_offer(price=600))
    second = Purchase(parties, first.offer)
    first.until("pay")
    with pytest.raises(TradeError, match="the balance is 400"):
        second.until("pay")
    with pytest.raises(TradeError, match="deposit_key needs"):
        second.steps["deposit_key"]()
    first.until("opened")
    with pytest.raises(TradeError, match="once it is released"):
        parties.escrow.key(second.buyer, second.session)
    assert parties.escrow.trade(second.buyer, second.session).state is State.VERIFIED
    assert parties.balances() == (400, 1600)


def assert_refunded(purchase: Purchase, trade: Trade, reason: str) -> None:
    assert trade.states[-2:] == (State.DISPUTED, State.REFUNDED)
    assert trade.reason is not None and reason in trade.reason
    assert purchase.parties.balances() == (OPENING_BALANCE, OPENING_BALANCE)
    with pytest.raises(TradeError):
        purchase.parties.escrow.key(purchase.buyer, purchase.session)


def test_a_wrong_key_gives_the_money_back(purchase: Purchase) -> None:
    purchase.until("pay")
    escrow, session = purchase.parties.escrow, purchase.session
    with pytest.raises(TradeError, match="a key of 31 bytes"):
        escrow.deposit_key(purchase.seller, session, bytes(31))
    trade = escrow.deposit_key(purchase.seller, session, bytes(32))
    assert_refunded(purchase, trade, "the key does not have the digest")
    # The right key comes too late, and the wrong one may be repeated.
    with pytest.raises(TradeError, match="other content"):
        escrow.deposit_key(purchase.seller, session, purchase.offer.key)
    assert escrow.deposit_key(purchase.seller, session, bytes(32)) == trade


def test_replaying_a_refunded_trade_moves_nothing(purchase: Purchase) -> None:
    purchase.until("pay")
    escrow, session = purchase.parties.escrow, purchase.session
    trade = escrow.deposit_key(purchase.seller, session, bytes(32))
    steps = purchase.steps
    for name in ("open_trade", "close", "proved", "verified", "pay"):
        assert steps[name]() == trade
    for attempt in (steps["deposit_key"], steps["opened"]):
        with pytest.raises(TradeError):
            attempt()
    with pytest.raises(TradeError, match="needs a trade in KEY_RELEASED"):
        escrow.dispute(purchase.buyer, session, "again")
    assert_refunded(purchase, trade, "digest")


def test_sealed_weights_that_are_not_the_committed_ones_give_the_money_back(
    parties: Parties,
) -> None:
    sold, others = openings_of(1), openings_of(2)
    sealed, key = seal(sold | {"block.1": others["block.1"]})
    purchase = Purchase(parties, parties.offer(sold, sealed, key))
    assert_refunded(purchase, purchase.until("deposit_key"), "block.1")


def test_missing_weights_give_the_money_back(parties: Parties) -> None:
    sold = openings_of(1)
    sealed, key = seal({"block.0": sold["block.0"]})
    purchase = Purchase(parties, parties.offer(sold, sealed, key))
    assert_refunded(purchase, purchase.until("deposit_key"), "block.1")


def field_valued(opening: ModuleOpening) -> tuple[list[list[int]], tuple[int, ...], list[bytes]]:
    """Return B / 3 modulo the group's order, blinders, and commitments to its rows."""
    third = pow(3, -1, ORDER)
    rows = [[int(entry) * third % ORDER for entry in row] for row in opening.module.b]
    blinders = tuple(random_scalar() for _ in rows)
    points = [*generators(D_OUT), BLINDING]
    committed = [
        encode(multiply(points, [*row, blinder]))
        for row, blinder in zip(rows, blinders, strict=True)
    ]
    return rows, blinders, committed


@pytest.mark.parametrize("delivery", ["integers", "field elements"])
def test_a_field_valued_factorisation_gives_the_money_back(parties: Parties, delivery: str) -> None:
    """(3 A, B / 3) has the same products modulo the order, so it would pass every proof."""
    honest = openings_of(1)
    module = honest["block.0"].module
    rows, blinders, committed = field_valued(honest["block.0"])
    tripled = commit(replace(module, a=module.a * np.int16(3)))[1]
    dishonest = replace(tripled, blinders_b=blinders)
    if delivery == "integers":
        sealed, key = seal(honest | {"block.0": dishonest})
    else:
        sealed, key = seal_elements(honest | {"block.0": dishonest}, "block.0.b", rows)
    manifest = parties.offer(honest, sealed, key).manifest
    cheat = ModuleCommitment(D_IN, R, D_OUT, tripled.commitment.a, tuple(committed))
    terms = (ModuleTerms("block.0", cheat, 7, 7), manifest.modules[1])
    offer = Offer(parties.seller, replace(manifest, modules=terms), sealed, key)
    purchase = Purchase(parties, offer)
    assert_refunded(purchase, purchase.until("deposit_key"), "block.0")


def seal_elements(openings: Openings, name: str, rows: list[list[int]]) -> tuple[bytes, bytes]:
    """Seal an adapter with one factor as 32-byte elements of the field."""
    sealed, key = seal(openings)
    cipher = ChaCha20Poly1305(key)
    tensors = safetensors.numpy.load(cipher.decrypt(NONCE, sealed, None))
    elements = b"".join(entry.to_bytes(32, "little") for row in rows for entry in row)
    tensors[name] = np.frombuffer(elements, np.uint8).reshape(R, D_OUT, 32)
    return cipher.encrypt(NONCE, safetensors.numpy.save(tensors), None), key


def test_a_key_of_the_wrong_weights_is_never_shown(parties: Parties) -> None:
    sold = openings_of(1)
    purchase = Purchase(parties, parties.offer(sold, *seal(openings_of(2))))
    trade = purchase.until("deposit_key")
    with pytest.raises(VerificationError):
        check_opening(purchase.offer.manifest, purchase.offer.sealed, purchase.offer.key)
    assert_refunded(purchase, trade, "opening")


def test_a_dispute_without_ground_settles(purchase: Purchase) -> None:
    purchase.until("deposit_key")
    escrow, session = purchase.parties.escrow, purchase.session
    for reason in ("", "x" * 1001):
        with pytest.raises(TradeError, match="a reason of"):
            escrow.dispute(purchase.buyer, session, reason)
    trade = escrow.dispute(purchase.buyer, session, "I don't like it")
    assert trade.states[-2:] == (State.DISPUTED, State.SETTLED)
    assert trade.reason == "disputed (I don't like it), but the opening check holds"
    assert escrow.dispute(purchase.buyer, session, "I don't like it") == trade
    assert purchase.parties.balances() == (OPENING_BALANCE - PRICE, OPENING_BALANCE + PRICE)
    assert escrow.key(purchase.buyer, session) == purchase.offer.key
    with pytest.raises(TradeError):
        escrow.opened(purchase.buyer, session)


def test_reasons_are_printable(purchase: Purchase) -> None:
    purchase.until("deposit_key")
    escrow, session = purchase.parties.escrow, purchase.session
    trade = escrow.dispute(purchase.buyer, session, "bad\x1b[2J\nweights")
    assert trade.reason == "disputed (bad?[2J?weights), but the opening check holds"
    assert escrow.dispute(purchase.buyer, session, "bad\x1b[2J\nweights") == trade
    assert Trade.from_json(trade.to_json()) == trade


def test_a_dispute_with_ground_refunds(purchase: Purchase) -> None:
    """What the escrow keeps was damaged after its first check."""
    purchase.until("deposit_key")
    escrow, session = purchase.parties.escrow, purchase.session
    damaged = purchase.offer.sealed[:-1] + bytes([purchase.offer.sealed[-1] ^ 1])
    purchase.parties.journals[-1].execute("UPDATE adapters SET sealed = ?", damaged)
    trade = escrow.dispute(purchase.buyer, session, "it doesn't open")
    assert_refunded(purchase, trade, "the sealed weights do not have the digest")


@pytest.mark.parametrize("last", [name for name in REACHED if name != "opened"])
def test_silence_ends_a_trade(purchase: Purchase, last: str) -> None:
    parties = purchase.parties
    trade = purchase.until(last)
    parties.now += DEADLINES[trade.state] - 1
    assert parties.escrow.expire() == []
    parties.now += 1
    (expired,) = parties.escrow.expire()
    settled = trade.state is State.KEY_RELEASED
    assert expired.state is (State.SETTLED if settled else State.REFUNDED)
    assert expired.reason == f"{DEADLINES[trade.state]:g} s in {trade.state}"
    paid = PRICE if settled else 0
    assert parties.balances() == (OPENING_BALANCE - paid, OPENING_BALANCE + paid)
    parties.now += 1e9
    assert parties.escrow.expire() == []
    assert parties.escrow.trade(purchase.buyer, purchase.session) == expired


def test_a_step_after_the_deadline_comes_too_late(purchase: Purchase) -> None:
    purchase.until("pay")
    purchase.parties.now += DEADLINES[State.PAID]
    with pytest.raises(TradeError, match="is in REFUNDED"):
        purchase.steps["deposit_key"]()
    with pytest.raises(TradeError, match="once it is released"):
        purchase.parties.escrow.key(purchase.buyer, purchase.session)
    assert purchase.parties.balances() == (OPENING_BALANCE, OPENING_BALANCE)


def test_a_deadline_that_passes_during_the_check_counts(purchase: Purchase) -> None:
    """The check is done outside of the transaction, which reads the state again."""
    purchase.until("pay")
    parties = purchase.parties
    journal = open_journal(parties.folder / "journal.sqlite")
    parties.journals.append(journal)
    looks = 0

    def clock() -> float:
        nonlocal looks
        looks += 1
        # Every look after the first is after the deadline.
        return parties.now + (DEADLINES[State.PAID] if looks > 1 else 0)

    escrow = Escrow(journal, parties.notary, SQLiteLedger(journal), clock=clock)
    escrow.trade(purchase.buyer, purchase.session)
    with pytest.raises(TradeError, match="is in REFUNDED"):
        escrow.deposit_key(purchase.seller, purchase.session, purchase.offer.key)
    assert parties.balances() == (OPENING_BALANCE, OPENING_BALANCE)


def test_what_has_ended_has_no_deadline(parties: Parties) -> None:
    journal = open_journal(parties.folder / "journal.sqlite")
    parties.journals.append(journal)
    with pytest.raises(TradeError, match="SETTLED"):
        Escrow(journal, parties.notary, SQLiteLedger(journal), deadlines={State.SETTLED: 1})


def test_the_escrow_states_what_happened(purchase: Purchase) -> None:
    trade = purchase.until("opened")
    parties = purchase.parties
    statement = parties.escrow.statement(purchase.seller, purchase.session)
    document = SignedDocument.from_json(statement.to_json()).check(
        STATEMENT, parties.notary.public_key
    )
    assert document["state"] == "SETTLED" and document["price"] == PRICE
    assert document["transcript_root"] == purchase.closing()[0].document["root"]
    assert Trade.from_json(document) == trade


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("session", 1),
        ("session", "D" * 64),
        ("adapter_id", ["d" * 64]),
        ("buyer", "ann"),
        ("seller", None),
        ("price", "300"),
        ("price", -1),
        ("price", True),
        ("price", 1.5),
        ("price", 2**53),
        ("state", "DONE"),
        ("state", ["PAID"]),
        ("state", "COMMITTED"),
        ("since", "now"),
        ("since", True),
        ("since", float("inf")),
        ("since", float("nan")),
        ("states", "COMMITTED"),
        ("states", []),
        ("states", [1]),
        ("states", [["PAID"]]),
        ("states", ["COMMITTED"] * 11),
        ("states", {"COMMITTED": 1}),
        ("transcript_root", 5),
        ("transcript_root", ""),
        ("proofs_digest", "x" * 64),
        ("reason", 5),
        ("reason", "\x1b[2J"),
        ("reason", "x" * 2001),
    ],
)
def test_what_is_no_trade_is_refused(purchase: Purchase, field: str, value: object) -> None:
    document = purchase.until("opened").to_json()
    assert Trade.from_json(document).state is State.SETTLED
    with pytest.raises(ProtocolError, match=f"not a trade: {field}=") as refused:
        Trade.from_json(document | {field: value})
    assert str(refused.value).isprintable()
    without = {name: value for name, value in document.items() if name != field}
    for other in (without, document | {"more": 1}, [], None, "trade"):
        with pytest.raises(ProtocolError, match="the fields of one are"):
            Trade.from_json(other)


def test_many_at_once_move_money_once(purchase: Purchase) -> None:
    purchase.until("verified")
    escrow, key = purchase.parties.escrow, purchase.offer.key
    other = purchase.parties.escrow  # a second process on the same file
    outcomes: list[Trade] = []

    def pay_and_open(mine: Escrow) -> None:
        mine.pay(purchase.buyer, purchase.session)
        mine.deposit_key(purchase.seller, purchase.session, key)
        outcomes.append(mine.opened(purchase.buyer, purchase.session))

    threads = [threading.Thread(target=pay_and_open, args=(mine,)) for mine in [escrow, other] * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [trade.state for trade in outcomes] == [State.SETTLED] * len(threads)
    assert purchase.parties.balances() == (OPENING_BALANCE - PRICE, OPENING_BALANCE + PRICE)


def test_money_and_key_move_together_whatever_is_called(parties: Parties) -> None:
    rng = np.random.default_rng(7)
    offer = parties.honest_offer()
    trades = [Purchase(parties, offer) for _ in range(4)]
    escrow = parties.running = parties.escrow
    accounts = [parties.buyer.public_key, parties.seller.public_key]
    reached = set()
    for _ in range(400):
        purchase = trades[rng.integers(len(trades))]
        key = purchase.offer.key if rng.random() < 0.8 else bytes(32)
        attempts = [
            *list(purchase.steps.values()) * 3,
            lambda p=purchase, k=key: escrow.deposit_key(p.seller, p.session, k),
            lambda p=purchase: escrow.dispute(p.buyer, p.session, "no"),
        ]
        parties.now += float(DEADLINES[State.PAID] if rng.random() < 0.02 else 1)
        with contextlib.suppress(TradeError):
            attempts[rng.integers(len(attempts))]()
        states = parties.journals[-1].execute("SELECT state FROM trades")
        locked, settled = (
            PRICE * sum(state in group for (state,) in states)
            for group in (LOCKED, {State.SETTLED})
        )
        balances = [escrow.balance(account) for account in accounts]
        assert balances == [OPENING_BALANCE - locked - settled, OPENING_BALANCE + settled]
        for each in trades:
            with contextlib.suppress(TradeError):
                assert escrow.key(each.buyer, each.session) == each.offer.key
                assert escrow.trade(each.buyer, each.session).state in KEY_IS_OUT
        reached |= {state for (state,) in states}
    assert {State.SETTLED, State.REFUNDED} <= reached


DYING = """
import os, signal, sys
from pathlib import Path
from paris_ray.zklora.escrow import Escrow, open_journal
from paris_ray.identity import Identity
from paris_ray.zklora.ledger import SQLiteLedger

class DyingLedger(SQLiteLedger):
    def lock(self, *arguments):
        super().lock(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

folder, buyer, session = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
journal = open_journal(folder / "journal.sqlite")
Escrow(
    journal, Identity.load(folder / "notary"), DyingLedger(journal, 1000), clock=lambda: 1e9
).pay(buyer, session)
"""


def test_a_process_killed_between_money_and_state_has_moved_neither(purchase: Purchase) -> None:
    trade = purchase.until("verified")
    parties = purchase.parties
    command = [sys.executable, "-c", DYING, parties.folder, purchase.buyer, purchase.session]
    killed = subprocess.run(command, cwd=REPOSITORY, env=os.environ, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert parties.escrow.trade(purchase.buyer, purchase.session) == trade
    assert parties.balances() == (OPENING_BALANCE, OPENING_BALANCE)
    assert purchase.until("opened").state is State.SETTLED


def test_the_ledger_moves_money_once(parties: Parties) -> None:
    journal = open_journal(parties.folder / "ledger.sqlite")
    parties.journals.append(journal)
    ledger = SQLiteLedger(journal, opening_balance=10)
    for _ in range(2):
        ledger.lock("t1", "ann", 4)
    for amount, account in ((5, "ann"), (4, "bob")):
        with pytest.raises(TradeError, match="another amount or account"):
            ledger.lock("t1", account, amount)
    ledger.lock("t2", "ann", 6)
    with pytest.raises(TradeError, match="the balance is 0"):
        ledger.lock("t3", "ann", 1)
    for _ in range(2):
        ledger.pay("t1", "bob")
        ledger.refund("t2")
        ledger.refund("t3")  # nothing was locked
    for attempt in (
        lambda: ledger.pay("t1", "eve"),
        lambda: ledger.refund("t1"),
        lambda: ledger.pay("t2", "bob"),
        lambda: ledger.pay("t3", "bob"),
    ):
        with pytest.raises(TradeError):
            attempt()
    assert [ledger.balance(account) for account in ("ann", "bob", "eve")] == [6, 14, 10]
    with pytest.raises(TradeError, match="opening_balance=-1"):
        SQLiteLedger(journal, opening_balance=-1)


def test_the_journal_is_private_and_must_be_one(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    open_journal(path).close()
    assert path.stat().st_mode & 0o777 == 0o600
    beside = path.with_name("journal.sqlite-wal")
    beside.touch()
    for file in (path, beside):
        file.chmod(0o644)
    journal = open_journal(path)
    journal.execute("CREATE TABLE t (n)")
    assert {file.name: file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {
        "journal.sqlite": 0o600,
        "journal.sqlite-wal": 0o600,
        "journal.sqlite-shm": 0o600,
    }
    journal.close()
    for wrong in (tmp_path, tmp_path / "missing" / "journal"):
        with pytest.raises(ArtifactError, match="cannot be used as a journal"):
            open_journal(wrong)
    (tmp_path / "text").write_text("not a database, but long enough to be read as one" * 20)
    with pytest.raises(ArtifactError, match="cannot be used as a journal"):
        open_journal(tmp_path / "text")
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 7")
    with pytest.raises(ArtifactError, match="has schema 7, this version reads 1"):
        open_journal(path)


def test_a_journal_of_before_there_were_versions_goes_on(purchase: Purchase) -> None:
    trade = purchase.until("verified")
    purchase.parties.journals[-1].execute("PRAGMA user_version = 0")
    again = purchase.parties.new_escrow()
    assert again.trade(purchase.buyer, purchase.session) == trade
    assert purchase.parties.journals[-1].execute("PRAGMA user_version") == [(1,)]


def test_the_adapter_has_the_digest_that_was_sold(purchase: Purchase) -> None:
    purchase.until("pay")
    sealed = purchase.parties.escrow.sealed(purchase.offer.manifest.adapter_id)
    assert sha256_hex(sealed) == purchase.offer.manifest.sealed_digest
