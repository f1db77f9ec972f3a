"""The studio in a real browser, from the Serve config file to the pixels on the screen."""

import base64
import io
import json
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from jobs.replay import main as replay
from paris_ray.bundle import load_bundle
from paris_ray.config import SolverName, TimeGrid
from paris_ray.pictures import encode_picture, read_picture
from paris_ray.sampling import generate

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

pytestmark = pytest.mark.browser

Open = Callable[..., "sync_api.Page"]
DRAWING = "**/v1/images/generations"
NUM_EXPERTS = 3
KEY = "s3cret"
# What a browser reports of requests that are cancelled, begun or not, or refused for a while.
CANCELLED = "status of (404|429|499)"


def draw(page: "sync_api.Page", prompt: str = "a red cat", **fields: object) -> None:
    """Fill in the form and begin to draw."""
    for name, value in {"prompt": prompt, **fields}.items():
        control = page.locator(f"[name={name}]")
        page.evaluate(
            "n => document.getElementsByName(n)[0].closest('details')?.setAttribute('open', '')",
            name,
        )
        if control.evaluate("control => control.tagName") == "SELECT":
            control.select_option(str(value))
        else:
            control.fill(str(value))
    page.get_by_role("button", name="Draw", exact=True).click()


def slow() -> dict[str, object]:
    """The fields of a request that takes a while, even of a tiny model."""
    steps = {"num_inference_steps": 100, "solver": "heun", "guidance_scale": 2}
    return {"n": 10, "routing": "full", **steps}


def status(page: "sync_api.Page", text: str | re.Pattern[str]) -> "sync_api.Locator":
    """Wait for what a screen reader is told."""
    told = page.get_by_role("status").filter(has_text=text)
    told.wait_for()
    return told


def shown(page: "sync_api.Page") -> "sync_api.Locator":
    """The large picture."""
    return page.locator("#job .view img")


def pixels(image: "sync_api.Locator") -> np.ndarray:
    source = image.get_attribute("src")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))))


def expected(bundle_path: Path, prompt: str = "a red cat", **options: object) -> np.ndarray:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        (image,) = generate(load_bundle(str(bundle_path)), [prompt], **options)
    finally:
        torch.set_num_threads(threads)
    return np.asarray(image)


# -- Drawing -----------------------------------------------------------------------------------


def test_it_draws_and_says_who_drew(open_page: Open, url: str, bundle_path: Path) -> None:
    requested: list[str] = []
    page = open_page()
    page.on("request", lambda request: requested.append(request.url))
    page.reload()
    status(page, "Ready.")
    assert page.get_by_text("All pictures by nobody.").is_visible()
    page.get_by_role("button", name="a red cat").click()
    page.get_by_label("Seed").fill("7")
    page.locator("[name=n]").fill("2")
    page.keyboard.press("Enter")
    status(page, "Drawn 2 pictures.")

    tiles = page.locator("#job .tile")
    assert tiles.all_inner_texts() == ["Seed 7", "Seed 8"]
    for i, tile in enumerate(tiles.all()):
        tile.click()
        image = page.get_by_role("img", name="a red cat", exact=True).and_(shown(page))
        np.testing.assert_array_equal(pixels(image), expected(bundle_path, seed=7 + i))
    assert image.evaluate("image => [image.naturalWidth, image.width > 100]") == [32, True]
    assert all(address.startswith((url, "data:")) for address in requested)


