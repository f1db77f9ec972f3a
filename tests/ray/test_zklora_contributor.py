"""A contributor's service: shares of users, news, proofs that failed, a gateway that dies."""

import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import ray

from paris_ray.config import LoRAConfig
from paris_ray.errors import BudgetError, ConfigError, ParisError, ProtocolError
from paris_ray.identity import Identity
from paris_ray.zklora.adapter import PeftAdapter
from paris_ray.zklora.fixed_point import Int16
from paris_ray.zklora.manifest import AdapterManifest, Base
from paris_ray.zklora.offer import AskedTerms, open_offer
from paris_ray.zklora.parties.channel import Channel
from paris_ray.zklora.parties.contributor import Contribution, Service
from paris_ray.zklora.parties.evidence import fetch_evidence
from paris_ray.zklora.parties.frames import Message
from paris_ray.zklora.parties.session import Session
from paris_ray.zklora.proof import verify_named

pytestmark = pytest.mark.ray

WIDTH, BUDGET, PER_USER = 16, 1000, 20
MODULES = ("layers.0.proj", "layers.1.proj")


@dataclass(frozen=True)
class Shop:
    """A contributor, and the users whom it knows."""

    service: Service
    manifest: AdapterManifest
    contribution: Contribution
    users: Iterator[Identity]

    def channel(self, user: Identity) -> Channel:
        address = self.contribution.address
        return Channel(user, address, self.manifest.contributor_certificate)


