"""Multi-party inference: experts and language models whose updates somebody else computes."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from paris_ray.config import LoRAConfig
from paris_ray.diffusion import denoising_loss, sample_path
from paris_ray.errors import BundleError, ParisError, ProtocolError
from paris_ray.evaluation.denoising import denoising_losses
from paris_ray.models import Expert, ExpertConfig, TextConditioning
from paris_ray.models.lora import Adapter, LowRankUpdate, attach
from paris_ray.seeding import torch_generator
from paris_ray.zklora.adapter import quantise_adapter, read_peft
from paris_ray.zklora.commitment import commit
from paris_ray.zklora.fixed_point import (
    Int16,
    Int64,
    QuantisedModule,
    evaluate,
    quantise,
    quantise_rows,
)
from paris_ray.zklora.inference import (
    PEAK_TO_RMS,
    NumericsLog,
    Together,
    adapt,
    trace_calls,
)
from paris_ray.zklora.leakage import draw_last_bits, row_seeds
from paris_ray.zklora.manifest import ModuleTerms

Randomise = Callable[[nn.Module, int], nn.Module]
Modules = dict[str, QuantisedModule]

SIZES = {"input_size": 4, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "text_embed_dim": 8}
EVERY_LINEAR = (
    "in_proj",
    "out_proj",
    "mlp.0",
    "mlp.2",
    "text_proj",
    "t_block.1",
    "final_layer.linear",
)
SCALE = 2.0
A_ROW = np.ones((1024, 1))


class Contributor:
    """Holds the weights. Like a session, it cannot be copied, and keeps what it was asked."""

    def __init__(self, modules: Modules) -> None:
        self.modules, self.calls, self.lock = modules, list[tuple[str, int]](), Lock()

    def evaluate(self, name: str, x: Int16, exponent: int) -> Int64:
        assert x.dtype == np.int16 and x.flags.c_contiguous
        with self.lock:
            self.calls.append((name, len(x)))
            return evaluate(self.modules[name], x)


def integers_of(adapter: Adapter) -> Modules:
    return {
        name: quantise(update.A.detach().numpy().T, update.B.detach().numpy().T)
        for name, update in adapter.updates().items()
    }


def dequantised(adapter: Adapter, modules: Modules) -> Adapter:
    """The same adapter with the very numbers of the integers."""
    updates = {}
    for name, module in modules.items():
        a, b = module.a * 2.0**-module.exponent_a, module.b * 2.0**-module.exponent_b
        a, b = (torch.from_numpy(factor.T).float().contiguous() for factor in (a, b))
        updates[name] = LowRankUpdate(a, b, adapter.config.scale)
    return Adapter(adapter.config, updates).requires_grad_(False)


def relative(output: Tensor, expected: Tensor) -> float:
    return ((output - expected).norm() / expected.norm()).item()


def make_adapter(model: nn.Module, randomised: Randomise, *targets: str, seed: int = 1) -> Adapter:
    config = LoRAConfig(r=4, lora_alpha=4 * SCALE, target_modules=targets)
    adapter = randomised(Adapter.create(model, config, 0), seed)
    assert isinstance(adapter, Adapter)
    return adapter.requires_grad_(False)


@pytest.fixture
def expert(randomised: Randomise) -> Expert:
    model = randomised(Expert(ExpertConfig(**SIZES)), 0).eval().requires_grad_(False)
    assert isinstance(model, Expert)
    return model


@pytest.fixture
def adapter(expert: Expert, randomised: Randomise) -> Adapter:
    return make_adapter(expert, randomised, *EVERY_LINEAR)


def run(model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(2, 4, 4, 4, generator=generator).to(dtype)
    text = torch.randn(2, 3, 8, generator=generator).to(dtype)
    with torch.no_grad():
        return model(latents, torch.tensor([100.0, 900.0]), text)


# Numbers.


def outliers(generator: np.random.Generator, shape: tuple[int, int], ratio: float) -> Any:
    """Gaussian numbers with a few large ones; peak / RMS at most about `ratio`."""
    values = generator.standard_normal(shape)
    chosen = generator.random(shape) < 0.002
    values[chosen] *= ratio / 4
    peak = ratio * np.sqrt(np.mean(values**2))
    return values.clip(-peak, peak)


class Drawing(Contributor):
    """Draws the last bit of every input, as the contributor of a session does."""

    def evaluate(self, name: str, x: Int16, exponent: int) -> Int64:
        self.drawn = draw_last_bits(x, row_seeds(b"secret", name, x))
        return super().evaluate(name, self.drawn, exponent)


def delta_error(
    seed: int, rows: int, d_in: int, r: int, d_out: int, ratio: float, kind: type = Contributor
) -> float:
    """Relative RMS error of a module's whole update against float64."""
    generator = np.random.default_rng(seed)
    x = outliers(generator, (rows, d_in), ratio) * 10.0 ** generator.integers(-6, 6)
    A = outliers(generator, (d_in, r), ratio) * 10.0 ** generator.integers(-4, 1)
    B = outliers(generator, (r, d_out), ratio) * 10.0 ** generator.integers(-4, 1)
    model = nn.Sequential(nn.Linear(d_in, d_out, bias=False, dtype=torch.float64))
    nn.init.zeros_(model[0].weight)
    modules = {"0": quantise(A, B)}
    view = adapt(model, modules, SCALE, kind(modules).evaluate)
    seen = view(torch.from_numpy(x))
    return relative(seen, torch.from_numpy(SCALE * x @ A @ B))


