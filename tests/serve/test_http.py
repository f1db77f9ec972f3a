"""The application over real HTTP: pictures, models, and every refusal."""

import base64
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from paris_ray.bundle import Bundle
from paris_ray.sampling import generate

pytestmark = pytest.mark.serve

IMAGES = "v1/images/generations"


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


def test_colocated_experts_draw_the_same(start_app: Callable[..., str], bundle: Bundle) -> None:
    url = start_app("colocated", colocated=True)
    settings = SETTINGS[1]
    with httpx.Client(base_url=url, timeout=60) as client:
        np.testing.assert_array_equal(drawn(draw(client, **settings)), expected(bundle, **settings))


def test_response_tells_how_to_draw_the_pictures_again(client: httpx.Client) -> None:
    first = draw(client, prompt="a cat", n=2, size="32x32")
    told = first["paris"]
    assert first["size"] == "32x32"
    assert first["output_format"] == "png"
    assert told["attribution"] == "All pictures by nobody."
    assert np.shape(told["experts"]) == (2, 3)
    np.testing.assert_allclose(np.sum(told["experts"], axis=1), 1, rtol=1e-5)
    keys = ("seed", "num_inference_steps", "guidance_scale", "routing")
    again = draw(client, prompt="a cat", n=2, **{key: told[key] for key in keys})
    assert again["data"] == first["data"]
    assert again["paris"] == told


def test_openai_client(url: str, bundle: Bundle) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    assert [model.id for model in client.models.list()] == ["tiny"]
    answer = client.images.generate(model="tiny", prompt="a cat", n=2, extra_body={"seed": 5})
    pictures = np.stack([decode(picture.b64_json) for picture in answer.data])
    np.testing.assert_array_equal(pictures, expected(bundle, "a cat", n=2, seed=5))
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(model="tiny", prompt="a cat", quality="hd")
    assert (caught.value.param, caught.value.code) == ("quality", "unknown_parameter")


def test_models(client: httpx.Client) -> None:
    answer = client.get("v1/models").json()
    assert answer["object"] == "list"
    (model,) = answer["data"]
    assert (model["id"], model["object"], model["owned_by"]) == ("tiny", "model", "paris_ray")
    assert model["paris"] == {
        "num_experts": 3,
        "picture_size": 32,
        "defaults": {"num_inference_steps": 3, "guidance_scale": 1.0, "routing": "top-2"},
        "example_prompts": ["a red cat", "a blue dog"],
        "loras": {},
        "attribution": "All pictures by nobody.",
    }


def test_healthz(client: httpx.Client) -> None:
    assert client.get("healthz").json() == {"status": "ok"}


def test_page_loads_nothing_from_elsewhere(client: httpx.Client) -> None:
    page = client.get("")
    assert page.headers["content-type"].startswith("text/html")
    assert "//" not in page.text.replace("</", "").replace("/**", "")


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
        ({"prompt": "a cat", "size": "64x64"}, "size", "invalid_value"),
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
        ({"prompt": "a cat", "response_format": "url"}, "response_format", "invalid_value"),
        ({"prompt": "a cat", "user": "me"}, "user", "unknown_parameter"),
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


def test_api_key(start_app: Callable[..., str], tmp_path: Path) -> None:
    key_file = tmp_path / "key"
    key_file.write_text("s3cret\n")
    url = start_app("keyed", colocated=True, api_key_file=str(key_file))
    with httpx.Client(base_url=url, timeout=60) as client:
        for header in ("", "Bearer", "Bearer wrong", "Basic s3cret", b"Bearer \xff"):
            response = client.get("v1/models", headers={"Authorization": header})
            assert_error(response, 401, None, "invalid_api_key")
            assert response.headers["www-authenticate"] == "Bearer"
        assert_error(client.post(IMAGES, json={"prompt": "a"}), 401, None, "invalid_api_key")
        client.headers["Authorization"] = "Bearer s3cret"
        client.headers["Host"] = "pictures.example"  # with a key, other machines may ask
        assert client.get("v1/models").status_code == 200
        assert len(draw(client, prompt="a cat")["data"]) == 1


def test_openapi_describes_our_errors(client: httpx.Client) -> None:
    responses = client.get("openapi.json").json()["paths"]["/v1/images/generations"]["post"]
    assert set(responses["responses"]) == {"200", "4XX", "5XX"}
