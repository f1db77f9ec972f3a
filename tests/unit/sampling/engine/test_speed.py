"""Estimates of how long work will take: by level of load, fading, none where nothing is known."""

import pytest

from paris_ray.sampling.engine.speed import REMEMBERED_S, Speed


def draw(speed: Speed, pictures: int, seconds_each: float, since: float, count: int = 10) -> float:
    """Record evaluations one by one; return when the last was done."""
    speed.begin(since)
    for _ in range(count):
        since += seconds_each
        speed.record(1, pictures, since)
    speed.pause()
    return since


def test_nothing_is_known_at_first() -> None:
    speed = Speed(16)
    assert speed.seconds(1000, 1, 0.0) == 0.0
    speed.begin(0.0)
    speed.record(0, 1, 0.0)  # no evaluation, no time
    assert speed.seconds(1000, 1, 0.0) == 0.0


def test_as_many_pictures_take_as_long_as_they_took() -> None:
    speed = Speed(16)
    now = draw(speed, 4, 0.5, 100.0)
    assert speed.seconds(10, 4, now) == pytest.approx(5.0)
    assert speed.seconds(20, 4, now) == pytest.approx(10.0)


def test_time_without_work_does_not_count() -> None:
    speed = Speed(16)
    now = draw(speed, 1, 0.5, 0.0)
    now = draw(speed, 1, 0.5, now + 30)
    assert speed.seconds(10, 1, now) == pytest.approx(5.0)


def test_work_that_is_begun_twice_was_begun_once() -> None:
    speed = Speed(16)
    speed.begin(0.0)
    speed.begin(1.0)
    speed.record(1, 1, 2.0)
    assert speed.seconds(1, 1, 2.0) == pytest.approx(2.0)


def test_more_pictures_than_were_measured_are_taken_to_share_batches() -> None:
    speed = Speed(4)
    now = draw(speed, 1, 1.0, 0.0)
    assert speed.seconds(10, 2, now) == pytest.approx(5.0)
    assert speed.seconds(10, 4, now) == pytest.approx(2.5)
    assert speed.seconds(10, 64, now) == pytest.approx(2.5)  # a batch has no more rows


def test_fewer_pictures_than_were_measured_are_not_taken_to_be_faster() -> None:
    speed = Speed(16)
    now = draw(speed, 16, 0.25, 0.0)
    assert speed.seconds(10, 1, now) == pytest.approx(2.5)


def test_the_nearest_level_counts() -> None:
    speed = Speed(1)  # nothing is shared
    now = draw(speed, 1, 1.0, 0.0)
    now = draw(speed, 16, 0.1, now)
    assert speed.seconds(10, 2, now) == pytest.approx(10.0)
    assert speed.seconds(10, 14, now) == pytest.approx(1.0)


def test_what_was_measured_lately_counts_more() -> None:
    speed = Speed(16)
    now = draw(speed, 1, 1.0, 0.0, count=20)
    now = draw(speed, 1, 2.0, now, count=20)
    assert 18.0 < speed.seconds(10, 1, now) < 20.0


def test_a_speed_of_long_ago_is_not_known() -> None:
    speed = Speed(16)
    now = draw(speed, 1, 1.0, 0.0)
    assert speed.seconds(10, 1, now + REMEMBERED_S) > 0
    assert speed.seconds(10, 1, now + REMEMBERED_S + 1) == 0.0
