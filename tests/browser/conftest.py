"""A Serve of its own from the project's config file, and a real browser."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from jobs.local_cluster import free_port
from paris_ray.artifacts import publish
from paris_ray.cluster_facts import ClusterFacts, write_clusters
from paris_ray.folders import Folder
from paris_ray.run import BUNDLE

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

REPOSITORY = Path(__file__).parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SERVE = [sys.executable, "-c", "from ray.serve.scripts import cli; cli()"]  # the `serve` command
FLAGS = [
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# What a bundle from a stranger may say.
WORDS = (["cat", "<img src=x onerror=document.title='pwned'>"], ["dog"], ["circle", "square"])
PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
)
KEY = "s3cret"


@pytest.fixture(scope="module")
def bundle_path(tiny_bundle_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle, with what its experts were trained on."""
    path = tmp_path_factory.mktemp("told") / "bundle"
    shutil.copytree(tiny_bundle_path, path)
    facts = [ClusterFacts(rows=5, words=words, pictures=[PIXEL] * 2) for words in WORDS]
    write_clusters(Folder(path / "clusters"), facts)
    publish(Folder(path), BUNDLE, config_digest="", parents={}, facts={})
    return path


def wait_until_served(url: str, server: "subprocess.Popen[bytes]", timeout_s: float = 180) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        assert server.poll() is None, "serve run ended"
        try:
            if httpx.get(f"{url}/healthz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise TimeoutError(f"{url}/healthz did not answer in {timeout_s} s")


@pytest.fixture(scope="module")
def url(
    bundle_path: Path, lora_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The address of the tiny bundle, served from the project's own config file.

    Below `/keyed` it is served a second time, to those who have KEY.
    """
    folder = tmp_path_factory.mktemp("served")
    (folder / "key").write_text(KEY)
    config = yaml.safe_load((REPOSITORY / "serve" / "config.yaml").read_text())
    config["http_options"]["port"] = port = free_port()
    (application,) = config["applications"]
    application["args"] |= {
        "bundle": str(bundle_path),
        "colocated": True,
        "ingress": {"num_replicas": 1},
        "loras": {"mine": {"path": str(lora_path)}},
        "limits": {"max_active_pictures": 4, "max_waiting_pictures": 8},
    }
    keyed = application | {"name": "keyed", "route_prefix": "/keyed"}
    keyed["args"] = application["args"] | {"api_key_file": str(folder / "key")}
    config["applications"].append(keyed)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    ray_folder = tempfile.mkdtemp(prefix="pr-", dir="/tmp")  # socket paths must stay short
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    server = subprocess.Popen(
        [*SERVE, "run", "--address", "local", str(folder / "config.yaml")],
        env=os.environ
        | {"RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": ray_folder, "PYTHONPATH": path},
        stdout=(folder / "serve.log").open("wb"),
        stderr=subprocess.STDOUT,
        # A shell's background jobs ignore SIGINT, and so would this, which is stopped by it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        for place in ("", "/keyed"):
            wait_until_served(f"http://127.0.0.1:{port}{place}", server)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)
        shutil.rmtree(ray_folder, ignore_errors=True)


@pytest.fixture(scope="module")
def browser() -> Iterator["sync_api.Browser"]:
    """The installed browser."""
    browser_path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser_path is None:
        pytest.skip(f"no browser is installed: looked for {', '.join(BROWSERS)}")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: "sync_api.Browser", url: str) -> Iterator[Callable[..., "sync_api.Page"]]:
    """A function that opens the studio in a browser profile of its own; errors fail the test.

    A browser reports each refused request as an error too: `expected` is a pattern of those.
    """
    contexts, problems = [], []

    def tell(message: str, expected: str | None) -> None:
        if expected is None or not re.search(expected, message):
            problems.append(message)

    def open_studio(
        place: str = "/", expected: str | None = None, **options: object
    ) -> "sync_api.Page":
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: tell(message.text, expected))
        page.goto(url + place)
        return page

    yield open_studio
    for context in contexts:
        context.close()
    assert problems == []
