"""Contributor, user and escrow against each other: real parties on one Ray, in one process."""

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import psutil
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from paris_ray.bundle import Bundle, load_bundle
from paris_ray.config import LoRAConfig
from paris_ray.errors import (
    BudgetError,
    ConfigError,
    ParisError,
    ProtocolError,
    ReceiptError,
    SignatureError,
    TradeError,
    VerificationError,
)
from paris_ray.evaluation.denoising import denoising_losses
from paris_ray.folders import Folder
from paris_ray.identity import Identity
from paris_ray.models.lora import Adapter
from paris_ray.models.peft_layout import save_adapter
from paris_ray.receipts import Receipt
from paris_ray.signatures import SignedDocument
from paris_ray.zklora.adapter import PeftAdapter, quantise_adapter, read_peft
from paris_ray.zklora.commitment import ModuleOpening, commit, open_commitments
from paris_ray.zklora.escrow import Escrow, open_journal
from paris_ray.zklora.fixed_point import Int16, QuantisedModule, evaluate
from paris_ray.zklora.inference import adapt
from paris_ray.zklora.journal import Journal
from paris_ray.zklora.language import base_of_model
from paris_ray.zklora.leakage import SEED_BYTES, draw_last_bits
from paris_ray.zklora.ledger import OPENING_BALANCE, SQLiteLedger
from paris_ray.zklora.log import Call, closing_statement
from paris_ray.zklora.manifest import MANIFEST, AdapterManifest, Base
from paris_ray.zklora.offer import AskedTerms, Offer, build_manifest, open_offer
from paris_ray.zklora.parties.buyer import Buyer, Outcome
from paris_ray.zklora.parties.channel import Channel
from paris_ray.zklora.parties.contributor import Contribution, Service
from paris_ray.zklora.parties.escrow import EscrowClient, EscrowService
from paris_ray.zklora.parties.evidence import (
    ClosedSession,
    Evidence,
    fetch_evidence,
    load_evidence,
    save_evidence,
)
from paris_ray.zklora.parties.frames import Message
from paris_ray.zklora.parties.purchase import buy, integers_digest
from paris_ray.zklora.parties.server import Server
from paris_ray.zklora.parties.session import Session
from paris_ray.zklora.parties.user import Trial
from paris_ray.zklora.parties.workers import verify_evidence
from paris_ray.zklora.proof import prove, verify_named
from paris_ray.zklora.sealing import check_opening, seal
from paris_ray.zklora.sequential import Verdict, Wanted
from paris_ray.zklora.sessions import SessionJournal
from paris_ray.zklora.subjects import PictureSubject
from paris_ray.zklora.trade import TradeState, sign_rows
from paris_ray.zklora.transcript import Transcript, new_nonce, proof_context
from serve.app import AppArgs, LoRAOptions, build
from tests.long_tests import chaos

# peft says when it corrects the option for one layer; transformers renames something.
pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is", "ignore:.*is_gradient_check"),
]

EXPERT = 1
BUDGET = 100_000
PRICE = 100
TARGETS = ("attn.in_proj", "attn.out_proj", "layers.0.mlp.0", "layers.0.mlp.2")
LEVELS = (0.3, 0.7)
CAPTIONS = ("a red circle", "a green square")
TOKENS = 16  # rows of each module that one picture takes at one level
SEARCHED = 32  # bytes of a factor that are looked for

WORKING = "proving"  # the kind of an answer that says how far something is

Randomise = Callable[[nn.Module, int], nn.Module]
Tamper = Callable[[Message], Message]


class Crowd:
    """Users; each test asks for new ones, who have no session yet."""

    def __init__(self, folder: Path, number: int) -> None:
        self.all = [Identity.create(folder / f"user_{i}") for i in range(number)]
        self._unused = iter(self.all)

    def one(self) -> Identity:
        return next(self._unused)


@dataclass(frozen=True)
class Market:
    """A contributor whose adapter of an expert is sold through an escrow."""

    bundle: str
    service: Service
    offer: Offer
    contribution: Contribution
    crowd: Crowd
    notary: Identity
    journal: Journal
    escrow: EscrowService

    @property
    def manifest(self) -> AdapterManifest:
        return self.offer.manifest

    def channel(self, user: Identity) -> Channel:
        return channel_to(self.contribution, self.manifest, user)

    def rows_left(self) -> dict[str, int]:
        with SessionJournal(self.service.folder / "sessions.sqlite") as journal:
            return journal.budget.rows_left(self.manifest.adapter_id)

    def subject(self, **changes: Any) -> PictureSubject:
        """Return the expert, and what losses are compared on."""
        pictures = np.random.default_rng(1).integers(0, 256, (2, 32, 32, 3), np.uint8)
        examples = {"pictures": pictures, "captions": CAPTIONS, "noise": LEVELS}
        return PictureSubject(**{"bundle": self.bundle, "expert": EXPERT} | examples | changes)

    def trial(self, user: Identity, output: Path, **changes: Any) -> Trial:
        """Return what a user does who wants all: losses and the weights."""
        wanted: dict[str, Any] = {
            "subject": self.subject(),
            "peer": self.contribution.address,
            "manifest": self.service.folder / MANIFEST,
            "identity": user.folder,
            "output": output,
            "escrow": self.escrow.address,
            "escrow_certificate": self.notary.certificate,
        }
        return Trial(**wanted | changes)

    def balance(self, user: Identity) -> int:
        with EscrowClient(user, self.escrow.address, self.notary.certificate) as client:
            return client.balance()


def channel_to(
    contribution: Contribution, manifest: AdapterManifest, user: Identity, kind: type = Channel
) -> Any:
    return kind(user, contribution.address, manifest.contributor_certificate)


@contextlib.contextmanager
def escrow_service(
    folder: Path, notary: Identity, parties: list[Identity]
) -> Iterator[tuple[Journal, EscrowService]]:
    journal = open_journal(folder / "journal.sqlite")
    escrow = Escrow(journal, notary, SQLiteLedger(journal))
    certificates = [party.certificate for party in parties]
    with EscrowService(escrow, "127.0.0.1", 0, certificates) as service:
        yield journal, service
    journal.close()


def service_of(folder: Path, seller: Identity, crowd: Crowd, **options: Any) -> Service:
    certificates = tuple(user.certificate for user in crowd.all)
    places: dict[str, Any] = {"identity": seller.folder, "host": "127.0.0.1", "port": 0}
    return Service(folder=folder, clients=certificates, **places, **options)