def test_the_timeline_is_a_table_of_weights(open_page: Open) -> None:
    page = open_page()
    draw(page, routing="full", num_inference_steps=4)
    status(page, "Drawn in")
    table = page.get_by_role("table")
    heads = table.get_by_role("columnheader").all_inner_texts()
    assert heads == ["", "1", "2", "3", "4", "mean"]
    rows = table.locator("tbody tr").all()
    names = [row.get_by_role("rowheader").inner_text() for row in rows]
    assert all(re.match(r"Expert \d\n", name) for name in names)
    assert any("circle, square" in name for name in names)  # what it was trained on
    assert rows[0].get_by_role("rowheader").locator("img").count() == 2
    weights = [row.get_by_role("cell").all_inner_texts() for row in rows]
    for column in zip(*weights, strict=True):  # each step, and the mean
        assert sum(int(cell.removesuffix(" %")) for cell in column) == pytest.approx(100, abs=2)
    assert re.search(
        r"\d of 3 experts drew; expert \d led in \d of 4 steps",
        table.locator("caption").inner_text(),
    )


def test_unfinished_pictures_are_shown(open_page: Open) -> None:
    page = open_page()
    page.evaluate("""() => {
        window.seen = [];
        new MutationObserver(() => {
            const image = document.querySelector("#job .view img");
            if (image) seen.push([image.alt, image.src]);
        }).observe(document.getElementById("job"),
            { subtree: true, childList: true, attributes: true });
    }""")
    draw(page, num_inference_steps=100)
    status(page, "Drawn in")
    seen = page.evaluate("seen")
    unfinished = {source for alt, source in seen if alt == "a red cat (unfinished)"}
    assert len(unfinished) == 3
    assert [alt for alt, _ in seen][-1] == "a red cat"


def test_one_seed_by_each_choice_of_experts(open_page: Open, bundle_path: Path) -> None:
    page = open_page()
    page.get_by_label("Prompt", exact=True).fill("a blue dog")
    page.get_by_label("Seed").fill("5")
    page.get_by_role("button", name="Compare experts").click()
    status(page, f"Drawn {3 + 2 * NUM_EXPERTS} pictures.")
    every = range(NUM_EXPERTS)
    choices = {routing: {"routing": routing} for routing in ("top-1", "top-2", "full")}
    choices |= {f"Only expert {k}": {"allowed_experts": [k]} for k in every}
    choices |= {
        f"Without expert {k}": {"allowed_experts": [j for j in every if j != k]} for k in every
    }
    for label, options in choices.items():
        page.get_by_title(label, exact=True).click()
        assert page.locator(".details h3").first.inner_text() == label
        drawn = expected(bundle_path, "a blue dog", seed=5, **options)
        np.testing.assert_array_equal(pixels(shown(page)), drawn)


def test_an_adapter(open_page: Open) -> None:
    page = open_page()
    status(page, "Ready.")
    assert page.get_by_label("Adapter").locator("option").all_inner_texts() == [
        "none",
        "mine (expert 1)",
    ]
    draw(page, seed=1, routing="full")
    status(page, "Drawn in")
    plain = pixels(shown(page))
    draw(page, seed=1, routing="full", lora="mine")
    page.get_by_text("Adapter", exact=True).and_(page.locator("dt")).wait_for()
    assert (pixels(shown(page)) != plain).any()


def test_settings_are_those_of_the_interface(open_page: Open) -> None:
    page = open_page()
    status(page, "Ready.")
    for name, allowed in (("solver", SolverName), ("time_grid", TimeGrid)):
        options = page.locator(f"[name={name}] option")
        values = [option.get_attribute("value") for option in options.all()]
        assert values == ["", *allowed.__args__]
    assert page.locator("[name=num_inference_steps]").get_attribute("placeholder") == "3"
    assert page.locator("[name=quality]").is_hidden()  # the tiny model has no presets


# -- Using pictures again ----------------------------------------------------------------------


def form_values(page: "sync_api.Page") -> dict[str, object]:
    return page.evaluate("""() => {
        const form = document.getElementById("form"), values = {};
        for (const [name, value] of new FormData(form)) {
            if (name !== "allowed_experts" && value) values[name] = value;
        }
        const boxes = [...form.querySelectorAll("[name=allowed_experts]")];
        values.allowed = boxes.filter((box) => box.checked).map((box) => Number(box.value));
        return values;
    }""")


