"""The engine under a simulated clock: what runs together, who waits, and what failures cost."""

import gc
import pickle
import random
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from paris_ray.errors import DeadlineError, ExpertsLostError, QueueFullError
from paris_ray.sampling.calls import ROUTER
from paris_ray.sampling.engine import Batch, Engine, Failed, Finished, Limits, Previewed
from paris_ray.sampling.engine.lanes import LONGEST_RETRY_S
from paris_ray.sampling.sampler import Denoising
from tests.simulation import MODELS, NUM_EXPERTS, Picture, Request, Simulation, is_idle, reply, rows

WIDE = Limits(max_batch_rows=1000, max_active_pictures=1000, max_waiting_pictures=1000)


def engine(**limits: Any) -> Engine:
    return Engine(MODELS, replace(WIDE, **limits))


def pictures(count: int, evaluations: int = 2, experts: tuple[int, ...] = (0,)) -> list[Picture]:
    return [Picture(evaluations, lambda _: experts) for _ in range(count)]


def request(simulation: Simulation, *arguments: Any, **options: Any) -> Request:
    """Admit and start a request of `pictures(*arguments)`."""
    return Request(simulation, pictures(*arguments), **options).start()


def of_model(batches: list[Batch], model: int) -> list[int]:
    return [len(batch.calls) for batch in batches if batch.model == model]


# -- What is computed together ---------------------------------------------------------------------


def test_a_model_that_is_free_takes_everything_that_waits_for_it() -> None:
    simulation = Simulation(engine())
    request(simulation, 1)
    for arrival in (0.1, 0.5, 0.9):  # while the router computes
        simulation.at(arrival, partial(request, simulation, 2))
    simulation.run(until=1.5)
    assert of_model(simulation.batches, ROUTER) == [1, 6]


def test_one_lane_computes_for_the_model_that_waits_longest() -> None:
    """As where all models are in one process: nobody is overtaken for ever."""
    simulation = Simulation(engine(), [MODELS])
    asked = [request(simulation, 1, 5, (k,)) for k in range(NUM_EXPERTS)]
    simulation.run()
    seconds = [one.seconds for one in asked]
    assert max(seconds) <= min(seconds) + NUM_EXPERTS
    assert is_idle(simulation.engine)


def test_calls_are_counted_until_they_are_answered() -> None:
    alone = engine(max_batch_rows=2)
    for k, count in enumerate((3, 1)):
        ticket = alone.admit(
            "a", num_pictures=count, evaluations=1, timeout_s=9, listener=lambda _: None, now=0
        )
        alone.start(ticket, [one.denoise() for one in pictures(count, 1, (k,))], 0)
    answer(alone, ROUTER), answer(alone, ROUTER)
    counts = lambda: [(alone.asked(k), alone.unanswered(k)) for k in range(NUM_EXPERTS)]  # noqa: E731
    assert counts() == [(3, 3), (1, 1), (0, 0)]
    batch = alone.take([0], 1)
    assert counts()[0] == (3, 3)  # under way
    alone.fail(batch, 2)
    assert counts()[0] == (3, 3)  # asked again, but wanted once
    batch = alone.take([0], 9)
    alone.answer(batch, [reply(call) for call in batch.calls], 9)
    answer(alone, 1)
    assert counts() == [(3, 1), (1, 0), (0, 0)]


def answer(alone: Engine, model: int) -> None:
    batch = alone.take([model], 0)
    assert batch is not None
    alone.answer(batch, [reply(call) for call in batch.calls], 0)


def test_a_batch_has_no_more_rows_than_allowed() -> None:
    simulation = Simulation(engine(max_batch_rows=5))
    guided = [Picture(3, lambda _: (0, 1), guided=True) for _ in range(7)]
    asked = [Request(simulation, guided).start(), request(simulation, 4, 3)]
    simulation.run()
    assert max(map(rows, simulation.batches)) == 5
    assert all(isinstance(one.events[-1], Finished) for one in asked)


