"""Serve on a free port of the tests' Ray, shared by the tests that need HTTP."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest
import ray
from ray import serve

from jobs.local_cluster import free_port
from paris_ray.bundle import Bundle, load_bundle
from serve.app import AppArgs, build
from tests.serve.applications import end_applications

Start = Callable[..., str]
Kill = Callable[[str, str], int]


@pytest.fixture(scope="session")
def serve_address(ray_session: None) -> Iterator[str]:
    """The address of a running Serve without applications."""
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


@contextmanager
def starting(address: str, bundle: Path) -> Iterator[Start]:
    """Yield a function that serves a bundle, or another, under a name and returns its URL."""
    names = []

    def start(name: str, **args: object) -> str:
        small = {"bundle": str(bundle), "ingress": {"num_replicas": 1}}
        app = build(AppArgs(**small | args))
        names.append(name)
        serve.run(app, name=name, route_prefix=f"/{name}")
        return f"{address}/{name}"

    yield start
    end_applications(names)


@pytest.fixture(scope="module")
def start_app(serve_address: str, tiny_bundle_path: Path) -> Iterator[Start]:
    """A function that serves the tiny bundle, or another, under a name and returns its URL.

    The applications end after the module: all of them together would not fit into 24 GB.
    """
    with starting(serve_address, tiny_bundle_path) as start:
        yield start


@pytest.fixture(scope="session")
def start_shared_app(serve_address: str, tiny_bundle_path: Path) -> Iterator[Start]:
    """The same for applications that several modules ask; whoever kills a part waits for it."""
    with starting(serve_address, tiny_bundle_path) as start:
        yield start


@pytest.fixture(scope="session")
def kill_replicas() -> Kill:
    """A function that kills the replicas of a deployment; it returns how many there were."""

    def kill(app: str, deployment: str) -> int:
        killed = 0
        for actor in ray.util.list_named_actors(all_namespaces=True):
            if f"{app}#{deployment}#" in actor["name"]:
                with suppress(ValueError):  # it is gone already
                    ray.kill(ray.get_actor(actor["name"], namespace="serve"))
                    killed += 1
        return killed

    return kill


@pytest.fixture(scope="session")
def separate_url(start_shared_app: Start) -> str:
    """The URL of the tiny bundle, with every expert in a replica of its own."""
    return start_shared_app("separate", ingress={}, experts={1: {"num_replicas": 2}})


@pytest.fixture(scope="session")
def colocated_url(start_shared_app: Start) -> str:
    """The URL of the tiny bundle in one process, under the names that tools insist on."""
    aliases = dict.fromkeys(("gpt-image-1", "dall-e-2", "dall-e-3"), "tiny")
    return start_shared_app("colocated", colocated=True, aliases=aliases)


@pytest.fixture(scope="module")
def client(separate_url: str) -> Iterator[httpx.Client]:
    """An HTTP client of the application with separate experts."""
    with httpx.Client(base_url=separate_url, timeout=60) as client:
        yield client


@pytest.fixture
def bundle(tiny_bundle_path: Path, replica_threads: None) -> Bundle:
    """The tiny bundle in this process, which computes with as many threads as a replica."""
    return load_bundle(str(tiny_bundle_path))
