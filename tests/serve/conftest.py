"""One real local Ray with Serve on a free port, shared by the tests that need HTTP."""

import os

# Ray reads it when it is imported; unset, a local Ray makes a token in the home folder.
os.environ["RAY_AUTH_MODE"] = "disabled"

import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import ray
import torch
from ray import serve

from paris_ray.bundle import Bundle, load_bundle
from serve.app import AppArgs, build

Start = Callable[..., str]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="session")
def serve_address() -> Iterator[str]:
    """The address of a running Serve without applications."""
    folder = tempfile.mkdtemp(prefix="pr-", dir="/tmp")  # socket paths must stay short
    port = free_port()
    ray.init(num_cpus=4, include_dashboard=False, _temp_dir=folder, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def start_app(serve_address: str, tiny_bundle_path: Path) -> Start:
    """A function that serves the tiny bundle under a name and returns its URL."""

    def start(name: str, **args: object) -> str:
        app = build(AppArgs(bundle=str(tiny_bundle_path), **args))
        serve.run(app, name=name, route_prefix=f"/{name}")
        return f"{serve_address}/{name}"

    return start


@pytest.fixture(scope="session")
def url(start_app: Start) -> str:
    """The URL of the tiny bundle, with every expert in a replica of its own."""
    return start_app("separate", experts={1: {"num_replicas": 2}})


@pytest.fixture(scope="session")
def client(url: str) -> Iterator[httpx.Client]:
    """An HTTP client of that application."""
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture
def bundle(tiny_bundle_path: Path) -> Iterator[Bundle]:
    """The tiny bundle in this process, which computes with as many threads as a replica."""
    threads = torch.get_num_threads()
    torch.set_num_threads(AppArgs().threads)
    yield load_bundle(str(tiny_bundle_path))
    torch.set_num_threads(threads)
