"""The price of rows: a contributor's toll with a real escrow, over the network."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paris_ray.config import LoRAConfig
from paris_ray.errors import ConfigError, ProtocolError, SignatureError, TradeError
from paris_ray.identity import Identity
from paris_ray.signatures import SignedDocument
from paris_ray.zklora.calls import Request
from paris_ray.zklora.commitment import commit
from paris_ray.zklora.escrow import Escrow, open_journal
from paris_ray.zklora.fixed_point import QuantisedModule
from paris_ray.zklora.ledger import SQLiteLedger
from paris_ray.zklora.manifest import AdapterManifest, Base
from paris_ray.zklora.offer import build_manifest
from paris_ray.zklora.parties.escrow import EscrowClient, EscrowService
from paris_ray.zklora.parties.toll import Toll
from paris_ray.zklora.sealing import seal
from paris_ray.zklora.sessions import SessionJournal
from paris_ray.zklora.trade import Trade, TradeState, sign_rows
from paris_ray.zklora.transcript import new_nonce

D_IN, D_OUT = 6, 5
MODULES = ("first", "second")
ROW_PRICE, DEPOSIT_ROWS = 3, 8


class Shop:
    """A buyer with a session, and a seller who answers for money."""

    def __init__(self, folder: Path, price_per_row: int = ROW_PRICE) -> None:
        self.buyer, self.seller, self.notary = (
            Identity.create(folder / name) for name in ("buyer", "seller", "notary")
        )
        rng = np.random.default_rng(0)
        module = QuantisedModule(
            rng.integers(-99, 99, (D_IN, 2), np.int16),
            rng.integers(-99, 99, (2, D_OUT), np.int16),
            7,
            7,
        )
        openings = {name: commit(module)[1] for name in MODULES}
        self.sealed, key = seal(openings)
        self.manifest: AdapterManifest = build_manifest(
            openings,
            LoRAConfig(r=2, lora_alpha=4.0),
            base=Base(digest="c" * 64, expert=None, router_digest=None),
            adapter="ink",
            price=30,
            price_per_row=price_per_row,
            budget_rows=16,
            sealed=self.sealed,
            key=key,
            contributor_certificate=self.seller.certificate,
            escrow_certificate=self.notary.certificate,
        )
        self.adapter_id = self.manifest.adapter_id
        self.user = self.buyer.public_key
        self.journal = SessionJournal(folder / "sessions.sqlite")
        self.journal.budget.add_adapter(self.adapter_id, MODULES, 16)
        self.escrow_address = ("", 0)
        self.nonces_of: dict[str, tuple[str, str]] = {}
        self.sid = self.another_session()
        self.nonces = self.nonces_of[self.sid]

    def another_session(self) -> str:
        nonces = new_nonce(), new_nonce()
        sid = self.manifest.session_id(*nonces)
        self.journal.open_session(sid, self.adapter_id, self.user, *nonces)
        self.nonces_of[sid] = nonces
        return sid

    def word(self, rows: int, signer: Identity | None = None) -> object:
        return sign_rows(signer or self.buyer, self.adapter_id, self.sid, rows).to_json()

    def answer(self, toll: Toll, seq: int, module: str, rows: int, by_user: object) -> None:
        """Do what the gateway does with a call."""
        toll.collect(self.sid, self.user, seq, [module], rows, by_user)
        x = np.full((rows, D_IN), seq, np.int16)
        y = np.zeros((rows, D_OUT), np.int64)
        self.journal.record_calls(self.sid, self.user, seq, [Request(module, 0, x)], lambda: [y])
        toll.answered(self.sid, seq, [module], rows)


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path)


@pytest.fixture
def clients(shop: Shop, tmp_path: Path) -> Iterator[tuple[EscrowClient, EscrowClient]]:
    """The escrow as buyer and seller see it; the adapter is listed."""
    journal = open_journal(tmp_path / "escrow.sqlite")
    escrow = Escrow(journal, shop.notary, SQLiteLedger(journal))
    parties = shop.buyer, shop.seller
    with EscrowService(escrow, "127.0.0.1", 0, [p.certificate for p in parties]) as service:
        buyer, seller = (
            EscrowClient(party, service.address, shop.notary.certificate) for party in parties
        )
        shop.escrow_address = service.address
        with buyer, seller:
            seller.list_adapter(shop.manifest.sign(shop.seller), shop.sealed)
            yield buyer, seller
    journal.close()


@pytest.fixture
def escrow(shop: Shop, clients: tuple[EscrowClient, EscrowClient]) -> EscrowClient:
    """The seller's escrow, after the buyer has locked a deposit."""
    buyer, seller = clients
    buyer.open_trade(shop.adapter_id, shop.sid, *shop.nonces, DEPOSIT_ROWS)
    return seller


