"""What clients notice when a Sampler is full, late or dead: as little as possible."""

import asyncio
import json
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml
from ray import serve

from paris_ray.api_keys import digest_of
from paris_ray.errors import QueueFullError
from paris_ray.pictures import read_picture
from serve.drawing import Drawing, DrawRequest, OtherVersionError, Partial
from serve.ingress import HttpOptions, Ingress
from serve.routes import create_api
from serve.source import BundleSource, Origin
from tests.long_tests import chaos
from tests.serve.applications import end_applications
from tests.serve.waiting import WAIT_S, wait_until

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
        last_resort=True,
        seconds=0.0,
        origin=Origin(),
    )


def whole(request: DrawRequest) -> Drawing:
    """Return black pictures that no expert was missing for."""
    return replace(drawing(request), missing_experts=[], last_resort=False)


class MortalSampler:
    """Dies with its first requests, after it has sent what there is to send.

    Args:
        folder: `lives` has a file a death that is still to come, or a `changed` bundle; `closed`
            keeps the next one from starting.
    """

    def __init__(self, folder: str) -> None:
        self._lives = Path(folder) / "lives"
        while (Path(folder) / "closed").exists():
            time.sleep(0.1)

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
            yield Partial(picture=0, index=index, step=index, pixels=PIXELS, origin=Origin())
            if index == 1:
                self._die_if_it_is_time()
        yield drawing(request)


class CountingSampler:
    """Draws black pictures and writes down each request.

    Args:
        folder: A file a request and a cancel; no request is answered before `open` is there.
    """

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    async def draw(self, request: DrawRequest) -> Drawing:
        if request.prompts[0] == "full":
            raise QueueFullError("7 pictures wait already", 7, 2.5)
        (self._folder / f"{request.id} {request.client} {request.max_pictures_of_client}").touch()
        while not (self._folder / "open").exists():
            await asyncio.sleep(0.05)
        return whole(request)

    async def cancel(self, client: str, request_id: str) -> int | None:
        (self._folder / f"{request_id} {client} cancelled").touch()
        return None


class ChangingSampler:
    """Draws black pictures, in another data type from some time on.

    Args:
        folder: `changed` is there from then on.
    """

    def __init__(self, folder: str) -> None:
        self._changed = Path(folder) / "changed"

    async def draw(self, request: DrawRequest) -> Drawing:
        origin = Origin(dtype="bfloat16") if self._changed.exists() else Origin()
        request.check_origin(origin)
        made = drawing(request) if "degraded" in request.prompts[0] else whole(request)
        return replace(made, origin=origin)


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
            yield Partial(picture=0, index=0, step=0, pixels=PIXELS, origin=Origin())
        yield await self.draw(request)


Deploy = Callable[..., str]


@contextmanager
def deploying(address: str, bundle: Path) -> Iterator[Deploy]:
    """Yield a function that serves a Sampler of the test's own, and returns the URL."""
    names = []

    def start(
        name: str,
        sampler_class: type,
        *args: object,
        key_file: str | None = None,
        **options: Any,
    ) -> str:
        # As often as `serve.app` has it: who dies is replaced when Serve asks it next.
        small = {"ray_actor_options": {"num_cpus": 0.1}, "health_check_period_s": 1}
        sampler = serve.deployment(name="Sampler", **small)(sampler_class).bind(*args)
        ingress = serve.deployment(name="Ingress", **small)(serve.ingress(create_api())(Ingress))
        source = BundleSource(str(bundle))
        app = ingress.bind(source, sampler, key_file, HttpOptions(**options))
        names.append(name)
        serve.run(app, name=name, route_prefix=f"/{name}")
        return f"{address}/{name}"

    yield start
    end_applications(names)


@pytest.fixture
def deploy(serve_address: str, tiny_bundle_path: Path) -> Iterator[Deploy]:
    with deploying(serve_address, tiny_bundle_path) as start:
        yield start


