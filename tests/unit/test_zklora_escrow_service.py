"""The escrow over the network, and as the process that `python -m jobs.escrow` starts."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from paris_ray.config import LoRAConfig
from paris_ray.errors import ProtocolError, SignatureError, TradeError
from paris_ray.identity import CERTIFICATE, Identity
from paris_ray.signatures import SignedDocument
from paris_ray.zklora.commitment import commit
from paris_ray.zklora.escrow import STATEMENT, Escrow, open_journal
from paris_ray.zklora.fixed_point import QuantisedModule
from paris_ray.zklora.ledger import SQLiteLedger
from paris_ray.zklora.listings import PIECE_BYTES
from paris_ray.zklora.manifest import MAX_BYTES, AdapterManifest, Base
from paris_ray.zklora.offer import build_manifest
from paris_ray.zklora.parties.channel import Channel
from paris_ray.zklora.parties.escrow import LIMITS, EscrowClient, EscrowService
from paris_ray.zklora.parties.frames import ConnectionLost, Message
from paris_ray.zklora.parties.server import Server
from paris_ray.zklora.sealing import check_opening, seal
from paris_ray.zklora.trade import Trade, TradeState, sign_rows
from paris_ray.zklora.transcript import new_nonce, session_id

D_IN, R, D_OUT = 6, 2, 5
PRICE = 300
ROWS = 8
REPOSITORY = Path(__file__).resolve().parents[2]
READY = re.compile(
    r"escrow ready: address=(\S+):(\d+) certificate=(\S+) sha256=([0-9a-f]{64}) .*\n"
)


class Sale:
    """An adapter, its buyer and its seller, who know the escrow by its identity."""

    def __init__(self, folder: Path) -> None:
        self.buyer, self.seller, self.notary = (
            Identity.create(folder / name) for name in ("buyer", "seller", "notary")
        )
        rng = np.random.default_rng(0)
        a = rng.integers(-99, 99, (D_IN, R), np.int16)
        b = rng.integers(-99, 99, (R, D_OUT), np.int16)
        self.opening = commit(QuantisedModule(a, b, 7, 7))[1]
        self.sealed, self.key = seal({"block": self.opening})
        self.manifest: AdapterManifest = build_manifest(
            {"block": self.opening},
            LoRAConfig(r=R, lora_alpha=2.0 * R),
            base=Base(digest="c" * 64, expert=None, router_digest=None),
            adapter="ink",
            price=PRICE,
            price_per_row=2,
            budget_rows=16,
            sealed=self.sealed,
            key=self.key,
            contributor_certificate=self.seller.certificate,
            escrow_certificate=self.notary.certificate,
        )
        self.adapter_id = self.manifest.adapter_id
        self.nonces = new_nonce(), new_nonce()
        self.session = session_id(
            self.manifest.protocol, self.adapter_id, self.manifest.base.digest, *self.nonces
        )

    def steps(self, buyer: EscrowClient, seller: EscrowClient) -> list[Callable[[], Trade]]:
        signed = sign_rows(self.buyer, self.adapter_id, self.session, 3)
        return [
            lambda: buyer.open_trade(self.adapter_id, self.session, *self.nonces, ROWS),
            lambda: seller.owe(self.session, signed),
            lambda: buyer.pay(self.session),
            lambda: seller.deposit_key(self.session, self.key),
            lambda: buyer.opened(self.session),
        ]


@pytest.fixture
def sale(tmp_path: Path) -> Sale:
    return Sale(tmp_path)


@pytest.fixture
def service(sale: Sale, tmp_path: Path) -> Iterator[EscrowService]:
    journal = open_journal(tmp_path / "journal.sqlite")
    escrow = Escrow(journal, sale.notary, SQLiteLedger(journal))
    clients = [sale.buyer.certificate, sale.seller.certificate]
    with EscrowService(escrow, "127.0.0.1", 0, clients) as result:
        yield result
    journal.close()


@pytest.fixture
def clients(sale: Sale, service: EscrowService) -> Iterator[tuple[EscrowClient, EscrowClient]]:
    buyer, seller = (
        EscrowClient(party, service.address, sale.notary.certificate)
        for party in (sale.buyer, sale.seller)
    )
    with buyer, seller:
        yield buyer, seller


def test_a_purchase_over_the_network(
    sale: Sale, clients: tuple[EscrowClient, EscrowClient]
) -> None:
    buyer, seller = clients
    seller.list_adapter(sale.manifest.sign(sale.seller), sale.sealed)
    seller.list_adapter(sale.manifest.sign(sale.seller), sale.sealed)  # again
    trades = [step() for step in sale.steps(buyer, seller)]
    assert [trade.state for trade in trades] == [
        TradeState.COMMITTED,
        TradeState.COMMITTED,
        TradeState.PAID,
        TradeState.RELEASED,
        TradeState.SETTLED,
    ]
    assert seller.trade(sale.session) == trades[-1]
    assert (buyer.balance(), seller.balance()) == (700, 1300)
    sealed = buyer.sealed(sale.session, sale.manifest)
    delivered = check_opening(sale.manifest, sealed, buyer.key(sale.session))
    assert delivered["block"].module.digest == sale.opening.module.digest
    statement = buyer.statement(sale.session, sale.adapter_id)
    assert statement.public_key == sale.notary.public_key
    assert (statement.document["state"], statement.document["rows"]) == ("SETTLED", 3)


def test_refusals_come_back_as_what_they_are(
    sale: Sale, clients: tuple[EscrowClient, EscrowClient]
) -> None:
    buyer, seller = clients
    with pytest.raises(TradeError, match="by its contributor"):
        buyer.list_adapter(sale.manifest.sign(sale.seller), sale.sealed)
    forged = SignedDocument.sign("manifest", sale.manifest.to_json(), sale.buyer)
    with pytest.raises(SignatureError):
        seller.list_adapter(forged, sale.sealed)
    seller.list_adapter(sale.manifest.sign(sale.seller), sale.sealed)
    buyer.open_trade(sale.adapter_id, sale.session, *sale.nonces)
    with pytest.raises(TradeError, match="pay is for the buyer"):
        seller.pay(sale.session)
    with pytest.raises(SignatureError):
        seller.owe(sale.session, sign_rows(sale.seller, sale.adapter_id, sale.session, 1))
    with pytest.raises(TradeError, match="once the key is released"):
        buyer.key(sale.session)
    with pytest.raises(TradeError, match="has no trade"):
        buyer.trade("d" * 64)


def test_a_wrong_key_is_told_to_the_seller(
    sale: Sale, clients: tuple[EscrowClient, EscrowClient]
) -> None:
    buyer, seller = clients
    seller.list_adapter(sale.manifest.sign(sale.seller), sale.sealed)
    for step in sale.steps(buyer, seller)[:3]:
        step()
    trade = seller.deposit_key(sale.session, bytes(32))
    assert trade.state is TradeState.REFUNDED and "the opening check failed" in str(trade.reason)
    assert (buyer.balance(), seller.balance()) == (1000, 1000)


@pytest.mark.parametrize(
    ("kind", "fields", "tensors"),
    [
        ("expire", {}, {}),
        ("_answer", {}, {}),
        ("pay", {}, {}),
        ("pay", {"session": 1}, {}),
        ("pay", {"session": "d" * 64, "caller": "me"}, {}),
        ("balance", {"caller": "me"}, {}),
        ("deposit_key", {"session": "d" * 64}, {}),
        ("deposit_key", {"session": "d" * 64}, {"key": np.zeros(32, np.int16)}),
        ("deposit_key", {"session": "d" * 64}, {"key": np.zeros((1, 32), np.uint8)}),
        ("list_adapter", {}, {"sealed": np.zeros(9, np.uint8)}),
        ("owe", {"session": "d" * 64, "by_buyer": "3 rows"}, {}),
        ("balance", {}, {"more": np.zeros(9, np.uint8)}),
        ("list_adapter", {}, {"manifest": np.frombuffer(b"{]", np.uint8)}),
        ("list_adapter", {}, {"manifest": np.frombuffer(b"[1e999]", np.uint8)}),
        ("upload", {"adapter_id": "d" * 64, "piece": "0"}, {"content": np.zeros(9, np.uint8)}),
        ("upload", {"adapter_id": "d" * 64, "piece": True}, {"content": np.zeros(9, np.uint8)}),
        ("sealed", {"session": "d" * 64}, {}),
    ],
)
def test_a_malformed_request_is_refused(
    sale: Sale,
    service: EscrowService,
    kind: str,
    fields: dict[str, object],
    tensors: dict[str, np.ndarray],
) -> None:
    with Channel(sale.buyer, service.address, sale.notary.certificate) as channel:
        with pytest.raises((ProtocolError, SignatureError)) as refused:
            channel.request(kind, fields, tensors)
        assert "internal" not in str(refused.value)
        assert channel.request("balance").fields == {"value": 1000}


def test_only_an_adapter_to_list_may_be_large(sale: Sale, service: EscrowService) -> None:
    large = np.zeros(5 * 2**20, np.uint8)
    address, certificate = service.address, sale.notary.certificate
    with (
        Channel(sale.seller, address, certificate, attempts=1) as rude,
        pytest.raises(ConnectionLost),
    ):
        rude.request("balance", {}, {"x": large})
    with Channel(sale.seller, address, certificate, limits=LIMITS) as channel:
        for kind in ("balance", "upload"):
            with pytest.raises(ProtocolError, match="shape of tensor 'x'"):
                channel.request(kind, {}, {"x": large})
        too_large = np.full(MAX_BYTES + 1, ord("["), np.uint8)
        with pytest.raises(ProtocolError, match="a manifest of 25165825 bytes is not allowed"):
            channel.request("list_adapter", {}, {"manifest": too_large})
        fields = {"adapter_id": sale.adapter_id, "piece": 0}
        piece = np.zeros(PIECE_BYTES, np.uint8)
        with pytest.raises(TradeError, match="no adapter"):
            channel.request("upload", fields, {"content": piece})


def test_an_escrow_that_lies_is_not_believed(
    sale: Sale, clients: tuple[EscrowClient, EscrowClient]
) -> None:
    buyer, seller = clients
    signed = sale.manifest.sign(sale.seller)
    seller.list_adapter(signed, sale.sealed)
    for step in sale.steps(buyer, seller):
        step()
    honest = buyer.statement(sale.session, sale.adapter_id).document
    lies: dict[str, Message] = {}

    def state(**changes: object) -> Message:
        statement = SignedDocument.sign(STATEMENT, honest | changes, sale.notary)
        return Message("done", {"value": statement.to_json()})

    pinned = [sale.buyer.certificate]
    with (
        Server(sale.notary, "127.0.0.1", 0, pinned, lambda _, request: lies[request.kind]) as liar,
        EscrowClient(sale.buyer, liar.address, sale.notary.certificate) as client,
    ):
        lies["statement"] = state()
        assert client.statement(sale.session, sale.adapter_id).document == honest
        for changes in ({"session": "d" * 64}, {"adapter_id": "d" * 64}):
            lies["statement"] = state(**changes)
            with pytest.raises(ProtocolError, match="the escrow's statement is about trade"):
                client.statement(sale.session, sale.adapter_id)
        lies["statement"] = state(price="free")
        with pytest.raises(ProtocolError, match="Trade: price='free'"):
            client.statement(sale.session, sale.adapter_id)
        lies["trade"] = Message("trade", honest | {"reason": "\x1b[2J"})
        with pytest.raises(ProtocolError, match="Trade: reason="):
            client.trade(sale.session)
        for fields in ({}, {"value": "9"}, {"value": True}, {"value": 9, "more": 9}):
            lies["balance"] = lies["list_adapter"] = Message("done", fields)
            with pytest.raises(ProtocolError, match=r"has the fields value|of type int"):
                client.balance()
            with pytest.raises(ProtocolError, match=r"has the fields value|of type int"):
                client.list_adapter(signed, sale.sealed)
        lies["list_adapter"] = Message("done", {"value": -1})
        with pytest.raises(ProtocolError, match="the escrow has no next piece -1"):
            client.list_adapter(signed, sale.sealed)
        for wrong in (np.zeros(32, np.int16), np.zeros((1, 32), np.uint8)):
            lies["key"] = Message("done", tensors={"value": wrong})
            with pytest.raises(ProtocolError, match="done: tensor 'value' is"):
                client.key(sale.session)
        lies["sealed"] = Message("done", tensors={"value": np.zeros(9, np.uint8)})
        with pytest.raises(ProtocolError, match="the escrow sent 9 bytes as a piece"):
            client.sealed(sale.session, sale.manifest)


def test_whoever_is_idle_keeps_no_place_from_another_offer_of_the_same_key(sale: Sale) -> None:
    """Two clients of three connections, and the escrow has four places for one key."""
    asked = threading.Barrier(3)

    def answer(caller: str, request: Message) -> Message:
        asked.wait(60)
        return Message("done", {"value": 9})

    pinned, certificate = [sale.seller.certificate], sale.notary.certificate
    with (
        Server(sale.notary, "127.0.0.1", 0, pinned, answer, LIMITS) as server,
        EscrowClient(sale.seller, server.address, certificate, connections=3) as one,
        EscrowClient(sale.seller, server.address, certificate, connections=3) as other,
        ThreadPoolExecutor(3) as threads,
    ):
        for client in (one, other, one):
            balances = [threads.submit(client.balance) for _ in range(3)]
            assert [balance.result(60) for balance in balances] == [9, 9, 9]


def test_a_slow_operation_keeps_no_other_waiting(sale: Sale) -> None:
    """A client with two connections: the first answer waits for the second question."""
    asked = threading.Barrier(2)

    def answer(caller: str, request: Message) -> Message:
        asked.wait(60)
        return Message("done", {"value": 9})

    pinned = [sale.seller.certificate]
    with (
        Server(sale.notary, "127.0.0.1", 0, pinned, answer) as slow,
        EscrowClient(sale.seller, slow.address, sale.notary.certificate, connections=2) as client,
        ThreadPoolExecutor(2) as threads,
    ):
        balances = [threads.submit(client.balance) for _ in range(2)]
        assert [balance.result(60) for balance in balances] == [9, 9]
        assert client.num_bytes > 0


def test_the_service_ends_silent_trades_by_itself(sale: Sale, tmp_path: Path) -> None:
    journal = open_journal(tmp_path / "journal.sqlite")
    now = 1e9
    escrow = Escrow(journal, sale.notary, SQLiteLedger(journal), clock=lambda: now)
    with EscrowService(escrow, "127.0.0.1", 0, [sale.seller.certificate]):
        seller = sale.seller.public_key
        escrow.listings.add(seller, sale.manifest.sign(sale.seller))
        escrow.listings.upload(seller, sale.adapter_id, 0, sale.sealed)
        escrow.open_trade(sale.buyer.public_key, sale.adapter_id, sale.session, *sale.nonces)
        now += 1e6
        wait_for(lambda: journal.execute("SELECT state FROM trades") == [(TradeState.REFUNDED,)])
    journal.close()


def wait_for(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline, "it has not happened"
        time.sleep(0.05)


class Process:
    """A real escrow process on a free port, and clients of it."""

    def __init__(self, sale: Sale, folder: Path, stack: ExitStack) -> None:
        certificates = folder / "certificates"
        certificates.mkdir(exist_ok=True)
        (certificates / "buyer.pem").write_text(sale.buyer.certificate)
        command = [
            *(sys.executable, "-m", "jobs.escrow", "--listen", "127.0.0.1:0"),
            *("--home", folder / "notary"),
            *("--clients", certificates, folder / "seller" / CERTIFICATE),
        ]
        self.process = stack.enter_context(
            subprocess.Popen(
                command, cwd=REPOSITORY, env=os.environ, stdout=subprocess.PIPE, text=True
            )
        )
        stack.callback(self.process.kill)
        assert self.process.stdout is not None
        self.log = ""
        while (ready := READY.fullmatch(line := self.process.stdout.readline())) is None:
            assert line, f"the escrow has ended: {self.log}"
            self.log += line
        self.certificate = Path(ready[3])
        self.buyer, self.seller = (
            stack.enter_context(
                EscrowClient(party, (ready[1], int(ready[2])), self.certificate.read_text())
            )
            for party in (sale.buyer, sale.seller)
        )


def test_a_killed_process_is_started_again_and_goes_on(sale: Sale, tmp_path: Path) -> None:
    with ExitStack() as stack:
        escrow = Process(sale, tmp_path, stack)
        assert "stand-in for payment" in escrow.log
        assert escrow.certificate == tmp_path / "notary" / CERTIFICATE
        escrow.seller.list_adapter(sale.manifest.sign(sale.seller), sale.sealed)
        for step in sale.steps(escrow.buyer, escrow.seller)[:3]:
            trade = step()
        assert trade.state is TradeState.PAID
        escrow.process.send_signal(signal.SIGKILL)
        assert escrow.process.wait(60) == -signal.SIGKILL

        again = Process(sale, tmp_path, stack)
        assert again.buyer.trade(sale.session) == trade
        assert again.buyer.balance() == 1000 - PRICE
        for step in sale.steps(again.buyer, again.seller):
            trade = step()
        assert trade.state is TradeState.SETTLED
        assert (again.buyer.balance(), again.seller.balance()) == (700, 1300)
        again.process.send_signal(signal.SIGTERM)
        assert again.process.wait(60) == 0


def job(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jobs.escrow", *arguments],
        cwd=REPOSITORY,
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_help_says_that_the_ledger_is_a_stand_in() -> None:
    result = job("--help")
    assert result.returncode == 0
    assert "STAND-IN FOR PAYMENT" in result.stdout
    assert "python -m jobs.escrow" in result.stdout


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--listen", "7443", "--listen='7443'"),
        ("--listen", "127.0.0.1:x", "HOST:PORT"),
        ("--clients", "missing.pem", "missing.pem"),
        ("--clients", "buyer/key.pem", "key.pem is no certificate"),
        ("--clients", "empty", "holds no certificate"),
        ("--home", "file", "cannot be the folder of an identity"),
        ("--home", "damaged", "cannot be used as a journal"),
        ("--opening-balance", "-1", "opening_balance=-1"),
    ],
)
def test_a_wrong_option_is_named(
    sale: Sale, tmp_path: Path, option: str, value: str, message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "damaged" / "journal.sqlite").mkdir(parents=True)
    options = {
        "--listen": "127.0.0.1:0",
        "--clients": tmp_path / "buyer" / CERTIFICATE,
        "--home": tmp_path / "notary",
    }
    options[option] = tmp_path / value if option in ("--clients", "--home") else value
    result = job(*(argument for pair in options.items() for argument in pair))
    assert result.returncode == 2
    assert message in result.stderr and "Traceback" not in result.stderr


def test_the_process_needs_neither_ray_nor_torch() -> None:
    check = "import sys, jobs.escrow; assert not {'ray', 'torch'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", check], cwd=REPOSITORY, env=os.environ, check=True)
