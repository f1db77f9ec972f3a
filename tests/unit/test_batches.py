"""What a sample gets does not depend on its batch: bytes, adapters, linear layers, lost experts."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from paris_ray.bundle import Bundle, load_bundle
from paris_ray.bundle.texts import Texts
from paris_ray.config import LoRAConfig
from paris_ray.errors import ExpertsLostError, ParisError
from paris_ray.exactness import MOST_TRIED
from paris_ray.folders import Folder
from paris_ray.models import EncodedText, TextConditioning
from paris_ray.models.layers import Linear, PatchEmbed, apply_linear
from paris_ray.models.lora import Adapter, adapted_samples
from paris_ray.models.peft_layout import save_adapter
from paris_ray.sampling import generate
from paris_ray.sampling.calls import ROUTER, Call, ExpertCall, RouterCall
from paris_ray.sampling.engine import Engine, Event, Failed, Finished, Limits, Ticket
from paris_ray.sampling.generation import sample_one_expert
from paris_ray.sampling.guidance import KeyedText
from paris_ray.sampling.local import LocalModels
from paris_ray.sampling.sampler import (
    Answers,
    Samples,
    Step,
    advance,
    initial_noise,
    start_denoising,
)
from paris_ray.sampling_options import sampling_options
from tests.expert_calls import answer_alone, first_expert_calls

PROMPTS = ["a red cat", "a blue dog", "a green square", "circle", "", "a red cat " * 9]
SIZES = (1, 2, 3, 5, 8, 20, 33)
ADAPTED = 1  # the expert that the adapters are for
ADAPTERS = ("mixed", "other", "merged")
ROUTINGS = ("top-1", "top-2", "full", "threshold:0.3", "top-p:0.7", "agree:1.4")
NUM_MIXES = 100  # of each bundle


pytestmark = pytest.mark.usefixtures("replica_threads")


@pytest.fixture(scope="module", params=["tiny_bundle_path", "release_path", "newer_bundle_path"])
def bundle(
    request: pytest.FixtureRequest,
    randomised: Callable[[nn.Module, int], nn.Module],
    tmp_path_factory: pytest.TempPathFactory,
) -> Bundle:
    """A bundle with two adapters that mix, of unlike ranks and targets, and a merged one."""
    bundle = load_bundle(str(request.getfixturevalue(request.param)))
    expert = bundle.expert(ADAPTED)
    configs = {
        "mixed": LoRAConfig(r=2, lora_alpha=8),
        "other": LoRAConfig(r=5, lora_alpha=5, target_modules=("in_proj", "mlp.0", "t_block.1")),
        "merged": LoRAConfig(r=3, lora_alpha=3),
    }
    for seed, name in enumerate(ADAPTERS):
        path: Path = tmp_path_factory.mktemp(name)
        save_adapter(randomised(Adapter.create(expert, configs[name], 0), seed), Folder(path))
        bundle.add_lora(name, str(path), expert=ADAPTED, merge=name == "merged")
    return bundle


def test_the_models_of_these_tests_compute_samples_together(bundle: Bundle) -> None:
    """Otherwise all would be computed one by one, and what follows would hold of itself."""
    models = LocalModels(bundle)
    assert all(
        models.most_rows(model) == MOST_TRIED for model in (ROUTER, *range(bundle.num_experts))
    )


# -- Requests through the engine -------------------------------------------------------------------


@dataclass(frozen=True)
class Wanted:
    """A request, and what `generate` draws of it alone."""

    prompts: list[str]
    seed: int
    options: dict[str, Any]
    alone: list[bytes] = field(default_factory=list)


def wish(bundle: Bundle, chance: random.Random) -> Wanted:
    """Return any request, drawn alone, a picture at a time."""
    prompts = chance.choices(PROMPTS, k=chance.choice([1, 1, 2, 3]))
    seed = chance.randrange(2**40)
    options = {
        "num_inference_steps": chance.randint(1, 4),
        "guidance_scale": chance.choice([1.0, 1.0, 0.0, 2.0, 7.5]),
        "routing": chance.choice(ROUTINGS),
        "solver": chance.choice(["euler", "heun", "ab2", "dpm++2m"]),
        "lora": chance.choice([None, None, *ADAPTERS]),
    }
    wanted = Wanted(prompts, seed, options)
    for i, prompt in enumerate(prompts):
        wanted.alone.extend(
            p.tobytes() for p in generate(bundle, [prompt], seed=seed + i, **options)
        )
    return wanted


def admit(
    engine: Engine, bundle: Bundle, wanted: Wanted, text: TextConditioning, events: list[Event]
) -> Ticket:
    options = sampling_options(bundle, **wanted.options)
    evaluations = options.num_inference_steps
    if options.solver == "heun":
        evaluations = 2 * evaluations - 1
    ticket = engine.admit(
        "a",
        num_pictures=len(wanted.prompts),
        evaluations=evaluations,
        timeout_s=1e9,
        listener=events.append,
        now=0.0,
    )
    seeds = range(wanted.seed, wanted.seed + len(wanted.prompts))
    pictures = [
        start_denoising(bundle, text.rows(slice(i, i + 1)), [seed], options)
        for i, seed in enumerate(seeds)
    ]
    engine.start(ticket, pictures, 0.0)
    return ticket


def draw_mix(
    bundle: Bundle, models: LocalModels, mix: Sequence[Wanted], chance: random.Random
) -> list[list[bytes]]:
    """Draw requests together: they come one by one, and any model may be the next that is free."""
    limits = Limits(
        max_batch_rows=chance.choice([1, 2, 3, 5, 8, 64]),
        max_active_pictures=chance.choice([1, 4, 64]),
    )
    every = (ROUTER, *range(bundle.num_experts))
    engine = Engine(every, limits)
    events: list[list[Event]] = [[] for _ in mix]
    # All texts at once, by an encoder that remembers none.
    prompts = [prompt for one in mix for prompt in one.prompts]
    texts = Texts(bundle.text_encoder).encode(prompts)
    rows = torch.arange(len(prompts)).split([len(one.prompts) for one in mix])
    coming = list(zip(mix, map(texts.rows, rows), events, strict=True))
    while coming or engine.num_left:
        if coming and chance.random() < 0.3:
            admit(engine, bundle, *coming.pop())
        batch = engine.take([chance.choice(every)], 0.0)
        if batch is not None and chance.random() < 0.05:
            engine.fail(batch, 0.0)  # it is sent again
            batch = engine.take([batch.model], 1.0)
        if batch is not None:
            engine.answer(batch, models.answer(batch.calls), 0.0)
    return [_pixels(bundle, told) for told in events]


def _pixels(bundle: Bundle, events: list[Event]) -> list[bytes]:
    (finished,) = events
    assert not isinstance(finished, Failed), finished.error
    assert isinstance(finished, Finished)
    return [bundle.codec.decode(one.latents)[0].tobytes() for one in finished.samples]


def test_any_mix_gives_the_bytes_of_each_alone(bundle: Bundle) -> None:
    chance = random.Random(11)
    wishes = [wish(bundle, chance) for _ in range(40)]
    assert len({data for one in wishes for data in one.alone}) > 50
    models = LocalModels(bundle)
    for _ in range(NUM_MIXES):
        mix = chance.sample(wishes, k=chance.randint(2, 6))
        assert draw_mix(bundle, models, mix, chance) == [one.alone for one in mix]


# -- Models ----------------------------------------------------------------------------------------


@cache
def many(shape: tuple[int, ...]) -> tuple[Tensor, list[float]]:
    """Latents of 33 pictures, and a time for each."""
    latents = initial_noise(shape, range(max(SIZES)))
    return latents, torch.linspace(1, 0.01, max(SIZES)).tolist()


def router_calls(bundle: Bundle) -> list[Call]:
    latents, times = many(bundle.latent_shape)
    text = KeyedText.of(bundle.encode_text(PROMPTS))
    return [
        RouterCall(
            latents=latents[i : i + 1], t=t, text=text.rows(torch.tensor([i % len(PROMPTS)]))
        )
        for i, t in enumerate(times)
    ]


def expert_calls(bundle: Bundle, loras: Sequence[str | None]) -> list[Call]:
    """Calls of 33 pictures, of which every third has no guidance."""
    latents, times = many(bundle.latent_shape)
    text, null = KeyedText.of(bundle.encode_text(PROMPTS)), KeyedText.of(bundle.null_text)
    return [
        ExpertCall(
            expert=ADAPTED,
            lora=loras[i % len(loras)],
            latents=latents[i : i + 1],
            t=t,
            text=text.rows(torch.tensor([i % len(PROMPTS)])),
            null_text=null if i % 3 else None,
            guidance_scale=1.0 + i,
        )
        for i, t in enumerate(times)
    ]


CALLS: dict[str, Callable[[Bundle], list[Call]]] = {
    "router": router_calls,
    "expert": lambda bundle: expert_calls(bundle, [None]),
    "one adapter": lambda bundle: expert_calls(bundle, ["mixed"]),
    "many adapters": lambda bundle: expert_calls(bundle, [None, *ADAPTERS]),
}


@pytest.mark.parametrize("kind", CALLS)
def test_rows_are_equal_in_batches_of_any_size(bundle: Bundle, kind: str) -> None:
    calls, models = CALLS[kind](bundle), LocalModels(bundle)
    alone = [answer_alone(models, call) for call in calls]
    for size in SIZES:
        for start in (0, len(calls) - size):
            answers = models.answer(calls[start : start + size])
            for answer, expected in zip(answers, alone[start:], strict=False):
                assert torch.equal(answer, expected)


@pytest.mark.parametrize("kind", CALLS)
def test_where_rows_depend_on_their_batch_they_are_computed_one_by_one(
    bundle: Bundle, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, asked = CALLS[kind](bundle), []
    together = LocalModels(bundle).answer(calls)
    monkeypatch.setattr("paris_ray.sampling.local.rows_are_independent", lambda model: False)
    models, ask = LocalModels(bundle), LocalModels._ask
    monkeypatch.setattr(
        models, "_ask", lambda calls: asked.append(len(calls)) or ask(models, calls)
    )
    pairs = zip(models.answer(calls), together, strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert asked == [1] * len(calls)
    asked.clear()
    inexact = LocalModels(bundle, exact=False)
    monkeypatch.setattr(
        inexact, "_ask", lambda calls: asked.append(len(calls)) or ask(inexact, calls)
    )
    inexact.answer(calls)
    assert asked == [len(calls)]


@torch.inference_mode()
@pytest.mark.parametrize("name", ["mixed", "other"])
def test_an_adapter_among_others_equals_it_attached(bundle: Bundle, name: str) -> None:
    attached, mixed = bundle.expert(ADAPTED, name), bundle.mixed_expert(ADAPTED)
    base = bundle.expert(ADAPTED)
    latents, t = many(bundle.latent_shape)
    latents, times = latents[:4], 1000 * torch.tensor(t[:4])
    text = bundle.encode_text(PROMPTS[:4])
    owners = [name, None, "other" if name == "mixed" else "mixed", name]
    views = [base if owner is None else bundle.expert(ADAPTED, owner) for owner in owners]
    rows = [slice(i, i + 1) for i in range(4)]
    encoded = [view.encode_text(text.rows(row)) for view, row in zip(views, rows, strict=True)]
    with adapted_samples(owners):
        together = mixed(latents, times, EncodedText.concatenate(encoded))
    alone = [
        view(latents[row], times[row], part)
        for view, row, part in zip(views, rows, encoded, strict=True)
    ]
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(attached(latents[:1], times[:1], encoded[0]), together[:1])
    assert not torch.equal(base(latents[:1], times[:1], encoded[0]), together[:1])


# -- Layers ----------------------------------------------------------------------------------------


@given(
    shape=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    widths=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    biased=st.booleans(),
    with_grad=st.booleans(),
)
def test_apply_linear_is_a_linear_layer(
    shape: list[int], widths: tuple[int, int], biased: bool, with_grad: bool
) -> None:
    torch.manual_seed(0)
    x, linear = torch.randn(*shape, widths[0]), nn.Linear(*widths, bias=biased)
    with torch.set_grad_enabled(with_grad):
        y = apply_linear(x, linear.weight, linear.bias)
        torch.testing.assert_close(y, functional.linear(x, linear.weight, linear.bias))
    assert y.requires_grad == with_grad
    if with_grad:
        gradients = torch.autograd.grad(y.square().sum(), list(linear.parameters()))
        expected = torch.autograd.grad(linear(x).square().sum(), list(linear.parameters()))
        for one, other in zip(gradients, expected, strict=True):
            torch.testing.assert_close(one, other)


@torch.inference_mode()
@pytest.mark.parametrize("num_tokens", [None, 1, 4, 5, 15, 16, 17, 64])
@pytest.mark.parametrize(("wide", "narrow"), [(32, 32), (128, 3), (64, 256), (384, 384)])
def test_linear_layers_compute_rows_alike_in_any_batch(
    num_tokens: int | None, wide: int, narrow: int
) -> None:
    torch.manual_seed(0)
    linear = Linear(wide, narrow)
    x = torch.randn(max(SIZES), *([] if num_tokens is None else [num_tokens]), wide)
    alone = torch.cat([linear(row[None]) for row in x])
    for size in SIZES:
        assert torch.equal(linear(x[:size]), alone[:size])


@torch.no_grad()
@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_patches_are_those_of_a_convolution(patch_size: int) -> None:
    embed = PatchEmbed(3, patch_size, 10)
    latents = torch.randn(5, 3, 8, 8)
    convolved = functional.conv2d(latents, embed.weight, embed.bias, stride=patch_size)
    torch.testing.assert_close(embed(latents), convolved.flatten(2).transpose(1, 2))
    with torch.enable_grad():
        torch.testing.assert_close(embed(latents), convolved.flatten(2).transpose(1, 2))


# -- Without an expert -----------------------------------------------------------------------------


def draw_without(
    bundle: Bundle, lost: set[int], lost_from: int = 0, count: int = 1, **options: Any
) -> tuple[Samples, list[list[int]]]:
    """Draw pictures with experts that are lost from some evaluation on; tell who was asked."""
    models, asked = LocalModels(bundle), []
    text, seeds = bundle.encode_text(PROMPTS[:count]), list(range(3, 3 + count))
    checked = sampling_options(bundle, **options)
    denoising = start_denoising(bundle, text, seeds, checked, bundle.last_resort)
    step = advance(denoising)
    while isinstance(step, Step):
        asked.append([call.model for call in step.calls])
        gone = lost if step.evaluations >= lost_from else set()
        answers: Answers = [
            None if call.model in gone else answer_alone(models, call) for call in step.calls
        ]
        step = advance(denoising, answers)
    return step, asked


def test_weights_are_shared_among_the_living(bundle: Bundle) -> None:
    options = {"routing": "full", "num_inference_steps": 3}
    whole, _ = draw_without(bundle, set(), **options)
    samples, asked = draw_without(bundle, {1}, lost_from=1, **options)
    assert whole.missing_experts == ()
    assert samples.missing_experts == (1,)
    first, second, third = samples.expert_weights[0]
    assert torch.equal(first, whole.expert_weights[0, 0])
    living = whole.expert_weights[0, 1].clone()  # of the same latents, which nobody moved yet
    living[1] = 0
    torch.testing.assert_close(second, living / living.sum())
    assert third[1] == 0
    torch.testing.assert_close(samples.expert_weights.sum(dim=2), torch.ones(1, 3))
    # Once it is lost, the others answer again, and it is not asked again.
    assert asked == [[-1], [0, 1, 2], [-1], [0, 1, 2], [0, 2], [-1], [0, 2]]


def test_top_1_of_the_living(bundle: Bundle) -> None:
    options = {"routing": "top-1", "num_inference_steps": 2}
    whole, _ = draw_without(bundle, set(), **options)
    (best,) = whole.expert_weights[0, 0].nonzero().flatten().tolist()
    samples, _ = draw_without(bundle, {best}, **options)
    assert samples.missing_experts == (best,)
    assert (samples.expert_weights[0, :, best] == 0).all()
    assert (samples.expert_weights.max(dim=2).values == 1).all()


def test_of_two_that_agree_one_may_be_lost(bundle: Bundle) -> None:
    for lost, agree, same in (
        ({0}, "agree:1e-6", "top-1"),
        ({0}, "agree:1e6", "top-2"),
        ({0, 2}, "agree:1e6", "top-1"),
    ):
        samples, _ = draw_without(bundle, lost, routing=agree, num_inference_steps=3)
        expected, _ = draw_without(bundle, lost, routing=same, num_inference_steps=3)
        assert torch.equal(samples.latents, expected.latents)
        assert (samples.num_asked == 3 - len(lost)).all()


def test_without_any_expert_there_is_no_picture(bundle: Bundle) -> None:
    with pytest.raises(ExpertsLostError, match="all experts that may draw are lost"):
        draw_without(bundle, {0, 1, 2}, lost_from=1, routing="top-2", num_inference_steps=2)
    with pytest.raises(ExpertsLostError):
        draw_without(bundle, {0, 1, 2}, routing="full", num_inference_steps=2)


def test_calls_of_many_pictures_are_those_of_each(bundle: Bundle) -> None:
    """`generate` asks about several pictures at once, the engine about each."""
    options = sampling_options(bundle, routing="full", guidance_scale=3.0, lora="other")
    models, text = LocalModels(bundle), bundle.encode_text(PROMPTS[:3])
    calls = first_expert_calls(bundle, text, [1, 2, 3], options)
    for call in calls:
        rows = torch.cat([answer_alone(models, call.row(i)) for i in range(3)])
        assert torch.equal(rows, answer_alone(models, call))


def test_the_answer_does_not_depend_on_the_order_of_calls(bundle: Bundle) -> None:
    calls, models = expert_calls(bundle, [None, *ADAPTERS])[:12], LocalModels(bundle)
    answers = models.answer(calls)
    order = np.random.default_rng(0).permutation(len(calls))
    for place, answer in zip(order, models.answer([calls[i] for i in order]), strict=True):
        assert torch.equal(answer, answers[place])


@pytest.fixture(scope="module")
def seeded(seeded_bundle_path: Path) -> Bundle:
    return load_bundle(str(seeded_bundle_path))


def test_the_last_resort_draws_in_the_place_of_a_lost_expert(
    tiny_bundle: Bundle, seeded: Bundle
) -> None:
    options = {"routing": "full", "num_inference_steps": 3}
    whole, _ = draw_without(tiny_bundle, set(), **options)
    unneeded, asked = draw_without(seeded, set(), **options)
    assert torch.equal(unneeded.latents, whole.latents)
    assert not unneeded.last_resort
    assert asked == [[-1], [0, 1, 2]] * 3

    samples, asked = draw_without(seeded, {1}, lost_from=1, **options)
    assert (samples.missing_experts, samples.last_resort) == ((1,), True)
    assert asked == [[-1], [0, 1, 2], [-1], [0, 1, 2], [0, 3, 2], [-1], [0, 3, 2]]
    # Of the same latents the router wants the same, and the weight of the lost one is drawn.
    assert torch.equal(samples.expert_weights[0, 1], whole.expert_weights[0, 1])
    assert not torch.equal(samples.latents, whole.latents)
    torch.testing.assert_close(samples.expert_weights.sum(dim=2), torch.ones(1, 3))


def test_where_all_experts_are_lost_the_last_resort_draws_alone(seeded: Bundle) -> None:
    options = {"num_inference_steps": 3, "guidance_scale": 1.0}
    samples, _ = draw_without(seeded, {0, 1, 2}, count=3, routing="top-2", **options)
    assert (samples.missing_experts, samples.last_resort) == ((0, 1, 2), True)
    assert seeded.last_resort is not None
    text = seeded.encode_text(PROMPTS[:3])
    seed = seeded.expert(seeded.last_resort)
    alone = sample_one_expert(seed, text, seeded.null_text, seeds=[3, 4, 5], **options)
    torch.testing.assert_close(samples.latents, alone)


@pytest.mark.parametrize("allowed", [None, [0, 2, 1]])
def test_without_a_last_resort_that_may_draw_the_others_do(
    tiny_bundle: Bundle, seeded: Bundle, allowed: list[int] | None
) -> None:
    """It may not where a request names who may, and cannot where it is lost as well."""
    options = {"routing": "full", "num_inference_steps": 3, "allowed_experts": allowed}
    expected, _ = draw_without(tiny_bundle, {1}, **options)
    samples, asked = draw_without(seeded, {1} if allowed else {1, 3}, **options)
    assert torch.equal(samples.latents, expected.latents)
    assert (samples.missing_experts, samples.last_resort) == ((1,), False)
    assert ([0, 3, 2] in asked) == (allowed is None)


def test_the_last_resort_is_no_expert_of_the_router(seeded: Bundle) -> None:
    assert (seeded.num_experts, seeded.num_models, seeded.last_resort) == (3, 4, 3)
    assert len(seeded.expert_configs) == len(seeded.num_parameters()[0]) == 3
    with pytest.raises(ParisError, match="numbers from 0 to 2"):
        sampling_options(seeded, allowed_experts=[3])
