"""From a body to an order: defaults, names, sizes, steps, texts; no Ray, no HTTP."""

from dataclasses import replace
from typing import Any

import pytest

from paris_ray.bundle import Bundle
from paris_ray.config import Preset
from paris_ray.errors import RoutingError
from paris_ray.pictures import Sampling
from paris_ray.sampling_options import sampling_options
from serve.checking import Order, Served, check
from serve.errors import ApiError
from serve.schemas import MAX_BATCH_PICTURES, BatchesRequest, ImagesRequest


def order(served: Served, **body: Any) -> Order:
    return check(ImagesRequest(**{"prompt": "a cat"} | body), served, random_seed=9)


def refusal(served: Served, **body: Any) -> tuple[int, str | None, str]:
    with pytest.raises(ApiError) as caught:
        order(served, **body)
    return caught.value.status, caught.value.detail.param, caught.value.detail.message


def test_defaults(served: Served, tiny_bundle: Bundle) -> None:
    got = order(served)
    assert got.sampling == Sampling(
        num_inference_steps=3,
        solver="euler",
        time_grid="linspace",
        guidance_scale=1.0,
        routing="top-2",
    )
    assert got.options == sampling_options(tiny_bundle)
    assert (got.n, got.seed, got.size, got.quality) == (1, 9, 32, "auto")
    assert (got.output_format, got.output_compression, got.as_url) == ("png", None, False)
    assert (got.stream, got.partial_images, got.allow_degraded) == (False, 0, True)
    assert got.warnings(0) == []


NOTHING = [
    {"quality": "auto", "background": "auto", "moderation": "auto", "output_format": "png"},
    {"stream": False, "partial_images": 0, "user": "x", "style": None, "n": None, "size": None},
    {"response_format": None, "background": "opaque", "moderation": "low", "quality": "standard"},
    {"output_compression": 100, "size": "32x32", "safety_identifier": "x"},
    {"model": "tiny"},
    {"model": "gpt-image-1"},
]


@pytest.mark.parametrize("body", NOTHING)
def test_values_that_change_nothing(served: Served, body: dict[str, Any]) -> None:
    assert order(served, **body) == order(served)


def test_what_the_sampler_is_asked(served: Served) -> None:
    body = BatchesRequest(prompts=["a cat", "a dog"], n=2, seed=5, allow_degraded=False)
    got = check(body, served, random_seed=9).draw_request(id="i", client="c", timeout_s=7)
    assert list(got.prompts) == ["a cat", "a cat", "a dog", "a dog"]
    assert list(got.seeds) == [5, 6, 7, 8]
    assert (got.id, got.client, got.timeout_s, got.allow_degraded) == ("i", "c", 7, False)


def test_one_picture_of_many_can_be_asked_for_again(served: Served) -> None:
    body = BatchesRequest(
        prompts=["a cat", "a dog"], n=2, seed=5, output_format="webp", size="64x64", solver="ab2"
    )
    whole = check(body, served, random_seed=9)
    alone = check(whole.picture_request(2), served, random_seed=0)
    assert (alone.prompts, alone.seed, alone.n) == (("a dog",), 7, 1)
    assert (whole.allow_degraded, alone.allow_degraded) == (True, False)
    for field in ("sampling", "options", "size", "output_format", "output_compression"):
        assert getattr(alone, field) == getattr(whole, field)


PRESETS = {
    "low": Preset(num_inference_steps=2, solver="heun", time_grid="linspace"),
    "high": Preset(num_inference_steps=7),
}


@pytest.fixture(scope="module")
def with_presets(served: Served, tiny_bundle: Bundle) -> Served:
    facts = tiny_bundle.facts
    facts = replace(facts, sampling=replace(facts.sampling, presets=PRESETS))
    return replace(served, bundle=Bundle(tiny_bundle.parts, facts))


@pytest.mark.parametrize(
    ("quality", "expected"),
    [
        ("low", (2, "heun", "linspace", "low")),
        ("high", (7, "ab2", "half-last", "high")),
        ("hd", (7, "ab2", "half-last", "high")),
        ("standard", (3, "euler", "linspace", "auto")),
        ("auto", (3, "euler", "linspace", "auto")),
    ],
)
def test_quality_is_a_preset_of_the_model(
    with_presets: Served, quality: str, expected: tuple[int, str, str, str]
) -> None:
    got = order(with_presets, quality=quality)
    for drawn in (got.sampling, got.options):
        assert (drawn.num_inference_steps, drawn.solver, drawn.time_grid) == expected[:3]
    assert got.quality == expected[3]
    assert got.warnings(0) == []


def test_a_quality_that_the_model_has_not_is_said(with_presets: Served) -> None:
    got = order(with_presets, quality="medium")
    assert got.sampling == order(with_presets).sampling
    assert [(w.code, w.message) for w in got.warnings(0)] == [
        ("quality_unused", "the model has no preset for quality='medium': it draws by default")
    ]