@pytest.fixture
def toll(shop: Shop, escrow: EscrowClient) -> Toll:
    return Toll(shop.manifest, escrow, shop.journal)


def test_a_row_of_every_module_is_owed_once(shop: Shop, toll: Toll, escrow: EscrowClient) -> None:
    shop.answer(toll, 0, "first", 3, shop.word(3))
    shop.answer(toll, 1, "second", 2, None)  # covered by what was signed for the first
    assert escrow.trade(shop.sid).rows == 3
    shop.answer(toll, 2, "second", 4, shop.word(6))
    assert escrow.trade(shop.sid).rows == 6
    assert toll.close(shop.sid) == 6 * ROW_PRICE
    assert toll.close(shop.sid) == 0  # it is forgotten


def test_no_row_is_answered_that_is_not_signed_for(
    shop: Shop, toll: Toll, escrow: EscrowClient
) -> None:
    shop.answer(toll, 0, "first", 3, shop.word(3))
    for too_little in (None, shop.word(3), shop.word(4)):
        with pytest.raises(TradeError, match="5 rows must be signed for, 3 are"):
            toll.collect(shop.sid, shop.user, 1, ["first"], 2, too_little)
    with pytest.raises(SignatureError):
        toll.collect(shop.sid, shop.user, 1, ["first"], 2, shop.word(5, shop.seller))
    other = sign_rows(shop.buyer, shop.adapter_id, "0" * 64, 5).to_json()
    with pytest.raises(ProtocolError, match="another session"):
        toll.collect(shop.sid, shop.user, 1, ["first"], 2, other)
    assert escrow.trade(shop.sid).rows == 3
    with pytest.raises(TradeError, match="9 rows are signed for, the deposit covers 8"):
        toll.collect(shop.sid, shop.user, 1, ["first"], 6, shop.word(9))
    toll.collect(shop.sid, shop.user, 1, ["first"], 5, shop.word(8))
    assert escrow.trade(shop.sid).owed == 8 * ROW_PRICE


def test_a_call_that_is_sent_again_is_not_owed_again(
    shop: Shop, toll: Toll, escrow: EscrowClient
) -> None:
    shop.answer(toll, 0, "first", 3, shop.word(3))
    toll.collect(shop.sid, shop.user, 0, ["first"], 3, None)
    toll.answered(shop.sid, 0, ["first"], 3)  # counted once
    toll.collect(shop.sid, shop.user, 1, ["first"], 2, shop.word(5))
    toll.collect(shop.sid, shop.user, 1, ["first"], 2, None)  # its computation had failed
    assert escrow.trade(shop.sid).rows == 5


def test_a_toll_that_is_made_anew_knows_what_was_answered(
    shop: Shop, toll: Toll, escrow: EscrowClient
) -> None:
    shop.answer(toll, 0, "first", 3, shop.word(3))
    shop.answer(toll, 1, "second", 1, None)
    again = Toll(shop.manifest, escrow, shop.journal)
    again.collect(shop.sid, shop.user, 1, ["second"], 1, None)
    with pytest.raises(TradeError, match="4 rows must be signed for, 3 are"):
        again.collect(shop.sid, shop.user, 2, ["first"], 1, None)
    shop.answer(again, 2, "second", 2, None)
    assert again.close(shop.sid) == 3 * ROW_PRICE


