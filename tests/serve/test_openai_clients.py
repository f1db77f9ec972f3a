"""OpenAI's own client, and the bodies that tools which build on its interface send."""

import asyncio
import base64
import io
import json
import shutil
import subprocess
from collections.abc import Iterator
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


@pytest.fixture(scope="module")
def sdk(colocated_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{colocated_url}/v1", api_key="none", max_retries=0) as client:
        yield client


def pixels(b64_json: str | None) -> np.ndarray:
    assert b64_json is not None
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64_json))))


def expected(bundle: Bundle, prompt: str, seed: int) -> np.ndarray:
    return np.asarray(generate(bundle, [prompt], seed=seed)[0])


def test_every_parameter_of_the_client(sdk: openai.OpenAI, bundle: Bundle) -> None:
    answer = sdk.images.generate(
        prompt="a cat",
        model="gpt-image-1",
        n=1,
        size="1024x1024",
        quality="auto",
        background="auto",
        moderation="auto",
        output_format="webp",
        output_compression=80,
        partial_images=0,
        stream=False,
        style=None,
        user="somebody",
        extra_body={"seed": 5},
    )
    assert (answer.size, answer.output_format, answer.background) == ("1024x1024", "webp", "opaque")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    assert answer.data is not None
    assert pixels(answer.data[0].b64_json).shape == (1024, 1024, 3)
    assert answer.data[0].url is None


def test_nulls_are_defaults(sdk: openai.OpenAI, bundle: Bundle) -> None:
    nothing: dict[str, Any] = dict.fromkeys(
        ("n", "size", "response_format", "quality", "output_format", "stream", "background")
    )
    answer = sdk.images.generate(prompt="a cat", model=None, extra_body=nothing | {"seed": 5})
    assert answer.data is not None
    np.testing.assert_array_equal(pixels(answer.data[0].b64_json), expected(bundle, "a cat", 5))


def test_a_link_is_followed_without_a_key(sdk: openai.OpenAI, bundle: Bundle) -> None:
    answer = sdk.images.generate(
        prompt="a cat", model="dall-e-3", response_format="url", extra_body={"seed": 5}
    )
    assert answer.data is not None
    assert answer.data[0].b64_json is None
    file = httpx.get(str(answer.data[0].url)).content
    np.testing.assert_array_equal(
        np.asarray(Image.open(io.BytesIO(file))), expected(bundle, "a cat", 5)
    )


def test_streams(sdk: openai.OpenAI, bundle: Bundle) -> None:
    stream = sdk.images.generate(
        prompt="a cat", model="gpt-image-1", stream=True, partial_images=2, extra_body={"seed": 5}
    )
    *partial, completed = list(stream)
    assert [event.type for event in partial] == ["image_generation.partial_image"] * 2
    assert [event.partial_image_index for event in partial] == [0, 1]
    assert all(pixels(event.b64_json).shape == (32, 32, 3) for event in partial)
    assert completed.type == "image_generation.completed"
    assert completed.usage.total_tokens > 0
    np.testing.assert_array_equal(pixels(completed.b64_json), expected(bundle, "a cat", 5))


def test_streams_of_the_asynchronous_client(colocated_url: str, bundle: Bundle) -> None:
    async def draw() -> Any:
        async with openai.AsyncOpenAI(base_url=f"{colocated_url}/v1", api_key="none") as client:
            stream = await client.images.generate(
                prompt="a cat", stream=True, partial_images=1, extra_body={"seed": 5}
            )
            return [event async for event in stream][-1]

    np.testing.assert_array_equal(
        pixels(asyncio.run(draw()).b64_json), expected(bundle, "a cat", 5)
    )


def test_a_cancelled_stream_raises_in_the_client(sdk: openai.OpenAI) -> None:
    body = {"num_inference_steps": 100, "n": 10}
    stream = sdk.images.generate(
        prompt="a cat",
        stream=True,
        partial_images=3,
        extra_body=body,
        extra_headers={"X-Request-Id": "from-the-sdk"},
    )
    next(iter(stream))
    sdk.delete("/images/generations/from-the-sdk", cast_to=object)
    with pytest.raises(openai.APIError) as caught:
        list(stream)
    assert caught.value.code == "cancelled"