@dataclass(frozen=True)
class Mortal:
    """An application whose Sampler dies when a test says so; each test leaves it alive.

    Attributes:
        url: Of the application.
        lives: A folder with a file a death, or a change of the bundle, that is still to come.
        closed: While this file is there, no Sampler takes the place of a dead one.
    """

    url: str
    lives: Path
    closed: Path


@pytest.fixture(scope="module")
def mortal_of_all_tests(
    serve_address: str, tiny_bundle_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Mortal]:
    folder = tmp_path_factory.mktemp("mortal")
    (folder / "lives").mkdir()
    with deploying(serve_address, tiny_bundle_path) as start:
        url = start("mortal-sampler", MortalSampler, str(folder))
        yield Mortal(url, folder / "lives", folder / "closed")


@pytest.fixture
def mortal(mortal_of_all_tests: Mortal) -> Iterator[Mortal]:
    """It lives when a test has failed, too: else all that come after it would wait in vain."""
    yield mortal_of_all_tests
    mortal_of_all_tests.closed.unlink(missing_ok=True)
    for life in mortal_of_all_tests.lives.iterdir():
        life.unlink(missing_ok=True)


def test_a_request_outlives_its_sampler(mortal: Mortal) -> None:
    for life in "ab":
        (mortal.lives / life).touch()
    response = httpx.post(
        f"{mortal.url}/{IMAGES}", json={"prompt": "a cat", "seed": 3}, timeout=120
    )
    assert response.status_code == 200, response.text
    assert response.json()["paris"]["seed"] == 3
    assert response.json()["paris"]["last_resort"] is True
    assert (response.json()["paris"]["degraded"], response.json()["paris"]["missing_experts"]) == (
        True,
        [2],
    )
    assert response.headers["x-paris-missing-experts"] == "2"
    assert not list(mortal.lives.iterdir())
    (mortal.lives / "c").touch()
    body = {"prompt": "a cat", "stream": True, "partial_images": 3}
    response = httpx.post(f"{mortal.url}/{IMAGES}", json=body, timeout=120)
    assert not list(mortal.lives.iterdir())
    lines = [line for line in response.text.split("\n") if line.startswith("data: ")]
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert [event.get("partial_image_index") for event in events] == [0, 1, 2, None]


def test_a_request_outlives_a_change_of_bundle(mortal: Mortal) -> None:
    """It is drawn again by a Sampler that is of the experts' bundle."""
    for options in ({}, {"stream": True, "partial_images": 3}):
        for change in ("changed-a", "changed-b"):
            (mortal.lives / change).touch()
        body = {"prompt": "a cat", **options}
        response = httpx.post(f"{mortal.url}/{IMAGES}", json=body, timeout=120)
        assert response.status_code == 200, response.text
        assert "error" not in response.text
        assert not list(mortal.lives.iterdir())


def cancelled(url: str, request_id: str) -> Any:
    """Cancel a request as soon as the Ingress, too, has noticed; return the answer."""
    answers: list[httpx.Response] = []

    def is_cancelled() -> bool:
        answers.append(httpx.delete(f"{url}/{IMAGES}/{request_id}", timeout=60))
        return answers[-1].status_code == 200

    wait_until(is_cancelled)
    return answers[-1].json()


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_between_two_samplers_can_be_cancelled(mortal: Mortal, stream: bool) -> None:
    url = mortal.url
    mortal.closed.touch()
    (mortal.lives / "a").touch()
    with ThreadPoolExecutor(2) as pool:
        body = {"prompt": "a cat", "stream": stream, "partial_images": 2 if stream else 0}
        pending = pool.submit(
            httpx.post, f"{url}/{IMAGES}", json=body, headers={"X-Request-Id": "mine"}, timeout=120
        )
        while list(mortal.lives.iterdir()):
            time.sleep(0.1)
        assert cancelled(url, "mine") == {"id": "mine", "cancelled": True, "step": 0}
        # So can one that comes while there is none.
        later = pool.submit(
            httpx.post, f"{url}/{IMAGES}", json=body, headers={"X-Request-Id": "next"}, timeout=120
        )
        assert cancelled(url, "next") == {"id": "next", "cancelled": True, "step": 0}
        responses = [pending.result(), later.result()]
    for response in responses:
        assert "cancelled_error" in response.text
        assert response.status_code == 499 or stream  # a stream has perhaps begun with 200
    mortal.closed.unlink()
    assert httpx.post(f"{url}/{IMAGES}", json={"prompt": "a cat"}, timeout=120).status_code == 200


