"""Bundles of one expert and of newer ones over HTTP: the pictures of `generate`."""

import base64
import io
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from PIL import Image

from paris_ray.bundle import load_bundle
from paris_ray.sampling import generate

pytestmark = [pytest.mark.serve, pytest.mark.usefixtures("replica_threads")]


@pytest.mark.parametrize("colocated", [True, False])
def test_a_bundle_of_one_expert_is_served(
    start_app: Callable[..., str], single_bundle_path: Path, colocated: bool
) -> None:
    url = start_app(f"single-{colocated}", bundle=str(single_bundle_path), colocated=colocated)
    request = {"prompt": "a red cat", "seed": 7, "response_format": "b64_json"}
    answer = httpx.post(f"{url}/v1/images/generations", json=request, timeout=60)
    assert answer.status_code == 200, answer.text
    picture = Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"])))
    (image,) = generate(load_bundle(str(single_bundle_path)), ["a red cat"], seed=7)
    assert picture.convert("RGB").tobytes() == image.tobytes()
    refused = httpx.post(
        f"{url}/v1/images/generations", json=request | {"routing": "top-2"}, timeout=60
    )
    assert refused.status_code in (400, 422)
    assert "there are 1 experts" in refused.text


def test_experts_with_modern_blocks_and_a_text_adapter_are_served(
    start_app: Callable[..., str], newer_bundle_path: Path
) -> None:
    """Each by itself, so that texts of several tokens and their masks travel to it."""
    url = start_app("newer", bundle=str(newer_bundle_path))
    request = {"prompt": "a blue dog a cat", "seed": 7, "n": 2, "routing": "full"}
    answer = httpx.post(f"{url}/v1/images/generations", json=request, timeout=60)
    assert answer.status_code == 200, answer.text
    served = [
        Image.open(io.BytesIO(base64.b64decode(p["b64_json"]))) for p in answer.json()["data"]
    ]
    bundle = load_bundle(str(newer_bundle_path))
    images = generate(bundle, [request["prompt"]] * 2, seed=7, routing="full")
    pixels = [picture.convert("RGB").tobytes() for picture in served]
    assert pixels == [image.tobytes() for image in images]
