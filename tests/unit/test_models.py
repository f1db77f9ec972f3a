"""Experts and router: sizes, the released parameter names, and what they accept."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from paris_ray.models import (
    EncodedText,
    Expert,
    ExpertConfig,
    Router,
    RouterConfig,
    TextConditioning,
)
from paris_ray.models.flops import forward_macs, parameter_count
from paris_ray.models.layers import Attention, CrossAttention

Randomise = Callable[[nn.Module, int], nn.Module]

SMALL = {"input_size": 4, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "text_embed_dim": 8}
ATTENTION = ["in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"]
MLP = ["mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias"]
EMBEDDINGS = [
    "pos_embed",
    *(f"patch_embed.{part}" for part in ("weight", "bias")),
    *(f"time_embed.{part}" for part in MLP),
]


def test_expert_has_the_released_names() -> None:
    expected = set(EMBEDDINGS)
    expected |= {f"{name}.{p}" for name in ("text_proj", "t_block.1") for p in ("weight", "bias")}
    for i in range(2):
        expected |= {f"layers.{i}.{attn}.{p}" for attn in ("attn", "cross_attn") for p in ATTENTION}
        expected |= {f"layers.{i}.{name}" for name in (*MLP, "scale_shift_table")}
    expected |= {f"final_layer.{p}" for p in ("linear.weight", "linear.bias", "scale_shift_table")}
    assert set(Expert(ExpertConfig(**SMALL)).state_dict()) == expected


def test_router_has_the_released_names() -> None:
    expected = {*EMBEDDINGS, "cls_token"}
    expected |= {f"head.{i}.{part}" for i in (0, 2, 4) for part in ("weight", "bias")}
    for i in range(2):
        expected |= {f"layers.{i}.attn.{part}" for part in ATTENTION}
        expected |= {f"layers.{i}.adaLN_modulation.1.{part}" for part in ("weight", "bias")}
        expected |= {f"layers.{i}.{part}" for part in MLP}
    config = RouterConfig(**{**SMALL, "text_embed_dim": 0})
    assert set(Router(config).state_dict()) == expected


def inputs(length: int = 3) -> tuple[Tensor, Tensor, TextConditioning]:
    generator = torch.Generator().manual_seed(5)
    text = torch.randn(2, length, 8, generator=generator)
    latents = torch.randn(2, 4, 4, 4, generator=generator)
    return latents, torch.tensor([100.0, 900.0]), TextConditioning(text, text[:, 0])


@pytest.mark.parametrize("injection", ["cross_attention", "spatial", "both"])
def test_state_dicts_load_strictly_and_mean_the_same(injection: str, randomised: Randomise) -> None:
    config = ExpertConfig(text_injection=injection, **SMALL)
    expert, other = randomised(Expert(config), 0), randomised(Expert(config), 1)
    latents, timesteps, text = inputs(length=1)
    assert not torch.allclose(expert(latents, timesteps, text), other(latents, timesteps, text))
    other.load_state_dict(expert.state_dict(), strict=True)
    assert torch.equal(expert(latents, timesteps, text), other(latents, timesteps, text))


@pytest.mark.parametrize(
    ("injection", "length"), [("cross_attention", 3), ("spatial", 1), ("both", 1)]
)
def test_text_is_accepted_in_three_forms(
    injection: str, length: int, randomised: Randomise
) -> None:
    expert = randomised(Expert(ExpertConfig(text_injection=injection, **SMALL)), 0)
    latents, timesteps, text = inputs(length)
    output = expert(latents, timesteps, text)
    assert output.shape == latents.shape
    assert torch.equal(expert(latents, timesteps, expert.encode_text(text)), output)
    assert torch.equal(expert(latents, timesteps, text.text_embeddings), output)
    assert not torch.allclose(expert(latents, timesteps, -text.text_embeddings), output)
    assert not torch.allclose(expert(latents, timesteps + 50, text), output)


def test_patches_keep_their_place(randomised: Randomise) -> None:
    """With nothing but the patch path open, a patch of latents only reaches its own output."""
    expert = randomised(Expert(ExpertConfig(text_injection="spatial", **SMALL)), 0)
    for block in expert.layers:
        nn.init.zeros_(block.attn.out_proj.weight)
    latents, timesteps, text = inputs(length=1)
    moved = latents.clone()
    moved[:, :, 2:, :2] += 1  # patch (1, 0)
    reached = (expert(moved, timesteps, text) - expert(latents, timesteps, text)).abs() > 1e-6
    inside = torch.zeros_like(reached)
    inside[:, :, 2:, :2] = True
    assert torch.equal(reached, inside)


def test_a_new_expert_is_silent_and_a_new_router_undecided() -> None:
    latents, timesteps, text = inputs()
    expert = Expert(ExpertConfig(**SMALL))
    assert not expert(latents, timesteps, text).any()
    router = Router(RouterConfig(num_experts=3, **SMALL))
    assert not router(latents, timesteps, text.pooled_text).any()


def test_router_needs_text_exactly_if_built_with_it(randomised: Randomise) -> None:
    latents, timesteps, text = inputs()
    router = randomised(Router(RouterConfig(num_experts=3, **SMALL)), 0)
    with pytest.raises(ValueError, match="pooled_text is missing"):
        router(latents, timesteps)
    logits = router(latents, timesteps, text.pooled_text)
    assert logits.shape == (2, 3)
    assert not torch.allclose(router(latents, timesteps, -text.pooled_text), logits)
    without = randomised(Router(RouterConfig(**{**SMALL, "text_embed_dim": 0})), 0)
    assert without(latents, timesteps).shape == (2, 8)


def test_self_attention_equals_torch(randomised: Randomise) -> None:
    reference = randomised(nn.MultiheadAttention(16, 4, batch_first=True), 0)
    attention = Attention(16, 4)
    attention.load_state_dict(reference.state_dict(), strict=True)
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(attention(x), reference(x, x, x)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padding", [0, 2])
def test_cross_attention_equals_torch(padding: int, randomised: Randomise) -> None:
    reference = randomised(nn.MultiheadAttention(16, 4, batch_first=True), 0)
    attention = CrossAttention(16, 4)
    attention.load_state_dict(reference.state_dict(), strict=True)
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    context = 2 * x[:, :4].flip(1)
    mask = torch.arange(4).expand(2, 4) < 4 - padding
    expected, _ = reference(x, context, context, key_padding_mask=~mask)
    found = attention(x, attention.keys_values(context), mask)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_padding_counts_unless_it_is_masked(masked: bool, randomised: Randomise) -> None:
    expert = randomised(Expert(ExpertConfig(text_padding_mask=masked, **SMALL)), 0)
    latents, timesteps, text = inputs(length=4)
    mask = torch.tensor([[True, True, False, False]]).expand(2, 4)
    other = text.text_embeddings.clone()
    other[:, 2:] += 1
    first = expert(latents, timesteps, replace(text, text_mask=mask))
    second = expert(latents, timesteps, TextConditioning(other, text.pooled_text, mask))
    assert torch.equal(first, second) == masked


def test_encoded_texts_join(randomised: Randomise) -> None:
    for injection, length in (("cross_attention", 3), ("spatial", 1), ("both", 3)):
        expert = randomised(Expert(ExpertConfig(text_injection=injection, **SMALL)), 0)
        latents, timesteps, text = inputs(length)
        parts = [expert.encode_text(text.rows(slice(i, i + 1))) for i in range(len(text))]
        joined = expert(latents, timesteps, EncodedText.concatenate(parts))
        torch.testing.assert_close(joined, expert(latents, timesteps, text))


def test_gradient_checkpointing_changes_no_gradient(randomised: Randomise) -> None:
    gradients = []
    for recompute in (False, True):
        expert = randomised(Expert(ExpertConfig(**SMALL)), 0)
        expert.gradient_checkpointing = recompute
        latents, timesteps, text = inputs(length=3)
        expert(latents, timesteps, text).square().mean().backward()
        gradients.append([p.grad for p in expert.parameters() if p.grad is not None])
    assert all(map(torch.equal, *gradients))


def test_the_router_head_has_a_choice_of_activation(randomised: Randomise) -> None:
    latents, timesteps, text = inputs(length=1)
    logits = [
        randomised(Router(RouterConfig(head_activation=activation, **SMALL)), 0)(
            latents, timesteps, text.pooled_text
        )
        for activation in ("identity", "gelu")
    ]
    assert not torch.allclose(*logits)


def test_stored_half_precision_is_computed_in(randomised: Randomise) -> None:
    latents, timesteps, text = inputs(length=3)
    expert = randomised(Expert(ExpertConfig(**SMALL)), 0)
    exact = expert(latents, timesteps, text)
    rounded = expert.to(torch.bfloat16)(latents, timesteps, text)
    assert rounded.dtype == torch.bfloat16
    assert (rounded - exact).norm() / exact.norm() < 0.05


def reads(injection: str, randomised: Randomise) -> tuple[bool, ...]:
    """Whether an expert's answer depends on token states, and on the sentence vector."""
    expert = randomised(Expert(ExpertConfig(text_injection=injection, **SMALL)), 0)
    latents, timesteps, text = inputs(length=3)
    output = expert(latents, timesteps, text)
    changed = [replace(text, text_embeddings=-text.text_embeddings)]
    changed.append(replace(text, pooled_text=-text.pooled_text))
    return tuple(not torch.allclose(expert(latents, timesteps, t), output) for t in changed)


