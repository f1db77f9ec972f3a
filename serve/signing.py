"""Content Credentials: the server's signature in picture files, by the standard C2PA 2.

A signed file says, to whoever trusts the certificate, that a trained model drew the picture, how it
was drawn, and that nothing of the file has changed since. c2pa-python does all of it; it is an
optional extra (`c2pa`).
"""

import io
import logging
from importlib import import_module
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from PIL import Image
from pydantic import BaseModel, ConfigDict

import paris_ray
from paris_ray.errors import ConfigError
from paris_ray.pictures import PictureFormat, PictureRecord

logger = logging.getLogger("ray.serve")  # the one whose files Serve keeps

RECORD_LABEL = "paris_ray.record"
TRAINED_MODEL = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
CURVES = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}
# What a certificate may be for: C2PA's own claims, documents, or mail.
PURPOSES = ("1.3.6.1.4.1.62558.2.1", "1.3.6.1.5.5.7.3.36", "1.3.6.1.5.5.7.3.4")
SETTINGS = {
    # The package reads each file again that it has signed, by default for the last purpose alone.
    "trust": {"trust_config": "\n".join(PURPOSES)},
    # A thumbnail beside every picture would be larger than most of ours.
    "builder": {"thumbnail": {"enabled": False}},
}


class SigningOptions(BaseModel):
    """By whom picture files are signed; both files lie where an Ingress replica runs.

    Attributes:
        certificate_file: The signer's certificate, then those between it and the root that
            verifiers trust, in PEM.
        private_key_file: The private key of the first certificate, in PEM and not encrypted.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    certificate_file: str
    private_key_file: str


class PictureSigner:
    """Signs picture files; any number of threads may at a time.

    Both files are read once, and an empty picture is signed with them: what is wrong with them
    must fail the start of the application, not its first picture.

    Args:
        options: Where certificate and key are.

    Raises:
        ConfigError: if c2pa-python is missing, a file cannot be read, or they cannot sign today.
    """

    def __init__(self, options: SigningOptions) -> None:
        self._c2pa = _import_c2pa()
        chain = _read("certificate_file", options.certificate_file)
        key, algorithm = _load_key(options.private_key_file)
        try:
            certificate = x509.load_pem_x509_certificates(chain)[0]
            self._context = self._open(chain, key, algorithm)
            self._sign(_empty_png(), "{}", "png")
        except (ValueError, self._c2pa.C2paError) as error:
            raise ConfigError(
                f"signing: certificate_file={options.certificate_file!r} cannot sign with "
                f"private_key_file={options.private_key_file!r}: {error}"
            ) from None
        subject, end = certificate.subject.rfc4514_string(), certificate.not_valid_after_utc
        logger.info("pictures are signed by %s, until %s", subject, end)

    def _open(self, chain: bytes, key: bytes, algorithm: str) -> Any:
        info = self._c2pa.C2paSignerInfo(algorithm, chain, key, None)
        signer = self._c2pa.Signer.from_info(info)
        return self._c2pa.Context(self._c2pa.Settings.from_dict(SETTINGS), signer)

    def sign(self, file: bytes, record: PictureRecord, output_format: PictureFormat) -> bytes:
        """Return a picture file with a signature: the same pixels and record, never the same bytes.

        Args:
            file: As `paris_ray.pictures.encode_picture` made it.
            record: How the picture was drawn; all of it is signed, where a JPEG carries a part.
            output_format: Kind of file.

        Raises:
            C2paError: if the certificate has ended meanwhile.
        """
        return self._sign(file, record.to_json().decode("ascii"), output_format)

    def _sign(self, file: bytes, record: str, output_format: PictureFormat) -> bytes:
        signed = io.BytesIO()
        with self._c2pa.Builder(_manifest(record), self._context) as builder:
            builder.sign(f"image/{output_format}", io.BytesIO(file), signed)
        return signed.getvalue()


def _manifest(record: str) -> dict[str, Any]:
    """Return what is signed: that a model drew it, and how; the package adds the file's hash."""
    drawn = {"action": "c2pa.created", "digitalSourceType": TRAINED_MODEL}
    return {
        "claim_generator_info": [{"name": "paris_ray", "version": paris_ray.__version__}],
        # `created` means that the signer says so, and does not pass on what somebody else said.
        "assertions": [
            {"label": "c2pa.actions.v2", "data": {"actions": [drawn]}, "created": True},
            # As text: the package's reader shows lists of small numbers as base64.
            {"label": RECORD_LABEL, "data": {"json": record}, "created": True},
        ],
    }


def _import_c2pa() -> Any:
    try:
        return import_module("c2pa")
    except ImportError:
        raise ConfigError(
            "signing needs the package c2pa-python: pip install 'paris_ray[c2pa]'"
        ) from None


def _load_key(path: str) -> tuple[bytes, str]:
    """Return a private key in PKCS 8, which c2pa-python wants, and the algorithm that it is for."""
    pem = _read("private_key_file", path)
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):  # the second: it is encrypted
        raise ConfigError(
            f"signing: private_key_file={path!r} is not allowed: PEM that is not encrypted"
        ) from None
    pkcs8 = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return pkcs8, _algorithm(key, path)


def _algorithm(key: Any, path: str) -> str:
    if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name in CURVES:
        return CURVES[key.curve.name]
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return "ed25519"
    if isinstance(key, rsa.RSAPrivateKey):
        return "ps256"
    raise ConfigError(
        f"signing: private_key_file={path!r} is not allowed: a key on the curve P-256, P-384 or "
        "P-521, of Ed25519 or of RSA"
    )


def _read(field: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"signing: {field}={path!r} cannot be read: {error.strerror}") from None


def _empty_png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, "PNG")
    return file.getvalue()