def test_the_gallery_gives_settings_back(open_page: Open) -> None:
    page = open_page()
    draw(page, seed=3, routing="full", num_inference_steps=4, guidance_scale=2)
    status(page, "Drawn in")
    page.get_by_role("button", name="The model's own settings").click()
    draw(page, "a blue dog", seed=9)
    page.get_by_role("button", name="a blue dog, seed 9").wait_for()
    page.get_by_role("button", name="The model's own settings").click()
    assert form_values(page) == {"allowed": [0, 1, 2]}

    page.get_by_role("button", name="a red cat, seed 3").click()
    page.get_by_role("button", name="Only the seed").click()
    status(page, "The seed of the picture is in the form.")
    assert form_values(page) == {"seed": "3", "allowed": [0, 1, 2]}
    page.get_by_role("button", name="All settings").click()
    assert form_values(page) == {
        "prompt": "a red cat",
        "seed": "3",
        "num_inference_steps": "4",
        "guidance_scale": "2",
        "routing": "full",
        "solver": "euler",
        "time_grid": "linspace",
        "allowed": [0, 1, 2],
    }

    page.get_by_role("button", name="The model's own settings").click()
    draw(page, "a circle", routing="top-1", num_inference_steps=1)
    page.get_by_text(re.compile("Expert . alone drew all of 1 step")).wait_for()
    (alone,) = re.findall(r"Expert (\d)\b", page.get_by_role("rowheader").inner_text())
    page.get_by_role("button", name="The model's own settings").click()
    page.get_by_role("button", name="Only the experts").click()
    assert form_values(page) == {"routing": "top-1", "allowed": [int(alone)]}
    assert page.get_by_text("1 of 3 experts may draw.").first.is_visible()


def give_key(page: "sync_api.Page") -> None:
    page.get_by_label("API key").fill(KEY)
    page.get_by_role("button", name="Use this key").click()


@contextmanager
def answered(page: "sync_api.Page", pattern: str, status: int, body: object) -> Iterator[None]:
    """Let the page find another answer than the server's."""
    page.route(pattern, lambda route: route.fulfill(status=status, json=body))
    yield
    page.unroute(pattern)


def test_a_key_given_in_mid_work_leaves_the_form_and_recalls_say_what_is_gone(
    open_page: Open,
) -> None:
    page = open_page("/keyed/", expected="status of 401")
    give_key(page)
    status(page, "Ready.")
    page.get_by_text("Experts", exact=True).first.click()
    page.get_by_label(re.compile("^Expert 0")).uncheck()
    draw(page, seed=3, solver="heun", time_grid="half-last", lora="mine", size="256x256")
    status(page, "Drawn in")
    filled_in = form_values(page)
    assert filled_in["allowed"] == [1, 2]
    assert filled_in["lora"] == "mine"

    # The key is no longer good; until another is given, the model loses an expert.
    error = {"message": "no", "type": "authentication_error", "code": "invalid_api_key"}
    with answered(page, DRAWING, 401, {"error": error | {"param": None}}):
        page.get_by_role("button", name="Draw", exact=True).click()
        page.get_by_role("alert").filter(has_text="The server does not know this key.").wait_for()
    headers = {"Authorization": f"Bearer {KEY}"}
    told = page.request.get(page.url + "v1/experts", headers=headers).json()
    with answered(page, "**/v1/experts", 200, told | {"data": told["data"][:2]}):
        give_key(page)
        status(page, "Ready.")
    assert form_values(page) == filled_in | {"allowed": [1]}
    assert page.locator("#error-allowed_experts").inner_text() == "There is no expert 2 here."

    page.get_by_role("button", name="The model's own settings").click()
    page.get_by_role("button", name="a red cat, seed 3").click()
    page.get_by_role("button", name="All settings").click()
    told = "Not all settings of the picture are in the form. There is no expert 2 here."
    assert status(page, "Not all").inner_text() == told
    assert page.locator("#error-allowed_experts").inner_text() == "There is no expert 2 here."
    assert form_values(page)["allowed"] == [1]