def test_without_a_deposit_nothing_is_answered(
    shop: Shop, clients: tuple[EscrowClient, EscrowClient]
) -> None:
    buyer, seller = clients
    toll = Toll(shop.manifest, seller, shop.journal)
    with pytest.raises(TradeError, match="has no trade"):
        toll.collect(shop.sid, shop.user, 0, ["first"], 1, shop.word(1))
    buyer.open_trade(shop.adapter_id, shop.sid, *shop.nonces, 0)
    with pytest.raises(TradeError, match="1 rows are signed for, the deposit covers 0"):
        toll.collect(shop.sid, shop.user, 0, ["first"], 1, shop.word(1))
    buyer.open_trade(shop.adapter_id, shop.sid, *shop.nonces, 1)
    toll.collect(shop.sid, shop.user, 0, ["first"], 1, shop.word(1))
    assert seller.trade(shop.sid).state is TradeState.COMMITTED


def test_modules_of_one_request_are_owed_together(
    shop: Shop, toll: Toll, escrow: EscrowClient
) -> None:
    shop.answer(toll, 0, "first", 2, shop.word(2))
    both = list(MODULES)
    with pytest.raises(TradeError, match="5 rows must be signed for, 2 are"):
        toll.collect(shop.sid, shop.user, 1, both, 3, shop.word(4))
    # Neither does a call that was paid for bring another one with it.
    with pytest.raises(TradeError, match="5 rows must be signed for, 2 are"):
        toll.collect(shop.sid, shop.user, 0, both, 3, None)
    toll.collect(shop.sid, shop.user, 1, both, 3, shop.word(5))
    toll.answered(shop.sid, 1, both, 3)
    toll.collect(shop.sid, shop.user, 1, both, 3, None)
    toll.collect(shop.sid, shop.user, 3, ["second"], 2, None)  # covered by the first's
    with pytest.raises(TradeError, match="6 rows must be signed for, 5 are"):
        toll.collect(shop.sid, shop.user, 3, both, 1, None)
    assert escrow.trade(shop.sid).rows == 5


class SlowEscrow(EscrowClient):
    """Takes nobody's word until it is let go."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.asked, self.let_go = threading.Event(), threading.Event()

    def owe(self, session: str, by_buyer: SignedDocument) -> Trade:
        self.asked.set()
        assert self.let_go.wait(60)
        return super().owe(session, by_buyer)


def test_a_slow_escrow_keeps_nobody_waiting_who_has_signed(
    shop: Shop, escrow: EscrowClient, tmp_path: Path
) -> None:
    slow = SlowEscrow(shop.seller, shop.escrow_address, shop.notary.certificate)
    others = shop.another_session()
    with slow, EscrowClient(shop.buyer, shop.escrow_address, shop.notary.certificate) as buyer:
        buyer.open_trade(shop.adapter_id, others, *shop.nonces_of[others], DEPOSIT_ROWS)
        toll = Toll(shop.manifest, slow, shop.journal)
        slow.let_go.set()
        word = sign_rows(shop.buyer, shop.adapter_id, others, 2).to_json()
        toll.collect(others, shop.user, 0, ["first"], 2, word)
        slow.let_go.clear()
        slow.asked.clear()
        with ThreadPoolExecutor(2) as threads:
            waiting = threads.submit(
                toll.collect, shop.sid, shop.user, 0, ["first"], 3, shop.word(3)
            )
            assert slow.asked.wait(60)
            covered = threads.submit(toll.collect, others, shop.user, 0, ["first"], 2, None)
            try:
                covered.result(20)
                assert not waiting.done()
            finally:
                slow.let_go.set()
            waiting.result(60)
    assert escrow.trade(shop.sid).rows == 3


def test_rows_with_a_price_need_an_escrow_and_free_ones_need_none(
    shop: Shop, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="escrow is missing: the manifest's price_per_row is 3"):
        Toll(shop.manifest, None, shop.journal)
    free = Shop(tmp_path / "free", price_per_row=0)
    toll = Toll(free.manifest, None, free.journal)
    free.answer(toll, 0, "first", 16, None)
    assert toll.close(free.sid) == 0
