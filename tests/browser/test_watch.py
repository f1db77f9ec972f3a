"""The page that watches trainings, in a real browser, from `jobs.watch` to the pixels."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from paris_ray.folders import Folder
from tests.s3_server import BUCKET, s3_server
from tests.watched_runs import HOSTILE, NUM_PICTURES, captions, train_one, write_run

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

pytestmark = pytest.mark.browser

REPOSITORY = Path(__file__).parents[2]
Open = Callable[..., "sync_api.Page"]
KEY = "s3cret"
LEFT_EDGES = "all => all.map(text => text.getBBox().x)"
# A pixel of a canvas, by a copy: a browser warns of whoever reads the canvas itself twice.
PIXEL_OF_LIGHTBOX = """canvas => {
    const copy = new OffscreenCanvas(1, 1).getContext('2d');
    copy.drawImage(canvas, 3, 3, 1, 1, 0, 0, 1, 1);
    return [...copy.getImageData(0, 0, 1, 1).data];
}"""


@contextmanager
def watching(*arguments: str, environment: dict[str, str] | None = None) -> Iterator[str]:
    """The address of a page that watches runs."""
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    server = subprocess.Popen(
        [sys.executable, "-m", "jobs.watch", *arguments, "--port", "0"],
        env=(environment or dict(os.environ)) | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        address = re.search(r"http://127\.0\.0\.1:\d+/", line)
        assert address is not None, line
        yield address[0]
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs, of one seed and another."""
    root = tmp_path_factory.mktemp("watched")
    for seed, name in enumerate(("mine", "other")):
        write_run(Folder(root / name), seed=seed)
    return root / "mine", root / "other"


@pytest.fixture
def open_watch(browser: "sync_api.Browser") -> Iterator[Open]:
    """A function that opens a page; errors and requests to elsewhere fail the test.

    A browser reports each refused request as an error too: `expected` is a pattern of those.
    """
    contexts, problems = [], []

    def open_it(url: str, expected: str = "(?!)", **options: object) -> "sync_api.Page":
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "console",
            lambda told: None if re.search(expected, told.text) else problems.append(told.text),
        )
        page.on(
            "request",
            lambda request: (
                None
                if request.url.startswith((url, "blob:", "data:"))
                else problems.append(request.url)
            ),
        )
        page.goto(url)
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert problems == []


def line_of(page: "sync_api.Page", model: str) -> "sync_api.Locator":
    """A model's row of the overview."""
    header = page.get_by_role("rowheader", name=model, exact=True)
    return page.locator("#overview tbody tr").filter(has=header)


def curves_of(page: "sync_api.Page", chart: str) -> "sync_api.Locator":
    return page.locator(f".chart[data-name={chart}] .curve:not(.raw)")


def drawn_cells(page: "sync_api.Page") -> "sync_api.Locator":
    return page.locator("#samples .cell[data-drawn]")


def test_it_shows_how_far_all_is(open_watch: Open, runs: tuple[Path, Path]) -> None:
    with watching(str(runs[0])) as url:
        page = open_watch(url)
        page.get_by_role("status").filter(has_text="mine: training Expert 1.").wait_for()
        assert "finished, resumed 1 x" in line_of(page, "Expert 0").inner_text()
        assert "6 / 12" in line_of(page, "Expert 1").inner_text()
        assert "waiting" in line_of(page, "Expert 2").inner_text()
        assert "2 of 4" in page.locator("#overview .facts").inner_text()
        assert "$" in page.locator("#overview .facts").inner_text()
        heads = page.locator("#overview thead th").all_inner_texts()
        assert "Memory" in heads and "MFU" not in heads  # which no model tells
        cards = page.locator("#clusters article")
        assert cards.count() == 3
        assert HOSTILE in cards.first.inner_text()  # as text
        assert cards.first.locator("img").evaluate_all("all => all.map(i => i.naturalWidth)") == [
            1,
            1,
        ]
        assert page.locator("#router tbody tr").first.inner_text().startswith("0.1\t90.0 %\t75.0 %")
        assert page.locator("#router figure circle").count() == 4
        assert page.title() == "mine · paris_ray watch"


