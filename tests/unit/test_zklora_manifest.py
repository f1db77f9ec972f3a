"""Who a party is, what it offers and how that is sealed; and documents by hostile parties."""

import json
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from paris_ray.artifacts import canonical_json, sha256_hex
from paris_ray.config import LoRAConfig
from paris_ray.errors import (
    ArtifactError,
    ParisError,
    ProtocolError,
    SignatureError,
    VerificationError,
)
from paris_ray.identity import CERTIFICATE, KEY, MAX_CERTIFICATE, Identity, public_key_of
from paris_ray.receipts import MAX_MODULES
from paris_ray.signatures import SignedDocument, verify_signature
from paris_ray.zklora import sealing
from paris_ray.zklora.commitment import ModuleOpening, commit, open_commitments
from paris_ray.zklora.field import ORDER
from paris_ray.zklora.fixed_point import quantise
from paris_ray.zklora.listings import PIECE_BYTES
from paris_ray.zklora.manifest import MAX_BYTES, MAX_POINTS, AdapterManifest, Base
from paris_ray.zklora.offer import build_manifest
from paris_ray.zklora.parties.escrow import LIMITS
from paris_ray.zklora.sealing import NONCE, seal, unseal

Openings = dict[str, ModuleOpening]
Change = Callable[[dict[str, Any]], object]

DIGEST = "0f" * 32


@pytest.fixture(scope="module")
def identity(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    return Identity.create(tmp_path_factory.mktemp("contributor"))


@pytest.fixture(scope="module")
def openings() -> Openings:
    random = np.random.default_rng(0)
    sizes = {"layers.0.attn": (6, 4), "layers.1.attn": (5, 3)}
    return {
        name: commit(quantise(random.normal(size=(d_in, 2)), random.normal(size=(2, d_out))))[1]
        for name, (d_in, d_out) in sizes.items()
    }


@pytest.fixture(scope="module")
def sealed(openings: Openings) -> tuple[bytes, bytes]:
    return seal(openings)


@pytest.fixture(scope="module")
def manifest(
    identity: Identity, openings: Openings, sealed: tuple[bytes, bytes]
) -> AdapterManifest:
    return build_manifest(
        openings,
        LoRAConfig(r=2, lora_alpha=3),
        base=Base(digest=DIGEST, expert=1, router_digest=DIGEST),
        adapter="pixel-art",
        price=7,
        sealed=sealed[0],
        key=sealed[1],
        contributor_certificate=identity.certificate,
        budget_rows=9,
    )


# Identities.


def test_an_identity_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "party"
    created = Identity.load_or_create(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / KEY).stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in folder.iterdir()) == [CERTIFICATE, KEY]
    for again in (Identity.load(folder), Identity.load_or_create(folder)):
        assert again.public_key == created.public_key
        assert again.certificate == created.certificate == (folder / CERTIFICATE).read_text()
    assert public_key_of(created.certificate) == created.public_key
    verify_signature(created.public_key, b"a message", created.sign(b"a message").hex(), "message")
    with pytest.raises(SignatureError):
        verify_signature(created.public_key, b"another", created.sign(b"a message").hex(), "it")


def test_the_certificate_says_no_more_than_the_key(identity: Identity) -> None:
    certificate = x509.load_pem_x509_certificate(identity.certificate.encode())
    name = certificate.subject.rfc4514_string()
    assert name == certificate.issuer.rfc4514_string() == f"CN=paris_ray {identity.public_key[:16]}"
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical and not constraints.value.ca
    years = (certificate.not_valid_after_utc - datetime.now(UTC)) / timedelta(days=365.25)
    assert 9.9 < years < 10


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    Identity.create(tmp_path)
    before = (tmp_path / KEY).read_bytes(), (tmp_path / CERTIFICATE).read_bytes()
    with pytest.raises(ArtifactError, match=rf"{KEY} exists"):
        Identity.create(tmp_path)
    assert before == ((tmp_path / KEY).read_bytes(), (tmp_path / CERTIFICATE).read_bytes())