@pytest.fixture(scope="module")
def shop(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    root, random = tmp_path_factory.mktemp("shop"), np.random.default_rng(0)
    factors = {
        name: tuple(random.normal(size=size).astype(np.float32) for size in ((WIDTH, 2), (2, 8)))
        for name in MODULES
    }
    adapter = PeftAdapter(LoRAConfig(r=2, lora_alpha=2, target_modules=MODULES), factors)
    seller = Identity.create(root / "seller")
    users = [Identity.create(root / f"user_{i}") for i in range(12)]
    terms = AskedTerms(
        base=Base(digest="c" * 64, expert=None, router_digest=None),
        name="small",
        budget_rows=BUDGET,
    )
    offer = open_offer(root / "offer", seller, adapter, terms)
    service = Service(
        folder=root / "offer",
        identity=seller.folder,
        host="127.0.0.1",
        port=0,
        clients=tuple(user.certificate for user in users),
        max_rows_per_user=PER_USER,
    )
    contribution = Contribution(service)
    yield Shop(service, offer.manifest, contribution, iter(users))
    contribution.close()


@pytest.fixture
def user(shop: Shop) -> Identity:
    return next(shop.users)


@pytest.fixture
def channel(shop: Shop, user: Identity) -> Iterator[Channel]:
    with shop.channel(user) as channel:
        yield channel


@pytest.fixture
def session(shop: Shop, channel: Channel, user: Identity) -> Session:
    return Session(channel, user, shop.manifest)


def rows(count: int, seed: int = 0) -> Int16:
    return np.random.default_rng(seed).integers(-3000, 3000, (count, WIDTH), np.int16)


def call_all(session: Session, count: int = 2) -> None:
    for name in MODULES:
        session.evaluate(name, rows(count), 9)


class Counting(Channel):
    """A channel that counts its requests by their kind."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.kinds = Counter[str]()

    def request(self, kind: str, *arguments: Any) -> Message:
        self.kinds[kind] += 1
        return super().request(kind, *arguments)


def test_modules_with_the_same_inputs_take_one_round_trip(shop: Shop, user: Identity) -> None:
    address = shop.contribution.address
    x = rows(3)
    with Counting(user, address, shop.manifest.contributor_certificate) as channel:
        session = Session(channel, user, shop.manifest)
        answers = session.evaluate_all(MODULES, x, 9)
        again = session.evaluate_all(MODULES[::-1], x, 9)[::-1]
        for first, second in zip(answers, again, strict=True):
            np.testing.assert_array_equal(first, second)
        assert channel.kinds["call"] == 2 and len(session.transcript) == 4
        call = {"session": session.sid, "exponent": 9, "modules": list(MODULES), "owed": None}
        for seq, said in ((3, "the next call is 4"), (1, "sent again with other content")):
            with pytest.raises(ProtocolError, match=said):
                channel.request("call", call | {"seq": seq}, {"x": x})


def test_what_no_message_holds_takes_several(
    shop: Shop, channel: Channel, user: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(channel, user, shop.manifest)
    monkeypatch.setattr("paris_ray.zklora.parties.session.MAX_ASKED", 2 * 2 * WIDTH)
    x = rows(5)
    (whole,) = session.evaluate_all(MODULES[:1], x, 9)
    assert len(whole) == 5 and len(session.transcript) == 3
    np.testing.assert_array_equal(session.transcript.rows(MODULES[0])[1], whole)
    call_all(session, 1)
    session.verify()


def test_a_user_sees_no_more_than_its_share(shop: Shop, user: Identity) -> None:
    with shop.channel(user) as channel:
        session = Session(channel, user, shop.manifest)
        assert set(session.rows_left.values()) == {PER_USER}
        with pytest.raises(BudgetError, match=f"{PER_USER} rows left, {PER_USER + 1} are asked"):
            session.evaluate(MODULES[0], rows(PER_USER + 1), 0)
        call_all(session, PER_USER - 3)
        assert set(Session(channel, user, shop.manifest).rows_left.values()) == {3}
    other = next(shop.users)
    with shop.channel(other) as channel:
        assert set(Session(channel, other, shop.manifest).rows_left.values()) == {PER_USER}


def test_sessions_are_ended_by_request(shop: Shop, session: Session, channel: Channel) -> None:
    call_all(session, 1)
    thief = next(shop.users)
    with shop.channel(thief) as other, pytest.raises(ProtocolError, match="does not exist"):
        other.request("end", {"session": session.sid})
    for _ in range(2):
        session.end()
    with pytest.raises(ProtocolError, match=r"is ENDED \(its user broke it off\)"):
        session.evaluate(MODULES[0], rows(1), 0)
    news = "\n".join(shop.contribution.news())
    assert f"session {session.sid[:8]}" in news and ": opened; " in news and "broken off" in news


def test_what_cannot_be_served_is_an_error_for_people(shop: Shop) -> None:
    taken = replace(shop.service, port=shop.contribution.address[1])
    with pytest.raises(ConfigError, match="cannot be listened on"):
        Contribution(taken)
    with pytest.raises(ConfigError, match="escrow is not allowed: the manifest names none"):
        Contribution(replace(shop.service, escrow=("127.0.0.1", 1)))
    with pytest.raises(ConfigError, match="max_rows_per_user=0 is not allowed"):
        replace(shop.service, max_rows_per_user=0)


def test_proofs_that_failed_are_made_again_when_asked_for(
    shop: Shop, session: Session, channel: Channel
) -> None:
    """An answer in the journal is damaged, so that it cannot be proved; then it is repaired."""
    call_all(session)
    closed = session.close()

    def damage() -> None:
        with sqlite3.connect(shop.service.folder / "sessions.sqlite", timeout=60) as journal:
            where = (session.sid, 1)
            select = "SELECT y FROM calls WHERE sid = ? AND seq = ?"
            ((y,),) = journal.execute(select, where).fetchall()
            damaged = bytes([y[0] ^ 1]) + y[1:]
            journal.execute("UPDATE calls SET y = ? WHERE sid = ? AND seq = ?", (damaged, *where))

    damage()
    for _ in range(2):  # told twice, made anew once it was told
        with pytest.raises(ParisError):
            fetch_evidence(channel, shop.manifest, closed)
    damage()
    verify_named(fetch_evidence(channel, shop.manifest, closed).claims(shop.manifest))


def test_requests_bring_no_other_tensors(shop: Shop, session: Session, channel: Channel) -> None:
    call_all(session)
    extra = {"more": np.zeros(4, np.int16)}
    for kind, fields in (
        ("open", {"adapter_id": shop.manifest.adapter_id, "nonce_u": "0" * 64}),
        ("close", {"session": session.sid, "statement": {}}),
        ("prove", {"session": session.sid, "nonce_v": "0" * 64}),
        ("release", {"session": session.sid}),
        ("end", {"session": session.sid}),
    ):
        with pytest.raises(ProtocolError, match=f"{kind}: tensor 'more' is not expected"):
            channel.request(kind, fields, extra)
    session.verify()


def test_a_gateway_that_died_listens_again_and_knows_its_sessions(
    shop: Shop, user: Identity
) -> None:
    contribution = shop.contribution
    with shop.channel(user) as channel:
        session = Session(channel, user, shop.manifest)
        call_all(session)
        before, deadline = contribution.address, time.monotonic() + 60
        ray.kill(contribution.gateway, no_restart=False)
        while contribution.address == before and time.monotonic() < deadline:  # another free port
            assert "rows left" in contribution.status()
            time.sleep(0.2)
    with shop.channel(user) as channel:
        back = Session(channel, user, shop.manifest, session.nonce_u)
        assert back.sid == session.sid
        call_all(back)  # the very same questions: answered from the journal
        assert set(back.rows_left.values()) == {PER_USER - 2}
        back.verify()
        assert set(Session(channel, user, shop.manifest).rows_left.values()) == {PER_USER - 2}
