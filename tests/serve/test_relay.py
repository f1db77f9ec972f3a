"""What clients notice when a Sampler is full, late or dead: as little as possible."""

import asyncio
import json
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import ray
from ray import serve

from paris_ray.sampling.engine import DeadlineError, QueueFullError
from serve.drawing import Drawing, DrawRequest, Partial
from serve.expert import OtherVersionError
from serve.ingress import HttpOptions, Ingress
from serve.routes import create_api
from serve.source import BundleSource

pytestmark = pytest.mark.serve

IMAGES = "v1/images/generations"
PIXELS = np.zeros((32, 32, 3), dtype=np.uint8)


def drawing(request: DrawRequest) -> Drawing:
    """Return black pictures."""
    n, steps = len(request.seeds), request.options.num_inference_steps
    return Drawing(
        pictures=np.stack([PIXELS] * n),
        expert_usage=[[1.0, 0.0, 0.0]] * n,
        expert_weights=[[[1.0, 0.0, 0.0]] * steps] * n,
        missing_experts=[2],
        seconds=0.0,
        bundle=None,
    )


class FullSampler:
    """Refuses everything, as the prompt says."""

    async def draw(self, request: DrawRequest) -> Drawing:
        raise {"full": QueueFullError("7 pictures wait already", 7, 2.5), "late": DeadlineError()}[
            request.prompts[0]
        ]

    async def stream(self, request: DrawRequest) -> AsyncIterator[Drawing]:
        yield await self.draw(request)


class MortalSampler:
    """Dies with its first requests, after it has sent what there is to send.

    Args:
        lives: A folder with a file a death that is still to come, or a `changed` bundle.
    """

    def __init__(self, lives: str) -> None:
        self._lives = Path(lives)

    def _die_if_it_is_time(self) -> None:
        for life in self._lives.iterdir():
            life.unlink()
            if life.name.startswith("changed"):
                raise OtherVersionError("expert 1 is of another version")
            os.kill(os.getpid(), signal.SIGKILL)

    async def draw(self, request: DrawRequest) -> Drawing:
        self._die_if_it_is_time()
        return drawing(request)

    async def stream(self, request: DrawRequest) -> AsyncIterator[Partial | Drawing]:
        for index in range(request.partial_images):
            yield Partial(picture=0, index=index, step=index, pixels=PIXELS, bundle=None)
            if index == 1:
                self._die_if_it_is_time()
        yield drawing(request)


class EndlessSampler:
    """Never finishes, and tells when it is stopped.

    Args:
        stopped: A folder for a file a request that was stopped, called as its prompt.
    """

    def __init__(self, stopped: str) -> None:
        self._stopped = Path(stopped)

    async def draw(self, request: DrawRequest) -> None:
        (self._stopped / f"{request.prompts[0]} began").touch()
        try:
            await asyncio.Event().wait()
        finally:
            (self._stopped / request.prompts[0]).touch()

    async def stream(self, request: DrawRequest) -> AsyncIterator[Partial | None]:
        if request.partial_images:
            yield Partial(picture=0, index=0, step=0, pixels=PIXELS, bundle=None)
        yield await self.draw(request)


Deploy = Callable[..., str]


@pytest.fixture
def deploy(serve_address: str, tiny_bundle_path: Path) -> Deploy:
    """A function that serves a Sampler of the test's own, and returns the URL."""

    def start(name: str, sampler_class: type, *args: object, **options: Any) -> str:
        small = {"ray_actor_options": {"num_cpus": 0.1}}
        sampler = serve.deployment(name="Sampler", **small)(sampler_class).bind(*args)
        ingress = serve.deployment(name="Ingress", **small)(serve.ingress(create_api())(Ingress))
        source = BundleSource(str(tiny_bundle_path))
        app = ingress.bind(source, sampler, None, HttpOptions(**options))
        serve.run(app, name=name, route_prefix=f"/{name}")
        return f"{serve_address}/{name}"

    return start