def test_parties_that_start_at_once_get_one_identity(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: Identity.load_or_create(tmp_path), range(16)))
    assert len({one.public_key for one in found}) == 1
    assert len({one.certificate for one in found}) == 1


def test_what_a_crash_left_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / f"{KEY}.tmp").write_text("half a key")
    (tmp_path / CERTIFICATE).write_text("of a key that was never written")
    created = Identity.load_or_create(tmp_path)
    assert Identity.load(tmp_path).certificate == created.certificate


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o777])
def test_a_key_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    Identity.create(tmp_path)
    (tmp_path / KEY).chmod(mode)
    with pytest.raises(ArtifactError, match=rf"{KEY} has mode 0{mode:o}, allowed: 0600"):
        Identity.load(tmp_path)


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777])
def test_a_home_that_others_can_write_to_is_refused(tmp_path: Path, mode: int) -> None:
    used, new = tmp_path / "used", tmp_path / "new"
    Identity.create(used)
    new.mkdir()
    for folder in (used, new):
        folder.chmod(mode)
    for attempt, folder in (
        (Identity.load, used),
        (Identity.load_or_create, used),
        (Identity.load_or_create, new),
        (Identity.create, new),
    ):
        with pytest.raises(ArtifactError, match=rf"has mode 0{mode:o}: others .*chmod go-w"):
            attempt(folder)
    assert not list(new.iterdir())
    used.chmod(0o755)
    Identity.load(used)


def private_pem(key: Any, password: bytes | None = None) -> bytes:
    encryption: Any = serialization.NoEncryption()
    if password is not None:
        encryption = serialization.BestAvailableEncryption(password)
    return bytes(key.private_bytes(Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption))


@pytest.mark.parametrize(
    ("name", "payload", "reason"),
    [
        (KEY, None, "key.pem cannot be read"),
        (CERTIFICATE, None, "certificate.pem cannot be read"),
        (KEY, b"", "no private key"),
        (KEY, private_pem(Ed25519PrivateKey.generate(), b"secret"), "without password"),
        (KEY, private_pem(ec.generate_private_key(ec.SECP256R1())), "another kind of key"),
        (KEY, private_pem(Ed25519PrivateKey.generate()), "certificate of another key"),
        (CERTIFICATE, b"\xff", "certificate.pem cannot be read"),
        (CERTIFICATE, b"", "the certificate is not allowed"),
    ],
)
def test_damaged_identities_are_refused(
    tmp_path: Path, name: str, payload: bytes | None, reason: str
) -> None:
    Identity.create(tmp_path)
    if payload is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(payload)
    with pytest.raises(ParisError, match=reason):
        Identity.load(tmp_path)


def test_the_key_does_not_travel(identity: Identity) -> None:
    assert "PrivateKey" not in repr(identity)
    with pytest.raises(TypeError):
        pickle.dumps(identity)


def certify(
    key: Any,
    *,
    signer: Any = None,
    issuer: str = "somebody",
    authority: bool = False,
    constraints: bool = True,
) -> str:
    subject, issued_by = (
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) for name in ("somebody", issuer)
    )
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(
        issued_by, subject, key.public_key(), 5, now, now + timedelta(days=1)
    )
    if constraints:
        builder = builder.add_extension(x509.BasicConstraints(authority, None), critical=True)
    algorithm = None if isinstance(signer or key, Ed25519PrivateKey) else SHA256()
    return builder.sign(signer or key, algorithm).public_bytes(Encoding.PEM).decode()


OURS = Ed25519PrivateKey.generate()


def test_a_certificate_made_elsewhere_is_read() -> None:
    assert public_key_of(certify(OURS)) == OURS.public_key().public_bytes_raw().hex()


