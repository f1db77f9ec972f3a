"""Pictures that a contributor draws for an audit: asked for, waited for, paid for, refused."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray

from paris_ray.artifacts import Folder
from paris_ray.bundle import Bundle
from paris_ray.config import LoRAConfig
from paris_ray.errors import BudgetError, ConfigError, ParisError, ProtocolError
from paris_ray.identity import Identity
from paris_ray.models.lora import Adapter
from paris_ray.models.peft_layout import save_adapter
from paris_ray.sampling.routing import Routing
from paris_ray.sampling.sampler import SamplingOptions
from paris_ray.signatures import SignedDocument
from paris_ray.zklora.adapter import read_peft
from paris_ray.zklora.manifest import AdapterManifest
from paris_ray.zklora.offer import AskedTerms, base_of_expert, open_offer
from paris_ray.zklora.parties.channel import Channel
from paris_ray.zklora.parties.contributor import (
    DRAWINGS,
    MAX_REPEATS,
    Contribution,
    Service,
    _Job,
)
from paris_ray.zklora.parties.evidence import fetch_evidence
from paris_ray.zklora.parties.frames import Message
from paris_ray.zklora.parties.messages import MIN_ROWS_A_PICTURE, DrawRequest
from paris_ray.zklora.parties.results import result
from paris_ray.zklora.parties.session import Session
from paris_ray.zklora.parties.workers import _check_size
from paris_ray.zklora.proof import verify_named
from paris_ray.zklora.transcript import drawing_digest

pytestmark = pytest.mark.ray

EXPERT, BUDGET, PER_USER = 0, 10_000, 200
TARGETS = ("in_proj", "out_proj")
ROWS = MIN_ROWS_A_PICTURE
FULL: dict[str, Any] = {"routing": "full", "num_inference_steps": 2}
SLOW: dict[str, Any] = {"routing": "full", "num_inference_steps": 1000}


@dataclass(frozen=True)
class Market:
    """A contributor who draws, and the users whom it knows."""

    bundle: str
    service: Service
    manifest: AdapterManifest
    contribution: Contribution
    users: Iterator[Identity]

    def rows_left(self) -> int:
        return min(result(self.contribution.gateway.rows_left.remote()).values())

    def channel(self, user: Identity) -> Channel:
        address = self.contribution.address
        return Channel(user, address, self.manifest.contributor_certificate)

    def session(self, channel: Channel, user: Identity, mode: str = "audit") -> Session:
        return Session(channel, user, self.manifest, mode)


@pytest.fixture(scope="module")
def market(
    ray_session: None,
    tiny_bundle_path: Path,
    tiny_bundle: Bundle,
    randomised: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Market]:
    root = tmp_path_factory.mktemp("drawing")
    config = LoRAConfig(r=2, lora_alpha=8, target_modules=TARGETS)
    save_adapter(
        randomised(Adapter.create(tiny_bundle.expert(EXPERT), config, 0), 7), Folder(root / "lora")
    )
    seller = Identity.create(root / "seller")
    users = [Identity.create(root / f"user_{i}") for i in range(20)]
    terms = AskedTerms(base=base_of_expert(tiny_bundle, EXPERT), name="style", budget_rows=BUDGET)
    offer = open_offer(root / "offer", seller, read_peft(root / "lora"), terms)
    service = Service(
        folder=root / "offer",
        identity=seller.folder,
        host="127.0.0.1",
        port=0,
        clients=tuple(user.certificate for user in users),
        bundle=str(tiny_bundle_path),
        max_rows_per_user=PER_USER,
    )
    contribution = Contribution(service)
    yield Market(str(tiny_bundle_path), service, offer.manifest, contribution, iter(users))
    contribution.close()


@pytest.fixture
def user(market: Market) -> Identity:
    return next(market.users)


@pytest.fixture
def channel(market: Market, user: Identity) -> Iterator[Channel]:
    with market.channel(user) as channel:
        yield channel


@pytest.fixture
def session(market: Market, channel: Channel, user: Identity) -> Session:
    return market.session(channel, user)


def drawing_of(session: Session, **changes: Any) -> dict[str, Any]:
    wanted = {"session": session.sid, "prompts": ["a red cat"], "seed": 0, "audit_rows": ROWS}
    return wanted | changes


def drawer(task: str = "draw") -> psutil.Process | None:
    """Return the process that is drawing right now, for the pictures or for the proofs."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[:1] == [f"ray::AuditWorker.{task}"]:
                return process
    return None


