"""A LoRA over HTTP: the picture that `generate` draws with it, and clear refusals."""

import base64
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError
from torch import nn

from paris_ray.artifacts import Folder, publish
from paris_ray.bundle import Bundle
from paris_ray.config import LoRAConfig
from paris_ray.errors import BundleError
from paris_ray.models.lora import Adapter
from paris_ray.models.peft_layout import save_adapter
from paris_ray.sampling import generate
from serve.app import AppArgs, build

pytestmark = pytest.mark.serve

EXPERT = 1
REQUEST = {"prompt": "a red cat", "n": 2, "seed": 5, "num_inference_steps": 3, "routing": "full"}


@pytest.fixture(scope="module")
def lora_path(
    tiny_bundle: Bundle,
    randomised: Callable[[nn.Module, int], nn.Module],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A random adapter of expert 1, as `jobs.train_lora` publishes it."""
    path = tmp_path_factory.mktemp("loras") / "mine"
    adapter = randomised(Adapter.create(tiny_bundle.expert(EXPERT), LoRAConfig(r=4), 0), 7)
    save_adapter(adapter, Folder(path))
    publish(Folder(path), "lora", config_digest="", parents={}, facts={"expert": EXPERT})
    return path


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