def test_each_injection_reads_what_it_is_for(randomised: Randomise) -> None:
    assert reads("cross_attention", randomised) == (True, False)
    assert reads("spatial", randomised) == (False, True)
    assert reads("both", randomised) == (True, True)


def test_both_have_the_names_of_cross_attention_and_a_projection_more() -> None:
    both, crossed = (
        Expert(ExpertConfig(text_injection=injection, **SMALL)).state_dict().keys()
        for injection in ("both", "cross_attention")
    )
    more = {f"pooled_text_proj.{i}.{part}" for i in (0, 2) for part in ("weight", "bias")}
    assert set(both) == set(crossed) | more


def test_both_cost_more_than_either() -> None:
    costs = {
        injection: (parameter_count(config), forward_macs(config, 3))
        for injection in ("spatial", "cross_attention", "both")
        for config in [ExpertConfig(text_injection=injection, **SMALL)]
    }
    for i in range(2):
        either = costs["spatial"][i], costs["cross_attention"][i]
        assert 0 < max(either) < costs["both"][i] < sum(either)


def test_padding_is_skipped_by_both_as_by_cross_attention(randomised: Randomise) -> None:
    config = ExpertConfig(text_injection="both", text_padding_mask=True, **SMALL)
    expert = randomised(Expert(config), 0)
    latents, timesteps, text = inputs(length=4)
    mask = torch.tensor([[True, True, False, False]]).expand(2, 4)
    masked, other = replace(text, text_mask=mask), text.text_embeddings.clone()
    other[:, 2:] += 1
    first = expert(latents, timesteps, masked)
    second = expert(latents, timesteps, replace(masked, text_embeddings=other))
    assert torch.equal(first, second)
    parts = [expert.encode_text(masked.rows(slice(i, i + 1))) for i in range(2)]
    joined = EncodedText.concatenate(parts)
    assert joined.mask is not None and joined.spatial is not None
    torch.testing.assert_close(expert(latents, timesteps, joined), first)