def test_a_file_of_another_model_says_what_there_is_not(open_page: Open, tmp_path: Path) -> None:
    page = open_page()
    draw(page)
    status(page, "Drawn in")
    with page.expect_download() as download:
        page.get_by_role("link", name="Download picture").click()
    record, _ = read_picture(Path(download.value.path()).read_bytes())
    sampling = replace(record.sampling, lora="theirs", allowed_experts=[0, 7])
    record = replace(record, model="other", sampling=sampling)
    (tmp_path / "other.png").write_bytes(
        encode_picture(np.zeros((32, 32, 3), dtype=np.uint8), record, "png")
    )
    page.get_by_label("Recall from a file").set_input_files(tmp_path / "other.png")
    assert status(page, "Another model").inner_text() == (
        "Not all settings of the picture are in the form. There is no theirs here. "
        "There is no expert 7 here. Another model drew the file: other."
    )


def test_the_gallery_keeps_the_last_pictures_and_says_how_many(open_page: Open) -> None:
    page = open_page()
    kept = page.get_by_role("region", name="Gallery").locator(".hint")
    told = "Pictures: {} of at most {}, until you leave the page"
    sync_api.expect(kept).to_have_text(told.format(0, 200) + ".")
    draw(page, n=2)
    status(page, "Drawn 2 pictures.")
    assert kept.inner_text() == told.format(2, 200) + "."

    page.reload()
    status(page, "Ready.")
    seen = page.evaluate("""async () => {
        const { Gallery } = await import("/web/gallery.js");
        const node = document.getElementById("gallery"), seen = [];
        const gallery = new Gallery(node, () => {}, { maxPictures: 3, maxBytes: 100 });
        const buttons = () => [...node.querySelectorAll("button")];
        const add = (seed, size) => {
            const src = "data:,".padEnd(size, "x"), record = { prompt: "p", seed };
            gallery.add({ part: { label: "" }, src, record });
            seen.push([buttons().map((button) => button.title).join("; "),
                node.querySelector(".hint").textContent]);
        };
        for (const seed of [1, 2, 3]) add(seed, 10);
        buttons().at(-1).focus();
        add(4, 10);
        seen.push(document.activeElement.title);
        add(5, 85);
        add(6, 200);
        return seen;
    }""")
    three, four, focused, five, six = seen[2:]
    assert three == ["p, seed 3; p, seed 2; p, seed 1", told.format(3, 3) + "."]
    assert four[0] == "p, seed 4; p, seed 3; p, seed 2"  # the number of pictures is bounded
    assert four[1] == told.format(3, 3) + "; older ones gone: 1."
    assert focused == "p, seed 2"  # focus was on what is gone
    assert five[0] == "p, seed 5; p, seed 4"  # and their bytes
    assert six == ["p, seed 6", told.format(1, 3) + "; older ones gone: 5."]


def test_downloads_say_how_they_were_drawn(
    open_page: Open, bundle_path: Path, tmp_path: Path
) -> None:
    page = open_page()
    page.get_by_text("Experts", exact=True).first.click()
    page.get_by_label(re.compile("^Expert 0")).uncheck()
    draw(page, seed=11)
    status(page, "Drawn in")
    with page.expect_download() as download:
        page.get_by_role("link", name="Download picture").click()
    assert download.value.suggested_filename == "tiny-a-red-cat-11.png"
    path = tmp_path / "picture.png"
    download.value.save_as(path)
    record, _ = read_picture(path.read_bytes())
    assert (record.prompt, record.seed) == ("a red cat", 11)
    assert record.sampling.allowed_experts == [1, 2]
    assert replay([str(path), "--bundle", str(bundle_path)]) == 0
    with page.expect_download() as download:
        page.get_by_role("link", name="Download record").click()
    told = json.loads(Path(download.value.path()).read_text())
    assert (told["seed"], told["allowed_experts"]) == (11, [1, 2])

    other = open_page()
    status(other, "Ready.")
    other.get_by_label("Recall from a file").set_input_files(path)
    status(other, "All settings of the picture are in the form.")
    assert form_values(other)["seed"] == "11"
    assert form_values(other)["allowed"] == [1, 2]