@contextlib.contextmanager
def held_drawing(channel: Channel, fields: dict[str, Any]) -> Iterator[psutil.Process]:
    """Ask for a drawing, and stop the process that makes it until the block is left."""
    with ThreadPoolExecutor(1) as thread:
        asked = thread.submit(channel.request, "draw", fields)
        while (process := drawer()) is None and not asked.done():
            time.sleep(0.01)
        assert process is not None
        process.suspend()
        try:
            answer = asked.result(60)
            assert (answer.kind, dict(answer.fields)) == ("drawing", {"done": 0, "total": 1})
            yield process
        finally:
            with contextlib.suppress(psutil.Error):
                process.resume()


def test_pictures_are_waited_for_and_bound_by_the_signatures(
    market: Market, session: Session, channel: Channel
) -> None:
    before, told = market.rows_left(), []
    prompts = ["a red cat", "a blue dog"]
    drawing = session.draw(prompts, 3, 2 * ROWS, lambda *progress: told.append(progress), **FULL)
    assert drawing.pictures.shape == (2, 32, 32, 3) and told[-1] == (2, 2)
    assert market.rows_left() == before - 2 * ROWS
    wish = {"prompts": prompts, "seed": 3, "audit_rows": 2 * ROWS, "guidance_scale": None} | FULL
    assert drawing.log.drawing == drawing_digest(wish, drawing.pictures)
    closed = session.close()
    for signed in (closed.by_user, closed.by_contributor):
        assert signed.document["drawing"] == drawing.log.drawing
    # Kept, for whoever lost the answer; other requests get nothing any more.
    again = session.draw(prompts, 3, 2 * ROWS, **FULL)
    assert np.array_equal(again.pictures, drawing.pictures) and again.log == drawing.log
    with pytest.raises(ProtocolError, match="paid for other rows or another drawing"):
        session.draw(prompts, 4, 2 * ROWS, **FULL)
    assert market.rows_left() == before - 2 * ROWS
    files = list((market.service.folder / DRAWINGS).iterdir())
    assert f"{session.sid}.safetensors" in {file.name for file in files}


def test_other_pictures_than_the_contributors_are_not_signed(
    session: Session, market: Market
) -> None:
    drawing = session.draw(["a red cat"], 0, ROWS, **FULL)
    pictures = drawing.pictures.copy()
    pictures[0, 0, 0, 0] ^= 1
    request = DrawRequest(**drawing_of(session), **FULL)
    assert request.digest(drawing.pictures) == drawing.log.drawing
    log = drawing.log._replace(drawing=request.digest(pictures))
    session._drawing = replace(drawing, log=log)
    with pytest.raises(ProtocolError, match="differ from the journal"):
        session.close()
    session._drawing = drawing
    assert session.verify().closed.by_user.document["drawing"] == drawing.log.drawing


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"routing": "nonsense"}, "routing='nonsense' is not allowed: use"),
        ({"routing": "top-9"}, "routing='top-9' is not allowed: there are 3 experts"),
        ({"routing": "threshold:nan"}, "routing='threshold:nan' is not allowed"),
        ({"audit_rows": 15}, "audit_rows=15 is not allowed for 1 prompts: .*16"),
        ({"prompts": ["a"] * 3, "audit_rows": 47}, "audit_rows=47 .* for 3 prompts: .*48"),
        ({"prompts": ["a"] * 2, "audit_rows": 32, "seed": 2**63 - 1}, "seed=9223372036854775807"),
    ],
)
def test_what_cannot_be_drawn_is_said_before_it_is_paid(
    market: Market, session: Session, channel: Channel, changes: dict[str, Any], message: str
) -> None:
    before = market.rows_left()
    fields = drawing_of(session, **changes)
    with pytest.raises(ProtocolError, match=message) as refused:
        channel.request("draw", fields)
    assert "internal error" not in str(refused.value)
    with pytest.raises(ProtocolError, match=message):
        session.draw(**{name: value for name, value in fields.items() if name != "session"})
    assert market.rows_left() == before