@pytest.mark.parametrize(
    ("certificate", "reason"),
    [
        (certify(ec.generate_private_key(ec.SECP256R1())), "not an Ed25519 key"),
        (certify(OURS, authority=True), "authority"),
        (certify(OURS, constraints=False), "BasicConstraints|extension"),
        (certify(OURS, issuer="another"), "not allowed"),
        (certify(OURS, signer=Ed25519PrivateKey.generate()), "not signed by its own key"),
        (certify(OURS) * 2, "usual form"),
        ("a comment\n" + certify(OURS), "usual form"),
        (certify(OURS) + " ", "usual form"),
        (certify(OURS).replace("\n", "\r\n"), "usual form"),
        (certify(OURS) * 20, "at most 4096"),
        ("", "not allowed"),
        ("-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n", "not allowed"),
        (certify(OURS).replace("M", "\N{CYRILLIC CAPITAL LETTER EM}"), "not allowed"),
        (private_pem(OURS).decode(), "not allowed"),
    ],
)
def test_certificates_of_strangers_are_refused(certificate: str, reason: str) -> None:
    with pytest.raises(SignatureError, match=reason):
        public_key_of(certificate)


@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")
def test_a_signed_negative_serial_number_is_refused() -> None:
    certificate = x509.load_pem_x509_certificate(certify(OURS).encode())
    signed = certificate.tbs_certificate_bytes.replace(b"\x02\x01\x05", b"\x02\x01\x85", 1)
    der = certificate.public_bytes(Encoding.DER).replace(certificate.tbs_certificate_bytes, signed)
    der = der.replace(certificate.signature, OURS.sign(signed))
    pem = x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM).decode()
    with pytest.raises(SignatureError, match="serial number is not positive"):
        public_key_of(pem)


def test_a_signature_of_fewer_bits_is_no_other_spelling() -> None:
    """Whether its last bit is zero, and so may be left out, differs from key to key."""
    others = 0
    for _ in range(40):
        certificate = x509.load_pem_x509_certificate(certify(Ed25519PrivateKey.generate()).encode())
        signature, der = certificate.signature, certificate.public_bytes(Encoding.DER)
        fewer = der.removesuffix(b"\x00" + signature) + b"\x01" + signature
        try:
            other = x509.load_der_x509_certificate(fewer).public_bytes(Encoding.PEM).decode()
        except ValueError:
            continue
        others += 1
        with pytest.raises(SignatureError, match="signature is not in the usual form"):
            public_key_of(other)
    assert others


@given(position=st.integers(0, 10_000), bit=st.integers(0, 7))
@settings(max_examples=150, deadline=None)
@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")
def test_any_changed_byte_of_a_certificate_is_refused(position: int, bit: int) -> None:
    text = bytearray(certify(OURS).encode())
    text[position % len(text)] ^= 1 << bit
    with pytest.raises(SignatureError):
        public_key_of(text.decode("latin-1"))


# Manifests.


def test_a_manifest_is_read_as_it_was_signed(
    identity: Identity, manifest: AdapterManifest, tmp_path: Path
) -> None:
    path = tmp_path / "zklora.json"
    path.write_text(json.dumps(manifest.sign(identity).to_json()))
    found = AdapterManifest.read(path)
    assert found == manifest
    assert found.adapter_id == manifest.adapter_id
    assert found.contributor == identity.public_key
    assert [terms.name for terms in found.modules] == ["layers.0.attn", "layers.1.attn"]
    assert found.module("layers.1.attn").dimensions == (5, 2, 3)
    assert found.scale == 1.5
    with pytest.raises(ProtocolError, match=r"module='layers.2.attn' is not allowed"):
        found.module("layers.2.attn")


def test_the_id_is_that_of_every_field(manifest: AdapterManifest) -> None:
    changes: list[Change] = [
        lambda m: m.update(adapter="other"),
        lambda m: m.update(price=8),
        lambda m: m.update(lora_alpha=3.5),
        lambda m: m.update(use_rslora=True),
        lambda m: m.update(budget_rows=10),
        lambda m: m.update(key_digest="00" * 32),
        lambda m: m.update(escrow_certificate=m["contributor_certificate"]),
        lambda m: m.update(contributor_certificate=certify(OURS)),
        lambda m: m["modules"].reverse(),
        lambda m: m["modules"][0].update(exponent_a=3),
        lambda m: m["modules"][0]["a"].reverse(),
        lambda m: m["base"].update(expert=2),
        lambda m: m["base"].update(router_digest=None),
    ]
    ids = {AdapterManifest.from_json(edited(manifest, change)).adapter_id for change in changes}
    assert len(ids | {manifest.adapter_id}) == len(changes) + 1