def test_a_full_queue_and_a_late_picture(deploy: Deploy) -> None:
    url = deploy("full", FullSampler)
    for stream in (False, True):
        body = {"prompt": "full", "stream": stream}
        full = httpx.post(f"{url}/{IMAGES}", json=body, timeout=60)
        assert full.status_code == 429
        assert (full.headers["retry-after"], full.headers["x-paris-queue-position"]) == ("3", "7")
        error = full.json()["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
        assert "7 pictures wait already" in error["message"]
        late = httpx.post(f"{url}/{IMAGES}", json=body | {"prompt": "late"}, timeout=60)
        assert late.status_code == 408
        assert late.json()["error"]["code"] == "timeout"
        assert late.headers["x-should-retry"] == "false"
    serve.delete("full")


def test_a_request_outlives_its_sampler(deploy: Deploy, tmp_path: Path) -> None:
    url = deploy("mortal-sampler", MortalSampler, str(tmp_path))
    for life in "ab":
        (tmp_path / life).touch()
    response = httpx.post(f"{url}/{IMAGES}", json={"prompt": "a cat", "seed": 3}, timeout=120)
    assert response.status_code == 200, response.text
    assert response.json()["paris"]["seed"] == 3
    assert (response.json()["paris"]["degraded"], response.json()["paris"]["missing_experts"]) == (
        True,
        [2],
    )
    assert response.headers["x-paris-missing-experts"] == "2"
    assert not list(tmp_path.iterdir())
    (tmp_path / "c").touch()
    body = {"prompt": "a cat", "stream": True, "partial_images": 3}
    response = httpx.post(f"{url}/{IMAGES}", json=body, timeout=120)
    assert not list(tmp_path.iterdir())
    lines = [line for line in response.text.split("\n") if line.startswith("data: ")]
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert [event.get("partial_image_index") for event in events] == [0, 1, 2, None]
    serve.delete("mortal-sampler")


def test_a_request_outlives_a_change_of_bundle(deploy: Deploy, tmp_path: Path) -> None:
    """It is drawn again by a Sampler that is of the experts' bundle."""
    url = deploy("changing-sampler", MortalSampler, str(tmp_path))
    for options in ({}, {"stream": True, "partial_images": 3}):
        for change in ("changed-a", "changed-b"):
            (tmp_path / change).touch()
        body = {"prompt": "a cat", **options}
        response = httpx.post(f"{url}/{IMAGES}", json=body, timeout=120)
        assert response.status_code == 200, response.text
        assert "error" not in response.text
        assert not list(tmp_path.iterdir())
    serve.delete("changing-sampler")


def appears(path: Path) -> bool:
    """Return whether a file appears within a minute."""
    for _ in range(600):
        if path.exists():
            return True
        time.sleep(0.1)
    return False


def test_a_client_that_hangs_up_stops_its_request(deploy: Deploy, tmp_path: Path) -> None:
    url = deploy("endless", EndlessSampler, str(tmp_path))
    body = {"prompt": "streamed", "stream": True, "partial_images": 1}
    with httpx.stream("POST", f"{url}/{IMAGES}", json=body, timeout=60) as response:
        assert next(response.iter_lines()).startswith("event: ")
        assert appears(tmp_path / "streamed began")
        assert not (tmp_path / "streamed").exists()
    assert appears(tmp_path / "streamed")
    for prompt, stream in (("whole", False), ("late", True)):  # the latter before its first event
        with ThreadPoolExecutor(1) as pool, httpx.Client(timeout=60) as client:
            body = {"prompt": prompt, "stream": stream}
            pending = pool.submit(client.post, f"{url}/{IMAGES}", json=body)
            assert appears(tmp_path / f"{prompt} began")
            assert not (tmp_path / prompt).exists()
            hang_up(client)
            assert appears(tmp_path / prompt)
            assert pending.exception() is not None
    serve.delete("endless")


def hang_up(client: httpx.Client) -> None:
    """Close the connections of a client that waits for an answer in another thread."""
    for connection in client._transport._pool.connections:
        stream = connection._connection._network_stream
        stream.get_extra_info("socket").shutdown(socket.SHUT_RDWR)


def test_the_operators_time_ends_a_request_whose_sampler_is_gone(
    deploy: Deploy, tmp_path: Path
) -> None:
    class DyingSampler:
        async def draw(self, _: DrawRequest) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

    url = deploy("dying", DyingSampler, timeout_s=3)
    response = httpx.post(f"{url}/{IMAGES}", json={"prompt": "a cat"}, timeout=60)
    assert response.status_code == 408
    assert response.json()["error"]["type"] == "timeout_error"
    serve.delete("dying")


def test_a_killed_sampler_costs_nobody_a_picture(start_app: Callable[..., str]) -> None:
    url = start_app("two-lives", colocated=True)
    body = {"prompt": "a cat", "seed": 1, "n": 4, "num_inference_steps": 100, "routing": "full"}
    before = httpx.post(f"{url}/{IMAGES}", json=body, timeout=120).json()
    with ThreadPoolExecutor(4) as pool:
        answers = [
            pool.submit(httpx.post, f"{url}/{IMAGES}", json=body, timeout=120) for _ in "1234"
        ]
        wait_until_drawing(url)
        ray.kill(sampler_of("two-lives"))
        assert not any(answer.done() for answer in answers)
        got = [answer.result() for answer in answers]
    assert [response.status_code for response in got] == [200] * 4
    assert all(response.json()["data"] == before["data"] for response in got)


def wait_until_drawing(url: str) -> None:
    deadline = time.monotonic() + 60
    while httpx.get(f"{url}/readyz", timeout=60).json().get("active_pictures", 0) == 0:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def sampler_of(app: str) -> Any:
    (name,) = [
        actor["name"]
        for actor in ray.util.list_named_actors(all_namespaces=True)
        if f"{app}#Sampler#" in actor["name"]
    ]
    return ray.get_actor(name, namespace="serve")