def test_links_are_drawn_again_once_and_within_the_quotas(deploy: Deploy, tmp_path: Path) -> None:
    keys, drawn = tmp_path / "keys.yaml", tmp_path / "drawn"
    drawn.mkdir()
    quotas = {"picture_steps_per_minute": 6, "concurrent_pictures": 2}
    entries = [
        {"name": "alice", "sha256": digest_of("a")},
        {"name": "bob", "sha256": digest_of("b"), "quotas": quotas},
    ]
    keys.write_text(yaml.safe_dump(entries))
    options = {"key_file": str(keys), "max_pictures": 20}
    first, second = (
        deploy(name, CountingSampler, str(drawn), **options) for name in ("links-a", "links-b")
    )
    (drawn / "open").touch()
    alice, bob = ({"Authorization": f"Bearer {secret}"} for secret in "ab")

    def ask(headers: dict[str, str], **body: object) -> httpx.Response:
        return httpx.post(f"{first}/{IMAGES}", json=body, headers=headers, timeout=60)

    # Nobody is charged for what is refused.
    assert [ask(bob, prompt="full").status_code for _ in range(4)] == [429] * 4
    answer = ask(bob, prompt="a cat", n=2, response_format="url")
    assert answer.status_code == 200, answer.text
    assert ask(bob, prompt="a cat").json()["error"]["code"] == "rate_limit_exceeded"
    refused = httpx.post(
        f"{first}/v1/images/batches", json={"prompts": ["a"] * 21}, headers=alice, timeout=60
    )
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "n")
    assert "this server takes 20 at once" in refused.json()["error"]["message"]
    # Another application of this cluster has the secret, and a memory and counts of its own.
    links = [picture["url"].replace(first, second) for picture in answer.json()["data"]]
    for file in drawn.iterdir():
        file.unlink()
    with ThreadPoolExecutor(8) as pool:
        pending = [pool.submit(httpx.get, links[0], timeout=60) for _ in range(8)]
        while not list(drawn.iterdir()):
            assert not any(each.done() for each in pending)
            time.sleep(0.1)
        time.sleep(0.5)  # until all of them are there; too short a time would only weaken the test
        (drawn / "open").touch()
        files = {(r.result().status_code, r.result().content) for r in pending}
    assert len(files) == 1
    (made,) = [file.name for file in drawn.iterdir() if file.name != "open"]
    assert made.endswith(" bob 2")
    assert httpx.get(links[1], timeout=60).status_code == 200  # the other half of the quota
    third = ask(alice, prompt="a dog", response_format="url").json()["data"][0]["url"]
    assert httpx.get(third.replace(first, second), timeout=60).status_code == 200
    keys.write_text(yaml.safe_dump(entries[:1]))  # bob's key is revoked
    for _ in range(100):
        gone = httpx.get(links[0], timeout=60)
        if gone.status_code != 200:
            break
        time.sleep(0.1)
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "link_expired")


def test_a_client_that_hangs_up_stops_its_request(deploy: Deploy, tmp_path: Path) -> None:
    url = deploy("endless", EndlessSampler, str(tmp_path))
    body = {"prompt": "streamed", "stream": True, "partial_images": 1}
    with httpx.stream("POST", f"{url}/{IMAGES}", json=body, timeout=60) as response:
        assert next(response.iter_lines()).startswith("event: ")
        wait_until((tmp_path / "streamed began").exists)
        assert not (tmp_path / "streamed").exists()
    wait_until((tmp_path / "streamed").exists)
    for prompt, stream in (("whole", False), ("late", True)):  # the latter before its first event
        with ThreadPoolExecutor(1) as pool, httpx.Client(timeout=60) as client:
            body = {"prompt": prompt, "stream": stream}
            pending = pool.submit(client.post, f"{url}/{IMAGES}", json=body)
            wait_until((tmp_path / f"{prompt} began").exists)
            assert not (tmp_path / prompt).exists()
            hang_up(client)
            wait_until((tmp_path / prompt).exists)
            assert pending.exception() is not None


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