@pytest.mark.parametrize("alpha", [3, 3.0])
def test_the_id_is_that_of_what_is_signed(
    identity: Identity, manifest: AdapterManifest, alpha: float
) -> None:
    """PEFT writes whole numbers: read as 3.0 they had another id, and with it a new budget."""
    document = edited(manifest, lambda m: m.update(lora_alpha=alpha))
    found = AdapterManifest.from_signed(SignedDocument.sign("manifest", document, identity))
    assert found.adapter_id == sha256_hex(canonical_json(document))
    assert canonical_json(found.sign(identity).document) == canonical_json(document)


def edited(manifest: AdapterManifest, change: Change) -> dict[str, Any]:
    document = manifest.to_json()
    change(document)
    return document


@pytest.mark.parametrize(("use_rslora", "scale"), [(False, 4.0), (True, 16.0)])
def test_the_scale_follows_peft(manifest: AdapterManifest, use_rslora: bool, scale: float) -> None:
    random = np.random.default_rng(1)
    module = quantise(random.normal(size=(20, 16)), random.normal(size=(16, 20)))
    opening = commit(module)[1]
    offer = build_manifest(
        {"wide": opening},
        LoRAConfig(r=16, lora_alpha=64, use_rslora=use_rslora),
        base=Base(digest=DIGEST, expert=None, router_digest=None),
        adapter="x",
        price=0,
        sealed=b"-",
        key=b"-",
        contributor_certificate=manifest.contributor_certificate,
    )
    assert offer.scale == scale
    assert offer.budget_rows == 1  # at least


POINT = "80" + "00" * 47