@given(
    seed=st.integers(0, 2**32),
    rows=st.integers(16, 64),
    d_in=st.integers(32, 200),
    r=st.integers(1, 16),
    d_out=st.integers(32, 200),
    ratio=st.floats(4, PEAK_TO_RMS),
)
@settings(max_examples=60, deadline=None)
def test_the_update_is_that_of_floats_within_5e_4(
    seed: int, rows: int, d_in: int, r: int, d_out: int, ratio: float
) -> None:
    assert delta_error(seed, rows, d_in, r, d_out, ratio) <= 5e-4
    assert delta_error(seed, rows, d_in, r, d_out, ratio, Drawing) <= 1e-3


def test_a_drawn_last_bit_is_part_of_the_error() -> None:
    modules, numerics = {"0": quantise(A_ROW, np.ones((1, 2)))}, NumericsLog(last_bits_drawn=True)
    contributor = Drawing(modules)
    view = adapt(nn.Sequential(nn.Linear(1024, 2)), modules, 1.0, contributor.evaluate, numerics)
    x = np.random.default_rng(0).standard_normal((64, 1024))
    view(torch.from_numpy(x).float())
    _, exponent = quantise_rows(x.astype(np.float32))
    error = np.ldexp(contributor.drawn.astype(float), -exponent) - x
    measured = np.sqrt(np.mean(error**2) / np.mean(x**2))
    assert numerics.modules["0"].input_error == pytest.approx(measured, rel=0.01)


def test_inputs_that_are_all_zero_have_no_update_even_if_last_bits_are_drawn() -> None:
    modules = {"0": quantise(A_ROW, np.ones((1, 2)))}
    contributor, numerics = Drawing(modules), NumericsLog(last_bits_drawn=True)
    model = nn.Sequential(nn.Linear(1024, 2, bias=False))
    view = adapt(model, modules, 1.0, contributor.evaluate, numerics)
    assert not view(torch.zeros(3, 1024)).any() and contributor.drawn.any()
    assert numerics.modules["0"].input_error < 1e-9