def test_a_file_without_a_record_is_refused(open_page: Open, tmp_path: Path) -> None:
    page = open_page(expected="status of 400")
    status(page, "Ready.")
    Image.new("RGB", (8, 8)).save(tmp_path / "other.png")
    page.get_by_label("Recall from a file").set_input_files(tmp_path / "other.png")
    page.get_by_role("alert").filter(has_text="the picture carries no record").wait_for()


# -- Waiting, cancelling, failing ----------------------------------------------------------------


def test_cancel_one(open_page: Open) -> None:
    page = open_page(expected=CANCELLED)
    draw(page, **slow())
    page.get_by_role("button", name="Cancel", exact=True).first.click()
    status(page, re.compile(r"Cancelled( after step \d+)?\."))
    assert page.locator("#queue").is_hidden()
    assert page.evaluate("document.activeElement.id") == "stage"  # not lost with the button
    page.get_by_role("button", name="Try again").wait_for()


def test_cancel_says_after_which_step(open_page: Open) -> None:
    page = open_page(expected=CANCELLED)
    draw(page, **slow())
    page.locator("#job .view img").wait_for()  # an unfinished picture: it has begun
    page.get_by_role("button", name="Cancel", exact=True).first.click()
    told = status(page, re.compile(r"Cancelled after step \d+\.")).inner_text()
    assert 0 < int(re.findall(r"\d+", told)[0]) < 199


def test_cancel_all(open_page: Open) -> None:
    page = open_page(expected=CANCELLED)
    for prompt in ("a red cat", "a blue dog"):
        draw(page, prompt, **slow())
    page.get_by_label("Prompt", exact=True).fill("a circle")
    page.get_by_role("button", name="Compare experts").click()
    queue = page.get_by_role("region", name="Queue")
    assert queue.get_by_role("listitem").count() == 3
    queue.get_by_role("button", name="Cancel all").click()
    queue.wait_for(state="hidden")
    page.get_by_role("button", name="The model's own settings").click()
    draw(page, "a green square", seed=1)  # nothing is left in the way
    page.get_by_role("button", name="a green square, seed 1").wait_for()


@contextmanager
def crowd(url: str) -> Iterator[None]:
    """Keep the server full of another client's pictures."""
    body = slow() | {"prompt": "a dog"}
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            httpx.post(f"{url}/v1/images/generations", json=body, timeout=120)

    with ThreadPoolExecutor(2) as pool:
        asking = [pool.submit(ask) for _ in range(2)]
        try:
            yield
        finally:
            over.set()
        for future in asking:
            future.result()


def test_a_full_server_is_asked_again(open_page: Open, url: str) -> None:
    page = open_page(expected="status of 429")
    status(page, "Ready.")
    with crowd(url):
        draw(page, n=4)
        busy = r"The server is busy: \d+ pictures wait already\. Asking again in \d+ s\."
        page.get_by_text(re.compile(busy)).first.wait_for()
    status(page, "Drawn 4 pictures.")


def test_a_slow_answer_shows_progress_and_can_be_cancelled(open_page: Open) -> None:
    page = open_page(expected="status of 404")  # what nobody draws cannot be cancelled there
    page.clock.install()
    page.reload()
    status(page, "Ready.")
    page.route(DRAWING, lambda route: None)  # never answered
    draw(page)
    progress = page.locator("#job").get_by_role("progressbar")
    progress.wait_for()
    assert progress.get_attribute("value") is None  # nobody knows how far it is
    page.clock.run_for(11_000)
    status(page, "Still drawing: you can wait, or cancel.")
    assert page.locator("#job").get_by_text("Begins, 11 s").is_visible()
    page.get_by_role("button", name="Cancel", exact=True).first.click()
    status(page, "Cancelled.")