def many_points(document: dict[str, Any]) -> list[dict[str, Any]]:
    points = [POINT] * 512
    wide = document["modules"][0] | {"d_in": 512, "r": 512, "a": points, "b": points}
    return [wide | {"name": f"layers.{i}"} for i in range(129)]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.pop("price"), "AdapterManifest: field 'price' is missing"),
        (lambda m: m.update(note=""), "field 'note' is unknown"),
        (lambda m: m.update(protocol="paris_ray zklora 0"), "protocol='paris_ray zklora 0'"),
        (lambda m: m.update(protocol=["paris_ray zklora 2"]), "protocol="),
        (lambda m: m.update(adapter=""), "adapter=''"),
        (lambda m: m.update(adapter="../x"), r"adapter='\.\./x'"),
        (lambda m: m.update(adapter="x\n"), "adapter="),
        (lambda m: m.update(adapter="x" * 10_000), "adapter="),
        (lambda m: m.update(adapter=None), "adapter=None"),
        (lambda m: m.update(price=-1), "price=-1 is not allowed: .*greater than or equal to 0"),
        (lambda m: m.update(price=1.0), r"price=1\.0"),
        (lambda m: m.update(price_per_row=-1), "price_per_row=-1 is not allowed"),
        (lambda m: m.update(price_per_row=2**50), "price_per_row="),  # of nine: no number of JSON
        (lambda m: m.update(price_per_row=1), "price_per_row=1 is not allowed: 0, since escrow"),
        (lambda m: m.update(price=True), "price=True"),
        (lambda m: m.update(price=2**53), "price="),
        (lambda m: m.update(price=10**400), "price="),
        (lambda m: m.update(budget_rows=0), "budget_rows=0"),
        (lambda m: m.update(budget_rows="9"), "budget_rows='9'"),
        (lambda m: m.update(sealed_bytes=0), "sealed_bytes=0"),
        (lambda m: m.update(sealed_bytes=200 * 2**20 + 1), "sealed_bytes=209715201 .*209715200"),
        (lambda m: m.update(r=512, modules=many_points(m)), "number of points=132096 is not"),
        (lambda m: m.update(sealed_digest=DIGEST[:-1]), "sealed_digest="),
        (lambda m: m.update(sealed_digest=DIGEST.upper()), "sealed_digest="),
        (lambda m: m.update(key_digest=DIGEST + "\n"), "key_digest="),
        (lambda m: m.update(key_digest=None), "key_digest=None"),
        (lambda m: m.update(r=3), "r=2 is not allowed: 3, that of the adapter"),
        (lambda m: m.update(r=True), "r=True"),
        (lambda m: m.update(r=10**20), "r=1000"),
        (lambda m: m.update(lora_alpha=0), "lora_alpha=0"),
        (lambda m: m.update(lora_alpha=1e-7), "lora_alpha=1e-07"),
        (lambda m: m.update(lora_alpha=1e7), "lora_alpha=10000000"),
        (lambda m: m.update(lora_alpha=float("nan")), "lora_alpha=nan"),
        (lambda m: m.update(lora_alpha=float("inf")), "lora_alpha=inf"),
        (lambda m: m.update(lora_alpha="3"), "lora_alpha='3'"),
        (lambda m: m.update(use_rslora=1), "use_rslora=1"),
        (lambda m: m.update(base=DIGEST), "base="),
        (lambda m: m["base"].update(digest="00"), "base: digest='00'"),
        (lambda m: m["base"].update(expert=-1), "base: expert=-1"),
        (lambda m: m["base"].update(expert=True), "base: expert=True"),
        (lambda m: m["base"].update(router_digest=1), "base: router_digest=1"),
        (lambda m: m["base"].update(more=1), "base: field 'more' is unknown"),
        (lambda m: m.update(modules={}), "modules={} is not allowed: .*tuple"),
        (lambda m: m.update(modules=[]), r"modules=\[\] is not allowed: .*at least 1 item"),
        (lambda m: m.update(modules=[None]), r"modules.0=None"),
        (lambda m: m.update(modules=m["modules"] * 2049), "at most 4096"),
        (lambda m: m["modules"].append(m["modules"][0]), "modules=.*each name once"),
        (lambda m: m["modules"][0].pop("b"), "modules.0: field 'b' is missing"),
        (lambda m: m["modules"][0].update(name=""), "name=''"),
        (lambda m: m["modules"][0].update(name="a b"), "name='a b'"),
        (lambda m: m["modules"][0].update(name="\x1b[2J"), "name="),
        (lambda m: m["modules"][0].update(name=7), "name=7"),
        (lambda m: m["modules"][1].update(exponent_a=127), "modules.1: exponent_a=127"),
        (lambda m: m["modules"][1].update(exponent_b=-113), "modules.1: exponent_b=-113"),
        (lambda m: m["modules"][1].update(exponent_b=1.0), r"exponent_b=1\.0"),
        (lambda m: m["modules"][1].update(d_in=0), "modules.1: d_in=0"),
        (lambda m: m["modules"][1].update(d_in=2**18 + 1), "d_in=262145"),
        (lambda m: m["modules"][1].update(d_out=2**18 + 1), "d_out=262145"),
        (lambda m: m["modules"][1].update(d_out=None), "d_out=None"),
        (lambda m: m["modules"][1].update(r=1), "r = 1 points"),
        (lambda m: m["modules"][1].update(a="0" * 96), "a=.*tuple"),
        (lambda m: m["modules"][1]["a"].pop(), "a=.*r = 2 points"),
        (lambda m: m["modules"][1]["b"].append(POINT), "b=.*r = 2 points"),
        (lambda m: m["modules"][1]["b"].__setitem__(0, POINT[:-2]), r"b\.0=.*\{96\}"),
        (lambda m: m["modules"][1]["b"].__setitem__(0, "zz" * 48), r"b\.0=.*\{96\}"),
        (lambda m: m["modules"][1]["b"].__setitem__(0, 5), r"b\.0=5"),
        (lambda m: m.update(contributor_certificate=""), "contributor_certificate: "),
        (lambda m: m.update(contributor_certificate=None), "contributor_certificate=None"),
        (lambda m: m.update(contributor_certificate=certify(OURS)), "is signed by"),
        (lambda m: m.update(escrow_certificate="x"), "escrow_certificate: "),
        (lambda m: m.update(escrow_certificate=0), "escrow_certificate=0"),
    ],
)
def test_fields_that_are_not_allowed_are_named(
    identity: Identity, manifest: AdapterManifest, change: Change, reason: str
) -> None:
    document = edited(manifest, change)
    # No signature is needed: a field is refused first, and NaN could not be signed at all.
    envelope = SignedDocument("manifest", document, identity.public_key, "00" * 64)
    with pytest.raises((ProtocolError, SignatureError), match=reason) as caught:
        AdapterManifest.from_signed(envelope)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("point", ["00" * 48, "ff" * 48, "c0" + "00" * 46 + "01", "80" + "00" * 47])