def test_a_killed_sampler_costs_nobody_a_picture(
    colocated_url: str, kill_replicas: Callable[[str, str], int]
) -> None:
    url = colocated_url
    body = {"prompt": "a cat", "seed": 1, "n": 4, "num_inference_steps": 100, "routing": "full"}
    before = httpx.post(f"{url}/{IMAGES}", json=body, timeout=120).json()
    with ThreadPoolExecutor(4) as pool:
        answers = [
            pool.submit(httpx.post, f"{url}/{IMAGES}", json=body, timeout=120) for _ in "1234"
        ]
        wait_until(lambda: is_drawing(url))
        assert kill_replicas("colocated", "Sampler") == 1
        assert not any(answer.done() for answer in answers)
        got = [answer.result() for answer in answers]
    assert [response.status_code for response in got] == [200] * 4
    assert all(response.json()["data"] == before["data"] for response in got)


def is_drawing(url: str) -> bool:
    return httpx.get(f"{url}/readyz", timeout=60).json().get("active_pictures", 0) > 0


def test_a_killed_ingress_costs_nobody_a_picture(
    deploy: Deploy, kill_replicas: Callable[[str, str], int], tmp_path: Path
) -> None:
    """Ray's proxy says nothing of its requests, so the edge sends them to another.

    This ends what the Sampler draws for the dead one: it would count against the key's quota.
    """
    url = deploy("mortal-ingress", CountingSampler, str(tmp_path))
    with ThreadPoolExecutor(1) as pool:
        body, headers = {"prompt": "a cat", "seed": 3}, {"X-Request-Id": "mine"}
        answer = pool.submit(
            httpx.post, f"{url}/{IMAGES}", json=body, headers=headers, timeout=2 * WAIT_S
        )
        wait_until((tmp_path / "mine local None").exists)
        assert not (tmp_path / "mine local cancelled").exists()
        assert kill_replicas("mortal-ingress", "Ingress") == 1
        wait_until((tmp_path / "mine local cancelled").exists)
        assert not answer.done()
        (tmp_path / "open").touch()
        assert answer.result().status_code == 200, answer.result().text
    assert answer.result().json()["paris"]["seed"] == 3
    assert answer.result().headers["x-request-id"] == "mine"


@chaos
def test_links_end_with_what_drew_their_pictures(deploy: Deploy, tmp_path: Path) -> None:
    """While Serve replaces replicas, a Sampler is perhaps not of the Ingress's version."""
    first, second = (deploy(name, ChangingSampler, str(tmp_path)) for name in ("one", "two"))

    def links(prompt: str = "a cat") -> list[str]:
        body = {"prompt": prompt, "n": 2, "response_format": "url"}
        answer = httpx.post(f"{first}/{IMAGES}", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        return [picture["url"] for picture in answer.json()["data"]]

    def refusal(url: str) -> tuple[int, str]:
        answer = httpx.get(url, timeout=60)
        return answer.status_code, answer.json()["error"]["code"]

    kept, forgotten = links()
    degraded = links("a degraded cat")[0]
    assert httpx.get(degraded, timeout=60).status_code == 200
    assert refusal(degraded.replace(first, second)) == (404, "link_expired")
    # Another application of this cluster has the secret, and a memory of its own.
    assert httpx.get(kept.replace(first, second), timeout=60).status_code == 200
    (tmp_path / "changed").touch()
    assert httpx.get(kept.replace(first, second), timeout=60).status_code == 200
    assert refusal(forgotten.replace(first, second)) == (503, "unavailable")  # the change goes on
    of_the_new = links()[0]
    record, _ = read_picture(httpx.get(of_the_new, timeout=60).content)
    assert record.dtype == "bfloat16"  # the Sampler's, and not the Ingress's
    assert refusal(of_the_new.replace(first, second)) == (404, "link_expired")
