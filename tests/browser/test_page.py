"""The page in a real browser, from the Serve config file to the pixels on the screen."""

import base64
import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from jobs.local_cluster import free_port
from paris_ray.bundle import load_bundle
from paris_ray.sampling import generate

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

pytestmark = pytest.mark.browser

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


def wait_until_served(url: str, server: "subprocess.Popen[bytes]", timeout_s: float = 120) -> None:
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


@pytest.fixture
def url(tiny_bundle_path: Path, tmp_path: Path) -> Iterator[str]:
    """The address of the tiny bundle, served from the project's own config file."""
    config = yaml.safe_load((REPOSITORY / "serve" / "config.yaml").read_text())
    config["http_options"]["port"] = port = free_port()
    config["applications"][0]["args"]["bundle"] = str(tiny_bundle_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    ray_folder = tempfile.mkdtemp(prefix="pr-", dir="/tmp")  # socket paths must stay short
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    server = subprocess.Popen(
        [*SERVE, "run", "--address", "local", str(tmp_path / "config.yaml")],
        env=os.environ
        | {"RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": ray_folder, "PYTHONPATH": path},
        stdout=(tmp_path / "serve.log").open("wb"),
        stderr=subprocess.STDOUT,
        # A shell's background jobs ignore SIGINT, and so would this, which is stopped by it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        wait_until_served(f"http://127.0.0.1:{port}", server)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)
        shutil.rmtree(ray_folder, ignore_errors=True)


@pytest.fixture
def page() -> Iterator["sync_api.Page"]:
    """An empty page of the installed browser."""
    browser_path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser_path is None:
        pytest.skip(f"no browser is installed: looked for {', '.join(BROWSERS)}")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=FLAGS)
        yield browser.new_page()
        browser.close()


def pixels(image: "sync_api.Locator") -> np.ndarray:
    source = image.get_attribute("src").removeprefix("data:image/png;base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source))))


def test_page_draws_and_explains(page: "sync_api.Page", url: str, tiny_bundle_path: Path) -> None:
    problems: list[str] = []
    requested: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: requested.append(request.url))
    page.goto(url)

    page.get_by_role("button", name="a red cat").click()
    page.get_by_label("Seed").fill("7")
    page.get_by_label("Pictures").fill("2")
    page.keyboard.press("Enter")
    images = page.get_by_role("img", name="a red cat")
    images.nth(1).wait_for(timeout=60_000)

    torch.set_num_threads(1)
    expected = generate(load_bundle(str(tiny_bundle_path)), ["a red cat"] * 2, seed=7)
    for i, image in enumerate(expected):
        np.testing.assert_array_equal(pixels(images.nth(i)), np.asarray(image))
    assert images.first.evaluate("image => [image.naturalWidth, image.width > 100]") == [32, True]

    figure = page.get_by_role("figure").first
    assert "Seed 7, drawn by" in figure.inner_text()
    shares = [
        int(text.removesuffix(" %")) for text in figure.locator("dd > span").all_inner_texts()
    ]
    assert len(shares) == 3
    assert abs(sum(shares) - 100) <= 2
    assert page.get_by_text("All pictures by nobody.").is_visible()

    assert problems == []
    assert all(address.startswith((url, "data:")) for address in requested)

    page.get_by_label("Routing").fill("top-9")
    page.keyboard.press("Enter")
    page.get_by_role("status").get_by_text("routing='top-9' is not allowed").wait_for()
