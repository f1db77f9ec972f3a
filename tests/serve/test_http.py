"""The application over real HTTP: pictures, models, and every refusal."""

import base64
import hashlib
import io
import json
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from jobs.replay import main as replay
from paris_ray.artifacts import publish
from paris_ray.bundle import Bundle
from paris_ray.cluster_facts import ClusterFacts, write_clusters
from paris_ray.errors import ConfigError
from paris_ray.folders import Folder
from paris_ray.model_folder.history import EXPORTED
from paris_ray.run import BUNDLE
from paris_ray.sampling import generate
from tests.credentials import Authority
from tests.serve.processes import maps_torch, processes

pytestmark = pytest.mark.serve

IMAGES = "v1/images/generations"


@pytest.fixture(scope="module")
def told_path(tiny_bundle_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle, with what its experts were trained on."""
    path = tmp_path_factory.mktemp("told") / "bundle"
    shutil.copytree(tiny_bundle_path, path)
    facts = [ClusterFacts(rows=9, words=["cat"], pictures=["aGk="])] * 3
    write_clusters(Folder(path / "clusters"), facts)
    publish(Folder(path), BUNDLE, config_digest="", parents={}, facts={})
    return path


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


KEY = {"Authorization": "Bearer s3cret"}


@pytest.fixture(scope="module")
def guarded_url(
    start_app: Callable[..., str],
    told_path: Path,
    authority: Authority,
    tmp_path_factory: pytest.TempPathFactory,
) -> str:
    """A bundle that tells of its experts, for those who have KEY.

    Pictures are signed, and keep their size.
    """
    key_file = tmp_path_factory.mktemp("guarded") / "key"
    key_file.write_text("s3cret\n")
    return start_app(
        "guarded",
        bundle=str(told_path),
        colocated=True,
        api_key_file=str(key_file),
        max_size=None,
        signing=authority.issue().model_dump(),
    )


def draw(client: httpx.Client, **body: object) -> dict[str, Any]:
    response = client.post(IMAGES, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def decode(b64_json: str) -> np.ndarray:
    image = Image.open(io.BytesIO(base64.b64decode(b64_json)))
    assert (image.format, image.mode) == ("PNG", "RGB")
    return np.asarray(image)


def drawn(answer: dict[str, Any]) -> np.ndarray:
    return np.stack([decode(picture["b64_json"]) for picture in answer["data"]])


def expected(bundle: Bundle, prompt: str, n: int = 1, **options: Any) -> np.ndarray:
    return np.stack([np.asarray(image) for image in generate(bundle, [prompt] * n, **options)])


SETTINGS = [
    {"prompt": "a red cat", "seed": 7},
    {"prompt": "a red cat", "seed": 7, "n": 3, "guidance_scale": 3.5},
    {"prompt": "a blue dog", "seed": 0, "routing": "full", "num_inference_steps": 5},
    {"prompt": "a dog", "seed": 1, "routing": "top-1", "guidance_scale": 0, "n": 2},
    {"prompt": "a dog", "seed": 2**62, "routing": "threshold:0.3"},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_served_pictures_are_those_of_generate(
    client: httpx.Client, bundle: Bundle, settings: dict[str, Any]
) -> None:
    np.testing.assert_array_equal(drawn(draw(client, **settings)), expected(bundle, **settings))


def test_requests_at_the_same_time_do_not_mix(client: httpx.Client, bundle: Bundle) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda settings: draw(client, **settings), SETTINGS * 3))
    for settings, answer in zip(SETTINGS * 3, answers, strict=True):
        np.testing.assert_array_equal(drawn(answer), expected(bundle, **settings))


def test_colocated_experts_draw_the_same(colocated_url: str, bundle: Bundle) -> None:
    settings = SETTINGS[1]
    with httpx.Client(base_url=colocated_url, timeout=60) as client:
        np.testing.assert_array_equal(drawn(draw(client, **settings)), expected(bundle, **settings))


def test_response_tells_how_to_draw_the_pictures_again(client: httpx.Client) -> None:
    first = draw(client, prompt="a cat", n=2, size="32x32")
    told = first["paris"]
    assert first["size"] == "32x32"
    assert first["output_format"] == "png"
    assert told["attribution"] == "All pictures by nobody."
    assert np.shape(told["experts"]) == (2, 3)
    np.testing.assert_allclose(np.sum(told["experts"], axis=1), 1, rtol=1e-5)
    keys = ("seed", "num_inference_steps", "solver", "time_grid", "guidance_scale", "routing")
    again = draw(client, prompt="a cat", n=2, **{key: told[key] for key in keys})
    assert again["data"] == first["data"]
    assert again["paris"] == told | {"id": again["paris"]["id"]}


def test_openai_client(separate_url: str, bundle: Bundle) -> None:
    client = openai.OpenAI(base_url=f"{separate_url}/v1", api_key="none")
    assert [model.id for model in client.models.list()] == ["tiny"]
    answer = client.images.generate(model="tiny", prompt="a cat", n=2, extra_body={"seed": 5})
    pictures = np.stack([decode(picture.b64_json) for picture in answer.data])
    np.testing.assert_array_equal(pictures, expected(bundle, "a cat", n=2, seed=5))
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(model="tiny", prompt="a cat", background="transparent")
    assert (caught.value.param, caught.value.code) == ("background", "invalid_value")


def test_models(client: httpx.Client) -> None:
    answer = client.get("v1/models").json()
    assert answer["object"] == "list"
    (model,) = answer["data"]
    assert (model["id"], model["object"], model["owned_by"]) == ("tiny", "model", "paris_ray")
    assert model["paris"] == {
        "num_experts": 3,
        "picture_size": 32,
        "defaults": {
            "num_inference_steps": 3,
            "solver": "euler",
            "time_grid": "linspace",
            "guidance_scale": 1.0,
            "routing": "top-2",
        },
        "qualities": [],
        "example_prompts": ["a red cat", "a blue dog"],
        "loras": {},
        "attribution": "All pictures by nobody.",
        "history": [asdict(EXPORTED[0])],
    }
    assert EXPORTED[0].event == "exported"


def test_experts(client: httpx.Client, guarded_url: str) -> None:
    def expert(k: int, **told: Any) -> dict[str, Any]:
        return {"expert": k, "rows": None, "words": [], "pictures": [], "loras": []} | told

    assert client.get("v1/experts").json() == {
        "object": "list",
        "data": [expert(k) for k in range(3)],
    }
    assert httpx.get(f"{guarded_url}/v1/experts", headers=KEY).json()["data"] == [
        expert(k, rows=9, words=["cat"], pictures=["aGk="]) for k in range(3)
    ]


def test_allowed_experts(client: httpx.Client, bundle: Bundle) -> None:
    body = {"prompt": "a red cat", "seed": 7, "routing": "full", "allowed_experts": [2, 0]}
    answer = draw(client, **body)
    np.testing.assert_array_equal(drawn(answer), expected(bundle, **body))
    told = answer["paris"]
    assert (told["allowed_experts"], told["degraded"]) == ([2, 0], False)
    assert told["experts"][0][1] == 0
    response = client.post(IMAGES, json=body)
    assert response.headers["x-paris-allowed-experts"] == "2,0"


def test_healthz(client: httpx.Client) -> None:
    assert client.get("healthz").json() == {"status": "ok"}


def test_page_loads_nothing_from_elsewhere(client: httpx.Client) -> None:
    page = client.get("")
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    links = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert {"web/studio.css", "web/studio.js"} <= set(links)
    scripts = ["studio.js", *re.findall(r'from "\./(.+)"', client.get("web/studio.js").text)]
    assert len(scripts) > 1
    for name in scripts:
        script = client.get(f"web/{name}")
        assert script.headers["content-type"].startswith("text/javascript")
        assert "http" not in script.text.replace("HTTP", "")
    assert client.get("web/studio.css").headers["content-type"].startswith("text/css")
    for name in ("nothing.js", "..%2Fapp.py", "%2e%2e/app.py"):
        assert_error(client.get(f"web/{name}"), 404, None, None)


def assert_error(response: httpx.Response, status: int, param: str | None, code: str | None) -> str:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["code"]) == (param, code)
    return str(error["message"])


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({}, "prompt", "missing_required_parameter"),
        ({"prompt": ""}, "prompt", "invalid_value"),
        ({"prompt": "a" * 1001}, "prompt", "invalid_value"),
        ({"prompt": None}, "prompt", "invalid_value"),
        ({"prompt": ["a cat"]}, "prompt", "invalid_value"),
        ({"prompt": "a cat", "n": 0}, "n", "invalid_value"),
        ({"prompt": "a cat", "n": 11}, "n", "invalid_value"),
        ({"prompt": "a cat", "n": "2"}, "n", "invalid_value"),
        ({"prompt": "a cat", "n": True}, "n", "invalid_value"),
        ({"prompt": "a cat", "n": 1.5}, "n", "invalid_value"),
        ({"prompt": "\u200b \n"}, "prompt", "invalid_value"),
        ({"prompt": "a\0cat"}, "prompt", "invalid_value"),
        ({"prompt": "a cat", "size": "64x32"}, "size", "invalid_value"),
        ({"prompt": "a cat", "size": "4096x4096"}, "size", "invalid_value"),
        ({"prompt": "a cat", "size": 32}, "size", "invalid_value"),
        ({"prompt": "a cat", "seed": -1}, "seed", "invalid_value"),
        ({"prompt": "a cat", "seed": 2**63 - 1}, "seed", "invalid_value"),
        ({"prompt": "a cat", "num_inference_steps": 0}, "num_inference_steps", "invalid_value"),
        ({"prompt": "a cat", "num_inference_steps": 101}, "num_inference_steps", "invalid_value"),
        ({"prompt": "a cat", "guidance_scale": -0.1}, "guidance_scale", "invalid_value"),
        ({"prompt": "a cat", "guidance_scale": 20.5}, "guidance_scale", "invalid_value"),
        ({"prompt": "a cat", "guidance_scale": "2"}, "guidance_scale", "invalid_value"),
        ({"prompt": "a cat", "routing": "top-4"}, "routing", "invalid_value"),
        ({"prompt": "a cat", "routing": "best"}, "routing", "invalid_value"),
        ({"prompt": "a cat", "routing": "b" * 201}, "routing", "invalid_value"),
        ({"prompt": "a cat", "model": "b" * 201}, "model", "invalid_value"),
        ({"prompt": "a cat", "size": "b" * 201}, "size", "invalid_value"),
        ({"prompt": "a cat", "lora": "b" * 201}, "lora", "invalid_value"),
        ({"prompt": "a cat", "routing": ""}, "routing", "invalid_value"),
        ({"prompt": "a cat", "response_format": "gif"}, "response_format", "invalid_value"),
        ({"prompt": "a cat", "output_format": "svg"}, "output_format", "invalid_value"),
        ({"prompt": "a cat", "output_compression": 101}, "output_compression", "invalid_value"),
        ({"prompt": "a cat", "quality": "max"}, "quality", "invalid_value"),
        ({"prompt": "a cat", "style": "oil"}, "style", "invalid_value"),
        ({"prompt": "a cat", "moderation": "off"}, "moderation", "invalid_value"),
        ({"prompt": "a cat", "stream": "true"}, "stream", "invalid_value"),
        (
            {"prompt": "a cat", "stream": True, "partial_images": 4},
            "partial_images",
            "invalid_value",
        ),
        ({"prompt": "a cat", "partial_images": 1}, "partial_images", "invalid_value"),
        ({"prompt": "a cat", "allowed_experts": []}, "allowed_experts", "invalid_value"),
        ({"prompt": "a cat", "allowed_experts": [3]}, "allowed_experts", "invalid_value"),
        ({"prompt": "a cat", "allowed_experts": [0, 0]}, "allowed_experts", "invalid_value"),
        ({"prompt": "a cat", "allowed_experts": [True]}, "allowed_experts", "invalid_value"),
        ({"prompt": "a cat", "svg": {}}, "svg", "unknown_parameter"),
        ({"prompt": "a cat", "steps": 4}, "steps", "unknown_parameter"),
    ],
)
def test_refused_fields_are_named(
    client: httpx.Client, body: dict[str, Any], param: str, code: str
) -> None:
    message = assert_error(client.post(IMAGES, json=body), 400, param, code)
    assert param in message


@pytest.mark.parametrize("content", ["", "no json", "[1]", '"a cat"', "null", "[" * 100_000])
def test_a_body_that_is_no_object_is_refused(client: httpx.Client, content: str) -> None:
    headers = {"Content-Type": "application/json"}
    response = client.post(IMAGES, content=content, headers=headers)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999", "9" * 5000])
def test_numbers_that_json_does_not_know_are_refused(client: httpx.Client, value: str) -> None:
    content = f'{{"prompt": "a cat", "guidance_scale": {value}}}'
    headers = {"Content-Type": "application/json"}
    response = client.post(IMAGES, content=content, headers=headers)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_text_that_is_no_unicode_is_refused(client: httpx.Client) -> None:
    headers = {"Content-Type": "application/json"}
    response = client.post(IMAGES, content=rb'{"prompt": "\ud800"}', headers=headers)
    assert_error(response, 400, "prompt", "invalid_value")


def test_a_form_from_another_page_is_refused(client: httpx.Client) -> None:
    headers = {"Content-Type": "text/plain"}  # what a page may send elsewhere without asking
    response = client.post(IMAGES, content='{"prompt": "a cat"}', headers=headers)
    assert_error(response, 400, None, "invalid_type")


def test_another_model_does_not_exist(client: httpx.Client) -> None:
    body = {"prompt": "a cat", "model": "gpt-image-1"}
    message = assert_error(client.post(IMAGES, json=body), 404, "model", "model_not_found")
    assert "'tiny'" in message


def test_wrong_paths_and_methods(client: httpx.Client) -> None:
    assert_error(client.get("v1/nothing"), 404, None, None)
    response = client.get(IMAGES)
    assert_error(response, 405, None, None)
    assert response.headers["allow"] == "POST"


def test_without_a_key_only_this_machine_is_served(client: httpx.Client) -> None:
    for path in ("", "healthz", "v1/models"):
        assert_error(client.get(path, headers={"Host": "evil.example"}), 403, None, None)
        assert_error(client.get(path, headers={"X-Forwarded-For": "203.0.113.5"}), 403, None, None)
        assert client.get(path, headers={"Host": "localhost:8000"}).status_code == 200


def test_api_key(guarded_url: str) -> None:
    with httpx.Client(base_url=guarded_url, timeout=60) as client:
        for header in ("", "Bearer", "Bearer wrong", "Basic s3cret", b"Bearer \xff"):
            response = client.get("v1/models", headers={"Authorization": header})
            assert_error(response, 401, None, "invalid_api_key")
            assert response.headers["www-authenticate"] == "Bearer"
        assert_error(client.post(IMAGES, json={"prompt": "a"}), 401, None, "invalid_api_key")
        client.headers.update(KEY)
        client.headers["Host"] = "pictures.example"  # with a key, other machines may ask
        assert client.get("v1/models").status_code == 200
        assert len(draw(client, prompt="a cat")["data"]) == 1


def test_retrieve_a_model(client: httpx.Client) -> None:
    assert client.get("v1/models/tiny").json() == client.get("v1/models").json()["data"][0]
    assert_error(client.get("v1/models/other"), 404, "model", "model_not_found")
    assert_error(client.get("v1/models/a/b"), 404, "model", "model_not_found")


def test_aliases(colocated_url: str, bundle: Bundle) -> None:
    with httpx.Client(base_url=colocated_url, timeout=60) as client:
        names = [m["id"] for m in client.get("v1/models").json()["data"]]
        assert names == ["tiny", "gpt-image-1", "dall-e-2", "dall-e-3"]
        assert client.get("v1/models/dall-e-3").json()["id"] == "dall-e-3"
        answer = draw(client, prompt="a cat", seed=1, model="dall-e-3")
        np.testing.assert_array_equal(drawn(answer), expected(bundle, "a cat", seed=1))
        assert answer["paris"]["model"] == "tiny"


def test_where_pictures_keep_their_size_another_is_refused(guarded_url: str) -> None:
    body = {"prompt": "a cat", "size": "64x64"}
    response = httpx.post(f"{guarded_url}/{IMAGES}", json=body, headers=KEY, timeout=60)
    assert_error(response, 400, "size", "invalid_value")


@pytest.mark.parametrize("aliases", [{"x": "other"}, {"tiny": "tiny"}])
def test_aliases_of_another_model_are_not_deployed(
    start_app: Callable[..., str], aliases: dict[str, str]
) -> None:
    with pytest.raises(ConfigError, match="aliases: "):
        start_app("never", aliases=aliases)


def test_a_server_signs_its_pictures(
    guarded_url: str, authority: Authority, bundle: Bundle
) -> None:
    with httpx.Client(base_url=guarded_url, headers=KEY, timeout=60) as client:
        (picture,) = draw(client, prompt="a red cat", seed=7)["data"]
        file = base64.b64decode(picture["b64_json"])
        assert authority.read(file, "png").get_validation_state() == "Trusted"
        np.testing.assert_array_equal(
            decode(picture["b64_json"]), expected(bundle, "a red cat", seed=7)[0]
        )
        headers = {"Content-Type": "image/png"}
        told = client.post("v1/images/provenance", content=file, headers=headers)
        assert told.json()["seed"] == 7


def test_files_and_sizes(client: httpx.Client, bundle: Bundle) -> None:
    (native,) = generate(bundle, ["a cat"], seed=5)
    enlarged = native.resize((100, 100), Image.Resampling.LANCZOS)
    body = {"prompt": "a cat", "seed": 5, "size": "100x100"}
    answer = draw(client, **body)
    assert (answer["size"], answer["paris"]["native_size"]) == ("100x100", "32x32")
    assert answer["paris"]["resize_filter"] == "lanczos"
    np.testing.assert_array_equal(drawn(answer)[0], np.asarray(enlarged))
    for kind in ("jpeg", "webp"):
        lossy = draw(client, **body, output_format=kind, output_compression=90)
        assert lossy["output_format"] == kind
        file = base64.b64decode(lossy["data"][0]["b64_json"])
        assert Image.open(io.BytesIO(file)).format == kind.upper()
        assert Image.open(io.BytesIO(file)).size == (100, 100)


def test_links(client: httpx.Client, colocated_url: str) -> None:
    body = {
        "prompt": "a cat",
        "seed": 5,
        "n": 2,
        "output_format": "webp",
        "quality": "hd",
        "solver": "heun",
    }
    files = [base64.b64decode(d["b64_json"]) for d in draw(client, **body)["data"]]
    answer = draw(client, **body, response_format="url")
    assert [set(picture) for picture in answer["data"]] == [{"url"}, {"url"}]
    for picture, file in zip(answer["data"], files, strict=True):
        got = httpx.get(picture["url"])
        assert (got.status_code, got.headers["content-type"]) == (200, "image/webp")
        assert got.content == file
    # Another application of this cluster has the secret, and a memory of its own.
    token = answer["data"][1]["url"].rpartition("/")[2]
    assert httpx.get(f"{colocated_url}/v1/images/files/{token}", timeout=60).content == files[1]
    stem = token.removesuffix(".webp")
    for bad in (f"{stem[:-9]}.webp", f"{stem}.png", "x.webp", "%E2%82%AC.webp"):
        assert_error(client.get(f"v1/images/files/{bad}"), 404, "token", "link_expired")


def test_batches(client: httpx.Client, bundle: Bundle) -> None:
    body = {"prompts": ["a red cat", "a \U0001f431"], "n": 2, "seed": 3, "guidance_scale": 2}
    response = client.post("v1/images/batches", json=body)
    assert response.status_code == 200, response.text
    answer = response.json()
    pictures = np.concatenate([drawn(one) for one in answer["data"]])
    prompts = ["a red cat"] * 2 + ["a \U0001f431"] * 2
    images = generate(bundle, prompts, seed=3, guidance_scale=2)
    np.testing.assert_array_equal(pictures, np.stack(list(map(np.asarray, images))))
    assert [one["paris"]["seed"] for one in answer["data"]] == [3, 5]
    codes = [[w["code"] for w in one["paris"]["warnings"]] for one in answer["data"]]
    assert codes == [[], ["unknown_text"]]
    assert response.headers["x-paris-warnings"] == "unknown_text"


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({}, "prompts", "missing_required_parameter"),
        ({"prompts": []}, "prompts", "invalid_value"),
        ({"prompts": "a cat"}, "prompts", "invalid_value"),
        ({"prompts": ["a"] * 65}, "prompts", "invalid_value"),
        ({"prompts": ["a", ""]}, "prompts", "invalid_value"),
        ({"prompts": ["a", " "]}, "prompts", "invalid_value"),
        ({"prompts": ["a"] * 33, "n": 2}, "n", "invalid_value"),
        ({"prompts": ["a"], "stream": True}, "stream", "unknown_parameter"),
    ],
)
def test_refused_batches(client: httpx.Client, body: dict[str, Any], param: str, code: str) -> None:
    message = assert_error(client.post("v1/images/batches", json=body), 400, param, code)
    assert ("allowed: " in message and "stream" in message.partition("allowed: ")[2]) is False


def test_headers_tell_what_proxies_drop(client: httpx.Client) -> None:
    body = {
        "prompt": "a cat",
        "seed": 5,
        "guidance_scale": 2.5,
        "routing": "top-1",
        "style": "vivid",
    }
    response = client.post(IMAGES, json=body)
    told = {k: v for k, v in response.headers.items() if k.startswith("x-paris-")}
    assert told == {
        "x-paris-model": "tiny",
        "x-paris-bundle": response.json()["paris"]["bundle"],
        "x-paris-seed": "5",
        "x-paris-steps": "3",
        "x-paris-solver": "euler",
        "x-paris-time-grid": "linspace",
        "x-paris-guidance": "2.5",
        "x-paris-routing": "top-1",
        "x-paris-warnings": "style_unused",
        "x-paris-attribution": "All pictures by nobody.",
    }


def test_a_file_tells_how_it_was_drawn_and_is_drawn_again(
    client: httpx.Client, tiny_bundle_path: Path, tmp_path: Path
) -> None:
    answer = draw(
        client,
        prompt="a cat",
        n=2,
        routing="full",
        size="64x64",
        output_format="jpeg",
        quality="hd",
    )
    file = base64.b64decode(answer["data"][1]["b64_json"])
    response = client.post("v1/images/provenance", content=file)
    assert response.status_code == 200, response.text
    record, told = response.json(), answer["paris"]
    assert (record["prompt"], record["seed"]) == ("a cat", told["seed"] + 1)
    assert record["bundle"] == told["bundle"]
    dense = [[row.get(str(k), 0) for k in range(3)] for row in record["expert_weights"]]
    assert dense == told["expert_weights"][1]
    path = tmp_path / "picture.jpg"
    path.write_bytes(file)
    assert replay([str(path), "--bundle", str(tiny_bundle_path)]) == 0
    assert_error(
        client.post("v1/images/provenance", content=b"no picture"), 400, None, "invalid_value"
    )


def events(response: httpx.Response) -> list[tuple[str, dict[str, Any]]]:
    blocks = response.read().decode().strip().split("\n\n")
    lines = [block.split("\n") for block in blocks]
    return [(e.removeprefix("event: "), json.loads(d.removeprefix("data: "))) for e, d in lines]


def test_streams(client: httpx.Client) -> None:
    body = {"prompt": "a cat", "seed": 4, "n": 2, "num_inference_steps": 6}
    whole = draw(client, **body)
    with client.stream(
        "POST", IMAGES, json=body | {"stream": True, "partial_images": 2}
    ) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["x-paris-seed"] == "4"
        got = events(response)
    partial = [data for name, data in got if name == "image_generation.partial_image"]
    places = {
        (e["paris"]["picture"], e["partial_image_index"], e["paris"]["step"]) for e in partial
    }
    assert places == {(0, 0, 2), (0, 1, 4), (1, 0, 2), (1, 1, 4)}
    assert [name for name, _ in got[4:]] == ["image_generation.completed"] * 2
    assert [data["b64_json"] for _, data in got[4:]] == [d["b64_json"] for d in whole["data"]]
    assert [data["paris"]["seed"] for _, data in got[4:]] == [4, 5]
    assert all(data["type"] == name for name, data in got)


def test_a_cancelled_request_is_answered_and_stops(client: httpx.Client) -> None:
    body = {"prompt": "a cat", "n": 10, "num_inference_steps": 100, "routing": "full"}
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(client.post, IMAGES, json=body, headers={"X-Request-Id": "mine"})
        deleted = client.delete(f"{IMAGES}/mine")
        while deleted.status_code == 404 and not pending.done():
            deleted = client.delete(f"{IMAGES}/mine")
        assert deleted.status_code == 200, deleted.text
        answer = deleted.json()
        assert (answer["id"], answer["cancelled"]) == ("mine", True)
        assert 0 <= answer["step"] < 100
        message = assert_error(pending.result(), 499, None, "cancelled")
        assert message == f"The request was cancelled after {answer['step']} steps"
    assert_error(client.delete(f"{IMAGES}/mine"), 404, "id", "request_not_found")


def test_a_cancelled_stream_ends_with_the_error(client: httpx.Client) -> None:
    body = {"prompt": "a cat", "n": 10, "num_inference_steps": 100, "stream": True}
    headers = {"X-Request-Id": "streamed"}
    with client.stream(
        "POST", IMAGES, json=body | {"partial_images": 3}, headers=headers
    ) as response:
        assert response.status_code == 200
        assert client.delete(f"{IMAGES}/streamed").status_code == 200
        name, last = events(response)[-1]
    assert (name, last["error"]["code"]) == ("error", "cancelled")


STATUSES = {"200", "400", "401", "403", "404", "405", "408", "413", "429", "499", "500", "503"}


def test_openapi_describes_every_answer(client: httpx.Client) -> None:
    document = client.get("openapi.json").json()
    for path in ("/v1/images/generations", "/v1/images/batches"):
        operation = document["paths"][path]["post"]
        assert set(operation["responses"]) == STATUSES
        assert operation["requestBody"]["content"]["application/json"]["examples"]
        assert "schema" in operation["requestBody"]["content"]["application/json"]
        for status in STATUSES - {"200"}:
            content = operation["responses"][status]["content"]["application/json"]
            assert {"message", "type"} <= set(content["example"]["error"])  # FastAPI drops nulls
            assert content["schema"] == {"$ref": "#/components/schemas/ErrorResponse"}
    kinds = document["paths"]["/v1/images/generations"]["post"]["responses"]["200"]["content"]
    assert set(kinds) == {"application/json", "text/event-stream"}
    for operations in document["paths"].values():
        assert all({"405", "403"} <= set(o["responses"]) for o in operations.values())


def test_examples_of_the_openapi_are_allowed(client: httpx.Client) -> None:
    document = client.get("openapi.json").json()
    for path in ("/v1/images/generations", "/v1/images/batches"):
        body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        for example in body["examples"].values():
            assert client.post(path.removeprefix("/"), json=example["value"]).status_code == 200


def test_head_is_answered_where_get_is(client: httpx.Client) -> None:
    for path in ("", "healthz", "v1/models", "v1/models/tiny"):
        response = client.head(path)
        assert (response.status_code, response.content) == (200, b"")
        assert response.headers["content-type"] == client.get(path).headers["content-type"]


def test_keys(start_app: Callable[..., str], tmp_path: Path) -> None:
    secrets = {"alice": "user", "bob": "user", "root": "admin"}
    path = tmp_path / "keys.yaml"
    digests = {name: hashlib.sha256(name.encode()).hexdigest() for name in secrets}
    entries = [
        {"name": name, "sha256": digests[name], "role": role} for name, role in secrets.items()
    ]
    entries[1]["quotas"] = {"concurrent_pictures": 2, "picture_steps_per_minute": 20}
    path.write_text(json.dumps(entries))
    url = start_app("of-several", colocated=True, api_key_file=str(path))

    def send(who: str, method: str, route: str, **options: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {who}", "X-Request-Id": "long"}
        return httpx.request(method, f"{url}/{route}", headers=headers, timeout=60, **options)

    few = {"prompt": "a cat", "num_inference_steps": 5}
    assert_error(send("bob", "POST", IMAGES, json=few | {"n": 3}), 400, "n", "invalid_value")
    answers = [send("bob", "POST", IMAGES, json=few | {"n": 2}) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert 1 <= int(answers[2].headers["Retry-After"]) <= 60

    body = {"prompt": "a cat", "n": 10, "num_inference_steps": 100, "stream": True}
    link = send("alice", "POST", IMAGES, json={"prompt": "a cat", "response_format": "url"})
    assert httpx.get(link.json()["data"][0]["url"]).status_code == 200  # without any key
    headers = {"Authorization": "Bearer alice", "X-Request-Id": "long"}
    options: dict[str, Any] = {"json": body | {"partial_images": 3}, "headers": headers}
    with httpx.stream("POST", f"{url}/{IMAGES}", timeout=60, **options) as response:
        assert response.status_code == 200
        assert_error(send("bob", "DELETE", f"{IMAGES}/long"), 404, "id", "request_not_found")
        refused = send("bob", "DELETE", f"{IMAGES}/long?client=alice")
        assert_error(refused, 403, "client", None)
        assert send("root", "DELETE", f"{IMAGES}/long?client=alice").status_code == 200
        assert events(response)[-1][1]["error"]["code"] == "cancelled"


def test_no_process_on_the_way_to_a_sampler_holds_torch(client: httpx.Client) -> None:
    """What is unpickled there counts, too: the application, requests, pictures and refusals."""
    draw(client, prompt="a cat")
    ingresses = processes("ServeReplica:separate:Ingress")
    proxies, (sampler,) = processes("ProxyActor"), processes("ServeReplica:separate:Sampler")
    assert len(ingresses) == 2
    assert len(proxies) == 1
    assert maps_torch(sampler)  # so the search finds it where it is
    assert not [process.cmdline() for process in ingresses + proxies if maps_torch(process)]