def test_commitments_that_are_no_points_are_refused(
    identity: Identity, manifest: AdapterManifest, point: str
) -> None:
    document = edited(manifest, lambda m: m["modules"][1]["a"].__setitem__(1, point))
    signed = SignedDocument.sign("manifest", document, identity)
    with pytest.raises(VerificationError, match=r"layers\.1\.attn: .*a\[1\]"):
        AdapterManifest.from_signed(signed)


def test_only_the_contributor_signs(
    identity: Identity, manifest: AdapterManifest, tmp_path: Path
) -> None:
    other = Identity.create(tmp_path)
    signed = SignedDocument.sign("manifest", manifest.to_json(), other)
    with pytest.raises(SignatureError, match=f"signed by {other.public_key}, not by"):
        AdapterManifest.from_signed(signed)
    claimed = SignedDocument("manifest", manifest.to_json(), identity.public_key, signed.signature)
    with pytest.raises(SignatureError, match="is not one of"):
        AdapterManifest.from_signed(claimed)
    receipt = SignedDocument.sign("receipt", manifest.to_json(), identity)
    with pytest.raises(SignatureError, match="kind='receipt' is not allowed here"):
        AdapterManifest.from_signed(receipt)
    dearer = edited(manifest, lambda m: m.update(price=8))
    signature = manifest.sign(identity).signature
    with pytest.raises(SignatureError, match="is not one of"):
        AdapterManifest.from_signed(
            SignedDocument("manifest", dearer, identity.public_key, signature)
        )


@pytest.mark.parametrize(
    "payload",
    [b"", b"[]", b"null", b"{}", b'{"kind": 1}', b"[" * 100_000, b"1" * 10_000, b"\xff", b"NaN"],
)
def test_files_that_hold_no_manifest_are_refused(tmp_path: Path, payload: bytes) -> None:
    (tmp_path / "zklora.json").write_bytes(payload)
    with pytest.raises(SignatureError):
        AdapterManifest.read(tmp_path / "zklora.json")