def test_outliers_are_reported() -> None:
    modules, numerics = {"0": quantise(np.ones((1024, 1)), np.ones((1, 2)))}, NumericsLog()
    model = nn.Sequential(nn.Linear(1024, 2))
    view = adapt(model, modules, 1.0, Contributor(modules).evaluate, numerics)
    x = torch.full((1, 1024), 0.01)
    view(x)
    assert numerics.modules["0"].peak_to_rms == pytest.approx(1)
    x[0, 3] = 1.0
    view(x)
    view(torch.zeros(3, 1024))
    seen = numerics.modules["0"]
    rms = x.square().mean().sqrt().item()
    assert seen.peak_to_rms == pytest.approx(1 / rms)
    rounded = torch.round(x.double() * 2**14) / 2**14
    error = (rounded - x).square().mean().sqrt().item() / rms
    assert seen.input_error == pytest.approx(error) and error > 0
    assert NumericsLog.from_json(numerics.to_json()).modules["0"] == seen
    of_before = {"0": {"rows": 5, "seconds": 0.1} | numerics.to_json()["0"]}
    assert NumericsLog.from_json(of_before).modules["0"] == seen


# Any model.


def test_what_is_public_of_the_modules_will_do(expert: Expert, adapter: Adapter) -> None:
    modules = integers_of(adapter)
    contributor = Contributor(modules)
    public = {name: ModuleTerms.of(name, commit(module)[1]) for name, module in modules.items()}
    views = [adapt(expert, terms, SCALE, contributor.evaluate) for terms in (public, modules)]
    assert torch.equal(*map(run, views))
    public = {"layers.0.mlp.2": public["layers.0.mlp.0"]}
    with pytest.raises(BundleError, match="the adapter has d_in=16, d_out=64, the model d_in=64"):
        adapt(expert, public, SCALE, refuse)


def test_an_adapted_expert_is_that_of_the_same_numbers(expert: Expert, adapter: Adapter) -> None:
    modules = integers_of(adapter)
    ours = run(adapt(expert, modules, SCALE, Contributor(modules).evaluate))
    assert relative(ours, run(attach(expert, adapter))) < 2e-3
    assert relative(ours, run(attach(expert, dequantised(adapter, modules)))) < 1e-3
    assert relative(ours, run(expert)) > 1e-2


@pytest.mark.parametrize("target", ["layers.0.attn.in_proj", "layers.1.cross_attn.in_proj"])
def test_fused_projections_are_updated_by_rows(
    expert: Expert, randomised: Randomise, target: str
) -> None:
    adapter = make_adapter(expert, randomised, target)
    modules = integers_of(adapter)
    contributor = Contributor(modules)
    view = adapt(expert, modules, SCALE, contributor.evaluate)
    assert relative(run(view), run(attach(expert, adapter))) < 1e-3
    assert len(contributor.calls) == 1 + ("cross" in target)  # apart for text and picture
    x = torch.randn(5, 16)
    linear = view.get_submodule(target)
    assert torch.equal(linear.rows(x, 4, 20), linear(x)[:, 4:20])


def test_the_view_shares_the_model_and_leaves_it_alone(expert: Expert, adapter: Adapter) -> None:
    modules, before = integers_of(adapter), run(expert)
    view = adapt(expert, modules, SCALE, Contributor(modules).evaluate)
    assert {id(p) for p in view.parameters()} == {id(p) for p in expert.parameters()}
    run(view)
    assert torch.equal(run(expert), before)
    assert expert.state_dict().keys() == Expert(ExpertConfig(**SIZES)).state_dict().keys()


def test_contributors_of_disjoint_modules_adapt_one_model(
    expert: Expert, randomised: Randomise
) -> None:
    adapters = [make_adapter(expert, randomised, t) for t in ("attn.in_proj", "mlp.0")]
    held = [integers_of(adapter) for adapter in adapters]
    contributors = [Contributor(modules) for modules in held]
    numerics, view = NumericsLog(), expert
    for contributor in contributors:  # the second copies the view, but not the session in it
        view = adapt(view, contributor.modules, SCALE, contributor.evaluate, numerics)
    both = attach(attach(expert, adapters[0]), adapters[1])
    assert relative(run(view), run(both)) < 1e-3
    for contributor in contributors:
        assert {name for name, _ in contributor.calls} == set(contributor.modules)
    assert set(numerics.modules) == set(held[0]) | set(held[1])
    with pytest.raises(BundleError, match="UpdatedLinear is not allowed: Linear"):
        adapt(view, held[0], SCALE, contributors[0].evaluate)


