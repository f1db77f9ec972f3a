"""Proofs in the making: what users are told, what is tried again, what is remembered."""

import threading
import time

import pytest

from paris_ray.errors import BudgetError, ProtocolError
from paris_ray.zklora.parties import proving
from paris_ray.zklora.parties.evidence import Progress
from paris_ray.zklora.parties.frames import Message
from paris_ray.zklora.parties.proving import MAX_REPEATS, Proofs, Proving


def test_proving_that_fails_says_so_before_it_is_repeated_and_not_for_ever() -> None:
    def fail(on_progress: Progress) -> Message:
        on_progress(1, 2)
        raise BudgetError("none are left")

    for attempt in range(1, MAX_REPEATS + 2):
        job = Proving(2, fail, attempt)
        assert job._answer.exception(60) is not None
        assert not job.may_be_repeated
        for _ in range(2):
            with pytest.raises(BudgetError, match="none are left"):
                job.wait(0)
        assert job.may_be_repeated == (attempt <= MAX_REPEATS)
    done = threading.Event()

    def make(on_progress: Progress) -> Message:
        on_progress(1, 2)
        done.wait(60)
        return Message("evidence")

    job = Proving(2, make)
    while dict((answer := job.wait(0)).fields) != {"done": 1, "total": 2}:
        time.sleep(0.01)
    assert answer.kind == "proving" and not job.was_told
    done.set()
    assert job.wait(60).kind == "evidence" and job.was_told and not job.may_be_repeated


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