def test_files_are_not_read_beyond_reason(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(24 * 2**20 + 1)
    with pytest.raises(ProtocolError, match="at most 25165824 bytes"):
        AdapterManifest.read(tmp_path / "large")
    for path in (tmp_path / "nowhere", tmp_path, Path("/dev/zero")):
        with pytest.raises(SignatureError, match=f"^{path} is not a file"):
            AdapterManifest.read(path)


def test_the_largest_manifest_can_be_read_and_sold(
    identity: Identity, manifest: AdapterManifest
) -> None:
    module = manifest.to_json()["modules"][0]
    points = {"a": [POINT] * 16, "b": [POINT] * 16}
    names = ("d_in", "d_out", "exponent_a", "exponent_b")
    largest = module | points | dict.fromkeys(names, 262144) | {"name": "x" * 256, "r": 16}
    document = manifest.to_json() | {
        "modules": [largest] * MAX_MODULES,
        "adapter": "x" * 100,
        "contributor_certificate": "x" * MAX_CERTIFICATE,
        "escrow_certificate": "x" * MAX_CERTIFICATE,
    }
    envelope = SignedDocument("manifest", document, identity.public_key, "0" * 128).to_json()
    assert 2 * 16 * MAX_MODULES == MAX_POINTS
    assert len(json.dumps(envelope, indent=2)) <= MAX_BYTES
    room = LIMITS.requests.header_bytes
    assert MAX_BYTES + room <= LIMITS.requests.of("list_adapter") <= 2**28
    for sizes, kind in ((LIMITS.requests, "upload"), (LIMITS.answers, "sealed")):
        assert PIECE_BYTES + room <= sizes.of(kind)  # the weights come in pieces


# Sealed weights.


def test_weights_that_are_too_large_to_be_sold_are_not_sealed(
    openings: Openings, sealed: tuple[bytes, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    size = len(sealed[0])
    monkeypatch.setattr(sealing, "MAX_SEALED_BYTES", size)
    assert len(seal(openings)[0]) == size
    monkeypatch.setattr(sealing, "MAX_SEALED_BYTES", size - 1)
    with pytest.raises(ParisError, match=f"have {size} bytes: what can be sold has at most"):
        seal(openings)


def test_what_is_sealed_opens_the_commitments(
    openings: Openings, sealed: tuple[bytes, bytes], manifest: AdapterManifest
) -> None:
    opened = unseal(*sealed, manifest)
    assert list(opened) == list(openings)
    for name, opening in openings.items():
        assert opened[name].module.digest == opening.module.digest
        assert opened[name].blinders_a == opening.blinders_a
        assert opened[name].blinders_b == opening.blinders_b
    open_commitments({t.name: (t.commitment, opened[t.name]) for t in manifest.modules})


def test_an_envelope_shows_nothing_and_repeats_nothing(openings: Openings) -> None:
    (first, key), (second, other_key) = seal(openings), seal(openings)
    assert key != other_key
    assert len(key) == 32
    assert first != second
    assert openings["layers.0.attn"].module.a.tobytes() not in first
    assert b"layers.0.attn" not in first


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda sealed, key: (sealed[:-1], key), "sealed weights do not have the digest"),
        (lambda sealed, key: (sealed + b"0", key), "sealed weights do not have the digest"),
        (lambda sealed, key: (bytes([sealed[0] ^ 1]) + sealed[1:], key), "sealed weights do not"),
        (lambda sealed, key: (b"", key), "sealed weights do not have the digest"),
        (lambda sealed, key: (sealed, bytes(32)), "key does not have the digest"),
        (lambda sealed, key: (sealed, key[:-1]), "key does not have the digest"),
        (lambda sealed, key: (sealed, b""), "key does not have the digest"),
    ],
)
def test_another_envelope_or_key_is_refused(
    sealed: tuple[bytes, bytes],
    manifest: AdapterManifest,
    change: Callable[[bytes, bytes], tuple[bytes, bytes]],
    reason: str,
) -> None:
    with pytest.raises(VerificationError, match=reason):
        unseal(*change(*sealed), manifest)


def seal_anything(plain: bytes, manifest: AdapterManifest) -> tuple[bytes, bytes, AdapterManifest]:
    """Return what a hostile contributor can make: any content under a manifest that fits it."""
    key = b"k" * 32
    sealed = ChaCha20Poly1305(key).encrypt(NONCE, plain, None)
    document = edited(
        manifest,
        lambda m: m.update(
            sealed_digest=sha256_hex(sealed), sealed_bytes=len(sealed), key_digest=sha256_hex(key)
        ),
    )
    return sealed, key, AdapterManifest.from_json(document)


@pytest.mark.parametrize("key", [b"", b"short", b"k" * 31, b"x" * 32])
def test_a_pinned_key_that_does_not_unseal_is_refused(
    sealed: tuple[bytes, bytes], manifest: AdapterManifest, key: bytes
) -> None:
    document = edited(manifest, lambda m: m.update(key_digest=sha256_hex(key)))
    with pytest.raises(VerificationError, match="the key"):
        unseal(sealed[0], key, AdapterManifest.from_json(document))


def test_an_envelope_without_room_for_a_tag_is_refused(manifest: AdapterManifest) -> None:
    key = b"k" * 32
    document = edited(
        manifest,
        lambda m: m.update(
            sealed_digest=sha256_hex(b"x"), sealed_bytes=1, key_digest=sha256_hex(key)
        ),
    )
    with pytest.raises(VerificationError, match="the key does not fit"):
        unseal(b"x", key, AdapterManifest.from_json(document))