def test_it_keeps_the_dtype_of_the_model(expert: Expert, adapter: Adapter) -> None:
    modules, half = integers_of(adapter), copy.deepcopy(expert).to(torch.bfloat16)
    view = adapt(half, modules, SCALE, Contributor(modules).evaluate)
    output = run(view, torch.bfloat16)
    assert output.dtype == torch.bfloat16
    assert relative(output.float(), run(attach(expert, adapter))) < 3e-2


def refuse(name: str, x: Int16, exponent: int) -> Int64:
    raise AssertionError("nothing may be sent")


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("layers.0.mlp.0", (16, 65), "layers.0.mlp.0: the adapter has d_in=16, d_out=65, the "
         "model d_in=16, d_out=64"),
        ("layers.0.mlp.0", (64, 16), "the adapter has d_in=64, d_out=16"),
        ("layers.0.mlp.1", (16, 64), "layers.0.mlp.1: GELU is not allowed: Linear"),
        ("layers.7.mlp.0", (16, 64), "layers.7.mlp.0: the model has no module of this name"),
        ("patch_embed", (16, 64), "patch_embed: PatchEmbed is not allowed"),
        ("", (16, 64), "Expert is not allowed"),
    ],
)  # fmt: skip
def test_modules_that_do_not_fit_are_refused(
    expert: Expert, name: str, sizes: tuple[int, int], message: str
) -> None:
    module = quantise(np.ones((sizes[0], 2)), np.ones((2, sizes[1])))
    with pytest.raises(BundleError, match=message):
        adapt(expert, {name: module}, 1.0, refuse)
    with pytest.raises(BundleError, match="has no modules"):
        adapt(expert, {}, 1.0, refuse)


@pytest.mark.parametrize(
    "x", [torch.full((2, 16), torch.nan), torch.full((2, 16), torch.inf), torch.ones(2, 17)]
)
def test_inputs_that_do_not_fit_are_not_sent(x: Tensor) -> None:
    module = quantise(np.ones((16, 2)), np.ones((2, 8)))
    view = adapt(nn.Sequential(nn.Linear(16, 8)), {"0": module}, 1.0, refuse)
    if x.shape[1] == 16:
        with pytest.raises(ParisError, match=r"^0: x has values that are not finite"):
            view(x)
    else:
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            view(x)


@pytest.mark.parametrize(
    "answer",
    [
        np.zeros((1, 8), np.int64),  # would broadcast
        np.zeros((3, 7), np.int64),
        np.zeros(24, np.int64),
        np.zeros((3, 8), np.int32),
        np.zeros((3, 8)),
    ],
    ids=lambda answer: f"{answer.dtype}{answer.shape}",
)
def test_answers_that_do_not_fit_are_refused(answer: NDArray[Any]) -> None:
    module = quantise(np.ones((16, 2)), np.ones((2, 8)))
    view = adapt(nn.Sequential(nn.Linear(16, 8)), {"0": module}, 1.0, lambda *_: answer)
    with pytest.raises(ProtocolError, match=r"^0: the answer must be int64 with shape \(3, 8\)"):
        view(torch.ones(3, 16))


def test_a_call_without_rows_asks_nothing() -> None:
    module = quantise(np.ones((16, 2)), np.ones((2, 8)))
    view = adapt(nn.Sequential(nn.Linear(16, 8)), {"0": module}, 1.0, refuse)
    assert view(torch.ones(4, 0, 16)).shape == (4, 0, 8)


# Rows and losses.