def test_a_call_of_more_rows_than_allowed_is_computed_alone() -> None:
    simulation = Simulation(engine(max_batch_rows=1))
    guided = [Picture(1, lambda _: (0,), guided=True) for _ in range(2)]
    asked = Request(simulation, guided).start()
    simulation.run()
    assert [rows(batch) for batch in simulation.batches if batch.model == 0] == [2, 2]
    assert isinstance(asked.events[-1], Finished)


# -- Who waits for whom ----------------------------------------------------------------------------


def slow_expert(batch: Batch) -> float:
    return 100.0 if batch.model == 1 else 1.0


def test_no_picture_waits_for_the_others_of_its_request() -> None:
    simulation = Simulation(engine(), seconds=slow_expert)
    fast, slow = Picture(3, lambda _: (0,)), Picture(3, lambda _: (1,))
    asked = Request(simulation, [slow, fast]).start()
    simulation.run(until=10)
    assert fast.is_finished
    assert slow.done == 0
    simulation.run()
    assert isinstance(asked.events[-1], Finished)


def test_a_slow_expert_delays_only_those_who_want_it() -> None:
    def seconds(slow_ones: int) -> list[float]:
        simulation = Simulation(engine(), seconds=slow_expert)
        fast = [request(simulation, 1, 8) for _ in range(4)]
        slow = [request(simulation, 1, 8, (1,)) for _ in range(slow_ones)]
        simulation.run()
        assert all(one.seconds > 800 for one in slow)
        return [one.seconds for one in fast]

    assert seconds(slow_ones=4) == seconds(slow_ones=0)


def test_with_room_a_picture_is_begun_at_once_and_asked_about_within_a_step() -> None:
    simulation = Simulation(engine())
    request(simulation, 8, 50, (0, 1, 2))
    late: list[Request] = []
    for arrival in (3.1, 7.7, 20.2):
        simulation.at(arrival, lambda: late.append(request(simulation, 1, 3)))
    simulation.run()
    for one in late:
        (finished,) = one.events
        assert isinstance(finished, Finished)
        assert one.ticket.queued_s(simulation.now) == 0
        asked = [
            batch.taken
            for batch in simulation.batches
            if any(waiting.picture.ticket is one.ticket for waiting in batch.waiting)
        ]
        assert min(asked) - one.admitted <= 1  # the router's time: what it was busy with


def test_a_large_request_lets_small_ones_by() -> None:
    """Requests begin their pictures in turn, and their calls are taken in turn."""
    simulation = Simulation(engine(max_active_pictures=4, max_batch_rows=4))
    large = request(simulation, 40, 3)
    small = [request(simulation, 1, 3) for _ in range(4)]
    simulation.run()
    assert max(one.seconds for one in small) < large.seconds / 3


def test_clients_get_equal_shares_however_many_requests_they_have() -> None:
    simulation = Simulation(engine(max_batch_rows=2))
    many = [request(simulation, 2, 20, client="many") for _ in range(10)]
    one = request(simulation, 2, 20, client="one")
    simulation.run()
    assert one.seconds < 2.2 * 2 * 20  # half of the rows: as if there were one other picture each
    assert min(asked.seconds for asked in many) > 2 * one.seconds


def test_shares_are_of_rows() -> None:
    """A guided call has two, so that the client of the other kind gets two for it."""
    simulation = Simulation(
        engine(max_batch_rows=1), seconds=lambda batch: 0.01 if batch.model == ROUTER else 1.0
    )
    guided = [Picture(30, lambda _: (0,), guided=True) for _ in range(9)]
    dear = Request(simulation, guided, client="dear").start()
    request(simulation, 9, 30, client="cheap")
    simulation.run(until=60)
    of_expert = [batch.waiting[0].picture for batch in simulation.batches if batch.model == 0]
    theirs = [picture.ticket is dear.ticket for picture in of_expert]
    assert 0.28 <= sum(theirs) / len(theirs) <= 0.38


def busy(batch: Batch) -> float:
    return 0.02 + 0.005 * rows(batch)


