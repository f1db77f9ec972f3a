"""A folder as the public release has it, served with no conversion."""

import base64
import io
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from paris_ray.bundle import Bundle, load_bundle
from paris_ray.model_folder.history import EXPORTED
from paris_ray.sampling import generate
from tests.long_tests import chaos
from tests.serve.processes import maps_torch, processes

pytestmark = [pytest.mark.serve, pytest.mark.usefixtures("replica_threads")]

Start = Callable[..., str]
BODIES: list[dict[str, Any]] = [
    {"prompt": "a red cat", "seed": 7, "num_inference_steps": 4},
    {"prompt": "blue dog", "seed": 1, "n": 3, "num_inference_steps": 3, "guidance_scale": 1.0},
    {"prompt": "cat", "seed": 2, "num_inference_steps": 2, "routing": "full-ensemble"},
    {"prompt": "cat", "seed": 2, "num_inference_steps": 5, "routing": "top-1"},
]


def drawn(url: str, **body: Any) -> np.ndarray:
    response = httpx.post(f"{url}/v1/images/generations", json=body, timeout=60)
    assert response.status_code == 200, response.text
    pictures = [base64.b64decode(picture["b64_json"]) for picture in response.json()["data"]]
    return np.stack([np.asarray(Image.open(io.BytesIO(picture))) for picture in pictures])


def expected(bundle: Bundle, prompt: str, n: int = 1, **options: Any) -> np.ndarray:
    return np.stack([np.asarray(image) for image in generate(bundle, [prompt] * n, **options)])


@pytest.fixture(scope="module")
def url(start_app: Start, release_path: Path) -> str:
    return start_app("release", bundle=str(release_path))


def test_the_model_is_described(url: str) -> None:
    (model,) = httpx.get(f"{url}/v1/models").json()["data"]
    assert model["id"] == "paris-small"
    assert model["paris"] == {
        "num_experts": 3,
        "picture_size": 32,
        "defaults": {
            "num_inference_steps": 50,
            "solver": "euler",
            "time_grid": "linspace",
            "guidance_scale": 7.5,
            "routing": "top-2",
        },
        "qualities": ["low", "medium", "high"],
        "example_prompts": [],
        "loras": {},
        "attribution": None,
        "history": [asdict(EXPORTED[0])],
    }


def test_defaults_are_those_of_the_release(url: str) -> None:
    body = {"prompt": "a red cat", "size": "32x32"}
    answer = httpx.post(f"{url}/v1/images/generations", json=body, timeout=60).json()
    assert answer["size"] == "32x32"
    told = answer["paris"]
    assert (told["num_inference_steps"], told["guidance_scale"], told["routing"]) == (
        50,
        7.5,
        "top-2",
    )


def test_a_quality_is_a_preset_of_the_bundle(url: str, release_bundle: Bundle) -> None:
    preset = release_bundle.facts.sampling.presets["high"]
    body = {"prompt": "a red cat", "seed": 3}
    own = {name: getattr(preset, name) for name in ("num_inference_steps", "solver", "time_grid")}
    picture = drawn(url, **body, quality="hd")
    np.testing.assert_array_equal(picture, expected(release_bundle, **body, **own))
    assert (picture != drawn(url, **body)).any()


def test_separate_experts_draw_what_generate_draws(url: str, release_bundle: Bundle) -> None:
    for body in BODIES:
        np.testing.assert_array_equal(drawn(url, **body), expected(release_bundle, **body))


@chaos
def test_arguments_of_a_single_gpu_draw_the_same(start_app: Start, release_path: Path) -> None:
    args = {"colocated": True, "offload": True, "dtype": "bfloat16", "device": "cpu"}
    app = start_app("release-colocated", bundle=str(release_path), **args)
    bundle = load_bundle(str(release_path), dtype="bfloat16")
    for body in BODIES:
        np.testing.assert_array_equal(drawn(app, **body), expected(bundle, **body))


def test_clips_tokenizer_brings_no_torch_into_an_ingress(url: str) -> None:
    assert drawn(url, **BODIES[0]).shape == (1, 32, 32, 3)
    (ingress,) = processes("ServeReplica:release:Ingress")
    assert not maps_torch(ingress)
