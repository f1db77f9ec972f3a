"""Signatures of picture files: what a verifier reads, and what cannot sign; no Ray, no HTTP."""

import base64
import io
import json
import logging
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from PIL import Image

from jobs.replay import main as replay
from paris_ray.bundle import bundle_digest
from paris_ray.errors import ConfigError
from paris_ray.pictures import (
    FORMATS,
    PictureFormat,
    PictureRecord,
    encode_picture,
    read_picture,
)
from paris_ray.sampling import generate
from serve.app import AppArgs
from serve.checking import Served, check
from serve.drawing import Drawing, Partial
from serve.ingress import HttpOptions, Ingress
from serve.pictures import encode_all, encode_partial
from serve.schemas import ImagesRequest
from serve.signing import (
    PURPOSES,
    RECORD_LABEL,
    TRAINED_MODEL,
    PictureSigner,
    SigningOptions,
)
from serve.source import BundleSource, Origin
from tests.credentials import SIGNER, Authority, assertions, to_pem
from tests.records import RECORD


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("credentials"))


@pytest.fixture(scope="module")
def signer(authority: Authority) -> PictureSigner:
    return PictureSigner(authority.issue())


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def opened(file: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))


@pytest.mark.parametrize("output_format", FORMATS)
def test_a_verifier_reads_who_drew_it_and_how(
    authority: Authority, signer: PictureSigner, pixels: np.ndarray, output_format: PictureFormat
) -> None:
    file = encode_picture(pixels, RECORD, output_format)
    signed = signer.sign(file, RECORD, output_format)
    np.testing.assert_array_equal(opened(signed), opened(file))
    assert read_picture(signed) == (RECORD, output_format)

    reader = authority.read(signed, output_format)
    assert reader.get_validation_state() == "Trusted"
    assert reader.get_active_manifest()["signature_info"]["issuer"] == SIGNER
    told = assertions(reader)
    (action,) = told["c2pa.actions.v2"]["actions"]
    assert action == {"action": "c2pa.created", "digitalSourceType": TRAINED_MODEL}
    assert told[RECORD_LABEL] == {"json": RECORD.to_json().decode()}
    assert set(told) == {"c2pa.actions.v2", RECORD_LABEL}  # no thumbnail

    detailed = json.loads(reader.detailed_json())
    claim = detailed["manifests"][detailed["active_manifest"]]["claim"]
    assert "gathered_assertions" not in claim  # nothing is passed on from others
    assert len(claim["created_assertions"]) == 3  # the third is the file's hash


@pytest.mark.parametrize("output_format", FORMATS)
def test_a_changed_file_is_noticed(
    authority: Authority, signer: PictureSigner, pixels: np.ndarray, output_format: PictureFormat
) -> None:
    file = encode_picture(pixels, RECORD, output_format)
    changed = bytearray(signer.sign(file, RECORD, output_format))
    middle = len(file) // 2
    changed[changed.index(file[middle : middle + 32])] ^= 1  # of the pixels
    reader = authority.read(bytes(changed), output_format)
    assert reader.get_validation_state() == "Invalid"
    (failure,) = reader.get_validation_results()["activeManifest"]["failure"]
    assert failure["code"] == "assertion.dataHash.mismatch"


def test_all_of_a_record_is_signed_even_where_a_jpeg_has_no_room(
    authority: Authority, signer: PictureSigner, pixels: np.ndarray
) -> None:
    record = replace(RECORD, expert_weights=[dict.fromkeys(range(8), 0.125)] * 1000)
    file = encode_picture(pixels, record, "jpeg")
    signed = signer.sign(file, record, "jpeg")
    assert len(read_picture(signed)[0].expert_weights) == 1
    reader = authority.read(signed, "jpeg")
    assert reader.get_validation_state() == "Trusted"
    assert assertions(reader)[RECORD_LABEL]["json"] == record.to_json().decode()


def test_many_threads_sign_at_a_time(
    authority: Authority, signer: PictureSigner, pixels: np.ndarray
) -> None:
    records = [replace(RECORD, seed=seed) for seed in range(32)]

    def sign(record: PictureRecord) -> bytes:
        return signer.sign(encode_picture(pixels, record, "png"), record, "png")

    with ThreadPoolExecutor(8) as pool:
        files = list(pool.map(sign, records))
    for file, record in zip(files, records, strict=True):
        reader = authority.read(file, "png")
        assert reader.get_validation_state() == "Trusted"
        assert assertions(reader)[RECORD_LABEL]["json"] == record.to_json().decode()


KEYS = {
    "P-256": (ec.generate_private_key(ec.SECP256R1()), "TraditionalOpenSSL"),
    "P-384": (ec.generate_private_key(ec.SECP384R1()), "PKCS8"),
    "P-521": (ec.generate_private_key(ec.SECP521R1()), "PKCS8"),
    "Ed25519": (ed25519.Ed25519PrivateKey.generate(), "PKCS8"),
    "RSA": (rsa.generate_private_key(65537, 2048), "TraditionalOpenSSL"),
}


@pytest.mark.parametrize("name", KEYS)
def test_any_of_the_usual_keys_will_do(authority: Authority, pixels: np.ndarray, name: str) -> None:
    key, private_format = KEYS[name]
    signer = PictureSigner(authority.issue(key, pem=to_pem(key, private_format)))
    file = encode_picture(pixels, RECORD, "png")
    signed = signer.sign(file, RECORD, "png")
    assert authority.read(signed, "png").get_validation_state() == "Trusted"


