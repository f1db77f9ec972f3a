"""A LoRA over HTTP: the picture that `generate` draws with it, and clear refusals."""

import base64
import io
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import safetensors.torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError

from jobs.replay import main as replay
from paris_ray.artifacts import file_sha256
from paris_ray.bundle import Bundle
from paris_ray.config.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from paris_ray.errors import BundleError, ReceiptError
from paris_ray.folders import Folder
from paris_ray.receipts import (
    ADAPTER_ID,
    RECEIPT,
    BaseFacts,
    ModuleFacts,
    Receipt,
    SessionFacts,
    State,
)
from paris_ray.sampling import generate
from serve.app import AppArgs, build

pytestmark = pytest.mark.serve

EXPERT = 1  # of `lora_path`
REQUEST = {"prompt": "a red cat", "n": 2, "seed": 5, "num_inference_steps": 3, "routing": "full"}


@pytest.fixture(scope="module", params=["attached", "colocated"])
def client(
    request: pytest.FixtureRequest, start_app: Callable[..., str], lora_path: Path
) -> Iterator[httpx.Client]:
    """An application with the adapter, attached, and again for another expert, merged."""
    loras = {
        "mine": {"path": str(lora_path)},
        "merged": {"path": str(lora_path), "expert": 0, "merge": True},
    }
    name = f"lora-{request.param}"
    url = start_app(name, loras=loras, colocated=request.param == "colocated")
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


def draw(client: httpx.Client, **fields: Any) -> tuple[NDArray[np.uint8], dict[str, Any]]:
    response = client.post("/v1/images/generations", json=REQUEST | fields)
    assert response.status_code == 200, response.text
    answer = response.json()
    pictures = [base64.b64decode(image["b64_json"]) for image in answer["data"]]
    images = [np.asarray(Image.open(io.BytesIO(picture))) for picture in pictures]
    return np.stack(images), answer["paris"]


def expected(bundle: Bundle, lora: str | None) -> NDArray[np.uint8]:
    options = {name: REQUEST[name] for name in ("seed", "num_inference_steps", "routing")}
    images = generate(bundle, [REQUEST["prompt"]] * REQUEST["n"], lora=lora, **options)
    return np.stack([np.asarray(image) for image in images])


def test_a_served_picture_equals_the_one_of_generate(
    client: httpx.Client, bundle: Bundle, lora_path: Path
) -> None:
    bundle.add_lora("mine", str(lora_path))
    bundle.add_lora("merged", str(lora_path), expert=0, merge=True)
    drawn = {}
    for lora in ("mine", "merged", None):
        drawn[lora], provenance = draw(client, lora=lora)
        assert np.array_equal(drawn[lora], expected(bundle, lora))
        assert provenance["lora"] == lora
    assert (drawn["mine"] != drawn[None]).any()
    assert (drawn["mine"] != drawn["merged"]).any()


def test_the_models_route_lists_them(client: httpx.Client) -> None:
    (model,) = client.get("/v1/models").json()["data"]
    assert model["paris"]["loras"] == {"mine": EXPERT, "merged": 0}


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ("theirs", "lora='theirs' is not allowed: 'mine', 'merged'"),
        ("", "lora='' is not allowed: 'mine', 'merged'"),
        (3, "lora=3 is not allowed: Input should be a valid string"),
        (["mine"], "lora=['mine'] is not allowed: Input should be a valid string"),
    ],
)
def test_an_unknown_name_is_refused_with_the_known_ones(
    client: httpx.Client, lora: object, message: str
) -> None:
    response = client.post("/v1/images/generations", json=REQUEST | {"lora": lora})
    assert response.status_code == 400
    assert response.json()["error"] == {
        "message": message,
        "type": "invalid_request_error",
        "param": "lora",
        "code": "invalid_value",
    }


def test_a_folder_that_does_not_fit_is_refused_when_it_is_deployed(
    tiny_bundle_path: Path, tmp_path: Path
) -> None:
    def deploy(**options: Any) -> None:
        build(AppArgs(bundle=str(tiny_bundle_path), loras={"mine": options}))

    with pytest.raises(BundleError, match=rf"{tmp_path}: expert=None is not allowed"):
        deploy(path=str(tmp_path))
    with pytest.raises(ValueError, match=r"adapter_config.json does not exist"):
        deploy(path=str(tmp_path), expert=0)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(BundleError, match="peft_type='IA3' is not allowed: LORA"):
        deploy(path=str(tmp_path), expert=0)
    with pytest.raises(ValidationError, match=r"loras\.mine\.expert"):
        deploy(path=str(tmp_path), expert=-1)