def test_curves_are_drawn_over_steps_samples_and_time(
    open_watch: Open, runs: tuple[Path, Path]
) -> None:
    with watching(str(runs[0])) as url:
        page = open_watch(url)
        loss = page.locator(".chart[data-name=loss]")
        curves_of(page, "loss").nth(1).wait_for(state="attached")
        assert curves_of(page, "held_out_loss").count() == 2
        assert loss.locator(".resumed").count() == 1
        points = curves_of(page, "loss").first.get_attribute("points").split()
        assert len(points) == 6
        assert loss.locator("text").filter(has_text="step 5").count() == 1
        words = page.locator(".chart text").evaluate_all(LEFT_EDGES)
        assert min(words) >= 0  # none is cut off
        loss.locator("svg").focus()
        for key, read in (("ArrowRight", ["Expert 0", "Expert 1"]), ("End", ["Expert 0"])):
            page.keyboard.press(key)  # at the end, one was trained no longer
            assert loss.locator(".tip span:not(.dot)").all_inner_texts() == read
        page.locator("[name=axis]").select_option("samples")
        loss.locator("text").filter(has_text="samples").first.wait_for()
        page.locator("[name=axis]").select_option("seconds")
        loss.locator("text").filter(has_text=re.compile(r"\d s$")).first.wait_for()
        page.get_by_label("logarithmic losses").check()
        page.get_by_role("button", name="Expert 0").click()
        page.wait_for_function(
            "() => document.querySelectorAll('[data-name=loss] .curve:not(.raw)').length === 1"
        )
        page.reload()  # what was chosen is remembered
        curves_of(page, "loss").first.wait_for(state="attached")
        assert page.locator("[name=axis]").input_value() == "seconds"
        assert page.get_by_role("button", name="Expert 0").get_attribute("aria-pressed") == "false"
        loss.locator("svg").focus()
        page.keyboard.press("ArrowRight")
        assert "Expert 1" in loss.locator(".tip").inner_text()


def test_all_samples_are_a_gallery_and_one_is_seen_pixel_by_pixel(
    open_watch: Open, runs: tuple[Path, Path]
) -> None:
    with watching(str(runs[0])) as url:
        page = open_watch(url)
        page.get_by_role("columnheader", name="step 4").wait_for()
        heads = page.locator("#samples thead th").all_inner_texts()
        assert heads == ["Caption", "step 4", "step 8", "trained"]
        rows = page.locator("#samples tbody th").all_inner_texts()
        assert rows == captions(0)
        page.wait_for_function(
            "count => document.querySelectorAll('[data-drawn]').length === count",
            arg=3 * NUM_PICTURES,
        )
        page.get_by_role("button", name=f"{captions(0)[9]}, step 8").click()
        dialog = page.get_by_role("dialog")
        canvas = dialog.locator("canvas[data-shown='9 8']")
        canvas.wait_for()
        assert canvas.evaluate(PIXEL_OF_LIGHTBOX) == [90, 160, 0, 255]
        assert canvas.evaluate("canvas => [canvas.width, canvas.clientWidth]") == [16, 16]
        page.keyboard.press("ArrowLeft")
        dialog.locator("canvas[data-shown='9 4']").wait_for()
        page.keyboard.press("ArrowDown")
        canvas = dialog.locator("canvas[data-shown='10 4']")
        canvas.wait_for()
        assert canvas.evaluate(PIXEL_OF_LIGHTBOX) == [100, 80, 0, 255]
        assert dialog.get_by_role("button", name="Earlier").is_disabled()
        page.keyboard.press("Escape")
        dialog.wait_for(state="hidden")
        page.locator("[name=model]").select_option("expert-1")
        page.get_by_role("rowheader", name=captions(1)[0]).wait_for()
        assert page.locator("#samples thead th").all_inner_texts() == ["Caption", "step 4"]
        page.wait_for_function(
            "() => document.querySelectorAll('.single [data-drawn]').length === 16"
        )
        first, second = (page.locator("#samples tbody tr").nth(i).bounding_box() for i in (0, 1))
        assert first["y"] == second["y"] and first["x"] < second["x"]  # there is room for both