def test_waiting_is_even_under_a_skewed_router() -> None:
    """16 clients of one picture and one of ten; most steps want the same expert."""
    simulation = Simulation(engine(max_batch_rows=16), seconds=busy)
    chance, small = random.Random(5), []

    def skewed() -> Callable[[int], tuple[int, ...]]:
        order = chance.choices(range(NUM_EXPERTS), weights=[8, 1, 1], k=8)
        return lambda evaluation: (order[evaluation],)

    def ask(client: int, count: int) -> None:
        one = Request(simulation, [Picture(8, skewed()) for _ in range(count)]).start()
        if count == 1:
            small.append(one)

        def again() -> None:
            if one.ended is None:
                simulation.at(simulation.now + 0.01, again)
            elif simulation.now < 60:
                ask(client, count)

        simulation.at(simulation.now + chance.uniform(0.1, 0.2), again)

    for client in range(16):
        ask(client, 1)
    ask(16, 10)
    simulation.run()
    seconds = sorted(one.seconds for one in small)
    assert len(seconds) > 300
    assert seconds[int(0.95 * len(seconds))] <= 2 * seconds[len(seconds) // 2]
    assert is_idle(simulation.engine)


def test_no_more_pictures_are_begun_than_allowed() -> None:
    simulation = Simulation(engine(max_active_pictures=3), seconds=busy)
    most = 0

    def look() -> None:
        nonlocal most
        most = max(most, simulation.engine.num_active)
        if not is_over:
            simulation.at(simulation.now + 0.01, look)

    is_over: list[bool] = []
    asked = [request(simulation, 2, 4, (k,)) for k in range(NUM_EXPERTS)]
    begun = [picture.is_begun for one in asked for picture in one.pictures]
    assert sum(begun) == 3
    simulation.at(0, look)
    simulation.at(10, lambda: is_over.append(True))
    simulation.run()
    assert most == 3
    assert all(isinstance(one.events[-1], Finished) for one in asked)


# -- Who is refused --------------------------------------------------------------------------------


def test_what_has_no_room_is_refused_with_its_place_and_a_time() -> None:
    simulation = Simulation(engine(max_active_pictures=2, max_waiting_pictures=3))
    admitted = Request(simulation, pictures(2))  # whose text is being encoded
    started = request(simulation, 3)
    assert (simulation.engine.num_active, simulation.engine.num_waiting) == (2, 3)
    with pytest.raises(QueueFullError, match="5 pictures are in work or wait") as refused:
        request(simulation, 1)
    assert refused.value.position == 3
    assert refused.value.retry_after_s >= 1
    copy = pickle.loads(pickle.dumps(refused.value))
    assert (str(copy), copy.position) == (str(refused.value), 3)
    admitted.start()
    simulation.run()
    assert isinstance(started.events[-1], Finished)
    assert isinstance(admitted.events[-1], Finished)
    assert request(simulation, 5).ticket.is_open


def test_what_cannot_be_done_in_time_is_refused() -> None:
    simulation = Simulation(engine(max_batch_rows=1))  # two seconds an evaluation, one at a time
    first = request(simulation, 1, 10, timeout_s=1)  # nothing is known yet
    simulation.run()
    assert isinstance(first.events[-1], Finished)
    request(simulation, 1, 30)
    # 40 evaluations: 80 s, but what was just done counts more than what went before
    with pytest.raises(QueueFullError, match=r"it would be done in 7\d s, and 60 s are") as refused:
        request(simulation, 1, 10, timeout_s=60)
    assert 10 < refused.value.retry_after_s < 20
    assert refused.value.position == simulation.engine.num_waiting == 0
    assert request(simulation, 1, 10, timeout_s=80).ticket.is_open


def test_the_speed_of_few_pictures_is_not_that_of_many() -> None:
    """A batch takes a second whatever is in it, so sixteen pictures take no longer than one."""
    simulation = Simulation(engine(max_batch_rows=16))
    first = request(simulation, 1, 20)
    simulation.run()
    assert first.seconds == 40
    burst = [request(simulation, 1, 20, timeout_s=60) for _ in range(16)]  # 40 s each, together
    simulation.run()
    assert all(one.seconds < 60 for one in burst)


def test_once_many_were_drawn_their_speed_counts() -> None:
    simulation = Simulation(engine(max_batch_rows=16), seconds=lambda batch: float(rows(batch)))
    for _ in range(2):
        for _ in range(16):
            request(simulation, 1, 5)
        simulation.run()
    request(simulation, 15, 20)
    with pytest.raises(QueueFullError, match="it would be done in"):
        request(simulation, 1, 20, timeout_s=150)  # batches gain nothing: it takes 320 s at least


def test_a_speed_of_long_ago_refuses_nobody() -> None:
    slow = [True]
    simulation = Simulation(engine(), seconds=lambda batch: 10.0 if slow else 0.1)
    for _ in range(2):
        request(simulation, 1, 5)
    simulation.run()
    slow.clear()
    request(simulation, 1, 5)
    with pytest.raises(QueueFullError):
        request(simulation, 1, 5, timeout_s=50)
    simulation.run()
    simulation.now += 100
    request(simulation, 1, 5)
    asked = request(simulation, 1, 5, timeout_s=50)
    simulation.run()
    assert isinstance(asked.events[-1], Finished)


def test_a_client_has_no_more_pictures_than_it_may() -> None:
    simulation = Simulation(engine())
    limit = partial(Request, simulation, max_pictures_of_client=3)
    first = limit(pictures(2), client="a")
    with pytest.raises(QueueFullError, match=r"you have 2 pictures .* the most at once are 3"):
        limit(pictures(2), client="a")
    limit(pictures(2), client="b").start()
    limit(pictures(1), client="a").start()
    first.start()
    simulation.run()
    limit(pictures(3), client="a")


# -- Cancelling ------------------------------------------------------------------------------------


def test_cancel_tells_the_step_and_what_was_never_begun_is_none() -> None:
    simulation = Simulation(engine())
    assert simulation.engine.cancel(Request(simulation, pictures(2)).ticket, 0.0) == 0
    asked = request(simulation, 2, 10)
    simulation.run(until=5.5)  # the router and an expert, a second each
    assert simulation.engine.cancel(asked.ticket, simulation.now) == 2
    assert simulation.engine.cancel(asked.ticket, simulation.now) == 2
    simulation.run()  # the batch under way is answered
    assert asked.events == []
    assert is_idle(simulation.engine)


def test_a_cancelled_request_makes_room_at_once() -> None:
    simulation = Simulation(engine(max_active_pictures=1))
    first, second = request(simulation, 1), request(simulation, 1)
    assert not second.pictures[0].is_begun
    simulation.engine.cancel(first.ticket, simulation.now)
    assert second.pictures[0].is_begun


def test_a_rejected_request_makes_room_at_once() -> None:
    simulation = Simulation(engine(max_active_pictures=1))
    first, second = request(simulation, 1), request(simulation, 1)
    batch = simulation.engine.take(MODELS, 0.0)
    assert batch is not None
    simulation.engine.reject(batch, RuntimeError("out of memory"), 0.0)
    assert str(first.error) == "out of memory"
    assert second.pictures[0].is_begun


def test_a_thousand_cancellations_leave_nothing_behind() -> None:
    """Before the start, waiting to begin, waiting for a model, and with a batch under way."""
    simulation = Simulation(engine(max_active_pictures=2))
    chance = random.Random(3)
    tickets = []
    for _ in range(1000):
        asked = Request(simulation, pictures(3, 4, (0, 1)))
        tickets.append(weakref.ref(asked.ticket))
        if chance.random() < 0.8:
            asked.start()
            simulation.run(until=simulation.now + chance.choice([0, 0.5, 1, 1.5, 3.2, 9]))
        simulation.engine.cancel(asked.ticket, simulation.now)
        counts = (simulation.engine.num_active, simulation.engine.num_waiting)
        assert (*counts, simulation.engine.num_left) == (0, 0, 0)
        assert not any(isinstance(event, Failed) for event in asked.events)
    simulation.run()
    assert is_idle(simulation.engine)
    del asked
    simulation.batches.clear()
    gc.collect()
    assert not any(ticket() for ticket in tickets)  # though their deadlines are far away


# -- Failures --------------------------------------------------------------------------------------


def test_a_failed_call_is_made_again_and_answered_once() -> None:
    is_up = iter([False, False, True])
    works = lambda batch, now: batch.model != 0 or now > 3 or next(is_up)  # noqa: E731
    simulation = Simulation(engine(), seconds=lambda batch: 0.25, works=works)
    asked = request(simulation, 1, 1)
    simulation.run()
    tries = [batch for batch in simulation.batches if batch.model == 0]
    assert len(tries) == 3
    assert all(batch.calls[0] is tries[0].calls[0] for batch in tries)
    (finished,) = asked.events
    assert isinstance(finished, Finished)
    assert finished.samples[0].missing_experts == ()


def test_a_model_that_fails_is_asked_less_and_less_often() -> None:
    simulation = Simulation(
        engine(lost_after_s=5), seconds=lambda batch: 0.0, works=lambda batch, now: batch.model != 0
    )
    request(simulation, 1, 1)
    simulation.run()
    times = [batch.taken for batch in simulation.batches if batch.model == 0]
    pauses = [later - earlier for earlier, later in pairwise(times)]
    assert pauses[:7] == pytest.approx([0.05, 0.1, 0.2, 0.4, 0.8, LONGEST_RETRY_S, LONGEST_RETRY_S])


def test_a_model_that_answers_again_is_asked_as_ever() -> None:
    simulation = Simulation(
        engine(lost_after_s=50),
        seconds=lambda batch: 0.0,
        works=lambda batch, now: batch.model != 0 or 3 < now < 10 or now > 12,
    )
    request(simulation, 1, 1)
    simulation.run()
    simulation.at(11, partial(request, simulation, 1, 1))
    simulation.run()
    times = [batch.taken for batch in simulation.batches if batch.model == 0 and batch.taken > 10]
    assert times[1] - times[0] == pytest.approx(0.05)


def test_pictures_are_drawn_without_a_lost_expert() -> None:
    simulation = Simulation(engine(lost_after_s=20), works=lambda batch, now: batch.model != 1)
    asked = request(simulation, 2, 3, (0, 1))
    unconcerned = request(simulation, 1, 3, (0,))
    simulation.run()
    (finished,) = asked.events
    assert isinstance(finished, Finished)
    assert [samples.missing_experts for samples in finished.samples] == [(1,), (1,)]
    assert 20 <= asked.seconds <= 30  # not asked again for each step
    assert unconcerned.seconds < 10


def test_what_hangs_is_asked_again_before_its_expert_is_lost() -> None:
    limits = Limits(lost_after_s=20)
    hung: list[Batch] = []

    def seconds(batch: Batch) -> float:
        if batch.model == 1 and not hung:
            hung.append(batch)
            return limits.call_timeout_s  # when whoever waits for it gives up
        return 1.0

    works = lambda batch, now: batch not in hung  # noqa: E731
    simulation = Simulation(Engine(MODELS, limits), seconds=seconds, works=works)
    asked = request(simulation, 1, 3, (0, 1))
    simulation.run()
    (finished,) = asked.events
    assert isinstance(finished, Finished)
    assert finished.samples[0].missing_experts == ()


def test_a_request_may_forbid_to_be_drawn_without() -> None:
    simulation = Simulation(engine(lost_after_s=20), works=lambda batch, now: batch.model != 1)
    strict = request(simulation, 2, 3, (0, 1), allow_missing=False)
    lenient = request(simulation, 1, 3, (0, 1))
    simulation.run()
    assert isinstance(strict.error, ExpertsLostError)
    assert "expert 1 is lost" in str(strict.error)
    assert isinstance(lenient.events[-1], Finished)
    assert is_idle(simulation.engine)


def test_without_any_expert_a_request_fails() -> None:
    simulation = Simulation(engine(lost_after_s=20), works=lambda batch, now: batch.model == ROUTER)
    asked = request(simulation, 1, 3, (0, 1))
    simulation.run()
    assert isinstance(asked.error, ExpertsLostError)


def test_a_lost_router_is_named() -> None:
    simulation = Simulation(engine(lost_after_s=2), works=lambda batch, now: False)
    asked = request(simulation, 1)
    simulation.run()
    assert str(asked.error) == "the router is lost"


def test_a_failure_long_ago_does_not_count() -> None:
    """Nobody asked meanwhile, so nobody knows that it was failing."""
    outage = [True]
    simulation = Simulation(
        engine(lost_after_s=20), works=lambda batch, now: batch.model != 0 or not outage
    )
    first = request(simulation, 1)
    simulation.run(until=5)
    simulation.engine.cancel(first.ticket, simulation.now)
    simulation.run(until=100)
    second = request(simulation, 1)
    simulation.run(until=102.5)
    outage.clear()
    simulation.run()
    (finished,) = second.events
    assert isinstance(finished, Finished)
    assert finished.samples[0].missing_experts == ()


def test_a_batch_that_hung_does_not_count_against_a_model_that_has_answered_since() -> None:
    work = engine(lost_after_s=20)
    simulation = Simulation(work, [(ROUTER,)])
    one, other = request(simulation, 1), request(simulation, 1)
    simulation.run(until=1)
    both = work.take([0], 1.0)
    assert both is not None
    hung, fine = (replace(both, waiting=[waiting]) for waiting in both.waiting)
    work.answer(fine, [reply(call) for call in fine.calls], 20.0)
    work.fail(hung, 22.0)
    again = work.take([0], 23.0)
    assert again is not None
    assert again.calls == hung.calls
    assert not one.events
    assert not other.events


def test_which_models_fail_is_told() -> None:
    simulation = Simulation(engine(), works=lambda batch, now: batch.model != 1 or now > 5)
    request(simulation, 1, 3, (0, 1))
    simulation.run(until=3)
    assert simulation.engine.failing == [1]
    simulation.run()
    assert simulation.engine.failing == []


def test_an_error_of_one_picture_leaves_other_requests_alone() -> None:
    class Broken(Picture):
        def denoise(self) -> Denoising:
            yield from self._ask(self._expert_calls())
            raise ZeroDivisionError

    simulation = Simulation(engine())
    broken = Request(simulation, [Picture(2, lambda _: (0,)), Broken(2, lambda _: (0,))]).start()
    others = [request(simulation, 2) for _ in range(3)]
    simulation.run()
    assert isinstance(broken.error, ZeroDivisionError)
    assert len(broken.events) == 1
    assert all(isinstance(one.events[-1], Finished) for one in others)
    assert is_idle(simulation.engine)


def test_a_request_ends_at_its_deadline() -> None:
    simulation = Simulation(engine(max_active_pictures=2))
    drawn = request(simulation, 2, 50, timeout_s=10)
    waiting = request(simulation, 1, 3)
    unstarted = Request(simulation, pictures(1), timeout_s=11)
    simulation.run(until=9.9)
    simulation.engine.expire(simulation.now)
    assert not drawn.events
    simulation.run(until=11)
    simulation.engine.expire(simulation.now)
    assert isinstance(drawn.error, DeadlineError)
    assert isinstance(unstarted.error, DeadlineError)
    unstarted.start()  # its text was encoded too late
    simulation.run()
    assert isinstance(waiting.events[-1], Finished)
    assert is_idle(simulation.engine)


# -- What is told ----------------------------------------------------------------------------------


def test_pictures_come_in_order_with_the_time_they_waited() -> None:
    simulation = Simulation(engine(max_active_pictures=1))
    simulation.now = 100.0
    first, second = request(simulation, 3), request(simulation, 1)
    simulation.run()
    (finished,) = first.events
    assert isinstance(finished, Finished)
    assert len(finished.samples) == 3
    assert first.ticket.queued_s(simulation.now) == 0
    # Two pictures of the first, whose turns came before its own.
    assert second.ticket.queued_s(simulation.now) == 8


def test_a_request_that_never_begins_has_waited_all_the_time() -> None:
    simulation = Simulation(engine(max_active_pictures=1), works=lambda batch, now: False)
    simulation.now = 100.0
    request(simulation, 1)
    behind = request(simulation, 1)
    simulation.run(until=107.0)
    assert behind.ticket.queued_s(simulation.now) == 7


def test_waiting_calls_are_counted_by_model_and_batches_know_how_long() -> None:
    """Two requests ask expert 1, whose first batch leaves the second's call waiting."""
    simulation = Simulation(engine(max_batch_rows=2))
    for _ in range(3):
        request(simulation, 1, 1, (1,))
    assert simulation.engine.waiting_calls[ROUTER] == 3
    simulation.run(until=0.5)
    assert sum(simulation.engine.waiting_calls.values()) == 3 - rows(simulation.batches[0])
    simulation.run()
    assert sum(simulation.engine.waiting_calls.values()) == 0
    assert [batch.waited_s for batch in simulation.batches if batch.model == ROUTER] == [0, 1]


def test_previews_are_told_once_each() -> None:
    simulation = Simulation(engine(lost_after_s=5), works=lambda batch, now: batch.model != 1)
    asked = request(simulation, 1, 4, (0, 1), preview_at=(1, 3))
    simulation.run()
    told = [event.evaluations for event in asked.events if isinstance(event, Previewed)]
    assert told == [1, 3]
    assert isinstance(asked.events[-1], Finished)


# -- Any order of events ---------------------------------------------------------------------------


class AnyOrder(RuleBasedStateMachine):
    """Whatever happens in whatever order, nothing is lost, and the counters are true."""

    def __init__(self) -> None:
        super().__init__()
        limits = Limits(
            max_batch_rows=3, max_active_pictures=4, max_waiting_pictures=4, lost_after_s=5
        )
        self.simulation = Simulation(Engine(MODELS, limits), [])
        self.engine = self.simulation.engine
        self.unstarted: list[Request] = []
        self.requests: list[Request] = []
        self.cancelled: dict[int, int] = {}  # how many events a request had then
        self.batches: list[Batch] = []
        self.failed: set[int] = set()

    @property
    def now(self) -> float:
        return self.simulation.now

    @rule(
        count=st.integers(1, 3),
        evaluations=st.integers(1, 3),
        experts=st.sets(st.integers(0, NUM_EXPERTS - 1), min_size=1),
        guided=st.booleans(),
        allow_missing=st.booleans(),
        timeout_s=st.sampled_from([2.0, 1000.0]),
        client=st.sampled_from("ab"),
    )
    def admit(
        self, count: int, evaluations: int, experts: set[int], guided: bool, **options: Any
    ) -> None:
        wanted = [
            Picture(evaluations, lambda _: sorted(experts), guided=guided) for _ in range(count)
        ]
        full = self.engine.num_active + self.engine.num_waiting + count > 8
        same = [one for one in self.open() if one.ticket.client == options["client"]]
        of_client = sum(len(one.pictures) for one in same) + count
        reason = ""
        try:
            asked = Request(self.simulation, wanted, max_pictures_of_client=6, **options)
            self.requests.append(asked)
            self.unstarted.append(asked)
        except QueueFullError as error:
            reason = str(error)
        if full:
            assert "are in work or wait" in reason
        elif of_client > 6:
            assert "the most at once are 6" in reason
        else:
            assert not reason or "it would be done in" in reason

    @precondition(lambda self: self.unstarted)
    @rule(chance=st.randoms())
    def start(self, chance: random.Random) -> None:
        self.unstarted.pop(chance.randrange(len(self.unstarted))).start()

    @rule(models=st.sets(st.sampled_from(MODELS), min_size=1))
    def take(self, models: set[int]) -> None:
        batch = self.engine.take(models, self.now)
        if batch is None:
            wait = self.engine.retry_in(models, self.now)
            assert wait is None or wait > 0
            return
        assert {call.model for call in batch.calls} == {batch.model} <= models
        assert rows(batch) <= 3
        self.batches.append(batch)

    def _pop(self, chance: random.Random) -> Batch:
        return self.batches.pop(chance.randrange(len(self.batches)))

    @precondition(lambda self: self.batches)
    @rule(chance=st.randoms())
    def answer(self, chance: random.Random) -> None:
        batch = self._pop(chance)
        self.engine.answer(batch, [reply(call) for call in batch.calls], self.now)

    @precondition(lambda self: self.batches)
    @rule(chance=st.randoms())
    def fail(self, chance: random.Random) -> None:
        batch = self._pop(chance)
        self.failed.add(batch.model)
        self.engine.fail(batch, self.now)

    @precondition(lambda self: self.batches)
    @rule(chance=st.randoms())
    def reject(self, chance: random.Random) -> None:
        batch = self._pop(chance)
        self.engine.reject(batch, RuntimeError("rejected"), self.now)
        assert not any(waiting.picture.ticket.is_open for waiting in batch.waiting)

    @precondition(lambda self: self.requests)
    @rule(chance=st.randoms())
    def cancel(self, chance: random.Random) -> None:
        number = chance.randrange(len(self.requests))
        asked = self.requests[number]
        if asked.ticket.is_open:
            self.cancelled[number] = len(asked.events)
        steps = self.engine.cancel(asked.ticket, self.now)
        assert 0 <= steps <= asked.pictures[0].evaluations

    @rule(seconds=st.sampled_from([0.01, 0.5, 3.0]))
    def wait(self, seconds: float) -> None:
        self.simulation.now += seconds

    @rule()
    def expire(self) -> None:
        self.engine.expire(self.now)
        assert all(one.ticket.deadline > self.now for one in self.open())

    def open(self) -> list[Request]:
        return [one for one in self.requests if one.ticket.is_open]

    @invariant()
    def the_counters_are_true(self) -> None:
        drawn = [p for one in self.open() for p in one.pictures]
        active = [p for p in drawn if p.is_begun and not p.is_finished]
        assert self.engine.num_active == len(active) <= 4
        unbegun = [p for p in drawn if not p.is_begun]
        assert self.engine.num_waiting == len(unbegun)
        assert self.engine.num_active == 4 or all(
            not picture.is_begun and one in self.unstarted
            for one in self.open()
            for picture in one.pictures
            if picture in unbegun
        )
        assert self.engine.num_left == sum(p.evaluations - p.done for p in drawn)

    @invariant()
    def no_call_is_lost_or_made_twice(self) -> None:
        """All that pictures wait for waits in the engine, or is under way."""
        wanted = [n for one in self.open() for p in one.pictures for n in p.wanted]
        taken = [w for batch in self.batches for w in batch.waiting if w.picture.ticket.is_open]
        names = [w.call.latents.item() for w in taken]
        names += [w.call.latents.item() for w in self.queued()]
        assert len(names) == len(set(names))
        assert set(names) <= set(wanted)
        answered = {
            n for one in self.open() for p in one.pictures for n in p.wanted if n not in names
        }
        for one in self.open():
            for picture in one.pictures:
                assert not picture.wanted or picture.wanted - answered

    @invariant()
    def only_what_failed_is_missing(self) -> None:
        assert all(p.missing <= self.failed for one in self.requests for p in one.pictures)

    def queued(self) -> list[Any]:
        lanes = self.engine._lanes.values()
        return [waiting for lane in lanes for waiting in lane.waiting]

    @invariant()
    def every_request_is_told_its_end_once(self) -> None:
        for number, one in enumerate(self.requests):
            ends = [event for event in one.events if isinstance(event, Finished | Failed)]
            if number in self.cancelled:
                assert not ends
                assert len(one.events) == self.cancelled[number]
            else:
                assert len(ends) == (not one.ticket.is_open)
                assert not ends or one.events[-1] is ends[0]

    def teardown(self) -> None:
        """In the end all works: whoever is still there is drawn."""
        left = self.open()
        for one in self.unstarted:
            one.start()
        for _ in range(1000):
            self.simulation.now += 1
            if not self.batches and (batch := self.engine.take(MODELS, self.now)):
                self.batches.append(batch)
            if not self.batches:
                break
            batch = self.batches.pop()
            self.engine.answer(batch, [reply(call) for call in batch.calls], self.now)
        assert is_idle(self.engine)
        for one in left:
            (finished,) = one.events
            assert isinstance(finished, Finished)
            steps = torch.cat([samples.latents for samples in finished.samples])
            assert steps.tolist() == [picture.evaluations for picture in one.pictures]


AnyOrder.TestCase.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)
TestAnyOrder = AnyOrder.TestCase
