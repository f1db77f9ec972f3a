"""Proofs in the making: what users are told, what is tried again, what is remembered."""

import threading
import time
from collections import Counter

import pytest

from paris_ray.errors import BudgetError, ProtocolError
from paris_ray.zklora.parties import proving
from paris_ray.zklora.parties.evidence import Progress
from paris_ray.zklora.parties.frames import Message
from paris_ray.zklora.parties.proving import MAX_REPEATS, Make, Proofs


def test_proving_that_fails_says_so_before_it_is_repeated_and_not_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    proofs, tried, may_fail = Proofs(2), [], threading.Event()

    def fail(on_progress: Progress) -> Message:
        tried.append(None)
        may_fail.wait(60)
        raise BudgetError("none are left")

    monkeypatch.setattr(proving, "ANSWER_WITHIN_S", 0.0)
    for _ in range(2):
        assert proofs.answer("a", fail).kind == "proving"
    assert len(tried) == 1
    may_fail.set()
    monkeypatch.setattr(proving, "ANSWER_WITHIN_S", 60.0)
    for attempt in range(1, MAX_REPEATS + 4):
        with pytest.raises(BudgetError, match="none are left"):
            proofs.answer("a", fail)
        assert len(tried) == min(attempt, MAX_REPEATS + 1)


def test_users_are_told_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proving, "ANSWER_WITHIN_S", 0.01)
    proofs, done = Proofs(2), threading.Event()

    def make(on_progress: Progress) -> Message:
        on_progress(1, 2)
        done.wait(60)
        return Message("evidence")

    while dict((answer := proofs.answer("a", make)).fields) != {"done": 1, "total": 2}:
        assert answer.kind == "proving"
    done.set()
    monkeypatch.setattr(proving, "ANSWER_WITHIN_S", 60.0)
    assert proofs.answer("a", make).kind == "evidence"


def test_an_error_of_ours_is_told_without_its_text() -> None:
    def fail(on_progress: Progress) -> Message:
        raise ZeroDivisionError("secret")

    with pytest.raises(ProtocolError, match="by no fault of yours"):
        Proofs(2).answer("session", fail)


def test_proofs_are_made_once_and_the_last_ones_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever opens many sessions does not fill the memory; who asks late has them made anew."""
    monkeypatch.setattr(proving, "MAX_KEPT", 3)
    proofs, made = Proofs(2), []

    def ask(session: str) -> None:
        def make(on_progress: Progress) -> Message:
            made.append(session)
            return Message("evidence", {"of": session})

        assert proofs.answer(session, make).fields == {"of": session}

    for session in ("a", "b", "a", "c", "d", "a", "c", "d"):
        ask(session)
    assert made == ["a", "b", "c", "d"] and len(proofs._jobs) == 3
    ask("b")
    assert made == ["a", "b", "c", "d", "b"] and len(proofs._jobs) == 3


def test_proofs_in_the_making_are_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proving, "MAX_KEPT", 1)
    monkeypatch.setattr(proving, "ANSWER_WITHIN_S", 0.0)
    proofs, go_on, begun = Proofs(2), threading.Event(), []

    def make(on_progress: Progress) -> Message:
        begun.append(None)
        go_on.wait(60)
        return Message("evidence")

    for _ in range(2):
        for session in ("a", "b", "c"):
            assert proofs.answer(session, make).kind == "proving"
    assert len(begun) == 3
    go_on.set()


def test_few_sessions_are_proved_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one begins when one of them is done; until then its user is told to wait."""
    monkeypatch.setattr(proving, "MAX_AT_ONCE", 2)
    monkeypatch.setattr(proving, "ANSWER_WITHIN_S", 0.0)
    proofs, go_on, begun = Proofs(2), threading.Event(), []

    def maker(session: str) -> Make:
        def make(on_progress: Progress) -> Message:
            begun.append(session)
            go_on.wait(60)
            return Message("evidence", {"of": session})

        return make

    for session in ("a", "b", "c", "d"):
        told = proofs.answer(session, maker(session))
        assert (told.kind, told.fields) == ("proving", {"done": 0, "total": 2})
    assert sorted(begun) == ["a", "b"]
    monkeypatch.setattr(proving, "ANSWER_WITHIN_S", 60.0)
    go_on.set()
    assert [proofs.answer(name, maker(name)).fields for name in "cdab"] == [
        {"of": name} for name in "cdab"
    ]
    assert sorted(begun) == ["a", "b", "c", "d"]


def test_users_who_wait_in_turns_have_their_proofs_made_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """More of them than are kept: who has not been told how it ended is forgotten last."""
    monkeypatch.setattr(proving, "MAX_KEPT", 2)
    proofs, made, go_on = Proofs(2), Counter[str](), threading.Event()
    go_on.set()

    def maker(session: str) -> Make:
        def make(on_progress: Progress) -> Message:
            made[session] += 1
            go_on.wait(60)
            return Message("evidence", {"of": session})

        return make

    for session in ("first", "second"):
        assert proofs.answer(session, maker(session)).fields == {"of": session}
    monkeypatch.setattr(proving, "ANSWER_WITHIN_S", 0.0)
    go_on.clear()
    assert proofs.answer("late", maker("late")).kind == "proving"
    go_on.set()
    while "late" not in proofs._made:
        time.sleep(0.01)
    monkeypatch.setattr(proving, "ANSWER_WITHIN_S", 60.0)
    for session in ("third", "fourth", "late"):
        assert proofs.answer(session, maker(session)).fields == {"of": session}
    assert made["late"] == 1


def test_what_failed_too_often_is_not_tried_again_whoever_else_asks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(proving, "MAX_KEPT", 1)
    proofs, tried = Proofs(2), []

    def fail(on_progress: Progress) -> Message:
        tried.append(None)
        raise BudgetError("none are left")

    for number in range(MAX_REPEATS + 4):
        with pytest.raises(BudgetError, match="none are left"):
            proofs.answer("failing", fail)
        for other in ("a", "b"):
            proofs.answer(f"{other}{number}", lambda on_progress: Message("evidence"))
    assert len(tried) == MAX_REPEATS + 1
