"""What clients see when parts of the application fail."""

import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray import serve

from paris_ray.errors import DeadlineError, QueueFullError
from serve.drawing import Drawing, DrawRequest, ExpertUnavailableError
from serve.ingress import Ingress
from serve.routes import create_api
from serve.source import BundleSource
from tests.serve.applications import end_applications

pytestmark = pytest.mark.serve

IMAGES = "v1/images/generations"


class FailingSampler:
    """Raises what the prompt says."""

    async def draw(self, request: DrawRequest) -> Drawing:
        raise {
            "full": QueueFullError("7 pictures wait already", 7, 2.5),
            "late": DeadlineError(),
            "dead": ExpertUnavailableError("Expert 2 stopped"),
            "bug": RuntimeError("secret"),
        }[request.prompts[0]]

    async def stream(self, request: DrawRequest) -> AsyncIterator[Drawing]:
        yield await self.draw(request)


@pytest.fixture(scope="module")
def failing_url(serve_address: str, tiny_bundle_path: Path) -> Iterator[str]:
    """The URL of an Ingress whose Sampler fails."""
    small = {"ray_actor_options": {"num_cpus": 0.1}}
    sampler = serve.deployment(name="Sampler", **small)(FailingSampler).bind()
    ingress = serve.deployment(name="Ingress", **small)(serve.ingress(create_api())(Ingress))
    app = ingress.bind(BundleSource(str(tiny_bundle_path)), sampler, None)
    serve.run(app, name="failing", route_prefix="/failing")
    yield f"{serve_address}/failing"
    end_applications(["failing"])


def ask(url: str, prompt: str, *, stream: bool = False) -> httpx.Response:
    return httpx.post(f"{url}/{IMAGES}", json={"prompt": prompt, "stream": stream}, timeout=60)


def test_a_full_queue_and_a_late_picture(failing_url: str) -> None:
    for stream in (False, True):
        full = ask(failing_url, "full", stream=stream)
        assert full.status_code == 429
        assert (full.headers["retry-after"], full.headers["x-paris-queue-position"]) == ("3", "7")
        error = full.json()["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
        assert "7 pictures wait already" in error["message"]
        late = ask(failing_url, "late", stream=stream)
        assert '"code":"timeout"' in late.text.replace(" ", "")
        if not stream:  # which a busy machine has begun with 200
            assert late.status_code == 408
            assert late.headers["x-should-retry"] == "false"


def test_a_dead_expert_is_unavailable(failing_url: str) -> None:
    response = ask(failing_url, "dead")
    assert response.status_code == 503
    assert response.json()["error"] == {
        "message": "A part of the model is being replaced. Send the request again",
        "type": "unavailable_error",
        "param": None,
        "code": "unavailable",
    }


def test_a_bug_is_not_shown(failing_url: str) -> None:
    response = ask(failing_url, "bug")
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert "secret" not in response.text


def test_killed_expert_comes_back(
    separate_url: str, kill_replicas: Callable[[str, str], int]
) -> None:
    url = separate_url
    body: dict[str, Any] = {"prompt": "a cat", "seed": 1, "routing": "full"}

    def draw(steps: int) -> httpx.Response:
        return httpx.post(f"{url}/{IMAGES}", json=body | {"num_inference_steps": steps}, timeout=90)

    before = draw(3).json()
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(draw, 100) for _ in range(4)]
        while httpx.get(f"{url}/readyz", timeout=60).json().get("active_pictures", 0) == 0:
            time.sleep(0.01)
        assert kill_replicas("separate", "Expert-0") == 1
        assert not any(answer.done() for answer in answers)
        drawn = [answer.result() for answer in answers]
    assert {answer.status_code for answer in drawn} == {200}
    assert {answer.json()["data"][0]["b64_json"] for answer in drawn} == {
        draw(100).json()["data"][0]["b64_json"]
    }
    assert draw(3).json()["data"] == before["data"]