def test_steps_are_counted(open_page: Open) -> None:
    page = open_page()
    page.evaluate("""() => {
        window.seen = [];
        new MutationObserver(() => {
            const bar = document.querySelector("#job progress");
            const text = document.querySelector("#job .progress span")?.textContent;
            const isShown = bar?.hasAttribute("value") && !bar.parentElement.hidden;
            if (isShown) seen.push([text, bar.value]);
        }).observe(document.getElementById("job"),
            { subtree: true, childList: true, attributes: true });
    }""")
    draw(page, **slow() | {"n": 1})
    status(page, "Drawn in")
    told = {}
    for text, value in page.evaluate("seen"):
        if step := re.fullmatch(r"Step (\d+) of 199, \d+ s", text):
            told[int(step[1])] = value
    assert list(told) == [0, 49, 99, 149]  # as the unfinished pictures come
    assert list(told.values()) == pytest.approx([step / 199 for step in told])


def test_a_cut_network_is_said_in_words(open_page: Open) -> None:
    page = open_page(expected="ERR_INTERNET_DISCONNECTED")
    status(page, "Ready.")
    page.context.set_offline(True)
    draw(page, seed=4)
    told = status(page, "The server cannot be reached.").inner_text()
    assert "fetch" not in told
    page.context.set_offline(False)
    page.get_by_role("button", name="Try again").click()
    status(page, "Drawn in")


def test_a_broken_stream_can_be_drawn_again(open_page: Open, bundle_path: Path) -> None:
    page = open_page()
    status(page, "Ready.")
    head = {
        "Content-Type": "text/event-stream",
        "X-Paris-Seed": "21",
        "X-Paris-Steps": "3",
        "X-Paris-Solver": "euler",
    }
    page.route(DRAWING, lambda route: route.fulfill(headers=head, body=""))
    draw(page)
    status(page, "The connection broke before the picture was finished.")
    page.unroute(DRAWING)
    page.get_by_role("button", name="Try again").click()
    status(page, "Drawn in")
    np.testing.assert_array_equal(pixels(shown(page)), expected(bundle_path, seed=21))


def test_a_model_that_is_not_there_yet(open_page: Open) -> None:
    page = open_page(expected="ERR_INTERNET_DISCONNECTED")
    page.route("**/v1/models", lambda route: route.abort("internetdisconnected"))
    page.reload()
    page.get_by_role("alert").filter(has_text="The server cannot be reached.").wait_for()
    page.unroute("**/v1/models")
    page.get_by_role("button", name="Try again").click()
    status(page, "Ready.")
    assert page.get_by_role("alert").inner_text() == ""


def test_errors_stand_at_their_fields(open_page: Open) -> None:
    page = open_page(expected="status of 400")
    draw(page, routing="top-9")
    routing = page.locator("[name=routing]")
    sync_api.expect(routing).to_have_attribute("aria-invalid", "true")
    assert "routing='top-9' is not allowed" in page.locator("#error-routing").inner_text()
    sync_api.expect(routing).to_have_accessible_error_message(re.compile("there are 3 experts"))
    routing.fill("")
    assert page.locator("#error-routing").count() == 0

    draw(page, "", num_inference_steps=500)  # both seen by the page itself
    assert page.evaluate("document.activeElement.name") == "prompt"
    for name in ("prompt", "num_inference_steps"):
        assert page.locator(f"#error-{name}").is_visible()
    page.locator("[name=num_inference_steps]").fill("")

    page.get_by_label("Prompt", exact=True).fill("a cat")
    for k in range(NUM_EXPERTS):
        page.get_by_label(re.compile(f"^Expert {k}")).uncheck()
    page.get_by_role("button", name="Draw", exact=True).click()
    assert page.get_by_text("Choose at least one expert.").is_visible()


