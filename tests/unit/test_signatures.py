"""Signatures say something: a key whose signatures fit everything is nobody's."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from paris_ray.errors import SignatureError
from paris_ray.identity import Identity, public_key_of
from paris_ray.signatures import SMALL_ORDER, SignedDocument, check_public_key

P = 2**255 - 19
D = -121665 * pow(121666, -1, P) % P
NEUTRAL = 1
# RFC 8032: R is the neutral element, S = 0. It verifies if the key times anything is the neutral
# element, whatever was signed.
FITS_ALL = (NEUTRAL.to_bytes(32, "little") + bytes(32)).hex()

Point = tuple[int, int]


def add(first: Point, second: Point) -> Point:
    """RFC 8032, section 5.1.4, in affine coordinates."""
    (x1, y1), (x2, y2) = first, second
    product = D * x1 * x2 * y1 * y2
    x = (x1 * y2 + x2 * y1) * pow(1 + product, -1, P) % P
    return x, (y1 * y2 + x1 * x2) * pow(1 - product, -1, P) % P


def eightfold(point: Point) -> Point:
    for _ in range(3):
        point = add(point, point)
    return point


def point_of(y: int) -> Point | None:
    """Return a point with this y; None: there is none."""
    square = (y * y - 1) * pow(D * y * y + 1, -1, P) % P
    root = pow(square, (P + 3) // 8, P)
    for x in (root, root * pow(2, (P - 1) // 4, P) % P):
        if x * x % P == square:
            return x, y
    return None


def encodings(y: int) -> list[bytes]:
    """Return all that may be read as a point with this y: either sign, and above the field."""
    values = [y, y + P] if y + P < 2**255 else [y]
    return [(v | sign << 255).to_bytes(32, "little") for v in values for sign in (0, 1)]


def test_the_points_of_small_order_are_all_there() -> None:
    points = {y: point_of(y) for y in SMALL_ORDER}
    assert all(point is not None and eightfold(point) == (0, 1) for point in points.values())
    # The subgroup has eight points: y and -y with both signs of x, but for x = 0.
    with_both = [y for y, point in points.items() if point is not None and point[0] != 0]
    assert 2 * len(with_both) + len(points) - len(with_both) == 8


@pytest.mark.parametrize("y", sorted(SMALL_ORDER))
def test_a_key_of_small_order_signs_nothing(y: int) -> None:
    for key in encodings(y):
        with pytest.raises(SignatureError, match="a point that fits everything"):
            check_public_key(key)
        for document in ({"price": 0}, {"price": 100}):
            forged = SignedDocument("manifest", document, key.hex(), FITS_ALL)
            with pytest.raises(SignatureError):
                forged.check("manifest", key.hex())


def test_the_library_alone_would_accept_one_signature_for_everything() -> None:
    """Why it is checked here; once this fails, the check may go."""
    key = Ed25519PublicKey.from_public_bytes(NEUTRAL.to_bytes(32, "little"))
    for message in (b"one", b"another"):
        key.verify(bytes.fromhex(FITS_ALL), message)


def test_a_point_has_one_encoding() -> None:
    for y in (P, P + 1, P + 18, 2**255 - 1):
        with pytest.raises(SignatureError):
            check_public_key(y.to_bytes(32, "little"))


def test_keys_of_parties_are_accepted(tmp_path: Path) -> None:
    identity = Identity.create(tmp_path)
    check_public_key(bytes.fromhex(identity.public_key))
    assert SignedDocument.sign("a", {"b": 1}, identity).check("a", identity.public_key) == {"b": 1}


def test_a_certificate_of_such_a_key_is_refused() -> None:
    """One that is signed by itself, as its only signature fits it too."""
    neutral = Ed25519PublicKey.from_public_bytes(NEUTRAL.to_bytes(32, "little"))
    name, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "nobody")]), datetime.now(UTC)
    honest = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(neutral)
        .serial_number(7)
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(Ed25519PrivateKey.generate(), algorithm=None)
    )
    der = honest.public_bytes(Encoding.DER)
    assert der.endswith(honest.signature)
    forged = x509.load_der_x509_certificate(der[:-64] + bytes.fromhex(FITS_ALL))
    forged.verify_directly_issued_by(forged)  # by the library
    assert forged.public_key().public_bytes(Encoding.Raw, serialization.PublicFormat.Raw)
    with pytest.raises(SignatureError, match="a point that fits everything"):
        public_key_of(forged.public_bytes(Encoding.PEM).decode("ascii"))


@pytest.mark.parametrize("field", ["public_key", "signature", "kind"])
def test_what_a_stranger_says_is_not_repeated_at_length(tmp_path: Path, field: str) -> None:
    """Errors are printed as they are."""
    signed = SignedDocument.sign("manifest", {}, Identity.create(tmp_path / "me")).to_json()
    steering = "\x1b[2J" + "x" * 2000
    with pytest.raises(SignatureError) as refused:
        SignedDocument.from_json(signed | {field: steering}).check("manifest", "0" * 64)
    assert str(refused.value).isprintable() and len(str(refused.value)) < 250
