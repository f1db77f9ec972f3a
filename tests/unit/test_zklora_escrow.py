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

from paris_ray.config import LoRAConfig
from paris_ray.errors import (
    ArtifactError,
    ProtocolError,
    SignatureError,
    TradeError,
    VerificationError,
)
from paris_ray.identity import Identity
from paris_ray.signatures import SignedDocument
from paris_ray.zklora import listings
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
from paris_ray.zklora.listings import PIECE_BYTES
from paris_ray.zklora.manifest import AdapterManifest, Base, ModuleTerms
from paris_ray.zklora.offer import build_manifest
from paris_ray.zklora.sealing import NONCE, check_opening, seal
from paris_ray.zklora.trade import Trade, TradeState, sign_rows
from paris_ray.zklora.transcript import new_nonce, session_id

D_IN, R, D_OUT = 6, 2, 5
PRICE, OPENING_BALANCE = 300, 1000
ROW_PRICE, ROWS = 3, 20  # a deposit of 60
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

    def new_escrow(self) -> Escrow:
        journal = open_journal(self.folder / "journal.sqlite")
        self.journals.append(journal)
        ledger = SQLiteLedger(journal, OPENING_BALANCE)
        return Escrow(journal, self.notary, ledger, clock=lambda: self.now)

    def offer(self, sold: Openings, sealed: bytes, key: bytes, price: int = PRICE) -> Offer:
        manifest = build_manifest(
            sold,
            LoRAConfig(r=R, lora_alpha=2.0 * R),
            base=Base(digest="c" * 64, expert=None, router_digest=None),
            adapter="ink",
            price=price,
            price_per_row=ROW_PRICE,
            budget_rows=64,
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
        list_adapter(parties.escrow, self.seller, offer)

    def signed(self, rows: int, signer: Identity | None = None) -> SignedDocument:
        """The buyer's word for rows."""
        signer = signer or self.parties.buyer
        return sign_rows(signer, self.offer.manifest.adapter_id, self.session, rows)

    def owe(self, rows: int) -> Trade:
        return self.parties.escrow.owe(self.seller, self.session, self.signed(rows))

    @property
    def steps(self) -> dict[str, Callable[[], Trade]]:
        """Operations by name, in order."""
        session, adapter_id = self.session, self.offer.manifest.adapter_id
        return {
            "open_trade": lambda: self.parties.escrow.open_trade(
                self.buyer, adapter_id, session, *self.nonces, ROWS
            ),
            "owe": lambda: self.owe(7),
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
    "open_trade": TradeState.COMMITTED,
    "owe": TradeState.COMMITTED,
    "pay": TradeState.PAID,
    "deposit_key": TradeState.RELEASED,
    "opened": TradeState.SETTLED,
}
LOCKED = {
    TradeState.COMMITTED: ROWS * ROW_PRICE,
    TradeState.PAID: PRICE,
    TradeState.RELEASED: PRICE,
}
BOUGHT = {TradeState.RELEASED, TradeState.SETTLED}


def list_adapter(escrow: Escrow, seller: str, offer: Offer) -> None:
    number = escrow.listings.add(seller, offer.signed)
    for start in range(number * PIECE_BYTES, len(offer.sealed), PIECE_BYTES):
        piece = offer.sealed[start : start + PIECE_BYTES]
        escrow.listings.upload(seller, offer.manifest.adapter_id, start // PIECE_BYTES, piece)


@pytest.fixture
def purchase(parties: Parties) -> Purchase:
    return Purchase(parties, parties.honest_offer())


def test_an_honest_trade_survives_a_restart_after_every_step(purchase: Purchase) -> None:
    parties = purchase.parties
    for name, step in purchase.steps.items():
        trade = step()
        assert trade.state is REACHED[name]
        locked = LOCKED.get(trade.state, 0)
        paid = PRICE if trade.state is TradeState.SETTLED else 0
        assert parties.balances() == (OPENING_BALANCE - locked - paid, OPENING_BALANCE + paid)
        assert parties.escrow.trade(purchase.seller, purchase.session) == trade
    assert (trade.rows, trade.owed, trade.deposit_rows) == (7, 7 * ROW_PRICE, ROWS)
    escrow = parties.escrow
    key = escrow.key(purchase.buyer, purchase.session)
    sealed = escrow.sealed(purchase.buyer, purchase.session, 0)
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
    number = purchase.parties.escrow.listings.add(purchase.seller, purchase.offer.signed)
    assert number == 1  # all that there is


def test_steps_out_of_order_are_refused(purchase: Purchase) -> None:
    for name, early in (
        ("open_trade", ("deposit_key", "opened")),
        ("owe", ("deposit_key", "opened")),
        ("pay", ("opened",)),
    ):
        trade = purchase.until(name)
        for later in early:
            with pytest.raises(TradeError, match=f"{later} needs a trade in"):
                purchase.steps[later]()
        with pytest.raises(TradeError, match="once the key is released"):
            purchase.parties.escrow.key(purchase.buyer, purchase.session)
        with pytest.raises(TradeError, match="once the key is released"):
            purchase.parties.escrow.sealed(purchase.buyer, purchase.session, 0)
        assert purchase.parties.escrow.trade(purchase.buyer, purchase.session) == trade


def test_other_content_under_the_same_step_is_refused(purchase: Purchase) -> None:
    trade = purchase.until("deposit_key")
    escrow, session, offer = purchase.parties.escrow, purchase.session, purchase.offer
    with pytest.raises(TradeError, match="another key was deposited"):
        escrow.deposit_key(purchase.seller, session, bytes(32))
    with pytest.raises(TradeError, match="owe needs a trade in COMMITTED"):
        purchase.owe(8)
    with pytest.raises(TradeError, match="a larger deposit needs a trade in COMMITTED"):
        escrow.open_trade(
            purchase.buyer, offer.manifest.adapter_id, session, *purchase.nonces, ROWS + 1
        )
    with pytest.raises(TradeError, match="another buyer"):
        escrow.open_trade(purchase.seller, offer.manifest.adapter_id, session, *purchase.nonces)
    assert escrow.trade(purchase.buyer, session) == trade


def test_rows_are_paid_for_by_the_buyers_word_up_to_the_deposit(purchase: Purchase) -> None:
    purchase.until("open_trade")
    parties, escrow, session = purchase.parties, purchase.parties.escrow, purchase.session
    assert purchase.owe(5).rows == 5
    assert purchase.owe(3).rows == 5  # an earlier word
    with pytest.raises(TradeError, match="21 rows are signed for, the deposit covers 20"):
        purchase.owe(ROWS + 1)
    manifest = purchase.offer.manifest
    for deposit_rows in (-1, manifest.budget_rows + 1):
        with pytest.raises(TradeError, match=f"deposit_rows={deposit_rows} is not allowed"):
            escrow.open_trade(
                purchase.buyer, manifest.adapter_id, session, *purchase.nonces, deposit_rows
            )
    escrow.open_trade(purchase.buyer, manifest.adapter_id, session, *purchase.nonces, 30)
    assert parties.balances() == (OPENING_BALANCE - 30 * ROW_PRICE, OPENING_BALANCE)
    assert purchase.owe(30).owed == 30 * ROW_PRICE
    # The buyer walks away.
    parties.now += DEADLINES[TradeState.COMMITTED]
    (ended,) = parties.escrow.expire()
    assert ended.state is TradeState.REFUNDED
    paid = 30 * ROW_PRICE
    assert parties.balances() == (OPENING_BALANCE - paid, OPENING_BALANCE + paid)


def test_only_the_buyers_word_for_this_session_counts(purchase: Purchase) -> None:
    trade = purchase.until("open_trade")
    parties, session = purchase.parties, purchase.session
    adapter_id = purchase.offer.manifest.adapter_id
    for signed in (
        purchase.signed(3, parties.seller),
        replace(purchase.signed(3), document=purchase.signed(4).document),
        SignedDocument.sign("close", purchase.signed(3).document, parties.buyer),
        sign_rows(parties.buyer, adapter_id, "d" * 64, 3),
        sign_rows(parties.buyer, "d" * 64, session, 3),
        purchase.signed(-1),
        purchase.signed(2**53),
        purchase.signed(True),
        SignedDocument.sign("rows", purchase.signed(3).document | {"more": 1}, parties.buyer),
    ):
        with pytest.raises((SignatureError, ProtocolError)):
            parties.escrow.owe(purchase.seller, session, signed)
    assert parties.escrow.trade(purchase.buyer, session) == trade


def test_a_deposit_that_the_balance_does_not_cover_is_none(parties: Parties) -> None:
    offer = parties.honest_offer()
    offer.manifest = changed(offer.manifest, price_per_row=100)
    purchase = Purchase(parties, offer)
    with pytest.raises(TradeError, match="2000 credits are to be locked, the balance is 1000"):
        purchase.until("open_trade")
    with pytest.raises(TradeError, match="has no trade"):
        parties.escrow.trade(purchase.buyer, purchase.session)


def test_rows_may_cost_more_than_the_adapter(parties: Parties) -> None:
    purchase = Purchase(parties, parties.honest_offer(price=10))
    purchase.until("owe")
    purchase.owe(ROWS)
    purchase.steps["pay"]()
    purchase.steps["deposit_key"]()
    purchase.steps["opened"]()
    paid = ROWS * ROW_PRICE
    assert parties.balances() == (OPENING_BALANCE - paid, OPENING_BALANCE + paid)


def test_only_the_right_party_may_take_a_step(purchase: Purchase) -> None:
    stranger = purchase.parties.stranger.public_key
    escrow, session, key = purchase.parties.escrow, purchase.session, purchase.offer.key
    calls: dict[str, Callable[[str], object]] = {
        "owe": lambda caller: escrow.owe(caller, session, purchase.signed(1)),
        "pay": lambda caller: escrow.pay(caller, session),
        "deposit_key": lambda caller: escrow.deposit_key(caller, session, key),
        "opened": lambda caller: escrow.opened(caller, session),
        "key": lambda caller: escrow.key(caller, session),
        "sealed": lambda caller: escrow.sealed(caller, session, 0),
        "trade": lambda caller: escrow.trade(caller, session),
        "statement": lambda caller: escrow.statement(caller, session),
    }
    wrong = {
        "owe": purchase.buyer,
        "pay": purchase.seller,
        "deposit_key": purchase.buyer,
        "opened": purchase.seller,
        "key": purchase.seller,
        "sealed": purchase.seller,
    }
    for step in purchase.steps.values():
        trade = step()
        for call in calls.values():
            with pytest.raises(TradeError, match="has no trade"):
                call(stranger)
        for name, caller in wrong.items():
            with pytest.raises(TradeError, match=r"is for the|go to the buyer"):
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


def test_an_adapter_is_listed_by_its_contributor_as_the_manifest_says(parties: Parties) -> None:
    shelf, offer, seller = parties.escrow.listings, parties.honest_offer(), parties.seller
    with pytest.raises(TradeError, match="by its contributor"):
        shelf.add(parties.stranger.public_key, offer.signed)
    forged = SignedDocument.sign("manifest", offer.manifest.to_json(), parties.stranger)
    with pytest.raises(SignatureError):
        shelf.add(seller.public_key, forged)
    for other in (parties.stranger.certificate, parties.buyer.certificate):
        elsewhere = changed(offer.manifest, escrow_certificate=other)
        with pytest.raises(TradeError, match="escrow_certificate"):
            shelf.add(seller.public_key, elsewhere.sign(seller))
    with pytest.raises(TradeError, match="no adapter"):
        shelf.upload(seller.public_key, offer.manifest.adapter_id, 0, offer.sealed)


def test_weights_are_taken_as_they_were_announced(
    parties: Parties, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listings, "PIECE_BYTES", 100)
    offer, seller = parties.honest_offer(), parties.seller.public_key
    shelf, adapter_id, sealed = parties.escrow.listings, offer.manifest.adapter_id, offer.sealed
    pieces = [sealed[start : start + 100] for start in range(0, len(sealed), 100)]
    assert len(pieces) > 1
    assert shelf.add(seller, offer.signed) == 0
    with pytest.raises(TradeError, match="come from their contributor"):
        shelf.upload(parties.stranger.public_key, adapter_id, 0, pieces[0])
    for number, piece in ((1, pieces[1]), (-1, pieces[0]), (0, pieces[0][:-1]), (0, sealed)):
        with pytest.raises(TradeError, match=f"piece {number} with .* is not allowed: 0 is next"):
            shelf.upload(seller, adapter_id, number, piece)
    for number, piece in enumerate(pieces[:-1]):
        shelf.upload(seller, adapter_id, number, piece)
    another = pieces[-1][:-1] + bytes([pieces[-1][-1] ^ 1])
    nonces = new_nonce(), new_nonce()
    session = offer.manifest.session_id(*nonces)
    with pytest.raises(TradeError, match="misses 1 pieces of its weights"):
        parties.escrow.open_trade(parties.buyer.public_key, adapter_id, session, *nonces)
    with pytest.raises(TradeError, match="sealed_digest"):
        shelf.upload(seller, adapter_id, len(pieces) - 1, another)
    assert shelf.add(seller, offer.signed) == 0  # all of it is forgotten
    for number, piece in enumerate(pieces):
        shelf.upload(seller, adapter_id, number, piece)
    assert shelf.sealed(adapter_id) == sealed
    with pytest.raises(TradeError, match="piece=999 is not allowed"):
        shelf.piece(adapter_id, 999)


def test_a_seller_lists_so_many_adapters(parties: Parties, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listings, "MAX_LISTED", 2)
    shelf = parties.escrow.listings
    first, second, third = (parties.honest_offer(price) for price in (1, 2, 3))
    seller, other = parties.seller.public_key, parties.stranger
    for offer in (first, second):
        shelf.add(seller, offer.signed)
    with pytest.raises(TradeError, match=r"2 adapters of .* are listed, .*at most 2"):
        shelf.add(seller, third.signed)
    shelf.add(seller, first.signed)  # again
    theirs = changed(third.manifest, contributor_certificate=other.certificate)
    assert shelf.add(other.public_key, theirs.sign(other)) == 0


def test_what_a_seller_announces_counts_before_a_byte_of_it_comes(
    parties: Parties, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = parties.honest_offer(1), parties.honest_offer(2)
    size = len(first.sealed) + len(second.sealed)
    monkeypatch.setattr(listings, "MAX_LISTED_BYTES", size - 1)
    shelf, seller = parties.escrow.listings, parties.seller.public_key
    shelf.add(seller, first.signed)
    with pytest.raises(TradeError, match=rf"are listed, with {len(first.sealed)} bytes"):
        shelf.add(seller, second.signed)


def test_a_buyer_has_so_many_open_trades(parties: Parties, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paris_ray.zklora.escrow.MAX_OPEN_TRADES", 2)
    offer = parties.honest_offer()
    first, second, third, fourth = (Purchase(parties, offer) for _ in range(4))
    first.until("deposit_key")
    second.until("open_trade")
    with pytest.raises(TradeError, match="has 2 trades that have not ended: at most 2"):
        third.until("open_trade")
    assert second.until("open_trade").state is TradeState.COMMITTED  # again
    fourth.buyer = parties.stranger.public_key
    assert fourth.until("open_trade").state is TradeState.COMMITTED
    first.until("opened")
    assert third.until("open_trade").state is TradeState.COMMITTED


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
    trade = purchase.until("owe")
    with pytest.raises(TradeError, match="941 credits are to be locked, the balance is 940"):
        parties.escrow.pay(purchase.buyer, purchase.session)
    assert parties.escrow.trade(purchase.buyer, purchase.session) == trade
    assert parties.balances() == (OPENING_BALANCE - ROWS * ROW_PRICE, OPENING_BALANCE)


def test_two_trades_of_one_adapter_are_paid_one_by_one(parties: Parties) -> None:
    first = Purchase(parties, parties.honest_offer(price=600))
    second = Purchase(parties, first.offer)
    first.until("pay")
    with pytest.raises(TradeError, match="the balance is 340"):
        second.until("pay")
    with pytest.raises(TradeError, match="deposit_key needs"):
        second.steps["deposit_key"]()
    first.until("opened")
    with pytest.raises(TradeError, match="once the key is released"):
        parties.escrow.key(second.buyer, second.session)
    assert parties.escrow.trade(second.buyer, second.session).state is TradeState.COMMITTED
    assert parties.balances() == (340, 1600)


def assert_refunded(purchase: Purchase, trade: Trade, reason: str) -> None:
    assert trade.state is TradeState.REFUNDED
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
    with pytest.raises(TradeError, match="another key"):
        escrow.deposit_key(purchase.seller, session, purchase.offer.key)
    assert escrow.deposit_key(purchase.seller, session, bytes(32)) == trade


def test_replaying_a_refunded_trade_moves_nothing(purchase: Purchase) -> None:
    purchase.until("pay")
    escrow, session = purchase.parties.escrow, purchase.session
    trade = escrow.deposit_key(purchase.seller, session, bytes(32))
    steps = purchase.steps
    for name in ("open_trade", "owe"):
        assert steps[name]() == trade
    for name in ("pay", "deposit_key", "opened"):
        with pytest.raises(TradeError):
            steps[name]()
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
    points = {side: [point.hex() for point in getattr(cheat, side)] for side in "ab"}
    terms = [manifest.modules[0].to_json() | points, manifest.modules[1].to_json()]
    offer = Offer(parties.seller, changed(manifest, modules=terms), sealed, key)
    purchase = Purchase(parties, offer)
    assert_refunded(purchase, purchase.until("deposit_key"), "block.0")


def changed(manifest: AdapterManifest, **fields: object) -> AdapterManifest:
    return AdapterManifest(**manifest.to_json() | fields)


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


@pytest.mark.parametrize("last", [name for name in REACHED if name != "opened"])
def test_silence_ends_a_trade(purchase: Purchase, last: str) -> None:
    parties = purchase.parties
    trade = purchase.until(last)
    parties.now += DEADLINES[trade.state] - 1
    assert parties.escrow.expire() == []
    parties.now += 1
    (expired,) = parties.escrow.expire()
    settled = trade.state is TradeState.RELEASED
    assert expired.state is (TradeState.SETTLED if settled else TradeState.REFUNDED)
    assert expired.reason == f"{DEADLINES[trade.state]:g} s in {trade.state}"
    paid = PRICE if settled else trade.owed
    assert parties.balances() == (OPENING_BALANCE - paid, OPENING_BALANCE + paid)
    parties.now += 1e9
    assert parties.escrow.expire() == []
    assert parties.escrow.trade(purchase.buyer, purchase.session) == expired


def test_a_step_after_the_deadline_comes_too_late(purchase: Purchase) -> None:
    purchase.until("pay")
    purchase.parties.now += DEADLINES[TradeState.PAID]
    with pytest.raises(TradeError, match="is in REFUNDED"):
        purchase.steps["deposit_key"]()
    with pytest.raises(TradeError, match="once the key is released"):
        purchase.parties.escrow.key(purchase.buyer, purchase.session)
    owed = 7 * ROW_PRICE
    assert purchase.parties.balances() == (OPENING_BALANCE - owed, OPENING_BALANCE + owed)


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
        return parties.now + (DEADLINES[TradeState.PAID] if looks > 1 else 0)

    escrow = Escrow(journal, parties.notary, SQLiteLedger(journal), clock=clock)
    escrow.trade(purchase.buyer, purchase.session)
    with pytest.raises(TradeError, match="is in REFUNDED"):
        escrow.deposit_key(purchase.seller, purchase.session, purchase.offer.key)
    escrow.expire()
    owed = 7 * ROW_PRICE
    assert parties.balances() == (OPENING_BALANCE - owed, OPENING_BALANCE + owed)


def test_the_escrow_states_what_happened(purchase: Purchase) -> None:
    trade = purchase.until("opened")
    parties = purchase.parties
    statement = parties.escrow.statement(purchase.seller, purchase.session)
    document = SignedDocument.from_json(statement.to_json()).check(
        STATEMENT, parties.notary.public_key
    )
    assert document["state"] == "SETTLED" and document["price"] == PRICE
    assert document["rows"] == 7 and document["price_per_row"] == ROW_PRICE
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
        ("price_per_row", -1),
        ("deposit_rows", None),
        ("rows", 0.5),
        ("since", "now"),
        ("since", True),
        ("since", float("inf")),
        ("since", float("nan")),
        ("reason", 5),
        ("reason", "\x1b[2J"),
        ("reason", "x" * 2001),
    ],
)
def test_what_is_no_trade_is_refused(purchase: Purchase, field: str, value: object) -> None:
    document = purchase.until("opened").to_json()
    assert Trade.from_json(document).state is TradeState.SETTLED
    with pytest.raises(ProtocolError, match=f"Trade: {field}=") as refused:
        Trade.from_json(document | {field: value})
    assert str(refused.value).isprintable()
    without = {name: value for name, value in document.items() if name != field}
    for other, reason in (
        (without, f"Trade: field '{field}' is missing"),
        (document | {"more": 1}, "Trade: field 'more' is unknown"),
        *((other, "Trade=.* is not allowed: a mapping") for other in ([], None, "trade")),
    ):
        with pytest.raises(ProtocolError, match=reason):
            Trade.from_json(other)


def test_many_at_once_move_money_once(purchase: Purchase) -> None:
    purchase.until("owe")
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
    assert [trade.state for trade in outcomes] == [TradeState.SETTLED] * len(threads)
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
        key = purchase.offer.key if rng.random() < 0.5 else bytes(32)
        rows = int(rng.integers(ROWS + 2))
        attempts = [
            *list(purchase.steps.values()) * 3,
            *[lambda p=purchase, k=key: escrow.deposit_key(p.seller, p.session, k)] * 4,
            lambda p=purchase, n=rows: p.owe(n),
        ]
        parties.now += float(DEADLINES[TradeState.PAID] if rng.random() < 0.02 else 1)
        with contextlib.suppress(TradeError):
            attempts[rng.integers(len(attempts))]()
        seen = [
            escrow.trade(parties.buyer.public_key, session)
            for (session,) in parties.journals[-1].execute("SELECT session FROM trades")
        ]
        locked = sum(LOCKED.get(trade.state, 0) for trade in seen)
        settled = sum(PRICE for trade in seen if trade.state is TradeState.SETTLED)
        # Rows of trades that have ended without weights; not of those that were refused.
        settled += sum(
            trade.owed
            for trade in seen
            if trade.state is TradeState.REFUNDED and "check" not in str(trade.reason)
        )
        balances = [escrow.balance(account) for account in accounts]
        assert balances == [OPENING_BALANCE - locked - settled, OPENING_BALANCE + settled]
        for each in trades:
            with contextlib.suppress(TradeError):
                assert escrow.key(each.buyer, each.session) == each.offer.key
                assert escrow.trade(each.buyer, each.session).state in BOUGHT
        reached |= {trade.state for trade in seen}
    assert {TradeState.SETTLED, TradeState.REFUNDED} <= reached


DYING = """
import os, signal, sys
from pathlib import Path
from paris_ray.zklora.escrow import Escrow, open_journal
from paris_ray.identity import Identity
from paris_ray.zklora.ledger import SQLiteLedger
from paris_ray.zklora.listings import PIECE_BYTES

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
    trade = purchase.until("owe")
    parties = purchase.parties
    command = [sys.executable, "-c", DYING, parties.folder, purchase.buyer, purchase.session]
    killed = subprocess.run(command, cwd=REPOSITORY, env=os.environ, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert parties.escrow.trade(purchase.buyer, purchase.session) == trade
    assert parties.balances() == (OPENING_BALANCE - ROWS * ROW_PRICE, OPENING_BALANCE)
    assert purchase.until("opened").state is TradeState.SETTLED


def test_the_ledger_moves_money_once(parties: Parties) -> None:
    journal = open_journal(parties.folder / "ledger.sqlite")
    parties.journals.append(journal)
    ledger = SQLiteLedger(journal, opening_balance=10)
    for amount in (3, 4, 4, 2):  # in all, so far
        ledger.lock("t1", "ann", amount)
    assert ledger.balance("ann") == 6
    with pytest.raises(TradeError, match="another account"):
        ledger.lock("t1", "bob", 5)
    ledger.lock("t2", "ann", 6)
    with pytest.raises(TradeError, match="1 credits are to be locked, the balance is 0"):
        ledger.lock("t3", "ann", 1)
    with pytest.raises(TradeError, match="4 credits are locked for trade t1, not 5"):
        ledger.settle("t1", "bob", 5)
    for _ in range(2):
        ledger.settle("t1", "bob", 3)
        ledger.settle("t2", "bob", 0)
        ledger.settle("t3", "bob", 0)  # nothing was locked
    for attempt in (
        lambda: ledger.settle("t1", "eve", 3),
        lambda: ledger.settle("t1", "bob", 4),
        lambda: ledger.settle("t2", "bob", 6),
        lambda: ledger.settle("t3", "bob", 1),
        lambda: ledger.lock("t1", "ann", 5),
    ):
        with pytest.raises(TradeError):
            attempt()
    assert [ledger.balance(account) for account in ("ann", "bob", "eve")] == [7, 13, 10]
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
    with pytest.raises(ArtifactError, match="has schema 7, this version reads 2"):
        open_journal(path)