@pytest.fixture
def pictures() -> tuple[Tensor, TextConditioning]:
    generator = torch.Generator().manual_seed(8)
    text = torch.randn(2, 3, 8, generator=generator)
    return torch.randn(2, 4, 4, 4, generator=generator), TextConditioning(text, text[:, 0])


TIMES = (0.3, 0.6, 1.0)


def test_rows_are_known_before_anything_is_asked(
    expert: Expert, adapter: Adapter, pictures: tuple[Tensor, TextConditioning]
) -> None:
    modules = integers_of(adapter)
    contributor = Contributor(modules)

    def losses(model: Expert) -> Tensor:
        return denoising_losses(model, *pictures, TIMES, seed=3)

    seen = []
    counts = trace_calls(expert, modules, lambda view: seen.append(losses(view))).rows
    assert torch.equal(seen[0], losses(expert))
    losses(adapt(expert, modules, SCALE, contributor.evaluate))
    asked = {name: sum(n for other, n in contributor.calls if other == name) for name in modules}
    assert counts == asked
    tokens, pairs = 4, 6
    assert counts["layers.0.attn.in_proj"] == counts["layers.1.mlp.2"] == tokens * pairs
    assert counts["t_block.1"] == pairs
    assert counts["text_proj"] == 2 * 3  # a caption is encoded once for all levels
    assert counts["layers.0.cross_attn.in_proj"] == tokens * pairs + 2 * 3
    calls = [name for name, _ in contributor.calls if "cross_attn.in_proj" not in name]
    assert sorted(calls) == sorted(name for name in modules if "cross_attn.in_proj" not in name)


def test_modules_that_are_not_asked_count_zero() -> None:
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "idle": nn.Linear(4, 4)})
    modules = {name: quantise(np.ones((4, 1)), np.ones((1, 4))) for name in model}
    assert trace_calls(model, modules, lambda view: view["used"](torch.ones(2, 3, 4))).rows == {
        "used": 6,
        "idle": 0,
    }


@pytest.mark.parametrize("prediction", ["velocity", "preconditioned", "epsilon"])
def test_losses_with_and_without_see_the_same_noise(
    randomised: Randomise, pictures: tuple[Tensor, TextConditioning], prediction: str
) -> None:
    expert = randomised(Expert(ExpertConfig(**SIZES, prediction=prediction)), 0).eval()
    assert isinstance(expert, Expert)
    adapter = make_adapter(expert, randomised, *EVERY_LINEAR)
    modules = integers_of(adapter)
    models = (
        expert,
        attach(expert, adapter),
        adapt(expert, modules, SCALE, Contributor(modules).evaluate),
    )
    base, attached, ours = (denoising_losses(model, *pictures, TIMES, seed=3) for model in models)
    assert base.shape == (3, 2) and base.dtype == torch.float32
    torch.testing.assert_close(ours, attached, rtol=2e-3, atol=1e-4)
    assert relative(ours, base) > 1e-2
    assert torch.equal(denoising_losses(expert, *pictures, TIMES, seed=3), base)
    assert not torch.allclose(denoising_losses(expert, *pictures, TIMES, seed=4), base)


def test_the_loss_is_that_of_training(
    expert: Expert, pictures: tuple[Tensor, TextConditioning]
) -> None:
    latents, text = pictures
    noise = torch.randn(4, 4, 4, 4, generator=torch_generator(0, "denoising losses"))
    losses = denoising_losses(expert, latents, text, (0.25, 0.75), seed=0)
    for level, t in enumerate((0.25, 0.75)):
        for i in range(2):
            one = noise[2 * level + i][None]
            path = sample_path(latents[i : i + 1], one, torch.tensor([t]))
            expected = denoising_loss(expert, path, text.rows(slice(i, i + 1)))
            torch.testing.assert_close(losses[level, i], expected, rtol=1e-4, atol=1e-5)


# Language models.


