"""Curves: what is joined, thinned and marked."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paris_ray.watching.curves import MAX_SERIES, Point, compute_seconds, curves, thinned

RATE = 100.0  # samples a second
NOON = 1_700_000_000.0


def timing(samples: int, at: float, **more: float) -> dict[str, float]:
    return {"samples_seen": samples, "unix_time": NOON + at, "samples_per_second": RATE, **more}


def test_points_have_samples_and_the_time_since_training_began() -> None:
    metrics = [{"samples_seen": 200, "loss": 0.5}, {"samples_seen": 400, "loss": 0.25}]
    timings = [timing(200, 2.0), timing(400, 4.0)]
    drawn = curves(metrics, timings)
    assert drawn.series["loss"] == [(200, 2.0, 0.5), (400, 4.0, 0.25)]
    assert drawn.series["samples_per_second"] == [(200, 2.0, RATE), (400, 4.0, RATE)]
    assert drawn.series.keys() == {"loss", "samples_per_second"}
    assert drawn.resumes == []


def test_pauses_take_wall_time_but_no_device() -> None:
    timings = [timing(200, 2.0), timing(400, 1000.0, resumes=1), timing(600, 1002.0, resumes=1)]
    drawn = curves([{"samples_seen": n, "loss": 1.0} for n in (200, 400, 600)], timings)
    assert [point.seconds for point in drawn.series["loss"]] == [2.0, 1000.0, 1002.0]
    assert drawn.resumes == [(400, 1000.0)]
    assert compute_seconds(timings) == pytest.approx(6.0)


def test_a_run_that_was_resumed_before_its_first_row_says_so() -> None:
    assert curves([], [timing(200, 2.0, resumes=2)]).resumes == [(200, 2.0)]


def test_rows_without_a_clock_are_drawn_over_samples() -> None:
    drawn = curves([{"samples_seen": 8, "loss": 1.0}], [])
    assert drawn.series["loss"] == [(8, None, 1.0)]


def test_what_is_no_number_of_a_known_form_is_left_out() -> None:
    rows = [
        {"samples_seen": 8, "loss": float("nan"), "note": "x", "ok": True, "<b>": 1, "n": None},
        {"loss": 1.0},
        {"samples_seen": "8", "loss": 1.0},
    ]
    assert curves(rows, []).series == {}


def test_a_rate_of_almost_nothing_makes_no_time_without_end() -> None:
    timings = [{"samples_seen": 8, "unix_time": NOON, "samples_per_second": 1e-300}]
    assert curves([{"samples_seen": 8, "loss": 1.0}], timings).series["loss"] == [(8, 0.0, 1.0)]
    assert compute_seconds(timings) == 0.0


def test_the_number_of_curves_is_bounded() -> None:
    row = {"samples_seen": 8, **{f"measure_{i}": 1.0 for i in range(100)}}
    assert len(curves([row], []).series) == MAX_SERIES


@given(st.lists(st.floats(-1e9, 1e9), max_size=300), st.integers(4, 40))
def test_a_thinned_curve_keeps_its_ends_order_and_extremes(values: list[float], limit: int) -> None:
    points = [Point(i, None, value) for i, value in enumerate(values)]
    thin = thinned(points, limit)
    assert len(thin) <= max(limit, 4)
    assert thin == sorted(thin) and set(thin) <= set(points)
    if points:
        assert (thin[0], thin[-1]) == (points[0], points[-1])
        assert min(p.value for p in thin) == min(values)
        assert max(p.value for p in thin) == max(values)