def test_steps_and_quality_do_not_contradict_each_other(with_presets: Served) -> None:
    got = order(with_presets, quality="standard", num_inference_steps=5, solver="dpm++2m")
    assert (got.sampling.num_inference_steps, got.sampling.solver) == (5, "dpm++2m")
    assert got.sampling.time_grid == "linspace"
    for own in ({"num_inference_steps": 5}, {"solver": "ab2"}, {"time_grid": "linspace"}):
        status, param, message = refusal(with_presets, quality="hd", **own)
        assert (status, param) == (400, "quality")
        assert message.startswith(f"quality='hd' is not allowed beside {next(iter(own))}:")


def test_sizes(served: Served) -> None:
    assert [order(served, size=s).size for s in ("auto", "32x32", "512x512", "8x8")] == [
        32,
        32,
        512,
        8,
    ]
    for size in ("513x513", "64x32", "0x0", "064x064", "64", "64x64 ", "x", "", "٦٤x٦٤"):
        status, param, message = refusal(served, size=size)
        assert (status, param) == (400, "size")
        assert "'32x32', or another square up to '512x512', resized" in message


def test_the_operator_can_forbid_other_sizes(served: Served) -> None:
    native = replace(served, max_size=None)
    assert order(native, size="32x32").size == 32
    assert refusal(native, size="64x64")[2].endswith("is not allowed: 'auto' or '32x32'")


def test_a_native_size_above_the_limit_is_allowed(served: Served) -> None:
    assert order(replace(served, max_size=16), size="32x32").size == 32


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_compression_is_for_files_that_lose_something(served: Served, output_format: str) -> None:
    assert order(served, output_format=output_format).output_compression == 100
    got = order(served, output_format=output_format, output_compression=0)
    assert got.output_compression == 0
    assert refusal(served, output_compression=50)[:2] == (400, "output_compression")


def test_experts_that_may_draw_are_kept_for_links_and_records(served: Served) -> None:
    got = order(served, allowed_experts=[2, 0])
    assert got.sampling.allowed_experts == [2, 0]
    assert got.options.allowed_experts == {0, 2}
    again = check(got.picture_request(0), served, random_seed=9)
    assert again.sampling == got.sampling


def test_partial_images_need_a_stream(served: Served) -> None:
    assert order(served, stream=True, partial_images=3).partial_images == 3
    assert refusal(served, partial_images=1)[:2] == (400, "partial_images")


def test_another_model_is_named_with_those_there_are(served: Served) -> None:
    status, param, message = refusal(served, model="dall-e-3")
    assert (status, param) == (404, "model")
    assert message == "model='dall-e-3' does not exist: this server has 'tiny' or 'gpt-image-1'"


def test_other_refusals(served: Served) -> None:
    assert refusal(served, lora="mine")[:2] == (400, "lora")
    assert refusal(served, allowed_experts=[3]) == (
        400,
        "allowed_experts",
        "allowed_experts=[3] is not allowed: numbers from 0 to 2, at least one, each once",
    )
    with pytest.raises(RoutingError):
        order(served, routing="top-4")


BLANK = ["   ", "\n\t\r", "\u200b", "\u200b \u2060\ufeff", "\u3164", "\u2800", "\ufe0f", "\u0301"]


@pytest.mark.parametrize("prompt", BLANK)
def test_blank_prompts_are_refused(served: Served, prompt: str) -> None:
    assert refusal(served, prompt=prompt) == (400, "prompt", "prompt is blank: say what to draw")


def test_nul_is_refused_wherever_it_is(served: Served) -> None:
    assert refusal(served, prompt="a\0cat")[:2] == (400, "prompt")
    with pytest.raises(ApiError, match=r"prompts\[1\] holds the character NUL"):
        check(BatchesRequest(prompts=["a", "\0"]), served, random_seed=0)


def test_batches_are_bounded(served: Served) -> None:
    prompts = ["a cat"] * 7
    assert check(BatchesRequest(prompts=prompts, n=9), served, random_seed=0).n == 9
    with pytest.raises(ApiError, match=f"n=10 is not allowed for 7 prompts: {MAX_BATCH_PICTURES}"):
        check(BatchesRequest(prompts=prompts, n=10), served, random_seed=0)


def warnings(served: Served, prompt: str, **body: Any) -> dict[str, str]:
    return {w.code: w.message for w in order(served, prompt=prompt, **body).warnings(0)}


def test_text_that_is_cut_is_said(served: Served) -> None:
    assert warnings(served, "cat " * 126) == {}
    assert warnings(served, "cat " * 126 + "red dog") == {
        "text_cut": "text cut at token 128 of 130: 'red dog' is not read"
    }


def test_text_that_the_encoder_does_not_know_is_said(served: Served) -> None:
    found = warnings(served, "a \U0001f431 cat \U0001f431")
    assert list(found) == ["unknown_text"]
    assert found["unknown_text"].startswith("the text encoder does not know '\U0001f431':")


def test_a_style_is_said_to_change_nothing(served: Served) -> None:
    assert list(warnings(served, "a cat", style="vivid")) == ["style_unused"]