def test_a_key_is_asked_for(open_page: Open, bundle_path: Path) -> None:
    page = open_page("/keyed/", expected="status of 401")
    page.get_by_role("alert").filter(has_text="This server asks for a key.").wait_for()
    assert page.evaluate("document.activeElement.id") == "key"
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    page.get_by_role("alert").filter(has_text="The server does not know this key.").wait_for()
    page.get_by_label("API key").fill(KEY)
    page.keyboard.press("Enter")
    status(page, "Ready.")
    draw(page, seed=2)
    status(page, "Drawn in")
    np.testing.assert_array_equal(pixels(shown(page)), expected(bundle_path, seed=2))
    assert KEY not in page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}])")


# -- Safety --------------------------------------------------------------------------------------


HOSTILE = "<img src=x onerror=\"document.title='pwned'\"><script>document.title='pwned'</script>"


def test_prompts_and_bundles_cannot_run_scripts(open_page: Open) -> None:
    page = open_page()
    draw(page, HOSTILE)
    status(page, "Drawn in")
    page.reload()  # the history is shown again
    status(page, "Ready.")
    page.get_by_text("Your prompts").click()
    page.get_by_role("button", name=HOSTILE).click()
    assert page.get_by_label("Prompt", exact=True).input_value() == HOSTILE
    assert "cat, <img src=x" in page.locator("#cast").inner_text()  # words of the bundle
    assert page.locator("img[src=x]").count() == 0
    assert page.title() == "tiny: paris_ray studio"
    page.get_by_role("button", name="Forget them").click()
    assert page.evaluate("localStorage['paris_ray.history']") == "[]"


def test_no_inline_script_or_style_runs(open_page: Open) -> None:
    page = open_page(expected="Content Security Policy|Trusted")
    page.evaluate("""() => {
        const script = document.createElement("script");
        script.append("document.title = 'pwned'");
        document.body.append(script);
        document.body.setAttribute("style", "display: none");
    }""")
    assert page.title() != "pwned"
    assert page.locator("body").is_visible()


def test_no_text_becomes_html_or_script(open_page: Open) -> None:
    page = open_page(expected="Trusted")
    refused = page.evaluate("""() => {
        const attempts = {
            html: () => { document.body.innerHTML = "<b>x</b>"; },
            script: () => { document.createElement("script").src = "web/api.js"; },
            policy: () => trustedTypes.createPolicy("any", { createHTML: (text) => text }),
        };
        return Object.entries(attempts).map(([name, attempt]) => {
            try { attempt(); } catch (error) { return `${name}: ${error.name}`; }
        });
    }""")
    assert refused == ["html: TypeError", "script: TypeError", "policy: TypeError"]


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_nobody_can_frame_it(open_page: Open, url: str, host: str) -> None:
    page = open_page("/healthz", expected="frame-ancestors 'none'|favicon|status of 404")
    address = url.replace("127.0.0.1", host)
    body = f'<title></title><iframe src="{address}/" onload="document.title = 1"></iframe>'
    page.route("**/framing.html", lambda route: route.fulfill(content_type="text/html", body=body))
    page.goto(f"{url}/framing.html")
    sync_api.expect(page).to_have_title("1")
    assert page.frames[1].url.startswith("chrome-error:")  # else it would be the studio's


# -- Every body and every screen -----------------------------------------------------------------


