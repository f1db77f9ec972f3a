"""Sampling: seeds, guidance, routing, and a second implementation in plain loops."""

import math
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from paris_ray.bundle import Bundle, load_bundle
from paris_ray.config import ExpertConfig, SolverName, TimeGrid
from paris_ray.diffusion import predict_velocity, router_logits, sampling_times
from paris_ray.errors import ParisError, RoutingError, SamplingError
from paris_ray.models import EncodedText, Expert, TextConditioning
from paris_ray.sampling import generate
from paris_ray.sampling.generation import sample, sample_one_expert
from paris_ray.sampling.guidance import KeyedText, TextCache, guided_velocity
from paris_ray.sampling.local import LocalModels
from paris_ray.sampling.sampler import Samples, initial_noise
from paris_ray.sampling.solvers import integrate, solve
from paris_ray.sampling_options import Routing, parse_routing, sampling_options

PROMPTS = ["a red cat", "blue dog", "a green square"]
SEEDS = [3, 14, 15]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("top-1", Routing("top-k", top_k=1)),
        ("top-3", Routing("top-k", top_k=3)),
        ("full", Routing("full")),
        ("full-ensemble", Routing("full")),
        ("threshold:0.25", Routing("threshold", threshold=0.25)),
        ("top-p:0.9", Routing("top-p", top_p=0.9)),
        ("agree:0.5", Routing("agree", top_k=2, disagreement=0.5)),
        ("agree:1.5", Routing("agree", top_k=2, disagreement=1.5)),
    ],
)
def test_routing_is_parsed(text: str, expected: Routing) -> None:
    assert parse_routing(text, num_experts=3) == expected


@pytest.mark.parametrize(
    "text",
    [
        "top-0",
        "top-4",
        "top--1",
        "top-1.5",
        "top-x",
        "top-",
        "top2",
        "top-²",
        "TOP-1",
        "full-",
        "full-ensemble:1",
        "full:1",
        "threshold",
        "threshold:",
        "threshold:0",
        "threshold:1",
        "threshold:-1",
        "threshold:nan",
        "threshold:x",
        "top-p",
        "top-p:0",
        "top-p:1",
        "top-p:nan",
        "agree",
        "agree:0",
        "agree:-1",
        "agree:inf",
        "agree:nan",
        "nothing",
        "",
        " full",
        "top-" + "9" * 5000,
    ],
)
def test_other_routing_is_refused(text: str) -> None:
    with pytest.raises(RoutingError, match="is not allowed"):
        parse_routing(text, num_experts=3)


def test_one_expert_has_nobody_to_agree_with() -> None:
    assert parse_routing("agree:0.5", num_experts=2).top_k == 2
    with pytest.raises(RoutingError, match="of two experts or more, 'agree:x'"):
        parse_routing("agree:0.5", num_experts=1)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("num_inference_steps", 0),
        ("guidance_scale", -1.0),
        ("guidance_scale", 101.0),
        ("guidance_scale", math.nan),
        ("routing", "top-9"),
        ("solver", "rk4"),
        ("time_grid", "karras"),
        ("allowed_experts", []),
        ("allowed_experts", [3]),
        ("allowed_experts", [-1]),
        ("allowed_experts", [1, 1]),
    ],
)
def test_bad_options_are_refused(tiny_bundle: Bundle, option: str, value: object) -> None:
    with pytest.raises(ParisError, match=option):
        generate(tiny_bundle, PROMPTS, **{option: value})


def test_options_default_to_those_of_the_bundle(tiny_bundle: Bundle) -> None:
    options = sampling_options(tiny_bundle)
    assert (options.num_inference_steps, options.guidance_scale) == (3, 1.0)
    assert options.routing == Routing("top-k", top_k=2)
    assert sampling_options(tiny_bundle, guidance_scale=0.0).guidance_scale == 0.0


def draw(bundle: Bundle, prompts: list[str], seeds: list[int], **options: object) -> Samples:
    return sample(bundle, bundle.encode_text(prompts), seeds, sampling_options(bundle, **options))


