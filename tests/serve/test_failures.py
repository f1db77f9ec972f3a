"""What clients see when parts of the application fail."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray import serve

from serve.expert import ExpertUnavailableError
from serve.ingress import Ingress
from serve.routes import create_api
from serve.source import BundleSource

pytestmark = pytest.mark.serve

IMAGES = "v1/images/generations"


def serve_failing(name: str, error: Exception, address: str, bundle: Path) -> httpx.Response:
    """Answer one request with a Sampler that raises."""

    class FailingSampler:
        def draw(self, *_: object) -> None:
            raise error

    sampler = serve.deployment(name="Sampler", ray_actor_options={"num_cpus": 0.1})(FailingSampler)
    ingress_class = serve.ingress(create_api())(Ingress)
    ingress = serve.deployment(name="Ingress", ray_actor_options={"num_cpus": 0.1})(ingress_class)
    app = ingress.bind(BundleSource(str(bundle)), sampler.bind(), None)
    serve.run(app, name=name, route_prefix=f"/{name}")
    response = httpx.post(f"{address}/{name}/{IMAGES}", json={"prompt": "a cat"}, timeout=60)
    serve.delete(name)
    return response


def test_a_dead_expert_is_unavailable(serve_address: str, tiny_bundle_path: Path) -> None:
    error = ExpertUnavailableError("Expert 2 stopped")
    response = serve_failing("unavailable", error, serve_address, tiny_bundle_path)
    assert response.status_code == 503
    assert response.json()["error"] == {
        "message": "A part of the model is being replaced. Send the request again",
        "type": "unavailable_error",
        "param": None,
        "code": "unavailable",
    }


def test_a_bug_is_not_shown(serve_address: str, tiny_bundle_path: Path) -> None:
    response = serve_failing("bug", RuntimeError("secret"), serve_address, tiny_bundle_path)
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert "secret" not in response.text


def test_killed_expert_comes_back(
    start_app: Callable[..., str], kill_replicas: Callable[[str, str], int]
) -> None:
    url = start_app("mortal")
    body: dict[str, Any] = {"prompt": "a cat", "seed": 1, "routing": "full"}

    def draw(steps: int) -> httpx.Response:
        return httpx.post(f"{url}/{IMAGES}", json=body | {"num_inference_steps": steps}, timeout=90)

    before = draw(3).json()
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(draw, 100) for _ in range(4)]
        while httpx.get(f"{url}/readyz", timeout=60).json().get("active_pictures", 0) == 0:
            time.sleep(0.01)
        assert kill_replicas("mortal", "Expert-0") == 1
        assert not any(answer.done() for answer in answers)
        drawn = [answer.result() for answer in answers]
    assert {answer.status_code for answer in drawn} == {200}
    assert {answer.json()["data"][0]["b64_json"] for answer in drawn} == {
        draw(100).json()["data"][0]["b64_json"]
    }
    assert draw(3).json()["data"] == before["data"]
