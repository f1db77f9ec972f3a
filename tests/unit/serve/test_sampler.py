"""A Sampler in this process, its experts with it: texts that wait are encoded together."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paris_ray.bundle import load_bundle
from paris_ray.encoders.tokenizers import LENGTHS
from paris_ray.models import TextConditioning
from paris_ray.sampling import generate
from paris_ray.sampling.engine import Limits
from paris_ray.sampling_options import sampling_options
from serve.drawing import Drawing, DrawRequest
from serve.sampler import Sampler
from serve.source import BundleSource

PROMPTS = ["a red cat", "blue dog", "a green circle a blue square", "", "red cat " * 12]


pytestmark = pytest.mark.usefixtures("replica_threads")


@pytest.fixture(params=["tiny_bundle_path", "release_path", "newer_bundle_path"])
def path(request: pytest.FixtureRequest) -> Path:
    """A bundle of sentences, one of CLIP's tokens, and one of the newer experts."""
    return request.getfixturevalue(request.param)


def sampler_of(path: Path, **options: Any) -> Sampler:
    return Sampler(BundleSource(str(path), **options), None, threads=1, limits=Limits())


def requests_of(path: Path, prompts: Sequence[Sequence[str]]) -> list[DrawRequest]:
    options = sampling_options(load_bundle(str(path)), num_inference_steps=2)
    return [
        DrawRequest(
            id=str(i),
            client="local",
            prompts=some,
            seeds=range(10 * i, 10 * i + len(some)),
            options=options,
            timeout_s=600,
        )
        for i, some in enumerate(prompts)
    ]


def watch(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Return which prompts the Sampler has encoded together."""
    texts, seen = sampler._bundle.texts, list[list[str]]()
    encode = texts.encode

    def watched(prompts: Sequence[str], *, exact: bool = True) -> TextConditioning:
        if "unreadable" in prompts:
            raise ValueError("unreadable")
        seen.append(list(prompts))
        return encode(prompts, exact=exact)

    monkeypatch.setattr(texts, "encode", watched)
    return seen


def draw_all(sampler: Sampler, requests: Sequence[DrawRequest]) -> list[Any]:
    async def at_once() -> list[Any]:
        asked = [sampler.draw(request) for request in requests]
        return await asyncio.gather(*asked, return_exceptions=True)

    return asyncio.run(at_once())


def test_texts_that_wait_are_encoded_together_and_pictures_are_those_of_generate(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = requests_of(path, [*([prompt] for prompt in PROMPTS), PROMPTS[:2]])
    sampler = sampler_of(path)
    seen = watch(sampler, monkeypatch)
    drawings = draw_all(sampler, requests)
    assert seen == [PROMPTS + PROMPTS[:2]]  # all came before the encoder began
    bundle = load_bundle(str(path))
    for request, drawing in zip(requests, drawings, strict=True):
        assert isinstance(drawing, Drawing), drawing
        for prompt, seed, picture in zip(
            request.prompts, request.seeds, drawing.pictures, strict=True
        ):
            (alone,) = generate(bundle, [prompt], seed=seed, num_inference_steps=2)
            np.testing.assert_array_equal(picture, np.asarray(alone))


def test_no_more_texts_are_encoded_together_than_were_tried(
    tiny_bundle_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt that a request repeats counts once: it is encoded once."""
    wanted = [["a red cat"] * 10, [f"a {n} b" for n in range(12)], ["dog"], ["red", "blue", "cat"]]
    sampler = sampler_of(tiny_bundle_path)
    seen = watch(sampler, monkeypatch)
    drawings = draw_all(sampler, requests_of(tiny_bundle_path, wanted))
    assert all(isinstance(drawing, Drawing) for drawing in drawings)
    assert seen == [[*wanted[0], *wanted[1], *wanted[2]], wanted[3]]


def test_a_text_that_cannot_be_encoded_costs_its_own_request_alone(
    tiny_bundle_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = sampler_of(tiny_bundle_path)
    watch(sampler, monkeypatch)
    requests = requests_of(tiny_bundle_path, [["a red cat"], ["unreadable"], ["blue dog"]])
    one, error, other = draw_all(sampler, requests)
    assert isinstance(one, Drawing)
    assert isinstance(other, Drawing)
    assert isinstance(error, ValueError)
    assert sampler._engine.num_left == 0


@pytest.mark.parametrize("exact", [True, False])
def test_the_encoder_is_tried_at_the_start_if_bytes_are_to_be_equal(
    tiny_bundle_path: Path, monkeypatch: pytest.MonkeyPatch, exact: bool
) -> None:
    tried: list[int] = []

    def trial(_: Any, length: int) -> bool:
        tried.append(length)
        return False

    monkeypatch.setattr("paris_ray.bundle.texts.texts_are_independent", trial)
    sampler = sampler_of(tiny_bundle_path, exact=exact)
    assert tried == (list(LENGTHS) if exact else [])
    sizes: list[int] = []
    encode = sampler._bundle.text_encoder.encode_tokens
    monkeypatch.setattr(
        sampler._bundle.text_encoder,
        "encode_tokens",
        lambda token_ids: sizes.append(len(token_ids)) or encode(token_ids),
    )
    draw_all(sampler, requests_of(tiny_bundle_path, [["a red cat"], ["blue dog"]]))
    assert sizes == ([1, 1] if exact else [2])


def test_passes_of_small_experts_are_computed_one_after_the_other(
    tiny_bundle_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    assert sampler_of(tiny_bundle_path)._num_computations == 1
    monkeypatch.setattr("serve.sampler.SHORT_PASS_S", 0.0)
    assert sampler_of(tiny_bundle_path)._num_computations == 3
