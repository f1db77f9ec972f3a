"""Receipts of bought adapters: their format, and what a bundle makes of them."""

import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import nn

from paris_ray.artifacts import file_sha256, publish, sha256_hex
from paris_ray.bundle import Bundle, load_bundle
from paris_ray.config import LoRAConfig
from paris_ray.config.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from paris_ray.errors import BundleError, ReceiptError
from paris_ray.folders import Folder
from paris_ray.models.lora import Adapter
from paris_ray.models.peft_layout import LORA, save_adapter
from paris_ray.receipts import (
    ADAPTER_ID,
    KIND,
    OPENED_NEEDS,
    RECEIPT,
    BaseFacts,
    ModuleFacts,
    Receipt,
    SessionFacts,
    State,
)
from paris_ray.run import EXPERT_WEIGHTS, ROUTER_WEIGHTS
from paris_ray.signatures import SignedDocument

EXPERT = 1


class Key:
    """A signer whose key is known to the test."""

    def __init__(self, seed: int) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(bytes([seed]) * 32)

    @property
    def public_key(self) -> str:
        return self._key.public_key().public_bytes_raw().hex()

    def sign(self, message: bytes) -> bytes:
        return self._key.sign(message)


BUYER, ESCROW, STRANGER = Key(1), Key(2), Key(3)
ADAPTER = "a" * 64
MODULE = ModuleFacts(
    name="layers.0.attn.in_proj",
    d_in=16,
    r=4,
    d_out=48,
    rows=8,
    proof_bytes=1234,
    peak_to_rms=5.5,
    input_error=1.5e-4,
)
OPENED = Receipt(
    protocol="zklora/1",
    adapter_id=ADAPTER,
    adapter="Ink, a style",
    base=BaseFacts(digest="b" * 64, expert=EXPERT, router_digest="c" * 64),
    state=State.OPENED,
    session=SessionFacts(session="d" * 64, transcript_root="e" * 64),
    weights_sha256="f" * 64,
    config_sha256="7" * 64,
    integers_sha256="0" * 64,
    price=100,
    contributor="1" * 64,
    escrow=ESCROW.public_key,
    escrow_statement=SignedDocument.sign("trade", {"state": "OPENED"}, ESCROW).to_json(),
    modules=(MODULE, replace(MODULE, name="layers.0.attn.out_proj", d_out=16)),
    totals={"seconds": 1.5, "bytes": 4096},
    created="2026-01-31T12:00:00+00:00",
)
NO_EXPERT = replace(OPENED.base, expert=None, router_digest=None)
NOT_YET = dict.fromkeys((*OPENED_NEEDS, "escrow", "escrow_statement")) | {"base": NO_EXPERT}
NOTHING: dict[str, Any] = {"state": State.COMMITTED, "modules": (), "totals": {}}
COMMITTED = replace(OPENED, **(NOT_YET | NOTHING))


def document() -> dict[str, Any]:
    """Return the document of the receipt, to change and sign anew."""
    signed = copy.deepcopy(OPENED.sign(BUYER))
    return {name: signed[name] for name in signed if name not in ("public_key", "signature")}


def write(folder: Path, fields: dict[str, Any]) -> Folder:
    Folder(folder).write_json(RECEIPT, fields)
    return Folder(folder)


def sign(kind: str, changed: dict[str, Any]) -> dict[str, Any]:
    """Return a statement of the buyer as a receipt's file has it, whatever it says."""
    signed = SignedDocument.sign(kind, changed, BUYER)
    return {**changed, "public_key": signed.public_key, "signature": signed.signature}


def read(folder: Path, changed: dict[str, Any]) -> Receipt:
    return Receipt.read(write(folder, sign(KIND, changed)), BUYER.public_key)


@pytest.mark.parametrize("receipt", [OPENED, COMMITTED], ids=lambda receipt: receipt.state)
def test_what_is_signed_is_read(receipt: Receipt, tmp_path: Path) -> None:
    folder = write(tmp_path, receipt.sign(BUYER))
    assert Receipt.read(folder, BUYER.public_key) == receipt