def gpt2() -> nn.Module:
    config = GPT2Config(vocab_size=50, n_positions=32, n_embd=32, n_layer=2, n_head=2)
    return GPT2LMHeadModel(config)


def llama() -> nn.Module:
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.mark.parametrize(
    ("make", "targets"),
    [
        (gpt2, ["c_attn", "c_proj", "c_fc"]),
        (llama, ["q_proj", "v_proj", "o_proj", "down_proj"]),
    ],
)
def test_language_models_answer_as_with_peft(
    make: Callable[[], nn.Module], targets: list[str], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = make().eval()
    options = {"fan_in_fan_out": True} if make is gpt2 else {}
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False, **options
    )
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    theirs.save_pretrained(tmp_path)
    modules = quantise_adapter(read_peft(tmp_path))
    assert len(modules) == 2 * len(targets) + (2 if make is gpt2 else 0)  # c_proj is twice a block
    view = adapt(model, modules, SCALE, Contributor(modules).evaluate)
    tokens = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, expected, base = (m(tokens).logits for m in (view, theirs, model))
        assert relative(ours, expected) < 1e-3
        assert relative(ours, base) > 1e-2
        assert set(trace_calls(model, modules, lambda m: m(tokens)).rows.values()) == {14}
        first = tokens[:1]
        written = [
            m.generate(input_ids=first, max_new_tokens=4, do_sample=False, pad_token_id=0)
            for m in (view, theirs)
        ]
    assert torch.equal(*written)


class Counted(Contributor):
    """Counts questions, each about some modules with the same inputs."""

    def __init__(self, modules: Modules) -> None:
        super().__init__(modules)
        self.questions: list[tuple[str, ...]] = []

    def evaluate_all(self, names: Sequence[str], x: Int16, exponent: int) -> list[Int64]:
        self.questions.append(tuple(names))
        return [self.evaluate(name, x, exponent) for name in names]


def test_modules_that_share_inputs_are_asked_together() -> None:
    """128 tokens through 14 modules are 8 round trips: 4 a layer."""
    torch.manual_seed(0)
    model, random = llama().eval(), np.random.default_rng(0)
    modules = {
        name: quantise(
            random.normal(size=(module.in_features, 2)),
            random.normal(size=(2, module.out_features)),
        )
        for name, module in model.named_modules()
        if name.endswith("_proj") and isinstance(module, nn.Linear)
    }
    assert len(modules) == 14
    tokens = torch.randint(0, 50, (1, 128))
    calls = trace_calls(model, modules, lambda view: view(tokens))
    assert calls.rows == dict.fromkeys(modules, 128)
    contributor, alone = Counted(modules), Contributor(modules)
    together = Together(contributor.evaluate_all, calls.together)
    view = adapt(model, modules, SCALE, together)
    expected = adapt(model, modules, SCALE, alone.evaluate)
    with torch.no_grad():
        for some in (tokens, tokens[:, :7], tokens):
            assert torch.equal(view(some).logits, expected(some).logits)
    assert len(contributor.questions) == 3 * 8
    ends = [tuple(name.rpartition(".")[2] for name in names) for names in contributor.questions]
    layer = [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]
    assert ends == 3 * 2 * layer
    assert sorted(contributor.calls) == sorted(alone.calls)  # not a row more


def test_an_early_answer_is_for_its_inputs_alone() -> None:
    modules = {name: quantise(np.ones((4, 1)), np.ones((1, 3))) for name in ("a", "b", "c")}
    contributor = Counted(modules)
    together = Together(contributor.evaluate_all, [("a", "b")])
    x, other = np.ones((2, 4), np.int16), np.full((2, 4), 2, np.int16)
    together("a", x, 0)
    assert np.array_equal(together("b", other, 0), evaluate(modules["b"], other))
    together("a", x, 0)
    together("b", x, 1)
    together("c", x, 0)
    assert contributor.questions == [("a", "b"), ("b", "a"), ("a", "b"), ("b", "a"), ("c",)]