def test_a_log_that_would_not_fit_into_memory_is_refused() -> None:
    tokens, modules = 256, 56  # of DiT-XL/2
    options = SamplingOptions(
        num_inference_steps=50, guidance_scale=2.0, routing=Routing("full"), router_temperature=1.0
    )
    _check_size(2, options, tokens * modules)
    with pytest.raises(
        ProtocolError, match=r"3 prompts with num_inference_steps=50 .*4300800 rows"
    ):
        _check_size(3, options, tokens * modules)
    with pytest.raises(ProtocolError, match=r"2 prompts .* rows"):  # heun asks twice a step
        _check_size(2, replace(options, solver="heun"), tokens * modules)


def test_a_picture_without_the_adapter_costs_nothing(market: Market, session: Session) -> None:
    """The tiny router begins with expert 1, whatever the picture; one step takes 16 rows."""
    before, step = market.rows_left(), {"num_inference_steps": 1}
    for _ in range(2):
        with pytest.raises(ProtocolError, match="had no part in these pictures, the log has no"):
            session.draw(["a red cat"], 0, ROWS, routing="top-1", **step)
        assert market.rows_left() == before
    with pytest.raises(ProtocolError, match=r"audit_rows=17 is not allowed: .* has 16 rows"):
        session.draw(["a red cat"], 0, 17, routing="full", **step)
    assert market.rows_left() == before
    session.draw(["a red cat"], 0, ROWS, routing="full", **step)
    assert market.rows_left() == before - ROWS
    session.verify()


def test_a_worker_that_dies_while_it_draws(
    market: Market, session: Session, channel: Channel, user: Identity
) -> None:
    """It is not made to draw again by itself; the rows come back, and the session goes on."""
    before = market.rows_left()
    early = SignedDocument.sign("close", {"session": session.sid}, user)
    with held_drawing(channel, drawing_of(session, **SLOW)) as process:
        assert market.rows_left() == before - ROWS
        with market.channel(user) as second:
            with pytest.raises(ProtocolError, match="empty log"):
                second.request("close", {"session": session.sid, "statement": early.to_json()})
            thief = next(market.users)
            with market.channel(thief) as other, pytest.raises(ProtocolError, match="not exist"):
                other.request("draw", drawing_of(session, **SLOW))
        process.kill()
    with pytest.raises(ProtocolError, match="drawing failed, by no fault of yours: ask again"):
        session.draw(["a red cat"], 0, ROWS, **SLOW)
    assert market.rows_left() == before
    session.draw(["a red cat"], 0, ROWS, **FULL)  # by the worker that replaced it
    assert market.rows_left() == before - ROWS
    session.verify()


def test_a_drawing_that_takes_too_long_goes_on(
    market: Market, session: Session, channel: Channel
) -> None:
    told: list[tuple[int, int]] = []
    with (
        held_drawing(channel, drawing_of(session, **SLOW)),
        pytest.raises(ProtocolError, match="no pictures were drawn in 0 s: ask again later"),
    ):
        session.draw(["a red cat"], 0, ROWS, lambda *p: told.append(p), 0.0, **SLOW)
    assert told == [(0, 1)]
    drawing = session.draw(["a red cat"], 0, ROWS, **SLOW)
    assert drawing.log.num_leaves == 1000 * 16 * len(market.manifest.terms)
    assert any("1 pictures drawn" in line for line in market.contribution.news())


def test_other_requests_are_checked_and_refused_while_it_draws(
    market: Market, session: Session, channel: Channel, user: Identity
) -> None:
    slow = drawing_of(session, **SLOW)
    with ThreadPoolExecutor(1) as thread:
        asked = thread.submit(channel.request, "draw", slow)
        while drawer() is None and not asked.done():
            time.sleep(0.01)
        other = next(market.users)
        with (
            market.channel(other) as second,
            pytest.raises(ProtocolError, match="routing='none' is not allowed"),
        ):
            market.session(second, other).draw(["a"], 0, ROWS, routing="none")
        assert not asked.done()
        with (
            market.channel(user) as second,
            pytest.raises(ProtocolError, match="paid for other rows or another drawing"),
        ):
            second.request("draw", slow | {"seed": 1})


def test_proofs_that_failed_are_made_again_when_asked_for(
    market: Market, session: Session, channel: Channel
) -> None:
    session.draw(["a red cat"], 0, ROWS, **SLOW)
    closed = session.close()
    with ThreadPoolExecutor(1) as thread:
        proved = thread.submit(fetch_evidence, channel, market.manifest, closed)
        while (process := drawer("open_rows")) is None and not proved.done():
            time.sleep(0.01)
        assert process is not None
        process.kill()
        with pytest.raises(ProtocolError, match="proving failed, by no fault of yours: ask again"):
            proved.result(60)
    verify_named(fetch_evidence(channel, market.manifest, closed).claims(market.manifest))


