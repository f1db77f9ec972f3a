"""A lane by itself: what a batch holds, what is counted, and when its model may be asked again."""

from paris_ray.sampling.calls import ExpertCall
from paris_ray.sampling.engine.lanes import FIRST_RETRY_S, LONGEST_RETRY_S, Lane, Waiting
from paris_ray.sampling.engine.requests import Picture, Ticket
from paris_ray.sampling.sampler import Step, advance
from tests.simulation import Picture as Drawn

MODEL = 2
LOST_AFTER_S = 10.0


def ticket_of(client: str = "a") -> Ticket:
    return Ticket(
        client,
        num_pictures=1,
        evaluations=1,
        preview_at=(),
        allow_missing=True,
        admitted=0.0,
        deadline=100.0,
        listener=lambda _: None,
    )


def call(*, guided: bool = False) -> ExpertCall:
    """A call of one row, or of two."""
    denoising = Drawn(1, lambda _: (MODEL,), guided=guided).denoise()
    first = advance(denoising)
    assert isinstance(first, Step)
    second = advance(denoising, [-call.latents for call in first.calls])
    assert isinstance(second, Step)
    (asked,) = second.calls
    assert isinstance(asked, ExpertCall)
    return asked


def push(lane: Lane, count: int, ticket: Ticket | None = None, *, guided: bool = False) -> Ticket:
    ticket = ticket or ticket_of()
    for since in range(count):
        picture = Picture(ticket, 0, Drawn(1, lambda _: (MODEL,)).denoise())
        lane.push(Waiting(picture, 0, call(guided=guided), float(since)))
    return ticket


def test_a_batch_has_what_waits_up_to_its_rows() -> None:
    lane = Lane(MODEL)
    push(lane, 3, guided=True)
    batch = lane.take(5, 7.0)
    assert (batch.model, batch.taken, len(batch.calls), batch.waited_s) == (MODEL, 7.0, 2, 7.0)
    assert len(lane.take(1, 7.0).calls) == 1  # of two rows
    assert not lane.waiting


def test_halves_are_all_of_a_batch_and_of_one_call_there_are_none() -> None:
    lane = Lane(MODEL)
    push(lane, 5)
    batch = lane.take(5, 1.0)
    first, second = batch.halves()
    assert [*first.calls, *second.calls] == batch.calls
    assert (len(first.calls), len(second.calls)) == (2, 3)
    assert not first.halves()[0].halves()


def test_a_call_is_wanted_once_and_unanswered_until_it_is_answered() -> None:
    lane = Lane(MODEL)
    push(lane, 3)
    batch = lane.take(2, 0.0)
    counts = lambda: (lane.asked, lane.num_unanswered, len(lane.waiting))  # noqa: E731
    assert counts() == (3, 3, 1)
    assert not lane.failed(batch, 1.0, LOST_AFTER_S)
    assert counts() == (3, 3, 3)
    batch = lane.take(2, 2.0)
    lane.answered(batch, 3.0)
    assert counts() == (3, 1, 1)


def test_calls_of_requests_that_are_over_do_not_wait_again() -> None:
    lane = Lane(MODEL)
    over, still = push(lane, 1), push(lane, 1, ticket_of("b"))
    batch = lane.take(2, 0.0)
    over.is_open = False
    lane.failed(batch, 1.0, LOST_AFTER_S)
    assert [waiting.picture.ticket for waiting in lane.waiting] == [still]
    lane.discard(still)
    assert lane.num_unanswered == 0


def test_a_failing_model_is_left_alone_for_longer_and_longer_until_it_answers() -> None:
    lane = Lane(MODEL)
    push(lane, 1)
    pauses, now = [], 0.0
    assert lane.is_ready(now)
    for _ in range(7):
        lane.failed(lane.take(1, now), now, LOST_AFTER_S)
        pauses.append(round(lane.ready_in(now), 6))
        assert lane.is_failing
        assert not lane.is_ready(now)
        now += lane.ready_in(now)
        assert lane.is_ready(now)
    assert pauses == [FIRST_RETRY_S, 0.1, 0.2, 0.4, 0.8, LONGEST_RETRY_S, LONGEST_RETRY_S]
    lane.answered(lane.take(1, now), now)
    assert not lane.is_failing
    push(lane, 1)
    assert lane.is_ready(now)
    lane.failed(lane.take(1, now), now, LOST_AFTER_S)
    assert round(lane.ready_in(now), 6) == FIRST_RETRY_S


def test_a_model_is_lost_when_it_has_failed_for_so_long() -> None:
    lane = Lane(MODEL)
    push(lane, 1)
    assert not lane.failed(lane.take(1, 5.0), 5.0, LOST_AFTER_S)
    assert not lane.failed(lane.take(1, 14.0), 14.9, LOST_AFTER_S)
    assert lane.failed(lane.take(1, 14.9), 15.0, LOST_AFTER_S)
    assert lane.num_unanswered == 0  # whoever took the batch decides what becomes of its calls


def test_a_failure_long_ago_is_no_part_of_a_failure_now() -> None:
    lane = Lane(MODEL)
    push(lane, 1)
    assert not lane.failed(lane.take(1, 0.0), 0.0, LOST_AFTER_S)
    assert not lane.failed(lane.take(1, 50.0), 51.0, LOST_AFTER_S)
    assert not lane.failed(lane.take(1, 59.0), 59.9, LOST_AFTER_S)
    assert lane.failed(lane.take(1, 60.0), 60.0, LOST_AFTER_S)


def test_a_batch_that_hung_counts_from_the_last_answer() -> None:
    lane = Lane(MODEL)
    push(lane, 2)
    hung, fine = lane.take(1, 0.0), lane.take(1, 0.0)
    lane.answered(fine, 9.0)
    assert not lane.failed(hung, 12.0, LOST_AFTER_S)
