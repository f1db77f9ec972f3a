"""Properties of the moving average and of the order of the data."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from paris_ray.training.data import BatchOrder
from paris_ray.training.ema import ExponentialMovingAverage

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
