"""Properties of the moving average and of the order of the data."""

import itertools
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from paris_ray.config import TrainingConfig
from paris_ray.training.data import BatchOrder
from paris_ray.training.ema import ExponentialMovingAverage
from paris_ray.training.schedule import learning_rate

VALUES = st.lists(st.floats(-1e3, 1e3, width=32), min_size=2, max_size=2)


def model_of(values: list[float]) -> nn.Module:
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([values]))
    return model


@given(st.lists(VALUES, min_size=2, max_size=12), st.floats(0, 1))
@settings(deadline=None)
def test_the_average_stays_within_what_it_averages(
    history: list[list[float]], decay: float
) -> None:
    ema = ExponentialMovingAverage(model_of(history[0]), decay)
    for step, values in enumerate(history[1:]):
        ema.update(model_of(values), step)
    seen = torch.tensor(history)
    average, rounding = ema.state["weight"][0], 1e-5 * seen.abs().amax(dim=0)
    assert (average >= seen.amin(dim=0) - rounding).all()
    assert (average <= seen.amax(dim=0) + rounding).all()


@given(st.lists(VALUES, min_size=3, max_size=12), st.floats(0.5, 1))
@settings(deadline=None)
def test_the_average_has_its_closed_form(history: list[list[float]], decay: float) -> None:
    ema = ExponentialMovingAverage(model_of(history[0]), decay)
    expected = torch.tensor(history[0], dtype=torch.float64)
    for step, values in enumerate(history[1:]):
        ema.update(model_of(values), step)
        kept = min(decay, (1 + step) / (10 + step))
        expected = kept * expected + (1 - kept) * torch.tensor(values, dtype=torch.float64)
    torch.testing.assert_close(ema.state["weight"][0].double(), expected, rtol=1e-4, atol=1e-2)


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 2**32), st.integers(1, 4))
@settings(deadline=None)
def test_every_row_comes_once_an_epoch(
    num_rows: int, batch_size: int, seed: int, epochs: int
) -> None:
    order = BatchOrder(num_rows, batch_size, seed)
    steps = -(-epochs * num_rows // batch_size)
    rows = torch.cat([order.batch(step) for step in range(steps)])
    assert len(rows) == steps * batch_size
    for epoch in rows[: epochs * num_rows].view(epochs, num_rows):
        assert epoch.sort().values.tolist() == list(range(num_rows))


@given(
    st.sampled_from(["constant", "linear", "cosine"]),
    st.integers(1, 60),
    st.integers(0, 80),
    st.floats(0, 1),
    st.floats(0, 1),
)
@settings(deadline=None)
def test_the_learning_rate_rises_once_and_then_never_again(
    schedule: Any, steps: int, warmup_steps: int, decay_share: float, final_share: float
) -> None:
    config = TrainingConfig(
        steps=steps,
        learning_rate=3.0,
        schedule=schedule,
        warmup_steps=warmup_steps,
        decay_share=decay_share,
        final_learning_rate_share=final_share,
    )
    rates = [learning_rate(step, config) for step in range(steps)]
    rising, falling = rates[:warmup_steps], rates[max(0, warmup_steps - 1) :]
    assert all(a < b for a, b in itertools.pairwise(rising))
    assert all(a >= b for a, b in itertools.pairwise(falling))
    assert all(rate >= 3.0 * final_share * (1 - 1e-9) for rate in falling)
    assert all(0 < rate <= 3.0 for rate in rates)