def test_by_keyboard_alone(open_page: Open) -> None:
    page = open_page()
    status(page, "Ready.")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the picture"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.type("a red cat")
    page.keyboard.press("Control+Enter")
    status(page, "Drawn in")
    assert page.evaluate("document.activeElement.id") == "prompt"  # to go on writing
    order = []
    for _ in range(60):
        page.keyboard.press("Tab")
        order.append(
            page.evaluate("document.activeElement.textContent.trim() || document.activeElement.id")
        )
        if order[-1] == "Only the experts":
            break
        outlined = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outlined != "none" or order[-1].startswith("Recall"), order[-1]
    wanted = [
        "a red cat",
        "Draw",
        "Compare experts",
        "n",
        "seed",
        "The model's own settings",
        "Download picture",
        "All settings",
        "Only the experts",
    ]
    assert [name for name in order if name in wanted] == wanted
    page.keyboard.press("Enter")
    status(page, "The experts of the picture are in the form.")
    assert page.evaluate("document.activeElement.name") == "routing"


def test_a_screen_reader_finds_names_and_news(open_page: Open) -> None:
    page = open_page()
    draw(page, n=2)
    status(page, "Drawn 2 pictures.")
    unnamed = page.evaluate("""() => [...document.querySelectorAll(
            "input, select, textarea, button, a, img, summary, progress")].filter((node) =>
            !node.labels?.length && !node.textContent.trim() && !node.getAttribute("aria-label")
            && !node.hasAttribute("alt") && !node.querySelector("img[alt]"))
        .map((node) => node.outerHTML)""")
    assert unnamed == []
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((node) => node.id)")
    assert len(ids) == len(set(ids))
    for role in ("main", "contentinfo", "complementary"):
        assert page.get_by_role(role).count() == 1
    assert page.get_by_role("alert").count() == 1
    assert [heading.inner_text() for heading in page.get_by_role("heading").all()][:2] == [
        "paris_ray studio",
        "a red cat",
    ]
    assert page.evaluate("document.documentElement.lang") == "en"


def test_on_a_phone_the_picture_comes_into_view(open_page: Open) -> None:
    page = open_page(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    draw(page)
    status(page, "Drawn in")
    sync_api.expect(shown(page)).to_be_in_viewport(ratio=1)
    page.get_by_role("button", name="Compare experts").click()
    status(page, "Drawn 9 pictures.")
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= 360
    page.locator(".tile").last.click()
    sync_api.expect(shown(page)).to_be_in_viewport(ratio=0.9)


CONTRASTS = """() => {
    const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 });
    const context = canvas.getContext("2d", { willReadFrequently: true });
    const luminance = (colour) => {
        context.clearRect(0, 0, 1, 1);
        context.fillStyle = colour;
        context.fillRect(0, 0, 1, 1);
        const parts = [...context.getImageData(0, 0, 1, 1).data].slice(0, 3).map((byte) =>
            byte / 255 <= 0.04045 ? byte / 255 / 12.92 : ((byte / 255 + 0.055) / 1.055) ** 2.4);
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
    };
    const ground = (node) => {
        const colour = getComputedStyle(node).backgroundColor;
        return colour !== "rgba(0, 0, 0, 0)" ? colour : ground(node.parentElement);
    };
    return [...document.querySelectorAll("body *")].filter((node) => node.checkVisibility()
            && [...node.childNodes].some((c) => c.nodeType === 3 && c.textContent.trim()))
        .map((node) => {
            const levels = [luminance(getComputedStyle(node).color), luminance(ground(node))];
            const [dark, light] = levels.sort((a, b) => a - b);
            return [(light + 0.05) / (dark + 0.05), node.textContent.slice(0, 40)];
        });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(open_page: Open, scheme: str) -> None:
    page = open_page(color_scheme=scheme, expected="status of 400")
    for details in page.locator("details").all():
        details.evaluate("details => { details.open = true; }")
    draw(page, n=2)
    status(page, "Drawn 2 pictures.")
    draw(page, routing="top-9")
    page.locator("#error-routing").wait_for()
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", ground)[:3])) / 3
    assert brightness < 60 if scheme == "dark" else brightness > 200
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 30
    assert [pair for pair in contrasts if pair[0] < 4.5] == []