@pytest.fixture(scope="module")
def adapter_path(
    tiny_bundle: Bundle, randomised: Randomise, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of a random adapter of one expert, as `peft` would write it."""
    config = LoRAConfig(r=2, lora_alpha=8, target_modules=TARGETS)
    adapter = randomised(Adapter.create(tiny_bundle.expert(EXPERT), config, 0), 7)
    assert isinstance(adapter, Adapter)
    path = tmp_path_factory.mktemp("style")
    save_adapter(adapter, Folder(path))
    return path


@pytest.fixture(scope="module")
def market(
    ray_session: None,
    tiny_bundle_path: Path,
    adapter_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Market]:
    root = tmp_path_factory.mktemp("market")
    seller, notary = Identity.create(root / "seller"), Identity.create(root / "notary")
    crowd = Crowd(root, 60)
    terms = AskedTerms(
        base=PictureSubject(bundle=str(tiny_bundle_path), expert=EXPERT).base(),
        name="style",
        price=PRICE,
        price_per_row=0,
        budget_rows=BUDGET,
        escrow_certificate=notary.certificate,
    )
    offer = open_offer(root / "offer", seller, read_peft(adapter_path), terms)
    with escrow_service(root, notary, [seller, *crowd.all]) as (journal, escrow):
        service = service_of(root / "offer", seller, crowd, escrow=escrow.address)
        contribution = Contribution(service)
        yield Market(
            str(tiny_bundle_path), service, offer, contribution, crowd, notary, journal, escrow
        )
        contribution.close()


@pytest.fixture
def user(market: Market) -> Identity:
    """A user whom the contributor knows, without a session."""
    return market.crowd.one()


@pytest.fixture
def channel(market: Market, user: Identity) -> Iterator[Channel]:
    with market.channel(user) as channel:
        yield channel


@pytest.fixture
def session(market: Market, channel: Channel, user: Identity) -> Session:
    return Session(channel, user, market.manifest)


def rows_for(manifest: AdapterManifest, module: str, rows: int, seed: int = 0) -> Int16:
    d_in = manifest.module(module).commitment.d_in
    return np.random.default_rng(seed).integers(-3000, 3000, (rows, d_in), np.int16)


def call_all(session: Session, manifest: AdapterManifest, rows: int = 3) -> None:
    """Call every module twice."""
    for seed, name in itertools.product(range(2), manifest.terms):
        session.evaluate(name, rows_for(manifest, name, rows, seed), 9)


def spellings(modules: Mapping[str, QuantisedModule]) -> dict[str, bytes]:
    """Return the first bytes of every factor, in each layout and type that files may have."""
    found = {}
    for name, module in modules.items():
        for factor, exponent in ((module.a, module.exponent_a), (module.b, module.exponent_b)):
            floats = np.ldexp(factor.astype(np.float64), -exponent)
            for layout, values in itertools.product("CF", (factor, floats)):
                for dtype in ("<i2", "<i4", "<i8") if values is factor else ("<f4", "<f8"):
                    spelled = values.astype(dtype).tobytes(order=layout)
                    found[f"{name} {factor.shape} {layout} {dtype}"] = spelled[:SEARCHED]
    return found


def weights_in(folder: Path, offer: Offer) -> set[str]:
    """Return which spellings of the weights are in any file under a folder."""
    modules = {name: opening.module for name, opening in offer.openings().items()}
    contents = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    return {what for what, b in spellings(modules).items() if any(b in c for c in contents)}


# The whole way


@dataclass(frozen=True)
class Purchase:
    """One that was finished without an interruption, and what it cost."""

    user: Identity
    trial: Trial
    outcome: Outcome
    stages: list[tuple[str, int, int]]
    rows: dict[str, int]


@pytest.fixture(scope="module")
def bought(market: Market) -> Purchase:
    user, before = market.crowd.one(), market.rows_left()
    trial = market.trial(user, user.folder / "purchase")
    stages: list[tuple[str, int, int]] = []
    outcome = Buyer(trial, lambda *stage: stages.append(stage)).run()
    after = market.rows_left()
    return Purchase(user, trial, outcome, stages, {k: before[k] - after[k] for k in before})


def test_a_purchase_from_the_manifest_to_the_weights(market: Market, bought: Purchase) -> None:
    receipt, manifest = bought.outcome.receipt, market.manifest
    assert receipt == Receipt.read(Folder(str(bought.trial.output)), bought.user.public_key)
    assert (receipt.state, receipt.adapter_id) == ("OPENED", manifest.adapter_id)
    assert (receipt.price, receipt.escrow) == (PRICE, market.notary.public_key)
    assert receipt.session is not None
    rows = len(LEVELS) * len(CAPTIONS) * TOKENS
    assert bought.rows == dict.fromkeys(manifest.terms, rows)
    found = {
        part.name: ((part.d_in, part.r, part.d_out), part.rows, part.proof_bytes > 0)
        for part in receipt.modules
    }
    assert found == {name: (t.dimensions, rows, True) for name, t in manifest.terms.items()}
    assert all(1 < part.peak_to_rms < 16 for part in receipt.modules)
    assert all(0 < part.input_error < 8e-4 for part in receipt.modules)  # the last bit is drawn
    assert receipt.totals.keys() >= {"seconds", "verify_seconds"}
    assert all(total > 0 for total in receipt.totals.values())
    for stage in ("multi-party inference", "proofs", "verification", "purchase"):
        assert bought.stages[-1][1] == bought.stages[-1][2]
        assert any(stage == name and done == total for name, done, total in bought.stages)


def test_the_price_went_from_the_buyer_to_the_seller(market: Market, bought: Purchase) -> None:
    assert market.balance(bought.user) == OPENING_BALANCE - PRICE
    statement = bought.outcome.receipt.escrow_statement
    assert statement is not None
    signed = SignedDocument.from_json(statement).check("escrow", market.notary.public_key)
    session = bought.outcome.receipt.session
    assert session is not None
    assert (signed["state"], signed["session"]) == ("SETTLED", session.session)
    assert (signed["buyer"], signed["price"]) == (bought.user.public_key, PRICE)


def test_the_bought_integers_are_the_committed_ones(market: Market, bought: Purchase) -> None:
    assert bought.outcome.adapter is not None
    integers = quantise_adapter(read_peft(bought.outcome.adapter))
    committed = {name: opening.module for name, opening in market.offer.openings().items()}
    assert {k: m.digest for k, m in integers.items()} == {k: m.digest for k, m in committed.items()}
    assert integers_digest(integers) == bought.outcome.receipt.integers_sha256
    delivered = check_opening(market.manifest, market.offer.sealed, market.offer.key)
    pairs = {
        name: (
            market.manifest.module(name).commitment,
            ModuleOpening(module, delivered[name].blinders_a, delivered[name].blinders_b),
        )
        for name, module in integers.items()
    }
    open_commitments(pairs)
    a = integers[next(iter(pairs))].a.copy()
    a[0, 0] += 1  # one unit in one entry
    other = replace(integers[next(iter(pairs))], a=a)
    pairs[next(iter(pairs))] = (pairs[next(iter(pairs))][0], replace_module(pairs, other))
    with pytest.raises(VerificationError, match=next(iter(pairs))):
        open_commitments(pairs)


def replace_module(pairs: Mapping[str, tuple[Any, ModuleOpening]], module: QuantisedModule) -> Any:
    opening = next(iter(pairs.values()))[1]
    return ModuleOpening(module, opening.blinders_a, opening.blinders_b)


def test_what_was_tried_is_what_was_bought(market: Market, bought: Purchase) -> None:
    """Losses with the opened weights are those of the trial."""
    bundle, outcome = load_bundle(market.bundle), bought.outcome
    bundle.add_lora("style", str(outcome.adapter), receipt_key=bought.user.public_key)
    latents = bundle.codec.encode(market.subject().pictures)
    text = bundle.encode_text(CAPTIONS)
    served = bundle.expert(EXPERT, lora="style")
    for i in range(len(CAPTIONS)):  # one by one, each with a noise of its own
        picture = latents[i : i + 1], text.rows(slice(i, i + 1)), LEVELS
        losses = denoising_losses(served, *picture, seed=i).numpy()
        np.testing.assert_allclose(outcome.with_adapter[:, i : i + 1], losses, rtol=1e-3)
    assert np.abs(outcome.with_adapter / outcome.without - 1).max() > 0.01


def test_the_bought_adapter_is_served_with_its_receipt_alone(
    market: Market, bought: Purchase
) -> None:
    path = str(bought.outcome.adapter)

    def application(**options: Any) -> Any:
        loras = {"style": LoRAOptions(path=path, **options)}
        return build(AppArgs(bundle=market.bundle, loras=loras))

    assert application(receipt_key=bought.user.public_key) is not None
    with pytest.raises(ReceiptError, match="receipt_key is missing"):
        application()
    with pytest.raises(ReceiptError):
        application(receipt_key=market.notary.public_key)
    with pytest.raises(ReceiptError, match=r"base\.digest=.*expert 0 here"):
        application(receipt_key=bought.user.public_key, expert=0)


def test_a_finished_purchase_is_kept(market: Market, bought: Purchase) -> None:
    before = market.rows_left()
    again = Buyer(bought.trial).run()
    assert again.receipt == bought.outcome.receipt
    assert again.adapter == bought.outcome.adapter
    np.testing.assert_array_equal(again.with_adapter, bought.outcome.with_adapter)
    assert market.balance(bought.user) == OPENING_BALANCE - PRICE
    assert market.rows_left() == before


def test_the_folder_of_another_adapter_is_refused(
    market: Market, bought: Purchase, adapter_path: Path, tmp_path: Path
) -> None:
    terms = AskedTerms(base=market.manifest.base, name="other")
    open_offer(tmp_path, Identity.load(market.service.identity), read_peft(adapter_path), terms)
    trial = replace(bought.trial, manifest=tmp_path / MANIFEST, escrow=None)
    with pytest.raises(ConfigError, match=r"output=.*another adapter, style"):
        Buyer(trial)


def test_another_escrow_than_the_trusted_one_is_refused(
    market: Market, user: Identity, tmp_path: Path
) -> None:
    stranger = market.crowd.one().certificate
    trial = market.trial(user, tmp_path, escrow_certificate=stranger)
    with pytest.raises(ConfigError, match=f"names the escrow {market.notary.public_key}"):
        Buyer(trial)
    with pytest.raises(ConfigError, match="escrow_certificate"):
        Buyer(replace(trial, escrow_certificate=None))


class Interrupted(Exception):
    """The user's process ends here."""


class Impatient:
    """Interrupts at every stage that it has not seen yet."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, bool]] = []

    def __call__(self, stage: str, done: int, total: int) -> None:
        point = stage, done == total
        if point not in self.seen:
            self.seen.append(point)
            raise Interrupted(stage)


@chaos
def test_a_user_who_is_interrupted_everywhere_pays_once(
    market: Market, bought: Purchase, user: Identity
) -> None:
    trial = market.trial(user, user.folder / "purchase")
    before, impatient, outcome = market.rows_left(), Impatient(), None
    while outcome is None:
        assert len(impatient.seen) < 30
        with contextlib.suppress(Interrupted):
            outcome = Buyer(trial, impatient).run()
        if not impatient.seen or impatient.seen[-1][0] != "purchase":
            assert not weights_in(user.folder, market.offer)
    after = market.rows_left()
    stages = {stage for stage, _ in impatient.seen}
    assert stages >= {name for name, _, _ in bought.stages}
    assert {k: before[k] - after[k] for k in before} == bought.rows
    assert market.balance(user) == OPENING_BALANCE - PRICE
    assert outcome.receipt.state == "OPENED"
    assert outcome.receipt.escrow_statement is not None
    assert outcome.receipt.modules == bought.outcome.receipt.modules
    # The search finds weights where there are some: as float32, as PEFT stores them.
    found = weights_in(user.folder, market.offer)
    assert len(found) == 2 * len(market.manifest.modules)
    assert all(what.endswith("F <f4") for what in found)


def test_a_trial_cannot_be_changed_when_it_is_resumed(
    market: Market, user: Identity, tmp_path: Path
) -> None:
    trial = market.trial(user, tmp_path)
    with pytest.raises(Interrupted):
        Buyer(trial, Impatient()).run()
    pictures = market.subject().pictures
    assert pictures is not None
    changed: dict[str, dict[str, Any]] = {
        "pictures": {"subject": market.subject(pictures=pictures[::-1])},
        "captions": {"subject": market.subject(captions=("a dog", "a cat"))},
        "levels": {"subject": market.subject(noise=(0.5,))},
        "threads": {"threads": 2},
    }
    for what, changes in changed.items():
        with pytest.raises(ConfigError, match=f"another {what}"):
            Buyer(replace(trial, **changes)).run()
    assert Buyer(replace(trial, escrow=None)).run().receipt.state == "VERIFIED"


def test_a_base_that_the_adapter_is_not_for_is_refused(
    market: Market, user: Identity, tiny_parts: Path, tmp_path: Path
) -> None:
    """The bundle has its experts in another order; nothing is asked for, nothing is paid."""
    parts = tmp_path / "parts"
    parts.mkdir()
    for part in tiny_parts.iterdir():
        (parts / part.name).symlink_to(part)
    swapped = {"expert_0": "expert_1", "expert_1": "expert_0"}
    for name, source in swapped.items():
        (parts / name).unlink()
        (parts / name).symlink_to(tiny_parts / source)
    bundle = write_parts(parts, tmp_path / "bundle")
    before = market.rows_left()
    trial = market.trial(user, tmp_path / "out", subject=market.subject(bundle=str(bundle)))
    with pytest.raises(ProtocolError, match="base: the adapter is for another expert 1"):
        Buyer(trial).run()
    assert market.rows_left() == before


def write_parts(parts: Path, target: Path) -> Path:
    from paris_ray.artifacts import publish
    from paris_ray.export import write_bundle
    from paris_ray.run import BUNDLE
    from tests.conftest import open_parts  # how a bundle is made of its parts

    write_bundle(open_parts(parts), Folder(target), model_card="# tiny\n")
    publish(Folder(target), BUNDLE, config_digest="", parents={}, facts={})
    return target


def test_a_user_who_asks_for_too_much_can_ask_again(
    market: Market, user: Identity, tmp_path: Path
) -> None:
    """A refused trial returns to its session: few of one user may be open."""
    levels = tuple(np.linspace(0, 1, BUDGET // TOKENS + 1))
    for _ in range(2):
        with pytest.raises(BudgetError, match=f"and {min(market.rows_left().values())} are left"):
            Buyer(market.trial(user, tmp_path, subject=market.subject(noise=levels))).run()
    with pytest.raises(ConfigError, match=r"levels=1\.5 is not allowed"):
        market.subject(noise=(1.5,))
    nonce = (tmp_path / "nonce.json").read_bytes()
    assert Buyer(market.trial(user, tmp_path, escrow=None)).run().receipt.state == "VERIFIED"
    assert (tmp_path / "nonce.json").read_bytes() == nonce


def test_a_trial_without_rows_verifies_nothing(
    market: Market, user: Identity, tmp_path: Path
) -> None:
    seller = Identity.load(market.service.identity)
    left = dict.fromkeys(market.manifest.terms, 0)
    swindler = Swindler(
        market.manifest,
        {},
        seller,
        tamper=lambda a: Message(a.kind, dict(a.fields) | {"rows_left": left}),
    )
    with Server(seller, "127.0.0.1", 0, [user.certificate], swindler) as server:
        trial = market.trial(user, tmp_path, peer=server.address)
        with pytest.raises(BudgetError, match="and 0 are left"):
            Buyer(trial).run()
    assert not (tmp_path / "receipt.json").exists()


# What comes over the wire


class Recorder(Channel):
    """A channel that keeps all answers."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.answers: list[Message] = []

    def request(self, *arguments: Any, **named: Any) -> Message:
        self.answers.append(super().request(*arguments, **named))
        return self.answers[-1]


def test_answers_hold_no_weights(market: Market, user: Identity) -> None:
    manifest = market.manifest
    with channel_to(market.contribution, manifest, user, Recorder) as channel:
        session = Session(channel, user, manifest)
        call_all(session, manifest)
        evidence = session.verify()
    kinds = [answer.kind for answer in channel.answers if answer.kind != WORKING]
    assert kinds == ["opened", *["answer"] * 2 * len(manifest.modules), "closed", "evidence"]
    assert all(
        a.tensors.keys() == {"0.y", "0.seeds"} for a in channel.answers if a.kind == "answer"
    )
    assert channel.answers[-1].tensors.keys() == manifest.terms.keys()
    modules = {name: opening.module for name, opening in market.offer.openings().items()}
    sent = [t.tobytes() for answer in channel.answers for t in answer.tensors.values()]
    assert not [w for w, b in spellings(modules).items() if any(b in part for part in sent)]
    for name, module in modules.items():  # exact integers, those of the committed weights
        x, y = evidence.closed.transcript.rows(name)
        assert np.array_equal(evaluate(module, x), y)
        assert np.array_equal(x, session.transcript.rows(name)[0])


# Evidence that does not fit


class Tampering(Channel):
    """A channel whose other end is as hostile as the test wants."""

    tamper: Tamper

    def request(self, *arguments: Any, **named: Any) -> Message:
        answer = super().request(*arguments, **named)
        return answer if answer.kind == WORKING else self.tamper(answer)


@dataclass(frozen=True)
class Tried:
    """A closed session of a user."""

    user: Identity
    closed: ClosedSession


@pytest.fixture(scope="module")
def tried(market: Market) -> Tried:
    user = market.crowd.one()
    with market.channel(user) as channel:
        session = Session(channel, user, market.manifest)
        call_all(session, market.manifest)
        return Tried(user, session.close())


def calls_of(transcript: Transcript) -> list[Call]:
    return [transcript.call(seq) for seq in range(len(transcript))]


def fetch(market: Market, tried: Tried, tamper: Tamper = lambda answer: answer) -> Evidence:
    with channel_to(market.contribution, market.manifest, tried.user, Tampering) as channel:
        channel.tamper = tamper
        return fetch_evidence(channel, market.manifest, tried.closed)


def check(market: Market, evidence: Evidence) -> None:
    """Verify with Ray and without: both must find the same."""
    faults = []
    for verify in (
        lambda: verify_named(evidence.claims(market.manifest)),
        lambda: verify_evidence(evidence, market.manifest),
    ):
        try:
            verify()
        except ParisError as error:
            faults.append((type(error), str(error)))
    assert len(set(faults)) <= 1 and len(faults) in (0, 2)
    if faults:
        raise VerificationError(faults[0][1])


def test_honest_evidence_is_accepted(market: Market, tried: Tried, tmp_path: Path) -> None:
    progress: list[tuple[int, int]] = []
    evidence = fetch(market, tried)
    check(market, evidence)
    verify_evidence(evidence, market.manifest, lambda *done: progress.append(done))
    assert progress[-1] == (len(TARGETS), len(TARGETS))
    assert set(evidence.closed.transcript.log.rows.values()) == {6}
    evidence.closed.save(tmp_path)
    save_evidence(evidence, tmp_path)
    loaded = load_evidence(ClosedSession.load(tmp_path), tmp_path)
    assert loaded.proofs == evidence.proofs
    check(market, loaded)


def changed(answer: Message, **tensors: Any) -> Message:
    """Return evidence with other tensors; None removes one."""
    new = {**answer.tensors, **tensors}
    return Message(answer.kind, answer.fields, {k: v for k, v in new.items() if v is not None})


FIRST, LAST = "layers.0.attn.in_proj", "layers.9.attn.in_proj"
INCOMPLETE: dict[str, Tamper] = {
    "a missing module": lambda a: changed(a, **{FIRST: None}),
    "no module": lambda a: Message(a.kind),
    "an extra module": lambda a: changed(a, **{LAST: a.tensors[FIRST]}),
    "one for another": lambda a: changed(a, **{FIRST: None, LAST: a.tensors[FIRST]}),
}


@pytest.mark.parametrize("tamper", INCOMPLETE.values(), ids=INCOMPLETE)
def test_evidence_for_other_modules_is_refused(
    market: Market, tried: Tried, tamper: Tamper
) -> None:
    with pytest.raises(VerificationError, match="proofs must be of the 4 modules"):
        fetch(market, tried, tamper)


def test_evidence_without_a_proof_is_refused(market: Market, tried: Tried) -> None:
    for value in (np.zeros(3, np.float32), np.zeros((3, 1), np.uint8)):
        with pytest.raises(ProtocolError, match=f"tensor '{FIRST}' is"):
            fetch(market, tried, lambda a, v=value: changed(a, **{FIRST: v}))
    with pytest.raises(ProtocolError, match="evidence has the fields none"):
        fetch(market, tried, lambda a: Message(a.kind, {"modules": [FIRST]}, a.tensors))
    for size in (0, 3, 2**22):
        with pytest.raises(VerificationError, match=f"^{FIRST}: the proof has {size} bytes"):
            fetch(market, tried, lambda a, n=size: changed(a, **{FIRST: np.zeros(n, np.uint8)}))


def test_a_part_left_out_of_evidence_is_found_before_anything_is_verified(
    market: Market, tried: Tried
) -> None:
    evidence = fetch(market, tried)
    name, *others = evidence.proofs
    calls = calls_of(evidence.closed.transcript)
    first = calls[0]
    longer = Call(0, first.module, 9, np.repeat(first.x, 2, 0), np.repeat(first.y, 2, 0))
    changed = {
        "fewer calls": calls[:-1],
        "fewer rows": [Call(0, first.module, 9, first.x[:-1], first.y[:-1]), *calls[1:]],
        "more rows": [longer, *calls[1:]],
        "other inputs": [Call(0, first.module, 9, first.x[::-1], first.y), *calls[1:]],
        "other outputs": [Call(0, first.module, 9, first.x, first.y + 1), *calls[1:]],
        "another exponent": [Call(0, first.module, 8, first.x, first.y), *calls[1:]],
    }
    unsigned = [
        replace(evidence.closed, transcript=Transcript(calls)) for calls in changed.values()
    ]
    for bad, match in (
        (replace(evidence, proofs={}), "proofs must be"),
        (replace(evidence, proofs={k: evidence.proofs[k] for k in others}), name),
        (replace(evidence, proofs=evidence.proofs | {"extra": b""}), "extra"),
        *((replace(evidence, closed=other), "has signed another log") for other in unsigned),
    ):
        with pytest.raises(VerificationError, match=match):
            check(market, bad)
    without = Transcript(
        Call(seq, c.module, c.exponent, c.x, c.y)
        for seq, c in enumerate(c for c in calls if c.module != name)
    )
    signed = resigned(market, tried.user, replace(evidence.closed, transcript=without))
    with pytest.raises(VerificationError, match=f"rows must be of the 4 modules.*{name}"):
        check(market, replace(evidence, closed=signed))


def test_proofs_of_something_else_are_refused(market: Market, tried: Tried) -> None:
    """Of another module, session, root, nonce or rows; and one bad proof names its module."""
    evidence = fetch(market, tried)
    with market.channel(tried.user) as channel:
        again = Session(channel, tried.user, market.manifest)
        call_all(again, market.manifest)  # the very same questions
        other = fetch_evidence(channel, market.manifest, again.close())
    check(market, other)
    first, second, *_ = names = list(evidence.proofs)
    everything = ".*".join(map(str, names))
    proofs, closed = evidence.proofs, evidence.closed
    another_root = resigned(market, tried.user, closed, root="0" * 64)
    signed = "has signed another log"
    for bad, blamed in (
        (replace(evidence, proofs=other.proofs), everything),
        (replace(evidence, closed=replace(closed, nonce_v=new_nonce())), everything),
        (replace(evidence, closed=replace(closed, sid=other.closed.sid)), signed),
        (
            replace(evidence, closed=replace(closed, by_contributor=other.closed.by_contributor)),
            signed,
        ),
        (replace(evidence, closed=other.closed), everything),
        (replace(evidence, closed=another_root), signed),
        (replace(evidence, proofs=proofs | {first: other.proofs[first]}), f"of {first} does"),
        (replace(evidence, proofs=proofs | {second: proofs[second][:-1]}), f"^{second}: "),
        (replace(evidence, proofs=proofs | {second: b""}), f"^{second}: "),
        (replace(evidence, proofs=proofs | {second: proofs[first]}), second),
    ):
        with pytest.raises(VerificationError, match=blamed):
            check(market, bad)
    # Other rows that both have signed: what every proof is bound to differs.
    calls = [
        Call(c.seq, c.module, c.exponent, c.x, c.y + (c.module == second))
        for c in calls_of(closed.transcript)
    ]
    lie = resigned(market, tried.user, replace(closed, transcript=Transcript(calls)))
    with pytest.raises(VerificationError, match=everything):
        check(market, replace(evidence, closed=lie))


@pytest.mark.parametrize(
    "progress",
    [{}, {"done": "1"}, {"done": True}, {"done": -1}, {"done": 5}, {"done": 0.5}],
    ids=str,
)
def test_progress_that_is_no_progress_is_refused(
    market: Market, tried: Tried, progress: dict[str, Any]
) -> None:
    with pytest.raises(ProtocolError, match="done="):
        fetch(market, tried, lambda answer: Message("proving", progress))


def test_the_nonce_of_a_session_is_fixed_by_its_first_use(market: Market, tried: Tried) -> None:
    fetch(market, tried)
    changed = replace(tried, closed=replace(tried.closed, nonce_v=new_nonce()))
    with pytest.raises(ProtocolError, match="is CHALLENGED, not CLOSED"):
        fetch(market, changed)
    check(market, fetch(market, tried))


# Sessions


def test_a_module_that_was_never_called_stays_unproved(
    market: Market, session: Session, user: Identity
) -> None:
    with pytest.raises(VerificationError, match="in_proj: no row was computed"):
        session.close()
    *most, last = market.manifest.terms
    for name in most:
        session.evaluate(name, rows_for(market.manifest, name, 1), 0)
    with pytest.raises(VerificationError, match=f"{last}: no row was computed"):
        session.close()
    # The contributor would close it; the evidence of such a session is refused as well.
    session.evaluate(last, rows_for(market.manifest, last, 1), 0)
    evidence = session.verify()
    rows = {k: v for k, v in evidence.closed.transcript.log.rows.items() if k != last}
    partial = resigned(market, user, evidence.closed, rows=rows)
    with pytest.raises(VerificationError, match="the contributor has signed another log"):
        replace(evidence, closed=partial).claims(market.manifest)


def resigned(
    market: Market, user: Identity, closed: ClosedSession, **changes: Any
) -> ClosedSession:
    """Return a session whose parties have both signed its transcript, or something else."""
    adapter_id, log = market.manifest.adapter_id, closed.transcript.log
    statement = closing_statement(closed.sid, adapter_id, log) | changes
    seller = Identity.load(market.service.identity)
    both = [SignedDocument.sign("close", statement, party) for party in (user, seller)]
    return replace(closed, by_user=both[0], by_contributor=both[1])


def test_a_session_goes_on_over_a_new_connection(
    market: Market, session: Session, channel: Channel
) -> None:
    manifest, before = market.manifest, market.rows_left()
    for i, name in enumerate(manifest.terms):
        x = rows_for(manifest, name, 2)
        first = session.evaluate(name, x, 3)
        channel.close()
        call = {"session": session.sid, "seq": i, "modules": [name], "exponent": 3, "owed": None}
        for _ in range(2):  # the answer was lost: asked again, paid once
            assert np.array_equal(channel.request("call", call, {"x": x}).tensors["0.y"], first)
    channel.close()
    session.verify()
    after = market.rows_left()
    assert {name: before[name] - after[name] for name in before} == dict.fromkeys(before, 2)


def test_the_same_nonce_returns_to_the_same_session(
    market: Market, session: Session, channel: Channel, user: Identity
) -> None:
    again = Session(channel, user, market.manifest, session.nonce_u)
    assert (again.sid, again.nonce_c) == (session.sid, session.nonce_c)
    assert Session(channel, user, market.manifest).sid != session.sid
    stranger = market.crowd.one()
    with market.channel(stranger) as other:  # a nonce is not a secret: it gives nobody a session
        theirs = Session(other, stranger, market.manifest, session.nonce_u)
    assert theirs.sid != session.sid


def test_a_gap_is_refused_and_other_bytes_end_the_session(
    market: Market, session: Session, channel: Channel
) -> None:
    name = next(iter(market.manifest.terms))
    x = rows_for(market.manifest, name, 2)

    def call(seq: int, x: Int16 = x, exponent: int = 3, module: str = name) -> Any:
        fields = {"session": session.sid, "seq": seq, "modules": [module], "exponent": exponent}
        return channel.request("call", fields | {"owed": None}, {"x": x}).tensors["0.y"]

    for seq in (1, 7, -1, 2**31):
        with pytest.raises(ProtocolError, match=f"seq={seq} is not allowed"):
            call(seq)
    call(0)
    with pytest.raises(ProtocolError, match="seq=2 is not allowed: the next call is 1"):
        call(2)
    call(1)
    with pytest.raises(ProtocolError, match="call 0 was sent again with other content"):
        call(0, exponent=4)
    for seq in (0, 1, 2):
        with pytest.raises(ProtocolError, match="is ENDED"):
            call(seq)
    with pytest.raises(ProtocolError):
        channel.request("prove", {"session": session.sid, "nonce_v": new_nonce()})


def test_another_users_session_does_not_exist(
    market: Market, session: Session, channel: Channel, user: Identity
) -> None:
    call_all(session, market.manifest, 1)
    name = next(iter(market.manifest.terms))
    thief = market.crowd.one()
    statement = closing_statement(session.sid, market.manifest.adapter_id, session.transcript.log)
    mine = {"session": session.sid}
    by_thief = SignedDocument.sign("close", statement, thief).to_json()
    by_user = SignedDocument.sign("close", statement, user).to_json()
    call = {"seq": len(session.transcript), "modules": [name], "exponent": 0, "owed": None}
    with market.channel(thief) as other:
        for kind, fields, tensors in (
            ("call", mine | call, {"x": rows_for(market.manifest, name, 1)}),
            ("close", mine | {"statement": by_thief}, {}),
            ("close", mine | {"statement": by_user}, {}),
            ("prove", mine | {"nonce_v": new_nonce()}, {}),
            ("release", mine, {}),
            ("end", mine, {}),
        ):
            with pytest.raises(ProtocolError, match="does not exist for user"):
                other.request(kind, fields, tensors)
    session.verify()  # untouched


def test_a_session_ends_where_the_parties_disagree(
    market: Market, session: Session, channel: Channel, user: Identity
) -> None:
    """A user who claims other rows than were answered gets no signature, and no proof."""
    call_all(session, market.manifest, 1)
    adapter_id, mine = market.manifest.adapter_id, {"session": session.sid}
    honest = closing_statement(session.sid, adapter_id, session.transcript.log)
    shorter = Transcript(calls_of(session.transcript)[:-1])
    for wrong in (
        closing_statement(session.sid, adapter_id, shorter.log),
        honest | {"root": "0" * 64},
        honest | {"calls": honest["calls"] + 1},
        honest | {"adapter_id": "0" * 64},
        {k: v for k, v in honest.items() if k != "rows"},
    ):
        signed = SignedDocument.sign("close", wrong, user).to_json()
        with pytest.raises(ProtocolError, match="differs from the journal"):
            channel.request("close", mine | {"statement": signed})
    for malformed in ({}, {"kind": "close"}, SignedDocument.sign("other", honest, user).to_json()):
        with pytest.raises(ParisError):
            channel.request("close", mine | {"statement": malformed})
    with pytest.raises(ProtocolError, match="is OPEN, not CLOSED"):
        channel.request("prove", mine | {"nonce_v": new_nonce()})
    with pytest.raises(TradeError, match="nothing is for sale"):
        channel.request("release", mine)
    session.verify()


DIGEST = "0" * 64
OPEN = {"adapter_id": DIGEST, "nonce_u": DIGEST}
CALL = {"session": DIGEST, "seq": 0, "modules": ["a"], "exponent": 0, "owed": None}
MALFORMED: dict[str, tuple[str, dict[str, Any], str]] = {
    "another adapter": ("open", OPEN, "adapter_id=0"),
    "a list for a nonce": ("open", OPEN | {"nonce_u": [DIGEST]}, "nonce_u of open"),
    "an extra field": ("open", OPEN | {"admin": True}, "open has the fields adapter_id, nonce_u"),
    "nothing": ("open", {}, "open has the fields adapter_id, nonce_u"),
    "no session": ("call", CALL, "the adapter has none|does not exist"),
    "a number for a session": ("call", CALL | {"session": 7}, "session of call must be"),
    "a text for a number": ("call", CALL | {"seq": "0"}, "seq of call must be"),
    "a fraction": ("call", CALL | {"seq": 0.5}, "seq of call must be"),
    "a truth value": ("call", CALL | {"seq": True}, "seq of call must be"),
    "a number of 400 digits": ("call", CALL | {"seq": 10**400}, "seq of call must be"),
    "a huge exponent": ("call", CALL | {"exponent": 2**70}, "exponent of call must be"),
    "a missing module": (
        "call",
        {k: v for k, v in CALL.items() if k != "modules"},
        "call has the fields",
    ),
    "a text for modules": ("call", CALL | {"modules": "a"}, "modules of call must be"),
    "no modules": ("call", CALL | {"modules": []}, "modules must be the names"),
    "a list for a module": ("call", CALL | {"modules": [["a"]]}, "modules must be the names"),
    "a module like SQL": (
        "call",
        CALL | {"modules": ["a'; DROP TABLE budgets; --"]},
        "the adapter has none",
    ),
    "a list for a statement": (
        "close",
        {"session": DIGEST, "statement": []},
        "a signed document has the fields",
    ),
    "a session of 63 digits": ("end", {"session": DIGEST[1:]}, "session='0*' is not 32 bytes"),
    "a deep statement": (
        "close",
        {"session": DIGEST, "statement": {"a": {"b": [{}] * 99}}},
        "document",
    ),
    "a bad nonce": (
        "prove",
        {"session": DIGEST, "nonce_v": "x" * 64},
        "nonce_v=.* is not 32 bytes",
    ),
    "an unknown request": ("shutdown", {}, "there is no request 'shutdown'"),
    "a private method": ("_prove_all", {}, "there is no request '_prove_all'"),
    "an empty kind": ("", {}, "there is no request ''"),
    "a long kind": ("x" * 5000, {}, "there is no request 'xxx"),
}


@pytest.mark.parametrize(("kind", "fields", "match"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_requests_are_refused(
    market: Market, tried: Tried, kind: str, fields: dict[str, Any], match: str
) -> None:
    tensors = {"x": np.zeros((1, 32), np.int16)} if kind == "call" else {}
    with market.channel(tried.user) as channel, pytest.raises(ParisError, match=match) as refused:
        channel.request(kind, fields, tensors)
    assert len(str(refused.value)) < 2100


@pytest.mark.parametrize("nonce", ["00", DIGEST + "\n", "X" * 64])
def test_a_nonce_that_is_none_is_refused(market: Market, channel: Channel, nonce: str) -> None:
    fields = {"adapter_id": market.manifest.adapter_id, "nonce_u": nonce}
    with pytest.raises(ProtocolError, match=r"nonce_u=.* is not 32 bytes"):
        channel.request("open", fields)


def test_rows_of_another_shape_or_type_are_refused(
    market: Market, session: Session, channel: Channel
) -> None:
    name, d_in = "layers.0.attn.in_proj", 32
    call = {"session": session.sid, "seq": 0, "modules": [name], "exponent": 0, "owed": None}
    before = market.rows_left()
    for tensors in (
        {},
        {"x": np.zeros((2, d_in + 1), np.int16)},
        {"x": np.zeros((2, d_in), np.int64)},
        {"x": np.zeros((2, d_in), np.float32)},
        {"x": np.zeros(d_in, np.int16)},
        {"x": np.zeros((0, d_in), np.int16)},
        {"x": np.zeros((2, 2, d_in), np.int16)},
        {"x": np.array(1, np.int16)},
        {"x": np.zeros((4097, d_in), np.int16)},
        {"x": np.zeros((100_000, d_in), np.int16)},
        {"y": np.zeros((2, d_in), np.int16)},
        {"x": np.zeros((2, d_in), np.int16), "y": np.zeros((2, d_in), np.int16)},
    ):
        with pytest.raises(ParisError) as refused:
            channel.request("call", call, tensors)
        assert "internal error" not in str(refused.value)
    few = {"x": np.zeros((2, d_in), np.int16)}
    with pytest.raises(ProtocolError, match="modules of one request must differ"):
        channel.request("call", call | {"modules": [name, name]}, few)
    with pytest.raises(ProtocolError, match="has not inputs of 32 columns"):
        channel.request("call", call | {"modules": [name, "layers.0.mlp.2"]}, few)
    with pytest.raises(ProtocolError, match="the adapter has none"):
        channel.request(
            "call", call | {"modules": [name, "no"]}, {"x": np.zeros((2, d_in), np.int16)}
        )
    assert market.rows_left() == before
    lowest = np.full((1, d_in), -(2**15), np.int16)  # int16's own extremes are fine
    assert session.evaluate(name, lowest, 0).shape == (1, 96)


# Who may connect


def test_strangers_and_impostors_are_refused(
    market: Market, user: Identity, tmp_path: Path
) -> None:
    stranger, impostor = Identity.create(tmp_path / "s"), Identity.create(tmp_path / "i")
    address, pinned = market.contribution.address, market.manifest.contributor_certificate
    with Channel(stranger, address, pinned, attempts=1) as channel, pytest.raises(ProtocolError):
        Session(channel, stranger, market.manifest)
    with (
        Channel(user, address, impostor.certificate) as channel,
        pytest.raises(ProtocolError, match="is not the pinned server"),
    ):
        channel.request("k")
    with Server(
        impostor, "127.0.0.1", 0, [user.certificate], lambda caller, message: message
    ) as fake:
        trial = market.trial(user, tmp_path / "out", peer=fake.address)
        with pytest.raises(ProtocolError, match="is not the pinned server"):
            Buyer(trial).run()


def test_an_offer_that_cannot_be_served_is_an_error_for_people(market: Market) -> None:
    taken = replace(market.service, port=market.contribution.address[1], escrow=None)
    with pytest.raises(ConfigError, match="cannot be listened on"):
        Contribution(taken)


# Contributors who cheat


class Swindler:
    """A contributor without Ray who answers and proves with what it likes.

    Args:
        manifest: What the user pinned.
        openings: What it answers and proves with.
        identity: Its own.
        released: What it does when the price is locked.
        tamper: Applied to each of its answers.
    """

    def __init__(
        self,
        manifest: AdapterManifest,
        openings: Mapping[str, ModuleOpening],
        identity: Identity,
        released: Callable[[str], object] = lambda sid: None,
        tamper: Tamper = lambda answer: answer,
    ) -> None:
        self.manifest, self.openings, self.identity = manifest, openings, identity
        self.released, self.tamper = released, tamper
        self.transcript, self.nonce_c = Transcript(), new_nonce()
        self.root = ""

    def __call__(self, caller: str, request: Message) -> Message:
        return self.tamper(getattr(self, request.kind)(request))

    def open(self, request: Message) -> Message:
        left = dict.fromkeys(self.manifest.terms, BUDGET)
        return Message("opened", {"nonce_c": self.nonce_c, "rows_left": left})

    def call(self, request: Message) -> Message:
        fields, asked = request.fields, request.tensors["x"]
        seeds = np.zeros((len(asked), SEED_BYTES), np.uint8)
        x = draw_last_bits(asked, seeds)
        tensors = {}
        for i, name in enumerate(fields["modules"]):
            y = evaluate(self.openings[name].module, x)
            self.transcript.append(Call(fields["seq"] + i, name, fields["exponent"], x, y))
            tensors |= {f"{i}.y": y, f"{i}.seeds": seeds}
        return Message("answer", tensors=tensors)

    def close(self, request: Message) -> Message:
        sid = request.fields["session"]
        log = self.transcript.log
        self.root = log.root
        statement = closing_statement(sid, self.manifest.adapter_id, log)
        signed = SignedDocument.sign("close", statement, self.identity)
        return Message("closed", {"statement": signed.to_json()})

    def prove(self, request: Message) -> Message:
        fields, proofs = request.fields, {}
        for name in self.manifest.terms:
            names = (self.manifest.adapter_id, fields["session"], self.root, name)
            context = proof_context(*names, fields["nonce_v"])
            proof = prove(self.openings[name], *self.transcript.rows(name), context)
            proofs[name] = np.frombuffer(proof, np.uint8)
        return Message("evidence", {}, proofs)

    def release(self, request: Message) -> Message:
        self.released(request.fields["session"])
        return Message("released", {})


NAMES = ("first", "second", "third")


def random_openings(seed: int, d_in: int = 12, d_out: int = 10) -> dict[str, ModuleOpening]:
    rng = np.random.default_rng(seed)

    def module() -> QuantisedModule:
        a = rng.integers(-(2**15) + 1, 2**15, (d_in, 2), np.int16)
        return QuantisedModule(a, rng.integers(-999, 999, (2, d_out), np.int16), 12, 12)

    return {name: commit(module())[1] for name in NAMES}


@dataclass(frozen=True)
class Stall:
    """A seller with integers, before it decides how honest it is."""

    seller: Identity
    buyer: Identity
    notary: Identity
    openings: dict[str, ModuleOpening]
    sealed: bytes
    key: bytes
    manifest: AdapterManifest

    @contextlib.contextmanager
    def session(self, swindler: Swindler) -> Iterator[tuple[Channel, Session]]:
        """Call every module of a contributor who may cheat."""
        with Server(self.seller, "127.0.0.1", 0, [self.buyer.certificate], swindler) as server:
            certificate = self.seller.certificate
            with Channel(self.buyer, server.address, certificate, timeout=20) as channel:
                session = Session(channel, self.buyer, self.manifest)
                call_all(session, self.manifest)
                yield channel, session


def make_stall(
    root: Path, *, price: int = PRICE, delivered: Mapping[str, ModuleOpening] | None = None
) -> Stall:
    """Return a stall whose envelope holds the committed weights, or others."""
    seller, buyer, notary = (Identity.create(root / name) for name in ("seller", "buyer", "notary"))
    openings = random_openings(0)
    sealed, key = seal(delivered or openings)
    manifest = build_manifest(
        openings,
        LoRAConfig(r=2, lora_alpha=4),
        base=Base(digest="c" * 64, expert=None, router_digest=None),
        adapter="stall",
        price=price,
        budget_rows=BUDGET,
        sealed=sealed,
        key=key,
        contributor_certificate=seller.certificate,
        escrow_certificate=notary.certificate,
    )
    return Stall(seller, buyer, notary, openings, sealed, key, manifest)


@pytest.fixture
def stall(tmp_path: Path) -> Stall:
    return make_stall(tmp_path)


def test_a_contributor_without_ray_can_be_honest(stall: Stall) -> None:
    with stall.session(Swindler(stall.manifest, stall.openings, stall.seller)) as (_, session):
        assert session.verify().proofs.keys() == set(NAMES)


def test_other_weights_than_the_committed_ones_are_found(stall: Stall) -> None:
    """The very same numbers under other blinders are others too: only the committed can prove."""
    module = stall.openings["second"].module
    a = module.a.copy()
    a[3, 1] += 1
    almost = commit(replace(module, a=a))[1]
    unblinded = commit(module)[1]
    stolen = ModuleOpening(almost.module, *blinders(stall.openings["second"]))
    for wrong in (random_openings(1)["second"], almost, unblinded, stolen):
        openings = stall.openings | {"second": wrong}
        with (
            stall.session(Swindler(stall.manifest, openings, stall.seller)) as (_, session),
            pytest.raises(VerificationError, match="the proof of second does not hold"),
        ):
            session.verify()
    everything = random_openings(1)
    with (
        stall.session(Swindler(stall.manifest, everything, stall.seller)) as (_, session),
        pytest.raises(VerificationError, match="first, second, third"),
    ):
        session.verify()


def blinders(opening: ModuleOpening) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return opening.blinders_a, opening.blinders_b


def test_a_proof_of_one_module_for_another_is_found(stall: Stall) -> None:
    def swap(answer: Message) -> Message:
        if answer.kind != "evidence":
            return answer
        proofs = answer.tensors
        swapped = {"first": proofs["second"], "second": proofs["first"]}
        return Message(answer.kind, {}, {**proofs, **swapped})

    swindler = Swindler(stall.manifest, stall.openings, stall.seller, tamper=swap)
    with (
        stall.session(swindler) as (_, session),
        pytest.raises(VerificationError, match="of first, second does not hold"),
    ):
        session.verify()


def test_a_contributor_who_signs_another_log_is_refused(stall: Stall) -> None:
    thief = Identity.create(stall.seller.folder.parent / "thief")

    def sign(signer: Identity, **changes: Any) -> Tamper:
        def tamper(answer: Message) -> Message:
            if answer.kind != "closed":
                return answer
            statement = dict(answer.fields["statement"]["document"]) | changes
            signed = SignedDocument.sign("close", statement, signer).to_json()
            return Message("closed", {"statement": signed})

        return tamper

    seller = stall.seller
    for tamper in (
        sign(seller, root="0" * 64),
        sign(seller, rows={}),
        sign(seller, session="0" * 64),
        sign(thief),
        lambda answer: Message(answer.kind) if answer.kind == "closed" else answer,
    ):
        swindler = Swindler(stall.manifest, stall.openings, seller, tamper=tamper)
        with stall.session(swindler) as (_, session), pytest.raises(ParisError):
            session.close()


def test_answers_of_another_shape_are_refused(stall: Stall) -> None:
    for y in (
        np.zeros((3, 11), np.int64),
        np.zeros((2, 10), np.int64),
        np.zeros((3, 10), np.int16),
        np.zeros(30, np.int64),
        np.array(0, np.int64),
    ):
        seeds = np.zeros((3, SEED_BYTES), np.uint8)
        good = {"y": np.zeros((3, 10), np.int64), "seeds": seeds}
        for tensors in ({"y": y, "seeds": seeds}, good | {"z": y}, good | {"seeds": seeds[:2]}):
            tamper = (  # noqa: E731
                lambda a, t=tensors: Message(a.kind, {}, t) if a.kind == "answer" else a
            )
            swindler = Swindler(stall.manifest, stall.openings, stall.seller, tamper=tamper)
            with pytest.raises(ProtocolError, match="answer: tensor"), stall.session(swindler):
                pass


def test_an_opening_that_is_none_is_refused(stall: Stall) -> None:
    for fields in (
        {},
        {"nonce_c": 5, "rows_left": {}},
        {"nonce_c": "0" * 63, "rows_left": {}},
        {"nonce_c": "0" * 64, "rows_left": []},
        {"nonce_c": "0" * 64, "rows_left": {"first": "9"}},
        {"nonce_c": "0" * 64, "rows_left": {"fourth": 9}},
    ):
        tamper = lambda a, f=fields: Message("opened", f) if a.kind == "opened" else a  # noqa: E731
        swindler = Swindler(stall.manifest, stall.openings, stall.seller, tamper=tamper)
        with pytest.raises((ProtocolError, VerificationError)), stall.session(swindler):
            pass


# Trades that end without weights


@contextlib.contextmanager
def trade(
    stall: Stall, root: Path, release: Callable[[EscrowClient, str], object]
) -> Iterator[tuple[EscrowClient, Channel, Evidence]]:
    """List the adapter, and verify a session with a seller who releases as it likes."""
    parties = [stall.seller, stall.buyer]
    with escrow_service(root, stall.notary, parties) as (_, escrow):
        seller, buyer = (
            EscrowClient(party, escrow.address, stall.notary.certificate) for party in parties
        )
        swindler = Swindler(
            stall.manifest, stall.openings, stall.seller, lambda sid: release(seller, sid)
        )
        with seller, buyer, stall.session(swindler) as (channel, session):
            seller.list_adapter(stall.manifest.sign(stall.seller), stall.sealed)
            yield buyer, channel, session.verify()


def test_a_trade_with_an_honest_seller(stall: Stall, tmp_path: Path) -> None:
    with trade(stall, tmp_path, lambda escrow, sid: escrow.deposit_key(sid, stall.key)) as (
        buyer,
        channel,
        evidence,
    ):
        assert buy(buyer, channel, stall.manifest, evidence) == (stall.sealed, stall.key)
        assert buy(buyer, channel, stall.manifest, evidence) == (stall.sealed, stall.key)
        assert buyer.balance() == OPENING_BALANCE - PRICE


def test_a_price_that_the_buyer_cannot_pay(tmp_path: Path) -> None:
    stall = make_stall(tmp_path, price=OPENING_BALANCE + 1)
    with trade(stall, tmp_path, lambda escrow, sid: escrow.deposit_key(sid, stall.key)) as (
        buyer,
        channel,
        evidence,
    ):
        with pytest.raises(TradeError, match="the balance is 1000"):
            buy(buyer, channel, stall.manifest, evidence)
        assert buyer.trade(evidence.closed.sid).state is TradeState.COMMITTED
        assert buyer.balance() == OPENING_BALANCE
        with pytest.raises(TradeError):
            buyer.key(evidence.closed.sid)


def test_a_seller_who_keeps_the_key_gets_nothing(
    stall: Stall, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paris_ray.zklora.escrow.DEADLINES", {TradeState.PAID: 1.0})
    with trade(stall, tmp_path, lambda escrow, sid: None) as (
        buyer,
        channel,
        evidence,
    ):
        with pytest.raises(TradeError, match="is REFUNDED: 1 s in PAID"):
            buy(buyer, channel, stall.manifest, evidence)
        with pytest.raises(TradeError, match=r"is in REFUNDED \(1 s in PAID\)"):
            buy(buyer, channel, stall.manifest, evidence)  # asking again changes nothing
        assert buyer.balance() == OPENING_BALANCE
        with pytest.raises(TradeError):
            buyer.key(evidence.closed.sid)


def test_a_seller_whose_envelope_holds_other_weights_gets_nothing(tmp_path: Path) -> None:
    """All proofs hold, only the delivery does not: the escrow finds it before it pays."""
    committed = random_openings(0)
    stall = make_stall(tmp_path, delivered=random_openings(1))
    assert stall.openings["first"].module.digest == committed["first"].module.digest
    with trade(stall, tmp_path, lambda escrow, sid: escrow.deposit_key(sid, stall.key)) as (
        buyer,
        channel,
        evidence,
    ):
        with pytest.raises(TradeError, match=r"REFUNDED: the opening check failed: .* first, sec"):
            buy(buyer, channel, stall.manifest, evidence)
        assert buyer.balance() == OPENING_BALANCE


def test_a_buyer_does_not_take_what_does_not_open(
    market: Market, user: Identity, tmp_path: Path
) -> None:
    """The escrow's copy of the envelope is damaged after the swap, while the buyer is away."""
    trial = market.trial(user, user.folder / "purchase")
    impatient = Impatient()
    while ("purchase", False) not in impatient.seen:
        with pytest.raises(Interrupted):
            Buyer(trial, impatient).run()
    buyer = Buyer(trial, stop_at("purchase", 1))
    with pytest.raises(Interrupted):
        buyer.run()
    assert market.balance(user) == OPENING_BALANCE - PRICE
    damaged = bytearray(market.offer.sealed)
    damaged[50] ^= 1
    statement = "UPDATE pieces SET content = ? WHERE adapter_id = ?"
    market.journal.execute(statement, bytes(damaged), market.manifest.adapter_id)
    try:
        with pytest.raises(VerificationError, match="sealed weights"):
            Buyer(trial).run()
        receipt = Receipt.read(Folder(str(trial.output)), user.public_key)
        assert receipt.state == "RELEASED"
        assert not weights_in(user.folder, market.offer)
    finally:
        market.journal.execute(statement, market.offer.sealed, market.manifest.adapter_id)
    assert Buyer(trial).run().receipt.state == "OPENED"


def stop_at(stage: str, done: int) -> Callable[[str, int, int], None]:
    def show(shown: str, number: int, total: int) -> None:
        if (shown, number) == (stage, done):
            raise Interrupted(stage)

    return show


@pytest.fixture
def dear_market(market: Market, adapter_path: Path, tmp_path: Path) -> Iterator[Market]:
    """The same adapter, with rows that cost 2 credits each."""
    seller = Identity.load(market.service.identity)
    terms = AskedTerms(
        base=market.manifest.base,
        name="dear",
        price=PRICE,
        price_per_row=2,
        budget_rows=BUDGET,
        escrow_certificate=market.notary.certificate,
    )
    offer = open_offer(tmp_path / "offer", seller, read_peft(adapter_path), terms)
    service = service_of(tmp_path / "offer", seller, market.crowd, escrow=market.escrow.address)
    contribution = Contribution(service)
    yield replace(market, service=service, offer=offer, contribution=contribution)
    contribution.close()


def test_rows_are_paid_for_before_they_are_answered(dear_market: Market, user: Identity) -> None:
    manifest, name = dear_market.manifest, next(iter(dear_market.manifest.terms))
    notary = dear_market.notary.certificate
    with (
        dear_market.channel(user) as channel,
        EscrowClient(user, dear_market.escrow.address, notary) as escrow,
    ):
        session = Session(channel, user, manifest)
        with pytest.raises(TradeError, match="has no trade"):
            session.evaluate(name, rows_for(manifest, name, 1), 0)
        session = Session(channel, user, manifest)
        session.deposit(escrow, 5)
        assert escrow.balance() == OPENING_BALANCE - 10
        for module in manifest.terms:  # a row of every module costs once
            session.evaluate(module, rows_for(manifest, module, 3), 0)
        assert escrow.trade(session.sid).rows == 3
        x = rows_for(manifest, name, 2)
        call = {
            "session": session.sid,
            "seq": len(manifest.terms),
            "modules": [name],
            "exponent": 0,
            "owed": None,
        }
        stranger = sign_rows(dear_market.crowd.one(), manifest.adapter_id, session.sid, 5)
        too_few = sign_rows(user, manifest.adapter_id, session.sid, 4)
        for owed in (None, too_few.to_json()):
            with pytest.raises(TradeError, match="5 rows must be signed for, 3 are"):
                channel.request("call", call | {"owed": owed}, {"x": x})
        with pytest.raises(SignatureError):
            channel.request("call", call | {"owed": stranger.to_json()}, {"x": x})
        left = dear_market.rows_left()
        with pytest.raises(TradeError, match="6 rows are signed for, the deposit covers 5"):
            session.evaluate(name, rows_for(manifest, name, 3), 0)
        assert dear_market.rows_left() == left
        session.evaluate(name, x, 0)
        # Asked again after a lost answer, it costs nothing more; nor after the actor was replaced.
        channel.request("call", call, {"x": x})
        assert escrow.trade(session.sid).owed == 10


def test_a_dear_adapter_is_tried_and_bought(
    dear_market: Market, user: Identity, tmp_path: Path
) -> None:
    outcome = Buyer(dear_market.trial(user, tmp_path / "purchase")).run()
    assert outcome.receipt.state == "OPENED"
    rows = len(LEVELS) * len(CAPTIONS) * TOKENS
    statement = outcome.receipt.escrow_statement
    assert statement is not None and statement["document"]["rows"] == rows
    paid = max(PRICE, 2 * rows)
    assert dear_market.balance(user) == OPENING_BALANCE - paid
    news = "".join(dear_market.contribution.news())
    assert f"{2 * rows} credits for them" in news


def test_an_adapter_that_is_not_worth_it_is_not_bought(
    dear_market: Market, user: Identity, tmp_path: Path
) -> None:
    """A random adapter lowers no loss to a hundredth: that is clear after two pictures."""
    wanted = Wanted(min_gain=0.99)
    trial = dear_market.trial(user, tmp_path / "purchase", wanted=wanted)
    outcome = Buyer(trial).run()
    assert outcome.verdict is Verdict.NOT_WORTH and outcome.adapter is None
    assert outcome.receipt.state == "VERIFIED"
    assert dear_market.balance(user) == OPENING_BALANCE - 2 * len(LEVELS) * len(CAPTIONS) * TOKENS


def test_a_refunded_purchase_says_so_in_its_receipt(
    market: Market, user: Identity, tmp_path: Path
) -> None:
    """The contributor's key opens nothing, so the escrow refunds."""
    trial = market.trial(user, tmp_path)
    with pytest.raises(Interrupted):
        Buyer(trial, stop_at("purchase", 0)).run()
    damaged = bytearray(market.offer.sealed)
    damaged[50] ^= 1
    statement = "UPDATE pieces SET content = ? WHERE adapter_id = ?"
    market.journal.execute(statement, bytes(damaged), market.manifest.adapter_id)
    try:
        with pytest.raises(TradeError, match="REFUNDED"):
            Buyer(trial).run()
    finally:
        market.journal.execute(statement, market.offer.sealed, market.manifest.adapter_id)
    assert market.balance(user) == OPENING_BALANCE
    assert Receipt.read(Folder(str(tmp_path)), user.public_key).state == "REFUNDED"


def test_nothing_is_paid_for_an_adapter_that_does_not_verify(
    market: Market, user: Identity, tmp_path: Path
) -> None:
    """The manifest is the market's; who answers has its key and identity, and other weights."""
    wrong = market.offer.openings()
    broken = next(name for name in wrong if name.endswith("out_proj"))
    a = wrong[broken].module.a.copy()
    a[0] += 1
    wrong[broken] = commit(replace(wrong[broken].module, a=a))[1]
    seller = Identity.load(market.service.identity)
    swindler = Swindler(market.manifest, wrong, seller)
    with Server(seller, "127.0.0.1", 0, [user.certificate], swindler) as server:
        trial = market.trial(user, tmp_path, peer=server.address)
        for _ in range(2):
            with pytest.raises(VerificationError, match=f"of {broken} does not hold"):
                Buyer(trial).run()
    assert Receipt.read(Folder(str(tmp_path)), user.public_key).state == "PROVED"
    assert market.balance(user) == OPENING_BALANCE
    assert not (tmp_path / "adapter").exists()


# A language model, a small budget, and a contributor that is started again


@dataclass(frozen=True)
class Model:
    """A language model, and the LoRA of it that somebody has."""

    base: GPT2LMHeadModel
    adapted: nn.Module
    folder: Path
    digest: Base


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=20, n_positions=8, n_embd=16, n_layer=2, n_head=2)
    folder = tmp_path_factory.mktemp("gpt2")
    base = GPT2LMHeadModel(config).eval()
    base.save_pretrained(folder / "base")
    lora = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["c_attn", "c_fc"], init_lora_weights=False
    )
    adapted = peft.get_peft_model(GPT2LMHeadModel.from_pretrained(folder / "base"), lora).eval()
    adapted.save_pretrained(folder / "lora")
    digest = base_of_model(folder / "base")
    return Model(base, adapted, folder / "lora", digest)


def test_the_life_of_a_budget(  # noqa: PLR0915
    ray_session: None, language_model: Model, tmp_path: Path
) -> None:
    """Parallel users share it, a restart keeps it, and what was paid for can be proved after it."""
    seller, crowd, budget = Identity.create(tmp_path / "seller"), Crowd(tmp_path, 6), 40
    terms = AskedTerms(base=language_model.digest, name="gpt2", budget_rows=budget)
    adapter = read_peft(language_model.folder)
    offer = open_offer(tmp_path / "offer", seller, adapter, terms)
    manifest, service = offer.manifest, service_of(tmp_path / "offer", seller, crowd)
    contribution = Contribution(service)
    alice, bob, *others = crowd.all
    tokens = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    with channel_to(contribution, manifest, alice) as channel:
        session = Session(channel, alice, manifest)
        assert session.rows_left == dict.fromkeys(manifest.terms, budget)
        view = adapt(language_model.base, manifest.terms, manifest.scale, session.evaluate)
        with torch.no_grad():
            tried, expected = view(tokens).logits, language_model.adapted(tokens).logits
            plain = language_model.base(tokens).logits
        assert (tried - expected).norm() < 2e-3 * (expected - plain).norm()
        closed = session.close()
    left = budget - tokens.numel()
    name = next(iter(manifest.terms))
    with channel_to(contribution, manifest, bob) as channel:
        session = Session(channel, bob, manifest)
        with pytest.raises(BudgetError, match=f"{left} rows left, {left + 1} are asked for"):
            session.evaluate(name, rows_for(manifest, name, left + 1), 0)
        assert session.evaluate(name, rows_for(manifest, name, 1), 0).shape[0] == 1  # still call 0
        assert Session(channel, bob, manifest).rows_left[name] == left - 1
    left -= 1

    def exhaust(user: Identity) -> int:
        """Return how many rows a user could get, by pairs, of one module."""
        answered = 0
        with channel_to(contribution, manifest, user) as channel:
            session = Session(channel, user, manifest)
            barrier.wait()
            for seed in itertools.count():
                try:
                    answered += len(session.evaluate(name, rows_for(manifest, name, 2, seed), 0))
                except BudgetError:
                    return answered
        raise AssertionError

    barrier = threading.Barrier(len(others))
    with ThreadPoolExecutor(len(others)) as threads:
        answered = list(threads.map(exhaust, others))
    assert sum(answered) == left // 2 * 2
    assert left % 2 == 1

    contribution.close()
    contribution = Contribution(service)
    with channel_to(contribution, manifest, bob) as channel:
        session = Session(channel, bob, manifest)
        assert session.rows_left[name] == 1
        with pytest.raises(BudgetError, match="1 rows left"):
            session.evaluate(name, rows_for(manifest, name, 2), 0)
    with channel_to(contribution, manifest, alice) as channel:  # closed before, proved after
        evidence = fetch_evidence(channel, manifest, closed)
        verify_named(evidence.claims(manifest))
        assert set(evidence.closed.transcript.log.rows.values()) == {tokens.numel()}
    assert "rows left: 1" in contribution.status()
    contribution.close()


def prover() -> psutil.Process | None:
    """Return a process of this test run that is proving right now."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[:1] == ["ray::prove_modules"]:
                return process
    return None


def test_a_killed_prover_is_replaced(ray_session: None, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    factors = {
        f"layers.{i}.proj": (
            rng.standard_normal((512, 8)).astype(np.float32),
            rng.standard_normal((8, 512)).astype(np.float32),
        )
        for i in range(12)
    }
    config = LoRAConfig(r=8, lora_alpha=8, target_modules=tuple(factors))
    seller, crowd = Identity.create(tmp_path / "seller"), Crowd(tmp_path, 1)
    terms = AskedTerms(
        base=Base(digest="c" * 64, expert=None, router_digest=None), name="wide", budget_rows=1000
    )
    manifest = open_offer(tmp_path / "offer", seller, PeftAdapter(config, factors), terms).manifest
    contribution = Contribution(service_of(tmp_path / "offer", seller, crowd))
    (user,) = crowd.all
    with channel_to(contribution, manifest, user) as channel:
        session = Session(channel, user, manifest)
        for name in manifest.terms:
            session.evaluate(name, rows_for(manifest, name, 64), 0)
        closed = session.close()
        with ThreadPoolExecutor(1) as thread:
            proved = thread.submit(fetch_evidence, channel, manifest, closed)
            while (victim := prover()) is None and not proved.done():
                time.sleep(0.01)
            assert victim is not None
            victim.kill()
            evidence = proved.result(120)
    verify_named(evidence.claims(manifest))
    contribution.close()
