"""Properties of routing, of the solver and of the initial noise."""

import math
from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from paris_ray.diffusion import sampling_times
from paris_ray.errors import RoutingError
from paris_ray.sampling.routing import disagreement, expert_weights, mix
from paris_ray.sampling.sampler import initial_noise
from paris_ray.sampling.solvers import euler_step
from paris_ray.sampling_options import Routing, parse_routing

LOGITS = st.integers(1, 8).flatmap(
    lambda count: st.lists(
        st.lists(st.floats(-30, 30, width=32), min_size=count, max_size=count),
        min_size=1,
        max_size=4,
    ).map(torch.tensor)
)


@given(LOGITS, st.data())
@settings(deadline=None)
def test_weights_are_a_distribution_over_the_chosen_experts(
    logits: Tensor, data: st.DataObject
) -> None:
    count = logits.shape[1]
    text = data.draw(
        st.one_of(
            st.just("full"),
            st.integers(1, count).map(lambda k: f"top-{k}"),
            st.floats(0.01, 0.99).map(lambda x: f"threshold:{x}"),
            st.floats(0.01, 0.99).map(lambda x: f"top-p:{x}"),
            *([st.just("agree:0.5")] if count > 1 else []),
        )
    )
    routing = parse_routing(text, count)
    weights = expert_weights(logits, routing)
    assert weights.shape == (len(logits), count)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(len(logits)), rtol=0, atol=1e-5)
    asked = (weights > 0).sum(dim=1)
    assert (asked >= 1).all()
    if routing.kind in ("top-k", "agree"):
        assert (asked <= routing.top_k).all()


@given(LOGITS)
@settings(deadline=None)
def test_all_experts_of_top_k_are_the_full_ensemble(logits: Tensor) -> None:
    everyone = expert_weights(logits, Routing("top-k", top_k=logits.shape[1]))
    torch.testing.assert_close(everyone, expert_weights(logits, Routing("full")), rtol=0, atol=1e-5)


@given(LOGITS, st.floats(0.01, 0.99))
@settings(deadline=None)
def test_threshold_keeps_those_above_it_and_the_most_likely(
    logits: Tensor, threshold: float
) -> None:
    probabilities = logits.softmax(dim=1)
    asked = expert_weights(logits, Routing("threshold", threshold=threshold)) > 0
    for row, chosen in zip(probabilities.tolist(), asked.tolist(), strict=True):
        expected = [p >= threshold or p == max(row) for p in row]
        close = [abs(p - threshold) < 1e-6 for p in row]
        assert all(a == b or c for a, b, c in zip(chosen, expected, close, strict=True))


@given(LOGITS, st.floats(0.01, 0.99))
@settings(deadline=None)
def test_top_p_asks_the_fewest_that_have_so_much_together(logits: Tensor, top_p: float) -> None:
    probabilities = logits.softmax(dim=1)
    asked = (expert_weights(logits, Routing("top-p", top_p=top_p)) > 0).sum(dim=1)
    for row, count in zip(probabilities.tolist(), asked.tolist(), strict=True):
        likeliest = sorted(row, reverse=True)[:count]
        assert sum(likeliest[:-1]) < top_p + 1e-5  # one fewer would not do
        assert sum(likeliest) > min(top_p, 0.999) - 1e-5  # negligible experts are never asked


@given(LOGITS, st.integers(1, 8))
@settings(deadline=None)
def test_no_expert_left_out_is_likelier_than_one_that_is_asked(logits: Tensor, top_k: int) -> None:
    top_k = min(top_k, logits.shape[1])
    asked = expert_weights(logits, Routing("top-k", top_k=top_k)) > 0
    worst_asked = logits.masked_fill(~asked, torch.inf).amin(dim=1)
    best_left_out = logits.masked_fill(asked, -torch.inf).amax(dim=1)
    assert (worst_asked >= best_left_out - 1e-5).all()  # ties, up to the rounding of the softmax


@given(
    st.from_regex(r"(top-|top-p:|threshold:|agree:|full|)[^\n]{0,6}", fullmatch=True),
    st.integers(1, 8),
)
def test_any_text_is_parsed_or_refused(text: str, num_experts: int) -> None:
    try:
        routing = parse_routing(text, num_experts)
    except RoutingError:
        return
    if routing.kind == "top-k":
        assert 1 <= routing.top_k <= num_experts
        assert int(text.removeprefix("top-")) == routing.top_k
    elif routing.kind == "threshold":
        assert 0 < routing.threshold < 1
        assert float(text.removeprefix("threshold:")) == routing.threshold
    elif routing.kind == "top-p":
        assert float(text.removeprefix("top-p:")) == routing.top_p
    elif routing.kind == "agree":
        assert num_experts >= 2
        assert 0 < float(text.removeprefix("agree:")) == routing.disagreement < math.inf
    else:
        assert text == "full"


@given(
    st.integers(2, 8),
    st.integers(1, 12),
    st.sampled_from([(1, 2, 2), (4, 8, 8), (3, 5, 7)]),
    st.floats(0.5, 2),
    st.sampled_from(["top-1", "top-2", "full", "agree"]),
    st.integers(0, 2**32),
)
@settings(deadline=None)
def test_what_a_row_is_mixed_of_does_not_depend_on_the_batch(
    num_experts: int, batch: int, shape: tuple[int, ...], most: float, name: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    routing = parse_routing(f"agree:{most}" if name == "agree" else name, num_experts)
    logits = torch.randn(batch, num_experts, generator=generator)
    weights = expert_weights(logits, routing)
    velocities = torch.randn(batch, num_experts, *shape, generator=generator)
    velocity, mixed = mix(weights, velocities, routing)
    for row in range(batch):
        one = slice(row, row + 1)
        alone, own = mix(weights[one], velocities[one], routing)
        assert torch.equal(alone, velocity[one])
        assert torch.equal(own, mixed[one])
    torch.testing.assert_close(velocity, torch.einsum("bk,bkchw->bchw", mixed, velocities))
    if routing.kind != "agree":
        assert torch.equal(mixed, weights)


@given(st.floats(0, 3), st.integers(1, 4), st.integers(0, 2**32))
@settings(deadline=None)
def test_disagreement_is_the_relative_difference(scale: float, batch: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    velocities = torch.randn(batch, 2, 3, 3, generator=generator)
    found = disagreement(velocities, (1 + scale) * velocities)
    torch.testing.assert_close(found, torch.full((batch,), scale), rtol=1e-5, atol=1e-5)


@given(st.integers(1, 60), st.integers(0, 2**32))
@settings(deadline=None)
def test_euler_is_exact_on_a_constant_field(steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    noise, velocity = torch.randn(2, 2, 3, 4, 4, generator=generator, dtype=torch.float64)
    x = noise
    for t, t_next in pairwise(sampling_times(steps).tolist()):
        x = euler_step(x, velocity, t, t_next)
    torch.testing.assert_close(x, noise - velocity)


@given(st.lists(st.integers(0, 2**32), min_size=1, max_size=5))
@settings(deadline=None)
def test_a_seed_means_the_same_noise_in_any_batch(seeds: list[int]) -> None:
    batch = initial_noise((2, 3, 3), seeds)
    for noise, seed in zip(batch, seeds, strict=True):
        assert torch.equal(noise, initial_noise((2, 3, 3), [seed])[0])
