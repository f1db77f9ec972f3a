"""Certificates of a test's own authority, and what a verifier who trusts it makes of a picture."""

import io
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import c2pa
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID, ObjectIdentifier

from serve.signing import PURPOSES, SigningOptions

SIGNER = "A test's server"
NO_USE = dict.fromkeys(
    (
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "encipher_only",
        "decipher_only",
    ),
    False,
)


def to_pem(key: Any, private_format: str = "PKCS8", password: bytes | None = None) -> bytes:
    encryption = (
        serialization.BestAvailableEncryption(password)
        if password
        else serialization.NoEncryption()
    )
    return key.private_bytes(
        serialization.Encoding.PEM, getattr(serialization.PrivateFormat, private_format), encryption
    )


@dataclass
class Authority:
    """A root, and the folder that certificates and keys are written to."""

    folder: Path

    def __post_init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "A test's root")])
        root = self._certify(self._name, self._key.public_key(), days=(-2, 2), purpose=None)
        self.root = root.public_bytes(serialization.Encoding.PEM)

    def issue(
        self,
        key: Any = None,
        *,
        days: tuple[int, int] = (-1, 1),
        purpose: str = PURPOSES[0],
        pem: bytes | None = None,
    ) -> SigningOptions:
        """Write the certificate of a key, and the key as `pem` says; return where they are."""
        key = key or ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, SIGNER)])
        leaf = self._certify(name, key.public_key(), days=days, purpose=purpose)
        options = SigningOptions(
            certificate_file=str(self.folder / f"{leaf.serial_number}.pem"),
            private_key_file=str(self.folder / f"{leaf.serial_number}.key"),
        )
        chain = leaf.public_bytes(serialization.Encoding.PEM) + self.root
        Path(options.certificate_file).write_bytes(chain)
        Path(options.private_key_file).write_bytes(pem or to_pem(key))
        return options

    def _certify(
        self, subject: x509.Name, key: Any, *, days: tuple[int, int], purpose: str | None
    ) -> x509.Certificate:
        now, is_root = datetime.now(UTC), purpose is None
        usage = x509.KeyUsage(
            digital_signature=True, key_cert_sign=is_root, crl_sign=is_root, **NO_USE
        )
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        builder = (
            x509.CertificateBuilder(subject_name=subject, issuer_name=self._name, public_key=key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + timedelta(days[0]))
            .not_valid_after(now + timedelta(days[1]))
            .add_extension(x509.BasicConstraints(ca=is_root, path_length=None), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(issuer, critical=False)
        )
        if purpose is not None:
            usage = x509.ExtendedKeyUsage([ObjectIdentifier(purpose)])
            builder = builder.add_extension(usage, critical=False)
        return builder.sign(self._key, hashes.SHA256())

    def read(self, file: bytes, output_format: str) -> c2pa.Reader:
        """Return what a file says to somebody who trusts the root."""
        trust = {"trust_anchors": self.root.decode(), "trust_config": "\n".join(PURPOSES)}
        context = c2pa.Context(c2pa.Settings.from_dict({"trust": trust}))
        return c2pa.Reader(f"image/{output_format}", io.BytesIO(file), context=context)


def assertions(reader: c2pa.Reader) -> dict[str, Any]:
    """Return what the signer of a file says, by label."""
    told = reader.get_active_manifest()["assertions"]
    return {assertion["label"]: assertion["data"] for assertion in told}