A, BLINDERS = "layers.0.attn.a", "layers.0.attn.blinders_a"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.pop(A), "sealed tensor 'layers.0.attn.a' is missing"),
        (lambda t: t.update(extra=np.zeros(1)), "'extra' is .*no such tensor"),
        (lambda t: t.update({"layers.2.attn.a": t.pop(A)}), "'layers.0.attn.a' is missing"),
        (lambda t: t.update({A: t[A].astype(np.int32)}), "'layers.0.attn.a' is .*int32.*int16"),
        (lambda t: t.update({A: t[A].view(np.uint16)}), "'layers.0.attn.a' is .*uint16"),
        (lambda t: t.update({A: t[A].T.copy()}), r"'layers.0.attn.a' is .*\(2, 6\).*\(6, 2\)"),
        (lambda t: t.update({A: t[A][:0]}), r"'layers.0.attn.a' is .*\(0, 2\)"),
        (lambda t: t.update({A: t[A].reshape(1, 6, 2)}), r"'layers.0.attn.a' is .*\(1, 6, 2\)"),
        (lambda t: t[A].__setitem__((0, 0), -32768), "layers.0.attn: A has -32768"),
        (lambda t: t.update({BLINDERS: t[BLINDERS][:, :31].copy()}), r"blinders_a' is .*\(2, 31\)"),
        (lambda t: t[BLINDERS].fill(255), "layers.0.attn: a blinder is not below"),
        (lambda t: t.clear(), "is missing"),
    ],
)
def test_sealed_tensors_that_do_not_fit_are_refused(
    sealed: tuple[bytes, bytes], manifest: AdapterManifest, change: Change, reason: str
) -> None:
    plain = ChaCha20Poly1305(sealed[1]).decrypt(NONCE, sealed[0], None)
    tensors = {name: value.copy() for name, value in safetensors.numpy.load(plain).items()}
    change(tensors)
    with pytest.raises(VerificationError, match=reason):
        unseal(*seal_anything(safetensors.numpy.save(tensors), manifest))


@pytest.mark.parametrize(("value", "allowed"), [(ORDER - 1, True), (ORDER, False)])
def test_blinders_are_below_the_order(
    sealed: tuple[bytes, bytes], manifest: AdapterManifest, value: int, allowed: bool
) -> None:
    plain = ChaCha20Poly1305(sealed[1]).decrypt(NONCE, sealed[0], None)
    tensors = {name: v.copy() for name, v in safetensors.numpy.load(plain).items()}
    tensors[BLINDERS][1] = np.frombuffer(value.to_bytes(32, "little"), np.uint8)
    envelope = seal_anything(safetensors.numpy.save(tensors), manifest)
    if allowed:
        assert unseal(*envelope)["layers.0.attn"].blinders_a[1] == value
        return
    with pytest.raises(VerificationError, match=r"layers\.0\.attn: a blinder is not below"):
        unseal(*envelope)


def safetensors_bytes(header: bytes, payload: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + payload


@pytest.mark.parametrize(
    "plain",
    [
        b"",
        b"no safetensors",
        pickle.dumps({"layers.0.attn.a": 1}),
        (2**63).to_bytes(8, "little") + b"{}",
        safetensors_bytes(b"[" * 1000),
        safetensors_bytes(b'{"a":{"dtype":"I16","shape":[1099511627776],"data_offsets":[0,8]}}'),
        safetensors_bytes(b'{"a":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]}}', b"\0\0"),
        safetensors_bytes(b'{"a":{"dtype":"X9","shape":[1],"data_offsets":[0,2]}}', b"\0\0"),
        safetensors_bytes(b'{"a":{"dtype":"I16","shape":[0],"data_offsets":[0,0]}}'),
        safetensors_bytes(
            b'{"a":{"dtype":"I16","shape":[1],"data_offsets":[0,2]},'
            b'"b":{"dtype":"I16","shape":[1],"data_offsets":[0,2]}}',
            b"\0\0",
        ),
    ],
)
def test_envelopes_with_other_things_inside_are_refused(
    manifest: AdapterManifest, plain: bytes
) -> None:
    with pytest.raises(VerificationError, match=r"damaged|sealed tensor"):
        unseal(*seal_anything(plain, manifest))