class Buyer:
    """Who signs the receipt."""

    def __init__(self) -> None:
        self._key = Ed25519PrivateKey.generate()

    @property
    def public_key(self) -> str:
        return self._key.public_key().public_bytes_raw().hex()

    def sign(self, message: bytes) -> bytes:
        return self._key.sign(message)


def test_a_bought_adapter_is_deployed_with_its_opened_receipt_alone(
    tiny_bundle_path: Path, tiny_bundle: Bundle, lora_path: Path, tmp_path: Path
) -> None:
    weights = safetensors.torch.load_file(lora_path / ADAPTER_WEIGHTS)
    metadata = {"format": "pt", ADAPTER_ID: "a" * 64}
    safetensors.torch.save_file(weights, tmp_path / ADAPTER_WEIGHTS, metadata=metadata)
    (tmp_path / ADAPTER_CONFIG).write_bytes((lora_path / ADAPTER_CONFIG).read_bytes())
    buyer, digest = Buyer(), "0" * 64
    facts = ModuleFacts(
        name="a", d_in=1, r=1, d_out=1, rows=1, proof_bytes=1, peak_to_rms=1.0, input_error=0.0
    )
    paid = Receipt(
        protocol="test",
        adapter_id="a" * 64,
        adapter="ink",
        base=BaseFacts(
            digest=tiny_bundle.weights_digest(f"expert_{EXPERT}"),
            expert=EXPERT,
            router_digest=None,
        ),
        state=State.RELEASED,
        session=SessionFacts(session=digest, transcript_root=digest),
        weights_sha256=file_sha256(Folder(tmp_path), ADAPTER_WEIGHTS),
        config_sha256=file_sha256(Folder(tmp_path), ADAPTER_CONFIG),
        integers_sha256=digest,
        price=1,
        contributor=digest,
        escrow=None,
        escrow_statement=None,
        modules=(facts,),
        totals={},
        created="2026-01-31T12:00:00Z",
    )

    def deploy(receipt_key: str | None = buyer.public_key) -> None:
        options = {"path": str(tmp_path), "receipt_key": receipt_key}
        build(AppArgs(bundle=str(tiny_bundle_path), loras={"bought": options}))

    with pytest.raises(ReceiptError, match=r"receipt\.json does not exist"):
        deploy()
    Folder(tmp_path).write_json(RECEIPT, paid.sign(buyer))
    with pytest.raises(ReceiptError, match=f"receipt_key={buyer.public_key}: set that only if"):
        deploy(receipt_key=None)
    with pytest.raises(
        ReceiptError, match="state='RELEASED' is not allowed here: 'OPENED' is needed"
    ):
        deploy()
    Folder(tmp_path).write_json(RECEIPT, replace(paid, state=State.OPENED).sign(buyer))
    deploy()
    with pytest.raises(ValidationError, match=r"loras\.bought\.receipt_key"):
        deploy(receipt_key="mine")


def test_a_picture_is_drawn_again_with_its_adapter_alone(
    client: httpx.Client, lora_path: Path, tiny_bundle_path: Path, tmp_path: Path
) -> None:
    body = REQUEST | {"lora": "merged"}
    answer = client.post("v1/images/generations", json=body)
    assert answer.status_code == 200, answer.text
    path = tmp_path / "picture.png"
    path.write_bytes(base64.b64decode(answer.json()["data"][1]["b64_json"]))
    command = [str(path), "--bundle", str(tiny_bundle_path)]
    assert replay(command) == 2
    assert replay([*command, "--lora", str(lora_path)]) == 0
    other = tmp_path / "other"
    shutil.copytree(lora_path, other)
    weights = safetensors.torch.load_file(other / ADAPTER_WEIGHTS)
    changed = {name: 2 * tensor for name, tensor in weights.items()}
    safetensors.torch.save_file(changed, other / ADAPTER_WEIGHTS)
    assert replay([*command, "--lora", str(other)]) == 2
