"""Who somebody is: an Ed25519 key and the self-signed certificate that others pin.

key.pem (nobody else may read it)  certificate.pem (to be given away)

The same key signs documents and proves, in TLS, who is at the other end of a connection.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from paris_ray.errors import ArtifactError, SignatureError
from paris_ray.signatures import check_public_key

KEY = "key.pem"
CERTIFICATE = "certificate.pem"
VALIDITY = timedelta(days=3652)  # ten years
MAX_CERTIFICATE = 4096  # characters; ours have about 600
# DER of what stands between the signed part of a certificate and the 64 bytes of its signature: the
# algorithm Ed25519 (RFC 8410, section 3), and a string of bits of which none is left out.
SIGNED_BY = bytes.fromhex("300506032b6570034100")
READABLE_BY_OTHERS = 0o077
WRITABLE_BY_OTHERS = 0o022
# What reading a certificate raises: the errors of x509 have no common base.
MALFORMED = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.ExtensionNotFound,
    x509.InvalidVersion,
)


@dataclass(frozen=True, slots=True)
class Identity:
    """A party's private key and certificate; made by `create` or `load`.

    Attributes:
        folder: Where both are kept.
        certificate: The certificate as PEM text.
    """

    folder: Path
    certificate: str
    _key: Ed25519PrivateKey = field(repr=False)

    @classmethod
    def create(cls, folder: Path) -> "Identity":
        """Make a new identity in a folder.

        Raises:
            ArtifactError: if there is one already: a key is never overwritten; or if others can
                write into the folder.
        """
        with _locked(folder):
            return cls._create(folder)

    @classmethod
    def load(cls, folder: Path) -> "Identity":
        """Return the identity in a folder.

        Raises:
            ArtifactError: if it is missing or damaged, or if others can read the key or write into
                the folder.
            SignatureError: if its certificate is none of ours.
        """
        _check_private(folder)
        key = _read_key(folder / KEY)
        path = folder / CERTIFICATE
        try:
            certificate = path.read_text("ascii")
        except (OSError, UnicodeDecodeError) as error:
            raise ArtifactError(f"{path} cannot be read: {error}") from None
        if public_key_of(certificate) != _hex(key.public_key()):
            raise ArtifactError(f"{path} is the certificate of another key than {KEY}")
        return cls(folder, certificate, key)

    @classmethod
    def load_or_create(cls, folder: Path) -> "Identity":
        """Return the identity in a folder, a new one if it has none; raises like `load`."""
        with _locked(folder):
            return cls.load(folder) if (folder / KEY).exists() else cls._create(folder)

    @classmethod
    def _create(cls, folder: Path) -> "Identity":
        _check_private(folder)
        if (folder / KEY).exists():
            raise ArtifactError(f"{folder / KEY} exists: a key is never overwritten")
        key = Ed25519PrivateKey.generate()
        certificate = _certify(key).public_bytes(Encoding.PEM)
        private = key.private_bytes(
            Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        # The key comes last: a certificate without one is of no use, and was left by a crash.
        (folder / CERTIFICATE).unlink(missing_ok=True)
        write_new(folder / CERTIFICATE, certificate, 0o644)
        write_new(folder / KEY, private, 0o600)
        return cls(folder, certificate.decode("ascii"), key)

    @property
    def public_key(self) -> str:
        """The 32 bytes of the public key, in hexadecimal."""
        return _hex(self._key.public_key())

    def sign(self, message: bytes) -> bytes:
        """Return the 64 bytes of a signature."""
        return self._key.sign(message)


def public_key_of(certificate_pem: str) -> str:
    """Return the key, in hexadecimal, of a certificate that a stranger may have made.

    Its dates are not looked at: they bind connections, not what was signed.

    Raises:
        SignatureError: unless it is one certificate, of an Ed25519 key that is no authority,
            signed by that key.
    """
    try:
        return _hex(_checked_key(certificate_pem))
    except MALFORMED as error:
        raise SignatureError(f"the certificate is not allowed: {error}") from None
    except InvalidSignature:
        raise SignatureError("the certificate is not signed by its own key") from None


def _checked_key(certificate_pem: str) -> Ed25519PublicKey:
    if len(certificate_pem) > MAX_CERTIFICATE:
        raise ValueError(f"it has {len(certificate_pem)} characters, at most {MAX_CERTIFICATE}")
    pem = certificate_pem.encode("ascii")
    certificate = x509.load_pem_x509_certificate(pem)
    # One spelling only: no second certificate, no text around it, nothing to vary a digest with.
    if certificate.public_bytes(Encoding.PEM) != pem:
        raise ValueError("its PEM text is not in the usual form")
    if certificate.serial_number <= 0:  # which cryptography reads, with a warning
        raise ValueError("its serial number is not positive")
    key = certificate.public_key()
    if not isinstance(key, Ed25519PublicKey):
        raise ValueError("its key is not an Ed25519 key")
    check_public_key(key.public_bytes_raw())
    # What follows the signed part is not signed: cryptography reads a signature of fewer bits, too.
    if not certificate.public_bytes(Encoding.DER).endswith(SIGNED_BY + certificate.signature):
        raise ValueError("its signature is not in the usual form")
    if certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca:
        raise ValueError("it is that of an authority")
    certificate.verify_directly_issued_by(certificate)
    return key


def _hex(key: Ed25519PublicKey) -> str:
    return key.public_bytes_raw().hex()


def _certify(key: Ed25519PrivateKey) -> x509.Certificate:
    public = key.public_key()
    common_name = f"paris_ray {_hex(public)[:16]}"
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))  # clocks of parties differ
        .not_valid_after(now + VALIDITY)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, algorithm=None)
    )


def _check_private(folder: Path) -> None:
    """Raise ArtifactError if others could put another key, or another journal, into a folder."""
    try:
        mode = folder.stat().st_mode & 0o777
    except OSError as error:
        raise ArtifactError(f"{folder} cannot be the folder of an identity: {error}") from None
    if mode & WRITABLE_BY_OTHERS:
        raise ArtifactError(
            f"{folder} has mode {mode:04o}: others must not write into the folder of an identity "
            f"(chmod go-w {folder})"
        )


def _read_key(path: Path) -> Ed25519PrivateKey:
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777
            pem = file.read()
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from None
    if mode & READABLE_BY_OTHERS:
        raise ArtifactError(f"{path} has mode {mode:04o}, allowed: 0600 (chmod 600 {path})")
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (TypeError, ValueError, UnsupportedAlgorithm):  # TypeError: it has a password
        raise ArtifactError(f"{path} holds no private key without password") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ArtifactError(f"{path} holds another kind of key than Ed25519")
    return key


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes of this party from making an identity in the folder meanwhile."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise ArtifactError(f"{folder} cannot be the folder of an identity: {error}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write_new(path: Path, payload: bytes, mode: int) -> None:
    """Let a file appear whole, and stay on disk; raises FileExistsError if there is one."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # of a process that was killed
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(payload)
        file.flush()
        os.fsync(descriptor)
    path.hardlink_to(temporary)  # unlike a rename, it never replaces
    temporary.unlink()
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