def test_the_documents_fields() -> None:
    found = document()
    assert found.keys() == {
        *("protocol", "adapter_id", "adapter", "base", "state", "session", "weights_sha256"),
        *("config_sha256", "integers_sha256", "price", "contributor", "escrow"),
        *("escrow_statement", "modules", "totals", "created"),
    }
    assert found["base"] == {"digest": "b" * 64, "expert": EXPERT, "router_digest": "c" * 64}
    assert found["modules"][0].keys() == {field.name for field in fields(ModuleFacts)}


def places(found: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Give each mapping of a receipt whose fields are fixed, and what errors call it."""
    yield "", found
    yield r"base\.", found["base"]
    yield r"modules\.1\.", found["modules"][1]
    yield r"session\.", found["session"]


def test_missing_and_unknown_fields_are_named(tmp_path: Path) -> None:
    for place, (prefix, mapping) in enumerate(places(document())):
        for name in mapping:
            changed = document()
            del list(places(changed))[place][1][name]
            with pytest.raises(
                ReceiptError, match=rf"^{tmp_path}/{RECEIPT}: field '{prefix}{name}' is mi"
            ):
                read(tmp_path, changed)
        changed = document()
        list(places(changed))[place][1]["more"] = 1
        with pytest.raises(ReceiptError, match=rf"{RECEIPT}: field '{prefix}more' is unknown"):
            read(tmp_path, changed)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("protocol", ""),
        ("adapter_id", "a" * 63),
        ("adapter_id", "A" * 64),
        ("adapter_id", "a" * 64 + "\n"),
        ("adapter_id", None),
        ("adapter", "x" * 513),
        ("adapter", "\x1b[2J"),
        ("adapter", 3),
        ("base", None),
        ("base", ["b" * 64]),
        ("state", "opened"),
        ("state", None),
        ("state", ["OPENED"]),
        ("session", []),
        ("session", "d" * 64),
        ("weights_sha256", "g" * 64),
        ("config_sha256", 0),
        ("integers_sha256", ""),
        ("price", -1),
        ("price", 1.0),
        ("price", True),
        ("contributor", None),
        ("escrow", "2" * 62),
        ("escrow_statement", []),
        ("modules", {}),
        ("modules", [asdict(MODULE)] * 4097),
        ("totals", {"seconds": -1}),
        ("totals", {"seconds": "1"}),
        ("totals", {"": 1}),
        ("totals", []),
        ("created", "yesterday"),
        ("created", "2026-01-31T12:00:00"),  # whose noon?
        ("created", 0),
    ],
    ids=lambda value: str(value)[:20],
)
def test_values_that_are_not_allowed_are_named(tmp_path: Path, name: str, value: object) -> None:
    with pytest.raises(ReceiptError, match=rf"^{tmp_path}/{RECEIPT}: {name}\S*=.* is not all"):
        read(tmp_path, document() | {name: value})


@pytest.mark.parametrize(
    ("place", "name", "value"),
    [
        (1, "digest", "b"),
        (1, "expert", -1),
        (1, "expert", "1"),
        (1, "expert", False),
        (1, "router_digest", 0),
        (2, "name", ""),
        (2, "d_in", 0),
        (2, "r", 1.5),
        (2, "d_out", None),
        (2, "rows", -1),
        (2, "proof_bytes", True),
        (2, "peak_to_rms", -0.1),
        (2, "input_error", "0"),
        (2, "input_error", None),
    ],
)
def test_inner_values_that_are_not_allowed_are_named(
    tmp_path: Path, place: int, name: str, value: object
) -> None:
    changed = document()
    prefix, mapping = list(places(changed))[place]
    mapping[name] = value
    with pytest.raises(ReceiptError, match=rf"{RECEIPT}: {prefix}{name}=.* is not allowed: "):
        read(tmp_path, changed)


def test_modules_are_mappings_with_names_of_their_own(tmp_path: Path) -> None:
    changed = document()
    changed["modules"][1]["name"] = MODULE.name
    with pytest.raises(ReceiptError, match=rf"modules: '{MODULE.name}' is there twice"):
        read(tmp_path, changed)
    with pytest.raises(ReceiptError, match=r"modules\.0=3 is not allowed"):
        read(tmp_path, document() | {"modules": [3]})


def test_what_may_not_be_read_is_not_signed() -> None:
    for changes in ({"state": "DONE"}, {"totals": {"seconds": float("nan")}}, {"escrow": None}):
        with pytest.raises(ReceiptError, match=f"^{RECEIPT}: "):
            replace(OPENED, **changes).sign(BUYER)


def test_an_escrows_statement_is_its_own(tmp_path: Path) -> None:
    forged = SignedDocument.sign("trade", {"state": "OPENED"}, STRANGER).to_json()
    changed = OPENED.escrow_statement | {"document": {"state": "REFUNDED"}}
    for statement, reason in (
        (forged, f"is signed by {STRANGER.public_key}, not by {ESCROW.public_key}"),
        (changed, "the signature of the trade is not one of"),
        ({"kind": "trade"}, "a signed document has the fields"),
    ):
        with pytest.raises(ReceiptError, match=rf"escrow_statement: .*{reason}"):
            read(tmp_path, document() | {"escrow_statement": statement})


def test_only_the_pinned_key_is_believed(tmp_path: Path) -> None:
    folder = write(tmp_path, OPENED.sign(STRANGER))
    with pytest.raises(ReceiptError, match=rf"by {STRANGER.public_key}, not by {BUYER.public_key}"):
        Receipt.read(folder, BUYER.public_key)
    claimed = rf"receipt_key={STRANGER.public_key}: set that only if the key is your own"
    with pytest.raises(ReceiptError, match=claimed):
        Receipt.read(folder, None)


def test_another_kind_of_statement_is_no_receipt(tmp_path: Path) -> None:
    folder = write(tmp_path, sign("close", document()))
    with pytest.raises(ReceiptError, match=r"the signature of the receipt is not one of"):
        Receipt.read(folder, BUYER.public_key)


def test_a_changed_byte_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, OPENED.sign(BUYER))
    payload, generator, refused = folder.read(RECEIPT), random.Random(0), 0
    for _ in range(300):
        changed = bytearray(payload)
        changed[generator.randrange(len(payload))] ^= 1 << generator.randrange(8)
        folder.write(RECEIPT, bytes(changed))
        try:
            # A signature in capitals is the same, as is other white space.
            assert Receipt.read(folder, BUYER.public_key) == OPENED
        except ReceiptError:
            refused += 1
    assert refused > 250


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"[]",
        b"{}",
        b"\xff",
        b"[" * 100_000,
        b'{"kind":"receipt","document":{"a":NaN},"public_key":"","signature":""}',
        b'{"kind":"receipt","document":{"a":1e999},"public_key":"","signature":""}',
        b'{"kind":"receipt","document":[],"public_key":"","signature":""}',
        b'{"kind":"receipt","document":{},"public_key":"zz","signature":"\\ud800"}',
    ],
    ids=lambda payload: repr(payload[:60]),
)
@pytest.mark.parametrize("key", [None, BUYER.public_key], ids=["no key", "key"])
def test_what_is_no_receipt_is_refused(tmp_path: Path, payload: bytes, key: str | None) -> None:
    (tmp_path / RECEIPT).write_bytes(payload)
    with pytest.raises(ReceiptError, match=rf"^{tmp_path}/{RECEIPT} is not a receipt of yours"):
        Receipt.read(Folder(tmp_path), key)


def test_a_missing_receipt_is_named(tmp_path: Path) -> None:
    with pytest.raises(ReceiptError, match=rf"{tmp_path}/{RECEIPT} does not exist"):
        Receipt.read(Folder(tmp_path), BUYER.public_key)


def test_only_opened_is_opened() -> None:
    OPENED.require_opened()
    for state in set(State) - {State.OPENED}:
        with pytest.raises(ReceiptError, match=f"state='{state}' is not allowed here: 'OPENED' is"):
            replace(OPENED, state=state).require_opened()
    for name in OPENED_NEEDS:
        value = () if name == "modules" else None
        with pytest.raises(ReceiptError, match=f"{name}=.* does not go with state=OPENED"):
            replace(OPENED, **{name: value}).require_opened()


# In a bundle.

Buy = Callable[..., tuple[Path, Receipt]]


@pytest.fixture(scope="session")
def adapter(tiny_bundle: Bundle, randomised: Callable[[nn.Module, int], nn.Module]) -> nn.Module:
    return randomised(Adapter.create(tiny_bundle.expert(EXPERT), LoRAConfig(r=2), 0), 7)


@pytest.fixture
def bundle(tiny_bundle_path: Path) -> Bundle:
    return load_bundle(str(tiny_bundle_path))


def mark(path: Path, adapter_id: str) -> None:
    """Write the identity of a bought adapter into its weights."""
    weights = safetensors.torch.load_file(path / ADAPTER_WEIGHTS)
    metadata = {"format": "pt", ADAPTER_ID: adapter_id}
    safetensors.torch.save_file(weights, path / ADAPTER_WEIGHTS, metadata=metadata)


@pytest.fixture
def buy(adapter: Adapter, tiny_bundle_path: Path, tmp_path: Path) -> Buy:
    """A function that leaves what a purchase leaves: a folder, and its receipt."""

    def make(signer: Key = BUYER, **changes: Any) -> tuple[Path, Receipt]:
        path = tmp_path / "bought"
        save_adapter(adapter, Folder(path))
        mark(path, ADAPTER)
        base = (tiny_bundle_path / f"expert_{EXPERT}" / EXPERT_WEIGHTS).read_bytes()
        facts = {
            "weights_sha256": sha256_hex((path / ADAPTER_WEIGHTS).read_bytes()),
            "config_sha256": sha256_hex((path / ADAPTER_CONFIG).read_bytes()),
        }
        own = {"digest": sha256_hex(base)} | (changes.pop("base", {}))
        receipt = replace(OPENED, base=replace(OPENED.base, **own), **(facts | changes))
        write(path, receipt.sign(signer))
        return path, receipt

    return make


def add(bundle: Bundle, path: Path, **options: Any) -> None:
    bundle.add_lora("bought", str(path), **({"receipt_key": BUYER.public_key} | options))


@pytest.mark.parametrize("expert", [None, EXPERT])
@pytest.mark.parametrize("published", [False, True])
def test_an_opened_adapter_is_taken(
    bundle: Bundle, buy: Buy, expert: int | None, published: bool
) -> None:
    path, _ = buy()
    if published:
        publish(Folder(path), LORA, config_digest="", parents={}, facts={"expert": EXPERT})
    add(bundle, path, expert=expert)
    assert bundle.loras == {"bought": EXPERT}


@pytest.mark.parametrize("number", [0, 2, 7, None])
def test_its_expert_is_known_by_its_weights(bundle: Bundle, buy: Buy, number: int | None) -> None:
    """Its number may have changed when another expert left the bundle."""
    path, _ = buy(base={"expert": number})
    add(bundle, path)
    assert bundle.loras == {"bought": EXPERT}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        *(({"state": state}, f"state='{state}'") for state in State if state != State.OPENED),
        ({"weights_sha256": "9" * 64}, "weights_sha256='9{64}', but the weights: '"),
        ({"config_sha256": "9" * 64}, "config_sha256='9{64}', but the configuration: '"),
        ({"weights_sha256": None}, "weights_sha256=None does not go with state=OPENED"),
        ({"adapter_id": "9" * 64}, "adapter_id='9{64}', but the weights' metadata: 'a{64}'"),
        ({"base": {"digest": "9" * 64}}, "base.digest='9{64}', but expert 1 here: '"),
        ({"signer": STRANGER}, f"is signed by {STRANGER.public_key}, not by {BUYER.public_key}"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_other_receipts_are_refused(
    bundle: Bundle, buy: Buy, changes: dict[str, Any], reason: str
) -> None:
    path, _ = buy(**changes)
    with pytest.raises(ReceiptError, match=rf"^{path}/{RECEIPT}.*{reason}"):
        add(bundle, path, expert=EXPERT)
    assert bundle.loras == {}


def test_without_a_key_the_option_is_named(bundle: Bundle, buy: Buy) -> None:
    path, _ = buy()
    with pytest.raises(ReceiptError, match=rf"receipt_key={BUYER.public_key}: set that only if"):
        add(bundle, path, receipt_key=None)
    assert bundle.loras == {}


@pytest.mark.parametrize("key", [None, BUYER.public_key], ids=["no key", "key"])
def test_marked_weights_need_their_receipt(bundle: Bundle, buy: Buy, key: str | None) -> None:
    path, _ = buy()
    (path / RECEIPT).unlink()
    with pytest.raises(ReceiptError, match=rf"does not exist, but {ADAPTER_ID}={ADAPTER} means"):
        add(bundle, path, expert=EXPERT, receipt_key=key)


def test_a_key_needs_a_receipt(bundle: Bundle, adapter: Adapter, tmp_path: Path) -> None:
    save_adapter(adapter, Folder(tmp_path))
    with pytest.raises(ReceiptError, match=rf"not exist, but receipt_key={BUYER.public_key} means"):
        add(bundle, tmp_path, expert=EXPERT)
    add(bundle, tmp_path, expert=EXPERT, receipt_key=None)
    assert bundle.loras == {"bought": EXPERT}


def test_a_receipt_does_not_cover_unmarked_weights(
    bundle: Bundle, buy: Buy, adapter: Adapter
) -> None:
    path, receipt = buy()
    save_adapter(adapter, Folder(path))
    digest = file_sha256(Folder(path), ADAPTER_WEIGHTS)
    write(path, replace(receipt, weights_sha256=digest).sign(BUYER))
    with pytest.raises(ReceiptError, match=r"adapter_id=.*, but the weights' metadata: None"):
        add(bundle, path)


def test_swapped_weights_are_refused(bundle: Bundle, buy: Buy) -> None:
    path, _ = buy()
    weights = safetensors.torch.load_file(path / ADAPTER_WEIGHTS)
    next(iter(weights.values()))[0, 0] += 1
    safetensors.torch.save_file(weights, path / ADAPTER_WEIGHTS)
    mark(path, ADAPTER)
    with pytest.raises(ReceiptError, match=r"weights_sha256="):
        add(bundle, path)


def test_the_receipts_expert_must_exist(bundle: Bundle, buy: Buy) -> None:
    path, _ = buy(base={"expert": 7, "digest": "9" * 64})
    with pytest.raises(BundleError, match=r"expert=7 is not allowed"):
        add(bundle, path)


def test_digests_of_weights_with_and_without_a_manifest(
    tiny_bundle: Bundle, release_bundle: Bundle, tiny_bundle_path: Path, release_path: Path
) -> None:
    for bundle, path in ((tiny_bundle, tiny_bundle_path), (release_bundle, release_path)):
        for part, name in ((f"expert_{EXPERT}", EXPERT_WEIGHTS), ("router", ROUTER_WEIGHTS)):
            assert bundle.weights_digest(part) == sha256_hex((path / part / name).read_bytes())


def test_a_base_without_a_manifest_is_hashed(
    release_path: Path,
    release_bundle: Bundle,
    randomised: Callable[[nn.Module, int], nn.Module],
    tmp_path: Path,
) -> None:
    created = Adapter.create(release_bundle.expert(EXPERT), LoRAConfig(r=2), 0)
    save_adapter(randomised(created, 7), Folder(tmp_path))
    mark(tmp_path, ADAPTER)
    base = (release_path / f"expert_{EXPERT}" / EXPERT_WEIGHTS).read_bytes()
    receipt = replace(
        OPENED,
        base=replace(OPENED.base, digest=sha256_hex(base)),
        weights_sha256=file_sha256(Folder(tmp_path), ADAPTER_WEIGHTS),
        config_sha256=file_sha256(Folder(tmp_path), ADAPTER_CONFIG),
    )
    bundle = load_bundle(str(release_path))
    other = replace(receipt, base=replace(receipt.base, digest="9" * 64))
    write(tmp_path, other.sign(BUYER))
    with pytest.raises(ReceiptError, match=r"base\.digest="):
        add(bundle, tmp_path)
    write(tmp_path, receipt.sign(BUYER))
    add(bundle, tmp_path)
    assert bundle.loras == {"bought": EXPERT}