def test_models(sdk: openai.OpenAI) -> None:
    assert [m.id for m in sdk.models.list()] == ["tiny", "gpt-image-1", "dall-e-2", "dall-e-3"]
    assert sdk.models.retrieve("dall-e-3").id == "dall-e-3"
    with pytest.raises(openai.NotFoundError) as caught:
        sdk.models.retrieve("dall-e-9")
    assert caught.value.code == "model_not_found"


def test_refusals_name_the_field(sdk: openai.OpenAI) -> None:
    for body in ({"background": "transparent"}, {"size": "1792x1024"}, {"output_format": "gif"}):
        with pytest.raises(openai.BadRequestError) as caught:
            sdk.images.generate(prompt="a cat", **body)
        assert caught.value.param == next(iter(body))


NODE_CLIENT = """
import OpenAI from "openai";
const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const body = { prompt: "a cat", model: "gpt-image-1", seed: 5 };
const whole = await client.images.generate(body);
const events = [];
const stream = await client.images.generate({ ...body, stream: true, partial_images: 2 });
for await (const event of stream) events.push(event);
let refused;
try {
  await client.images.generate({ ...body, background: "transparent" });
} catch (error) {
  refused = { bad: error instanceof OpenAI.BadRequestError, param: error.param };
}
console.log(JSON.stringify({ whole, events, refused }));
"""


@pytest.fixture(scope="module")
def node_client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program with OpenAI's own client for Node; 2 MB from npm's registry."""
    if shutil.which("npm") is None:
        pytest.skip("there is no Node on this machine")
    folder = tmp_path_factory.mktemp("node")
    (folder / "client.mjs").write_text(NODE_CLIENT)
    install = ["npm", "install", "--silent", "--no-audit", "--no-fund", "openai@6"]
    if subprocess.run(install, cwd=folder, check=False, timeout=300).returncode != 0:
        pytest.skip("npm's registry is not reachable")
    return folder / "client.mjs"


def test_the_client_for_node(colocated_url: str, node_client: Path, bundle: Bundle) -> None:
    command = ["node", node_client.name, f"{colocated_url}/v1"]
    run = subprocess.run(
        command, cwd=node_client.parent, capture_output=True, text=True, check=False, timeout=120
    )
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout)
    drawn = expected(bundle, "a cat", 5)
    np.testing.assert_array_equal(pixels(told["whole"]["data"][0]["b64_json"]), drawn)
    *partial, completed = told["events"]
    assert [event["partial_image_index"] for event in partial] == [0, 1]
    assert completed["type"] == "image_generation.completed"
    np.testing.assert_array_equal(pixels(completed["b64_json"]), drawn)
    assert told["refused"] == {"bad": True, "param": "background"}


# Written down by a server that LiteLLM 1.110.2 and langchain-community 0.4.2 were run against once,
# since they are too large to be installed for tests (200 and 90 MB); read in the source of Open
# WebUI; as far as we know of Nextcloud.
TOOLS: dict[str, dict[str, Any]] = {
    "LangChain DallEAPIWrapper": {
        "model": "dall-e-2",
        "prompt": "a cat",
        "n": 1,
        "size": "1024x1024",
    },
    "LiteLLM": {"model": "dall-e-3", "prompt": "a cat"},
    "LiteLLM, more options": {
        "model": "gpt-image-1",
        "prompt": "a cat",
        "background": "auto",
        "n": 1,
        "output_format": "webp",
        "quality": "high",
        "size": "1024x1024",
        "user": "u",
    },
    "Open WebUI": {
        "model": "dall-e-2",
        "prompt": "a cat",
        "n": 1,
        "size": "512x512",
        "response_format": "b64_json",
    },
    "Open WebUI, gpt-image-1": {
        "model": "gpt-image-1",
        "prompt": "a cat",
        "n": 1,
        "size": "1024x1024",
    },
    "Nextcloud integration_openai": {
        "prompt": "a cat",
        "size": "1024x1024",
        "n": 1,
        "response_format": "url",
        "model": "dall-e-3",
        "user": "admin",
    },
}


@pytest.mark.parametrize("tool", TOOLS)
def test_bodies_of_tools(colocated_url: str, tool: str) -> None:
    body = TOOLS[tool]
    answer = httpx.post(f"{colocated_url}/{IMAGES}", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    (picture,) = answer.json()["data"]
    assert set(picture) == {"url" if body.get("response_format") == "url" else "b64_json"}
    assert answer.json()["size"] == body.get("size", "32x32")