@pytest.mark.parametrize("purpose", PURPOSES)
def test_a_certificate_may_be_for_any_purpose_of_the_standard(
    authority: Authority, pixels: np.ndarray, purpose: str
) -> None:
    file = encode_picture(pixels, RECORD, "png")
    signed = PictureSigner(authority.issue(purpose=purpose)).sign(file, RECORD, "png")
    assert authority.read(signed, "png").get_validation_state() == "Trusted"


def test_the_log_that_serve_keeps_says_as_whom_and_until_when(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    options = authority.issue()
    certificate = x509.load_pem_x509_certificates(Path(options.certificate_file).read_bytes())[0]
    caplog.set_level(logging.INFO, logger="ray.serve")
    logger = logging.getLogger("ray.serve")
    logger.addHandler(caplog.handler)  # Serve's own logger tells no other
    try:
        PictureSigner(options)
    finally:
        logger.removeHandler(caplog.handler)
    assert f"O={SIGNER}, until {certificate.not_valid_after_utc}" in caplog.text


# -- What cannot sign ----------------------------------------------------------------------------


def refusal(options: SigningOptions) -> str:
    with pytest.raises(ConfigError) as caught:
        PictureSigner(options)
    return str(caught.value)


def test_keys_that_do_not_fit_are_refused_at_the_start(authority: Authority) -> None:
    mine, other = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    told = refusal(authority.issue(mine, pem=to_pem(other)))
    assert "cannot sign with private_key_file=" in told
    assert "does not match" in told

    unfit = "private_key_file='.*' is not allowed: "
    for pem, allowed in (
        (to_pem(mine, password=b"secret"), "PEM that is not encrypted"),
        (b"no key", "PEM that is not encrypted"),
        (to_pem(ec.generate_private_key(ec.SECP256K1())), "a key on the curve P-256, P-384 or"),
    ):
        options = authority.issue(mine, pem=pem)
        with pytest.raises(ConfigError, match=unfit + allowed):
            PictureSigner(options)


@pytest.mark.parametrize("days", [(-2, -1), (1, 2)])
def test_a_certificate_of_another_time_is_refused_at_the_start(
    authority: Authority, days: tuple[int, int]
) -> None:
    assert "not valid at time of signing" in refusal(authority.issue(days=days))


def test_a_certificate_for_web_servers_is_refused_at_the_start(authority: Authority) -> None:
    told = refusal(authority.issue(purpose="1.3.6.1.5.5.7.3.1"))
    assert "the certificate is invalid" in told


def test_a_file_that_is_no_certificate_is_refused_at_the_start(authority: Authority) -> None:
    options = authority.issue()
    Path(options.certificate_file).write_bytes(b"no certificate")
    assert f"certificate_file={options.certificate_file!r} cannot sign" in refusal(options)


@pytest.mark.parametrize("field", SigningOptions.model_fields)
def test_a_missing_file_is_named(authority: Authority, field: str) -> None:
    options = authority.issue().model_copy(update={field: "no/such/file"})
    assert refusal(options).startswith(f"signing: {field}='no/such/file' cannot be read: No such")


def test_a_missing_package_is_named(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "c2pa", None)  # as where it is not installed
    assert "pip install 'paris_ray[c2pa]'" in refusal(authority.issue())


def test_an_application_that_cannot_sign_does_not_start(tiny_bundle_path: Path) -> None:
    options = SigningOptions(certificate_file="no/chain", private_key_file="no/key")
    with pytest.raises(ConfigError, match="signing: certificate_file='no/chain' cannot be read"):
        Ingress(BundleSource(str(tiny_bundle_path)), None, None, HttpOptions(signing=options))


@pytest.mark.parametrize("signing", [{}, {"certificate_file": "a"}, {"key": "a"}])
def test_both_files_must_be_named(signing: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"signing\.private_key_file"):
        AppArgs(signing=signing)


# -- What a server sends ---------------------------------------------------------------------------


@pytest.fixture
def signing(served: Served, signer: PictureSigner) -> Served:
    return replace(served, signer=signer)


@pytest.mark.usefixtures("replica_threads")
def test_every_file_of_a_server_that_signs_is_signed_and_can_be_drawn_again(
    signing: Served, authority: Authority, tiny_bundle_path: Path, tmp_path: Path
) -> None:
    request = ImagesRequest(prompt="a red cat", seed=7, output_format="webp")
    order = check(request, signing, random_seed=0)
    options = asdict(order.sampling)
    (image,) = generate(signing.bundle, ["a red cat"], seed=7, **options)
    drawing = Drawing(
        pictures=np.asarray(image)[None],
        expert_usage=[[1.0, 0, 0]],
        expert_weights=[[[1.0, 0, 0]] * 3],
        missing_experts=[],
        last_resort=False,
        seconds=0.0,
        origin=Origin(bundle=bundle_digest(str(tiny_bundle_path))),
    )
    (file,) = encode_all(order, drawing, signing)
    assert authority.read(file, "webp").get_validation_state() == "Trusted"
    (tmp_path / "signed.webp").write_bytes(file)
    assert replay([str(tmp_path / "signed.webp"), "--bundle", str(tiny_bundle_path)]) == 0


def test_an_unfinished_picture_is_signed_as_such(signing: Served, authority: Authority) -> None:
    order = check(ImagesRequest(prompt="a red cat", seed=7), signing, random_seed=0)
    pixels = np.zeros((32, 32, 3), dtype=np.uint8)
    partial = Partial(picture=0, index=0, step=2, pixels=pixels, origin=Origin())
    event = encode_partial(order, partial, signing)
    reader = authority.read(base64.b64decode(event.b64_json), "png")
    assert reader.get_validation_state() == "Trusted"
    assert json.loads(assertions(reader)[RECORD_LABEL]["json"])["unfinished_at"] == 2