def test_a_job_that_fails_says_so_before_it_is_repeated_and_not_for_ever() -> None:
    def fail(count: Callable[[int], None]) -> Message:
        count(1)
        raise BudgetError("none are left")

    for attempt in range(1, MAX_REPEATS + 2):
        job = _Job("proving", 2, fail, attempt)
        job._thread.join()
        assert not job.may_be_repeated
        for _ in range(2):
            with pytest.raises(BudgetError, match="none are left"):
                job.wait(0)
        assert job.may_be_repeated == (attempt <= MAX_REPEATS)
    done = threading.Event()

    def make(count: Callable[[int], None]) -> Message:
        count(1)
        done.wait(60)
        return Message("evidence")

    job = _Job("proving", 2, make)
    while dict((answer := job.wait(0)).fields) != {"done": 1, "total": 2}:
        time.sleep(0.01)
    assert answer.kind == "proving" and not job.was_told
    done.set()
    assert job.wait(60).kind == "evidence" and job.was_told and not job.may_be_repeated


def test_a_user_sees_no_more_than_its_share(market: Market, user: Identity) -> None:
    with market.channel(user) as channel:
        session = market.session(channel, user)
        assert set(session.rows_left.values()) == {PER_USER}
        with pytest.raises(BudgetError, match=f"{PER_USER} rows left, {PER_USER + 1} are asked"):
            session.draw(["a red cat"], 0, PER_USER + 1, num_inference_steps=9, routing="full")
        session.draw(["a red cat"], 0, 140, num_inference_steps=9, routing="full")
        exact = market.session(channel, user, "exact")
        assert set(exact.rows_left.values()) == {PER_USER - 140}
    other = next(market.users)
    with market.channel(other) as channel:
        assert set(market.session(channel, other).rows_left.values()) == {PER_USER}


def test_sessions_are_ended_by_request(market: Market, session: Session, channel: Channel) -> None:
    thief = next(market.users)
    with market.channel(thief) as other, pytest.raises(ProtocolError, match="does not exist"):
        other.request("end", {"session": session.sid})
    for _ in range(2):
        assert channel.request("end", {"session": session.sid}).kind == "ended"
    with pytest.raises(ProtocolError, match=r"is ENDED"):
        session.draw(["a red cat"], 0, ROWS, **FULL)
    news = "\n".join(market.contribution.news())
    assert f"session {session.sid[:8]}" in news and "opened in audit mode" in news


def test_what_cannot_be_served_is_an_error_for_people(
    market: Market, tiny_parts: Path, tmp_path: Path
) -> None:
    taken = replace(market.service, port=market.contribution.address[1])
    with pytest.raises(ConfigError, match="cannot be listened on"):
        Contribution(taken)
    with pytest.raises(ParisError, match="nowhere"):
        Contribution(replace(market.service, bundle=str(tmp_path / "nowhere")))
    with pytest.raises(ConfigError, match="escrow is not allowed: the manifest names none"):
        Contribution(replace(market.service, escrow=("127.0.0.1", 1)))
    with pytest.raises(ConfigError, match="max_rows_per_user=0 is not allowed"):
        replace(market.service, max_rows_per_user=0)


def test_a_gateway_that_died_listens_again_and_knows_its_sessions(
    market: Market, tmp_path: Path, user: Identity
) -> None:
    contribution = market.contribution
    with market.channel(user) as channel:
        session = market.session(channel, user)
        drawing = session.draw(["a red cat"], 0, ROWS, **FULL)
        ray.kill(contribution.gateway, no_restart=False)
        before, deadline = contribution.address, time.monotonic() + 60
        while contribution.address == before and time.monotonic() < deadline:  # another free port
            assert "rows left" in contribution.status()
            time.sleep(0.2)
    with market.channel(user) as channel:
        back = Session(channel, user, market.manifest, "audit", session.nonce_u)
        again = back.draw(["a red cat"], 0, ROWS, **FULL)
        assert np.array_equal(again.pictures, drawing.pictures) and again.log == drawing.log
        back.verify()