def test_two_runs_are_compared(open_watch: Open, runs: tuple[Path, Path]) -> None:
    with watching(*map(str, runs)) as url:
        page = open_watch(url)
        page.get_by_text("mine is drawn solid, other dashed.").wait_for()
        page.wait_for_function(
            "() => document.querySelectorAll('[data-name=loss] .second').length === 2"
        )
        assert curves_of(page, "loss").count() == 4
        galleries = page.locator("#samples table")
        assert galleries.count() == 2
        seed = page.get_by_role("rowheader", name="seed", exact=True)
        seed.wait_for()  # this table is drawn last
        rows = page.locator("#settings tbody tr")
        assert rows.filter(has=seed).all_inner_texts() == ["seed\t0\t1"]
        first, second = (page.locator("#overview h3").nth(i).inner_text() for i in (0, 1))
        assert first.endswith("/mine") and second.endswith("/other")


def test_what_is_trained_meanwhile_appears(open_watch: Open, tmp_path: Path) -> None:
    run = write_run(Folder(tmp_path / "live"))
    with watching(run.uri) as url:
        page = open_watch(url)
        line_of(page, "Expert 1").filter(has_text="6 / 12").wait_for()
        curves_of(page, "loss").nth(1).wait_for(state="attached")
        train_one(run, 1)
        line_of(page, "Expert 1").filter(has_text="finished").wait_for()
        page.wait_for_function(
            """() => document.querySelectorAll('[data-name=loss] .curve:not(.raw)')[1]
                ?.getAttribute('points').split(' ').length === 6"""
        )
        train_one(run, 2, stop=6)
        line_of(page, "Expert 2").filter(has_text="6 / 12").wait_for()


def test_a_damaged_grid_is_told_as_long_as_it_is_missing(
    open_watch: Open, runs: tuple[Path, Path], tmp_path: Path
) -> None:
    shutil.copytree(runs[0], tmp_path / "run")
    Folder(tmp_path / "run").write("experts/expert_0/samples/step-000004.png", b"no picture")
    with watching(str(tmp_path / "run")) as url:
        page = open_watch(url, expected="status of 503")
        told = page.get_by_role("alert").filter(has_text="step-000004.png is no PNG file")
        told.wait_for()
        for _ in range(2):  # the first may have been on its way already
            page.wait_for_event("requestfinished", lambda asked: "api/state" in asked.url)
        assert told.is_visible()
        page.wait_for_function(
            "count => document.querySelectorAll('[data-drawn]').length === count",
            arg=2 * NUM_PICTURES,  # of the other checkpoints
        )


def test_losses_of_any_size_are_drawn(open_watch: Open, tmp_path: Path) -> None:
    """An axis from 2^53 - 2 to 2^53 has steps that no such number can be added."""
    rows = [{"samples_seen": 8 * i, "loss": 2**53 - 2 * (i % 2)} for i in range(1, 5)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    Folder(tmp_path).write("experts/expert_0/metrics.jsonl", text.encode())
    with watching(str(tmp_path)) as url:
        page = open_watch(url)
        page.locator("[name=axis]").select_option("samples")
        page.locator(".chart[data-name=loss] .curve").first.wait_for(state="attached")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scrolling(
    open_watch: Open, runs: tuple[Path, Path], scheme: str
) -> None:
    with watching(*map(str, runs)) as url:
        page = open_watch(url, viewport={"width": 360, "height": 740}, color_scheme=scheme)
        drawn_cells(page).first.wait_for()
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width == 360


def test_whoever_has_a_key_may_watch(
    open_watch: Open, runs: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "key").write_text(KEY)
    with watching(str(runs[0]), "--api-key-file", str(tmp_path / "key")) as url:
        page = open_watch(url, expected="status of 401")
        page.get_by_label("API key").fill("wrong")
        page.keyboard.press("Enter")
        page.get_by_role("alert").filter(has_text="Send the API key").wait_for()
        page.get_by_label("API key").fill(KEY)
        page.keyboard.press("Enter")
        drawn_cells(page).first.wait_for()
        assert page.get_by_label("API key").is_hidden()
        page.wait_for_function("() => document.getElementById('alert').textContent === ''")


def test_a_run_in_a_bucket_is_watched(open_watch: Open, runs: tuple[Path, Path]) -> None:
    with s3_server() as store:
        store.upload(runs[0], "runs/mine")
        with watching(f"s3://{BUCKET}/runs/mine", environment=store.environment) as url:
            page = open_watch(url)
            line_of(page, "Expert 0").filter(has_text="finished").wait_for()
            page.wait_for_function(
                "count => document.querySelectorAll('[data-drawn]').length === count",
                arg=3 * NUM_PICTURES,
            )
            assert page.locator("#samples tbody th").all_inner_texts() == captions(0)