def test_pictures_are_deterministic_whatever_the_global_state(tiny_bundle: Bundle) -> None:
    torch.manual_seed(1)
    first = generate(tiny_bundle, PROMPTS, seed=5)
    torch.manual_seed(2)
    second = generate(tiny_bundle, PROMPTS, seed=5)
    assert [image.tobytes() for image in first] == [image.tobytes() for image in second]
    assert all(image.size == (32, 32) for image in first)
    other = generate(tiny_bundle, PROMPTS, seed=6)
    assert first[0].tobytes() != other[0].tobytes()


def test_picture_i_has_seed_plus_i_in_any_batch(tiny_bundle: Bundle) -> None:
    together = generate(tiny_bundle, PROMPTS, seed=5)
    for i, prompt in enumerate(PROMPTS):
        (alone,) = generate(tiny_bundle, [prompt], seed=5 + i)
        assert alone.tobytes() == together[i].tobytes()
    latents = draw(tiny_bundle, PROMPTS, SEEDS).latents
    for i in range(3):
        alone = draw(tiny_bundle, PROMPTS[i : i + 1], SEEDS[i : i + 1]).latents[0]
        assert torch.equal(alone, latents[i])


def test_more_prompts_than_a_batch_keep_their_seeds(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = generate(tiny_bundle, PROMPTS, seed=5)
    monkeypatch.setattr("paris_ray.sampling.generation.MAX_BATCH", 2)
    parts = generate(tiny_bundle, PROMPTS, seed=5)
    assert [image.tobytes() for image in parts] == [image.tobytes() for image in whole]


def test_no_prompts_give_no_pictures(tiny_bundle: Bundle) -> None:
    assert generate(tiny_bundle, []) == []


def test_guidance_interpolates_between_the_two_velocities(tiny_bundle: Bundle) -> None:
    expert, null_text = tiny_bundle.expert(0), tiny_bundle.null_text
    text = tiny_bundle.encode_text(PROMPTS)
    latents = initial_noise(tiny_bundle.latent_shape, SEEDS)

    def velocity(text: TextConditioning, *scales: float) -> Tensor:
        """Every picture has a scale of its own; 1 is no guidance."""
        guided = [row for row, scale in enumerate(scales) if scale != 1.0]
        null = null_text.rows(torch.zeros(len(guided)).long())
        return guided_velocity(
            expert,
            latents,
            torch.full((3,), 0.7),
            expert.encode_text(text),
            expert.encode_text(null) if guided else None,
            torch.tensor(scales),
            torch.tensor(guided),
        )

    conditional = velocity(text, 1.0, 1.0, 1.0)
    unconditional = velocity(null_text.rows(torch.zeros(3).long()), 1.0, 1.0, 1.0)
    assert not torch.allclose(conditional, unconditional, atol=1e-3)
    expected = {
        0.0: unconditional,
        1.0: conditional,
        1.0 + 1e-6: conditional,  # the same by the other way
        3.0: unconditional + 3 * (conditional - unconditional),
    }
    for scales in ((0.0,) * 3, (1.0 + 1e-6,) * 3, (3.0,) * 3, (3.0, 1.0, 0.0), (1.0, 3.0, 1.0)):
        rows = torch.stack([expected[scale][row] for row, scale in enumerate(scales)])
        torch.testing.assert_close(velocity(text, *scales), rows, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
@pytest.mark.parametrize("routing", ["top-1", "top-2", "full", "threshold:0.3", "agree:0.01"])
def test_equal_experts_equal_one_expert(
    tiny_bundle: Bundle, routing: str, guidance_scale: float
) -> None:
    part = tiny_bundle.parts["expert_0"]
    parts = dict(tiny_bundle.parts) | {f"expert_{k}": part for k in range(3)}
    bundle = Bundle(parts, tiny_bundle.facts)
    options = {"num_inference_steps": 4, "guidance_scale": guidance_scale}
    ensemble = draw(bundle, PROMPTS, SEEDS, routing=routing, **options)
    text = bundle.encode_text(PROMPTS)
    one = sample_one_expert(bundle.expert(0), text, bundle.null_text, seeds=SEEDS, **options)
    torch.testing.assert_close(ensemble.latents, one, rtol=1e-4, atol=1e-4)


def test_usage_counts_what_was_asked(tiny_bundle: Bundle) -> None:
    usage = draw(tiny_bundle, PROMPTS, SEEDS, routing="top-1", num_inference_steps=4).expert_usage
    torch.testing.assert_close(usage.sum(dim=1), torch.ones(3))
    assert torch.equal(4 * usage, (4 * usage).round())


def loop_in_plain_python(
    bundle: Bundle,
    prompt: str,
    seed: int,
    *,
    steps: int,
    top_k: int,
    guidance_scale: float,
    most_apart: float = math.inf,
) -> Tensor:
    """One picture, written a second time from the definitions."""
    text, null = bundle.encode_text([prompt]), bundle.encode_text([""])
    x = initial_noise(bundle.latent_shape, [seed])
    for step in range(steps):
        time = torch.tensor([1000 * (1 - step / steps)])
        logits = bundle.router(x, time, text.pooled_text)[0].tolist()
        odds = [math.exp(logit) for logit in logits]
        chosen = sorted(range(len(odds)), key=lambda k: -odds[k])[:top_k]
        total = sum(odds[k] for k in chosen)
        guided = []
        for k in chosen:
            expert = bundle.expert(k)
            with_text = expert(x, time, text.text_embeddings)
            without = expert(x, time, null.text_embeddings)
            guided.append(guidance_scale * with_text + (1 - guidance_scale) * without)
        velocity = sum(odds[k] / total * each for k, each in zip(chosen, guided, strict=True))
        apart = max(float((each - guided[0]).square().mean().sqrt()) for each in guided)
        if apart > most_apart * float(guided[0].square().mean().sqrt()):
            velocity = guided[0]
        x = x - velocity / steps
    return x[0]


@torch.no_grad()
def test_the_sampler_agrees_with_plain_loops(tiny_bundle: Bundle) -> None:
    options = {"guidance_scale": 2.0, "num_inference_steps": 5}
    latents = draw(tiny_bundle, PROMPTS, SEEDS, routing="top-2", **options).latents
    for i, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
        expected = loop_in_plain_python(
            tiny_bundle, prompt, seed, steps=5, top_k=2, guidance_scale=2.0
        )
        torch.testing.assert_close(latents[i], expected, rtol=1e-5, atol=1e-5)


AGREE = 1.4  # random experts are about the square root of two apart


@torch.no_grad()
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_the_likeliest_draws_alone_where_the_second_is_too_far(
    tiny_bundle: Bundle, guidance_scale: float
) -> None:
    options = {"guidance_scale": guidance_scale, "num_inference_steps": 5}
    samples = draw(tiny_bundle, PROMPTS, SEEDS, routing=f"agree:{AGREE}", **options)
    for i, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
        expected = loop_in_plain_python(
            tiny_bundle,
            prompt,
            seed,
            steps=5,
            top_k=2,
            guidance_scale=guidance_scale,
            most_apart=AGREE,
        )
        torch.testing.assert_close(samples.latents[i], expected, rtol=1e-5, atol=1e-5)
    mixed = (samples.expert_weights > 0).sum(dim=2)
    assert set(mixed.flatten().tolist()) == {1, 2}, "both happen"
    assert torch.equal(samples.num_asked, torch.full((3, 5), 2)), "one may be asked in vain"
    torch.testing.assert_close(samples.expert_weights.sum(dim=2), torch.ones(3, 5))


def test_agreement_lies_between_top_1_and_top_2(tiny_bundle: Bundle) -> None:
    def latents(routing: str) -> Tensor:
        return draw(tiny_bundle, PROMPTS, SEEDS, routing=routing, num_inference_steps=4).latents

    assert torch.equal(latents("agree:1e-6"), latents("top-1"))
    assert torch.equal(latents("agree:1e6"), latents("top-2"))
    assert not torch.equal(latents("top-1"), latents("top-2"))


@torch.no_grad()
def test_the_sampler_asks_what_its_solver_asks(tiny_bundle: Bundle) -> None:
    """Heun's second velocity is of other latents at another time, and routed like any other."""
    options = sampling_options(
        tiny_bundle, solver="heun", time_grid="half-last", num_inference_steps=3, routing="full"
    )
    text = tiny_bundle.encode_text(PROMPTS)

    def velocity(latents: Tensor, t: float) -> Tensor:
        times = torch.full((len(latents),), t)
        logits = router_logits(tiny_bundle.router, latents, times, text)
        answers = [predict_velocity(tiny_bundle.expert(k), latents, times, text) for k in range(3)]
        return torch.einsum("bk,kbchw->bchw", logits.softmax(dim=1), torch.stack(answers))

    noise = initial_noise(tiny_bundle.latent_shape, SEEDS)
    times = sampling_times(3, "half-last").tolist()
    expected = integrate(solve("heun", noise, times), velocity)
    samples = sample(tiny_bundle, text, SEEDS, options)
    torch.testing.assert_close(samples.latents, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(samples.expert_usage.sum(dim=1), torch.ones(3))
    torch.testing.assert_close(samples.experts_asked, torch.full((3,), 3.0))


@pytest.mark.parametrize("solver", get_args(SolverName))
@pytest.mark.parametrize("time_grid", get_args(TimeGrid))
def test_one_expert_draws_as_the_ensemble_of_it(
    tiny_bundle: Bundle, solver: SolverName, time_grid: TimeGrid
) -> None:
    part = tiny_bundle.parts["expert_0"]
    parts = dict(tiny_bundle.parts) | {f"expert_{k}": part for k in range(3)}
    bundle = Bundle(parts, tiny_bundle.facts)
    options = {"num_inference_steps": 4, "solver": solver, "time_grid": time_grid}
    ensemble = draw(bundle, PROMPTS, SEEDS, guidance_scale=2.0, **options)
    text = bundle.encode_text(PROMPTS)
    one = sample_one_expert(
        bundle.expert(0), text, bundle.null_text, seeds=SEEDS, guidance_scale=2.0, **options
    )
    torch.testing.assert_close(ensemble.latents, one, rtol=1e-4, atol=1e-4)


def test_the_temperature_divides_the_routers_logits(tiny_bundle: Bundle) -> None:
    options = sampling_options(tiny_bundle, routing="full", num_inference_steps=1)
    text, noise = tiny_bundle.encode_text(PROMPTS), initial_noise(tiny_bundle.latent_shape, SEEDS)
    with torch.no_grad():
        logits = tiny_bundle.router(noise, torch.full((3,), 1000.0), text.pooled_text)
    for temperature in (0.5, 1.0, 4.0):
        warm = replace(options, router_temperature=temperature)
        usage = sample(tiny_bundle, text, SEEDS, warm).expert_usage
        torch.testing.assert_close(usage, (logits / temperature).softmax(dim=1))


@pytest.mark.parametrize(
    "routing", ["top-1", "top-2", "full", "threshold:0.9", "top-p:0.1", "agree:0.2"]
)
def test_one_allowed_expert_draws_alone(tiny_bundle: Bundle, routing: str) -> None:
    options = {"num_inference_steps": 4, "guidance_scale": 2.0}
    text = tiny_bundle.encode_text(PROMPTS)
    for k in range(3):
        drawn = draw(tiny_bundle, PROMPTS, SEEDS, routing=routing, allowed_experts=[k], **options)
        assert drawn.expert_weights[:, :, k].eq(1).all()
        assert drawn.missing_experts == ()  # nobody was lost
        one = sample_one_expert(
            tiny_bundle.expert(k), text, tiny_bundle.null_text, seeds=SEEDS, **options
        )
        torch.testing.assert_close(drawn.latents, one, rtol=1e-4, atol=1e-4)


def test_without_an_expert_the_others_share_its_weight(tiny_bundle: Bundle) -> None:
    options = {"routing": "full", "num_inference_steps": 1}
    every = draw(tiny_bundle, PROMPTS, SEEDS, **options).expert_usage
    for k in range(3):
        others = [j for j in range(3) if j != k]
        usage = draw(tiny_bundle, PROMPTS, SEEDS, allowed_experts=others, **options).expert_usage
        assert usage[:, k].eq(0).all()
        expected = every[:, others] / every[:, others].sum(dim=1, keepdim=True)
        torch.testing.assert_close(usage[:, others], expected)


def test_all_experts_allowed_is_the_default(tiny_bundle: Bundle) -> None:
    one, other = (
        draw(tiny_bundle, PROMPTS, SEEDS, allowed_experts=allowed) for allowed in (None, [2, 0, 1])
    )
    assert torch.equal(one.latents, other.latents)


@pytest.fixture
def encoded_rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[int]]:
    """Counts the rows of text that each expert encodes, by the expert's identity."""
    counts: Counter[int] = Counter()
    encode_text = Expert.encode_text

    def counted(self: Expert, text: TextConditioning) -> EncodedText:
        counts[id(self)] += len(text)
        return encode_text(self, text)

    monkeypatch.setattr(Expert, "encode_text", counted)
    # It encodes text of its own.
    monkeypatch.setattr("paris_ray.sampling.local.rows_are_independent", lambda _: True)
    return counts


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_text_is_encoded_once_per_image(
    release_bundle: Bundle, encoded_rows: Counter[int], guidance_scale: float
) -> None:
    options = {"routing": "full", "guidance_scale": guidance_scale}
    draw(release_bundle, PROMPTS, SEEDS, num_inference_steps=6, **options)
    experts = [release_bundle.expert(k) for k in range(3)]
    rows = len(PROMPTS) + (guidance_scale != 1.0)  # the null text, if guidance asks for it
    assert encoded_rows == {id(expert): rows for expert in experts}


def test_pictures_of_one_prompt_share_what_is_encoded(
    release_bundle: Bundle, encoded_rows: Counter[int]
) -> None:
    options = {"routing": "full", "guidance_scale": 2.0}
    draw(release_bundle, ["a red cat"] * 3, SEEDS, num_inference_steps=2, **options)
    assert set(encoded_rows.values()) == {2}


@pytest.mark.parametrize("bundle_name", ["tiny_bundle", "release_bundle"])
def test_remembered_text_changes_no_bit(
    request: pytest.FixtureRequest, bundle_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = request.getfixturevalue(bundle_name)
    options = {"guidance_scale": 2.0, "num_inference_steps": 4, "routing": "full"}
    remembered = draw(bundle, PROMPTS, SEEDS, **options).latents
    monkeypatch.setattr("paris_ray.sampling.local.TextCache", lambda _: TextCache(max_bytes=0))
    assert torch.equal(draw(bundle, PROMPTS, SEEDS, **options).latents, remembered)


@torch.no_grad()
def test_the_cache_returns_what_the_expert_computes(release_bundle: Bundle) -> None:
    expert, text = release_bundle.expert(0), release_bundle.encode_text(PROMPTS)
    cache, keyed = TextCache(), KeyedText.of(text)
    for index in ([0, 1, 2], [2, 0], [1, 1]):
        rows = torch.tensor(index)
        found = cache.encode(expert, keyed.rows(rows))
        expected = expert.encode_text(text.rows(rows))
        assert len(found.keys_values) == len(expected.keys_values) == 2
        for one, other in zip(found.keys_values, expected.keys_values, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_experts_do_not_share_what_they_encode(release_bundle: Bundle) -> None:
    cache, text = TextCache(), KeyedText.of(release_bundle.null_text)
    one, other = (cache.encode(release_bundle.expert(k), text, owner=k) for k in (0, 1))
    assert not torch.equal(one.keys_values[0], other.keys_values[0])


def test_the_least_recently_used_text_is_forgotten(
    release_bundle: Bundle, encoded_rows: Counter[int]
) -> None:
    expert = release_bundle.expert(0)
    text = KeyedText.of(release_bundle.encode_text(PROMPTS))
    a, b, c = (text.rows(torch.tensor([i])) for i in range(3))
    row = TextCache().encode(expert, a)
    cache = TextCache(max_bytes=2 * sum(layer.nbytes for layer in row.keys_values))
    encoded_rows.clear()
    for keyed, expected in ((a, 1), (b, 2), (a, 2), (c, 3), (a, 3), (b, 4), (c, 5)):
        cache.encode(expert, keyed)
        assert encoded_rows[id(expert)] == expected


def test_a_known_text_is_found_while_another_is_encoded(release_bundle: Bundle) -> None:
    expert = release_bundle.expert(0)
    text = KeyedText.of(release_bundle.encode_text(PROMPTS))
    known, new = (text.rows(torch.tensor([i])) for i in (0, 1))
    cache, encoding, found = TextCache(), threading.Event(), threading.Event()
    cache.encode(expert, known)

    class Slow:
        pos_embed = expert.pos_embed

        def encode_text(self, text: TextConditioning) -> EncodedText:
            encoding.set()
            assert found.wait(60)
            return expert.encode_text(text)

    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(cache.encode, Slow(), new)
        assert encoding.wait(60)
        with ThreadPoolExecutor(1) as other:
            other.submit(cache.encode, expert, known).result(timeout=60)
        found.set()
        pending.result()


@pytest.mark.parametrize("memory", [8 * 2**30, 2**40])
def test_every_expert_has_room_for_texts(
    release_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, memory: int
) -> None:
    """Those of 64 pictures of the published experts, where there is memory for them."""
    monkeypatch.setattr("paris_ray.sampling.local.memory_bytes", lambda _: memory)
    caches = LocalModels(release_bundle)._texts
    with torch.device("meta"):
        expert = Expert(ExpertConfig.preset("XL/2"))
        row = expert.encode_text(torch.zeros(1, 77, expert.config.text_embed_dim))
    of_a_text = sum(layer.nbytes for layer in row.keys_values)
    assert len(caches) == release_bundle.num_experts
    assert sum(cache._max_bytes for cache in caches) <= memory / 4
    assert (caches[0]._max_bytes > 65 * of_a_text) == (memory > 2**34)


def test_keys_tell_texts_and_masks_apart(release_bundle: Bundle) -> None:
    text = release_bundle.encode_text(["a red cat", "blue dog", "a red cat"])
    keys = KeyedText.of(text).keys
    assert keys[0] == keys[2] != keys[1]
    assert text.text_mask is not None
    for mask in (None, torch.ones_like(text.text_mask)):
        assert KeyedText.of(replace(text, text_mask=mask)).keys[0] != keys[0]
    for name in ("text_embeddings", "pooled_text"):  # an expert may read either
        moved = replace(text, **{name: getattr(text, name) + 1})
        assert not set(KeyedText.of(moved).keys) & set(keys)


def test_offloaded_experts_are_asked_before_others_load(
    tiny_bundle_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room for two of three experts each step loads one, not all three in turn."""
    loads: list[int] = []
    load = Bundle._load_expert

    def counted(self: Bundle, index: int) -> Expert:
        loads.append(index)
        return load(self, index)

    monkeypatch.setattr(Bundle, "_load_expert", counted)
    bundle = load_bundle(str(tiny_bundle_path), offload=True)
    options = {"routing": "full", "num_inference_steps": 5}
    offloaded = generate(bundle, PROMPTS, **options)
    assert len(loads) == 3 + 4
    whole = generate(load_bundle(str(tiny_bundle_path)), PROMPTS, **options)
    assert all(np.array_equal(a, b) for a, b in zip(offloaded, whole, strict=True))


def test_latents_that_are_not_finite_are_no_picture(tiny_bundle_path: Path) -> None:
    bundle = load_bundle(str(tiny_bundle_path))
    for k in range(bundle.num_experts):
        bundle.expert(k).final_layer.linear.bias.fill_(float("nan"))
    with pytest.raises(SamplingError, match="not finite"):
        generate(bundle, PROMPTS)


def test_parts_that_sampling_loaded_can_be_trained_with(release_path: Path) -> None:
    bundle = load_bundle(str(release_path))
    generate(bundle, ["a red cat"], num_inference_steps=1)
    assert not any(p.is_inference() for p in bundle.expert(0).parameters())
    assert not any(p.is_inference() for p in bundle.router.parameters())
    expert = bundle.expert(0).requires_grad_(True)
    x = torch.zeros(1, *bundle.latent_shape)
    expert(x, torch.zeros(1), bundle.text_encoder.encode(["a red cat"])).sum().backward()
