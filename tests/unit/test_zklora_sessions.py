"""The journal: no row twice, none over the budget, whoever dies or pushes."""

import os
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from paris_ray.errors import ArtifactError, BudgetError, ProtocolError, SignatureError
from paris_ray.identity import Identity
from paris_ray.signatures import SignedDocument
from paris_ray.zklora import sessions
from paris_ray.zklora.calls import Request
from paris_ray.zklora.log import Call, Log, closing_statement
from paris_ray.zklora.session_records import SessionState
from paris_ray.zklora.sessions import SCHEMA_VERSION, SessionJournal
from paris_ray.zklora.transcript import Transcript, proof_context

ADAPTER, SID, OTHER_SID = "ad" * 32, "51" * 32, "52" * 32
NONCE_U, NONCE_C, NONCE_V = "0a" * 32, "0c" * 32, "0f" * 32
USER, STRANGER = "aa" * 32, "bb" * 32
BUDGET = 10


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "contributor" / "sessions.sqlite"


@pytest.fixture
def journal(path: Path, monkeypatch: pytest.MonkeyPatch) -> SessionJournal:
    monkeypatch.setattr(sessions, "MAX_OPEN_SESSIONS", 2)
    monkeypatch.setattr(sessions, "MAX_ROWS", 8)
    journal = SessionJournal(path)
    journal.budget.add_adapter(ADAPTER, ["m", "n"], BUDGET)
    journal.open_session(SID, ADAPTER, USER, NONCE_U, NONCE_C)
    return journal


def rows(count: int, first: int = 0) -> np.ndarray:
    return (np.arange(count * 3, dtype=np.int16) + first).reshape(count, 3)


def answers(x: np.ndarray) -> np.ndarray:
    return x.astype(np.int64) @ np.arange(15).reshape(3, 5)


def record(
    journal: SessionJournal,
    seq: int,
    x: np.ndarray,
    *,
    compute: Callable[[], np.ndarray] | None = None,
    sid: str = SID,
    user: str = USER,
    module: str = "m",
    exponent: int = 11,
) -> np.ndarray:
    (answer,) = journal.record_calls(
        sid,
        user,
        seq,
        [Request(module, exponent, x)],
        lambda: [(compute or (lambda: answers(x)))()],
    )
    return answer


def refuse() -> np.ndarray:
    raise AssertionError("nothing may be computed")


def left(journal: SessionJournal) -> dict[str, int]:
    return journal.budget.rows_left(ADAPTER)


def test_calls_are_paid_answered_and_kept(journal: SessionJournal, path: Path):
    first, second = rows(2), rows(3, 50)
    np.testing.assert_array_equal(record(journal, 0, first), answers(first))
    np.testing.assert_array_equal(record(journal, 1, second, module="n"), answers(second))
    assert left(journal) == {"m": 8, "n": 7}
    with SessionJournal(path) as restarted:
        assert left(restarted) == {"m": 8, "n": 7}
        assert restarted.calls.log(SID) == journal.calls.log(SID)
        x, y = restarted.calls.rows(SID, "n")
        with pytest.raises(ProtocolError, match="'o' was never called"):
            restarted.calls.rows(SID, "o")
    np.testing.assert_array_equal(x, second)
    np.testing.assert_array_equal(y, answers(second))
    asked = Transcript([Call(0, "m", 11, first, answers(first)), Call(1, "n", 11, x, y)])
    assert journal.calls.log(SID) == asked.log


def test_a_repeated_call_is_answered_from_the_journal(journal: SessionJournal, path: Path):
    answer = record(journal, 0, rows(2))
    with SessionJournal(path) as restarted:
        np.testing.assert_array_equal(record(restarted, 0, rows(2), compute=refuse), answer)
    record(journal, 1, rows(1))
    np.testing.assert_array_equal(record(journal, 0, rows(2), compute=refuse), answer)
    assert left(journal) == {"m": 7, "n": 10}


def test_calls_of_one_request_are_paid_together_or_not_at_all(journal: SessionJournal):
    x = rows(2)
    both = [Request("m", 11, x), Request("n", 11, x + 1)]

    def compute() -> list[np.ndarray]:
        return [answers(request.x) for request in both]

    for _ in range(2):
        found = journal.record_calls(SID, USER, 0, both, compute)
        np.testing.assert_array_equal(found, compute())
    assert left(journal) == {"m": 8, "n": 8} and journal.calls.log(SID).calls == 2
    record(journal, 2, rows(7), module="n")
    more = [Request("m", 11, rows(2)), Request("n", 11, rows(2))]
    with pytest.raises(BudgetError, match="n has 1 rows left, 2 are asked for"):
        journal.record_calls(SID, USER, 3, more, lambda: [refuse()])
    with pytest.raises(BudgetError, match="n has 1 rows left, 2 are asked for"):
        journal.check_turn(SID, USER, 3, ["m", "n"], 2)
    assert left(journal) == {"m": 8, "n": 1} and journal.session(SID, USER).calls == 3
    # Known ones bring no new ones with them, which nobody would have paid for.
    with pytest.raises(ProtocolError, match="seq=1 is not allowed: the next call is 3"):
        journal.record_calls(SID, USER, 1, [both[1], more[1], more[0]], lambda: [refuse()])
    with pytest.raises(ProtocolError, match="seq=2 is not allowed: the next call is 3"):
        journal.check_turn(SID, USER, 2, ["n", "m"], 7)
    with pytest.raises(ProtocolError, match="does not exist for user"):
        journal.check_turn(SID, STRANGER, 3, ["m"], 1)
    with pytest.raises(ProtocolError, match="9 rows are not allowed: 8 a call"):
        journal.check_turn(SID, USER, 3, ["m"], 9)
    with pytest.raises(ProtocolError, match="call 1 was sent again with other content"):
        journal.record_calls(SID, USER, 0, [both[0], both[0]], lambda: [refuse()])


@pytest.mark.parametrize(
    "change",
    [
        {"x": rows(2, 1)},
        {"x": rows(3)},
        {"x": rows(2).reshape(3, 2)},
        {"x": rows(2).reshape(1, 6)},
        {"module": "n"},
        {"exponent": 12},
    ],
)
def test_a_call_repeated_with_other_content_ends_the_session(
    journal: SessionJournal, path: Path, change: dict
):
    record(journal, 0, rows(2))
    changed = {"x": rows(2)} | change
    with pytest.raises(ProtocolError, match="call 0 was sent again with other content"):
        record(journal, 0, compute=refuse, **changed)
    with SessionJournal(path) as restarted:
        session = restarted.session(SID, USER)
        assert session.state is SessionState.ENDED and "call 0" in session.reason
        for seq in (0, 1):
            with pytest.raises(ProtocolError, match=r"is ENDED \(call 0 was sent again"):
                record(restarted, seq, rows(2), compute=refuse)
        with pytest.raises(ProtocolError, match="is ENDED"):
            restarted.challenge(SID, USER, NONCE_V)
        assert left(restarted) == {"m": 8, "n": 10}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq": 1}, "seq=1 is not allowed: the next call is 0"),
        ({"user": STRANGER}, "does not exist for user"),
        ({"sid": OTHER_SID}, "does not exist for user"),
        ({"sid": "' OR 1=1"}, "session="),
        ({"module": "o"}, "module='o' is not one of adapter"),
        ({"module": "\udcff"}, "is not the name of a module"),
        ({"seq": 2**70}, "seq="),
        ({"x": rows(9)}, "9 rows are not allowed: 8 a call"),
        ({"x": rows(2).astype(np.int32)}, "x must be a matrix of int16"),
        ({"x": rows(0)}, "x must be"),
    ],
)
def test_calls_out_of_place_are_refused_and_cost_nothing(
    journal: SessionJournal, change: dict, message: str
):
    with pytest.raises(ProtocolError, match=message):
        record(journal, compute=refuse, **({"seq": 0, "x": rows(2)} | change))
    assert left(journal) == {"m": 10, "n": 10}
    record(journal, 0, rows(2))


def test_the_budget_is_one_for_all_users_and_sessions(journal: SessionJournal, path: Path):
    journal.open_session(OTHER_SID, ADAPTER, STRANGER, NONCE_U, NONCE_C)
    record(journal, 0, rows(6))
    with pytest.raises(BudgetError, match="m has 4 rows left, 5 are asked for"):
        record(journal, 0, rows(5), sid=OTHER_SID, user=STRANGER, compute=refuse)
    record(journal, 0, rows(5), sid=OTHER_SID, user=STRANGER, module="n")
    record(journal, 1, rows(4), sid=OTHER_SID, user=STRANGER)
    assert left(journal) == {"m": 0, "n": 5}
    with SessionJournal(path) as restarted:
        restarted.budget.add_adapter(ADAPTER, ["m", "n"], BUDGET)
        assert left(restarted) == {"m": 0, "n": 5}
        with pytest.raises(BudgetError, match="0 rows left"):
            record(restarted, 1, rows(1), compute=refuse)
        for modules, budget in ((["m", "n"], 11), (["m"], BUDGET), (["m", "n", "o"], BUDGET)):
            with pytest.raises(ArtifactError, match="another budget"):
                restarted.budget.add_adapter(ADAPTER, modules, budget)


def test_a_failed_computation_is_paid_once_and_may_be_repeated(journal: SessionJournal):
    def fail() -> np.ndarray:
        assert left(journal) == {"m": 8, "n": 10}  # it was paid for before
        raise OSError("a worker died")

    for _ in range(2):
        with pytest.raises(OSError, match="a worker died"):
            record(journal, 0, rows(2), compute=fail)
    with pytest.raises(ProtocolError, match="call 0 has no answer yet"):
        record(journal, 1, rows(1), compute=refuse)
    with pytest.raises(ProtocolError, match="other content"):
        record(journal, 0, rows(2, 1), compute=refuse)
    assert left(journal) == {"m": 8, "n": 10}


def test_a_failed_computation_is_answered_in_the_end(journal: SessionJournal):
    with pytest.raises(ZeroDivisionError):
        record(journal, 0, rows(2), compute=lambda: 1 // 0)
    np.testing.assert_array_equal(record(journal, 0, rows(2)), answers(rows(2)))
    assert left(journal) == {"m": 8, "n": 10} and journal.calls.log(SID).rows == {"m": 2}


KILLED = """
import os, sys
from pathlib import Path
import numpy as np
from paris_ray.zklora.calls import Request
from paris_ray.zklora.sessions import SessionJournal

path, sid, user, when = sys.argv[1:]
journal = SessionJournal(Path(path))
x = np.arange(6, dtype=np.int16).reshape(2, 3)

def compute():
    if when == "before the answer":
        os._exit(9)
    return [x.astype(np.int64) @ np.arange(15).reshape(3, 5)]

journal.record_calls(sid, user, 0, [Request("m", 11, x)], compute)
os._exit(9)
"""


@pytest.mark.parametrize("when", ["before the answer", "before it was sent"])
def test_a_killed_process_neither_forgets_nor_repeats_a_payment(
    journal: SessionJournal, path: Path, when: str
):
    command = [sys.executable, "-c", KILLED, str(path), SID, USER, when]
    for _ in range(2):
        killed = subprocess.run(command, check=False, capture_output=True, text=True)
        assert killed.returncode == 9, killed.stderr
        assert left(journal) == {"m": 8, "n": 10}
    compute = None if when == "before the answer" else refuse
    np.testing.assert_array_equal(record(journal, 0, rows(2), compute=compute), answers(rows(2)))
    assert left(journal) == {"m": 8, "n": 10} and journal.calls.log(SID).rows == {"m": 2}


def test_threads_of_two_journals_never_get_more_than_the_budget(path: Path):
    journals = [SessionJournal(path) for _ in range(2)]
    journals[0].budget.add_adapter(ADAPTER, ["m"], 25)
    count = 16
    for i in range(count):
        nonce = f"{i:064x}"
        journals[0].open_session(nonce, ADAPTER, USER, nonce, NONCE_C)
    computed = []  # appending is atomic

    def ask(i: int) -> int:
        journal, paid = journals[i % 2], 0
        for seq in range(4):
            x = rows(1 + i % 3, i)
            try:
                y = record(
                    journal,
                    seq,
                    x,
                    sid=f"{i:064x}",
                    compute=lambda x=x: (computed.append(len(x)), answers(x))[1],
                )
            except BudgetError:
                return paid
            np.testing.assert_array_equal(y, answers(x))
            paid += len(x)
        return paid

    with ThreadPoolExecutor(8) as pool:
        paid = sum(pool.map(ask, range(count)))
    asked = (journals[0].calls.asked(f"{i:064x}") for i in range(count))
    kept = sum(counts["m"] for _, counts in asked)
    assert paid == kept == sum(computed) == 25 - left(journals[0])["m"]
    assert left(journals[1])["m"] < 3  # nobody's question was that small, or it would be 0


def test_one_call_sent_over_many_connections_is_paid_once(journal: SessionJournal):
    together = threading.Barrier(6)

    def ask(_: int) -> np.ndarray:
        together.wait()
        return record(journal, 0, rows(2))

    with ThreadPoolExecutor(6) as pool:
        for y in pool.map(ask, range(6)):
            np.testing.assert_array_equal(y, answers(rows(2)))
    assert left(journal) == {"m": 8, "n": 10} and journal.calls.log(SID).calls == 1


def test_of_two_answers_the_first_is_everybodys(journal: SessionJournal):
    def slow() -> np.ndarray:
        record(journal, 0, rows(2))  # the same question, answered meanwhile
        return answers(rows(2)) + 1

    np.testing.assert_array_equal(record(journal, 0, rows(2), compute=slow), answers(rows(2)))


def test_opening_again_with_the_same_nonce_is_the_same_session(journal: SessionJournal):
    first = journal.session(SID, USER)
    assert journal.open_session(OTHER_SID, ADAPTER, USER, NONCE_U, "0d" * 32) == first
    assert first.nonce_c == NONCE_C and first.state is SessionState.OPEN
    stranger = journal.open_session(OTHER_SID, ADAPTER, STRANGER, NONCE_U, NONCE_C)
    assert stranger.sid == OTHER_SID


def test_openings_out_of_place_are_refused(journal: SessionJournal):
    with pytest.raises(ProtocolError, match="is not served here"):
        journal.open_session(OTHER_SID, "ee" * 32, USER, NONCE_V, NONCE_C)
    with pytest.raises(ProtocolError, match="nonce_u="):
        journal.open_session(OTHER_SID, ADAPTER, USER, "0", NONCE_C)


def opened(journal: SessionJournal, number: int, user: str = USER) -> str:
    sid = f"{number:064x}"
    return journal.open_session(sid, ADAPTER, user, sid, NONCE_C).sid


def test_a_new_session_takes_the_place_of_the_oldest_that_paid_nothing(journal: SessionJournal):
    record(journal, 0, rows(1))  # the fixture's session is older, and has a row
    first = opened(journal, 1)
    opened(journal, 2, STRANGER)
    second = opened(journal, 3)
    with pytest.raises(ProtocolError, match="does not exist"):
        journal.session(first, USER)
    third = opened(journal, 4)
    with pytest.raises(ProtocolError, match="does not exist"):
        journal.session(second, USER)
    record(journal, 0, rows(1), sid=third)
    with pytest.raises(ProtocolError, match="2 sessions are open, the most allowed: close or end"):
        opened(journal, 5)
    assert journal.sessions_by_state() == {"OPEN": 3, "CLOSED": 0, "CHALLENGED": 0, "ENDED": 0}
    journal.end(SID, USER, "no longer wanted")
    journal.end(SID, USER, "another reason")
    assert journal.session(SID, USER).reason == "no longer wanted"
    fifth = opened(journal, 5)
    with pytest.raises(ProtocolError, match="does not exist"):
        journal.end(fifth, STRANGER, "not mine")
    opened(journal, 6)
    assert journal.session(third, USER).state is SessionState.OPEN
    with pytest.raises(ProtocolError, match="does not exist"):
        journal.session(fifth, USER)
    assert journal.sessions_by_state() == {"OPEN": 3, "CLOSED": 0, "CHALLENGED": 0, "ENDED": 1}


@pytest.mark.parametrize("ended", [False, True])
def test_what_was_opened_for_nothing_does_not_grow(path: Path, ended: bool):
    """Whoever opens sessions, and ends them or not, without a row keeps few of them here."""
    journal = SessionJournal(path)
    journal.budget.add_adapter(ADAPTER, ["m"], BUDGET)
    paid = opened(journal, 10**6)
    record(journal, 0, rows(1), sid=paid)
    for number in range(60):
        sid = opened(journal, number)
        if ended:
            journal.end(sid, USER, "changed my mind")
            journal.end(sid, USER, "asked again: the answer was lost")
    kept = journal.sessions_by_state()
    assert sum(kept.values()) <= 17 and kept["ENDED"] == (16 if ended else 0)
    assert journal.session(sid, USER).state is (SessionState.ENDED if ended else SessionState.OPEN)
    record(journal, 1, rows(1), sid=paid)
    with sqlite3.connect(path) as connection:
        counted = dict(connection.execute("SELECT state, COUNT(*) FROM sessions GROUP BY state"))
    assert counted == {state: count for state, count in kept.items() if count}


def steps(journal: SessionJournal, work: Callable[[], object]) -> int:
    """Return how many instructions of its virtual machine SQLite takes for some work."""
    counted = [0]

    def count() -> None:
        counted[0] += 1

    database = journal._journal._database
    database.set_progress_handler(count, 1)
    try:
        work()
    finally:
        database.set_progress_handler(None, 0)
    return counted[0]


def test_what_a_call_costs_does_not_depend_on_how_many_there_were(path: Path):
    journal = SessionJournal(path, max_rows_per_user=10_000)
    journal.budget.add_adapter(ADAPTER, ["m", "n"], 10_000)
    opened(journal, 0)
    calls = iter(range(10_000))

    def call() -> object:
        return record(journal, next(calls), rows(1), sid=f"{0:064x}")

    few = [steps(journal, call) for _ in range(10)]
    for _ in range(400):
        call()
    many = [steps(journal, call) for _ in range(10)]
    assert max(many) <= max(few) + 20  # a few more where a tree is searched


def test_what_a_request_costs_does_not_depend_on_how_many_sessions_there_are(path: Path):
    journal = SessionJournal(path)
    journal.budget.add_adapter(ADAPTER, [f"m{i}" for i in range(60)], 10_000)

    def request() -> None:
        journal.sessions_by_state()
        journal.budget.fewest_left(ADAPTER)

    def open_one(number: int) -> Callable[[], object]:
        return lambda: opened(journal, number, f"{number:064x}")

    few = steps(journal, request), steps(journal, open_one(0))
    for number in range(1, 300):
        sid = opened(journal, number, f"{number:064x}")
        record(journal, 0, rows(1), sid=sid, user=f"{number:064x}", module=f"m{number % 60}")
        if number % 2:
            journal.end(sid, f"{number:064x}", "over")
    many = steps(journal, request), steps(journal, open_one(300))
    assert all(after <= before + 60 for before, after in zip(few, many, strict=True))
    assert journal.sessions_by_state() == {"OPEN": 151, "CLOSED": 0, "CHALLENGED": 0, "ENDED": 150}
    assert journal.budget.fewest_left(ADAPTER) == min(left(journal).values()) == 9_995


def test_a_user_sees_no_more_rows_than_a_user_may(path: Path):
    journal = SessionJournal(path, max_rows_per_user=4)
    journal.budget.add_adapter(ADAPTER, ["m", "n"], BUDGET)
    first, second, other = (opened(journal, number) for number in (1, 2, 3))
    theirs = opened(journal, 4, STRANGER)
    record(journal, 0, rows(1), sid=first)
    record(journal, 0, rows(2), sid=second)
    record(journal, 1, rows(1), sid=second, module="n")
    assert journal.budget.rows_left(ADAPTER, USER) == {"m": 1, "n": 3}
    with pytest.raises(BudgetError, match="m has 1 rows left, 2 are asked for; a user may see 4"):
        record(journal, 0, rows(2), sid=other, compute=refuse)
    record(journal, 0, rows(1), sid=other)
    record(journal, 0, rows(4), sid=theirs, user=STRANGER)
    assert left(journal) == {"m": 2, "n": 9}
    assert journal.budget.rows_left(ADAPTER, "cc" * 32) == {
        "m": 2,
        "n": 4,
    }  # the lesser of both limits
    with SessionJournal(path, max_rows_per_user=1) as stricter:
        assert stricter.budget.rows_left(ADAPTER, USER) == {"m": 0, "n": 0}


def test_threads_of_one_user_never_get_more_than_its_share(path: Path):
    journals = [SessionJournal(path, max_rows_per_user=5) for _ in range(2)]
    journals[0].budget.add_adapter(ADAPTER, ["m"], 100)
    sessions = [opened(journals[0], number) for number in range(8)]

    def ask(i: int) -> int:
        try:
            return len(record(journals[i % 2], 0, rows(2), sid=sessions[i]))
        except BudgetError:
            return 0

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(ask, range(8))) == 4
    assert left(journals[0]) == {"m": 96}


@pytest.fixture
def parties(tmp_path: Path) -> tuple[Identity, Identity]:
    return Identity.create(tmp_path / "user"), Identity.create(tmp_path / "seller")


def sign(log: Log, user: Identity, sid: str = SID) -> SignedDocument:
    return SignedDocument.sign("close", closing_statement(sid, ADAPTER, log), user)


def test_a_session_closes_once_and_is_challenged_once(path: Path, parties: tuple):
    journal = SessionJournal(path)
    identity, seller = parties
    user = identity.public_key
    journal.budget.add_adapter(ADAPTER, ["m"], BUDGET)
    journal.open_session(SID, ADAPTER, user, NONCE_U, NONCE_C)
    record(journal, 0, rows(2), user=user)
    with pytest.raises(ProtocolError, match="is OPEN, not CLOSED"):
        journal.challenge(SID, user, NONCE_V)
    for unsigned in (
        lambda: journal.session(SID, user).signed,
        lambda: journal.session(SID, user).proof_context("m"),
    ):
        with pytest.raises(ProtocolError, match="is OPEN: "):
            unsigned()
    early = sign(journal.calls.log(SID), identity)
    record(journal, 1, rows(1), user=user)
    with pytest.raises(ProtocolError, match="statement differs"):
        journal.close(SID, user, early, seller)
    log = journal.calls.log(SID)
    signed = sign(log, identity)
    assert journal.close(SID, user, signed, seller).state is SessionState.CLOSED
    with SessionJournal(path) as restarted:
        closed = restarted.close(SID, user, signed, seller).signed
        assert closed.by_user == signed
        statement = closing_statement(SID, ADAPTER, log)
        assert closed.by_contributor.check("close", seller.public_key) == statement
        with pytest.raises(ProtocolError, match="is CLOSED, not OPEN"):
            restarted.close(SID, user, early, seller)
        record(restarted, 0, rows(2), user=user, compute=refuse)  # its answer may have been lost
        with pytest.raises(ProtocolError, match="is CLOSED, not OPEN"):
            record(restarted, 2, rows(2), user=user, compute=refuse)
        with pytest.raises(ProtocolError, match="is CLOSED, not OPEN"):
            restarted.end(SID, user, "too late")
        with pytest.raises(ProtocolError, match="nonce_v="):
            restarted.challenge(SID, user, "")
        with pytest.raises(ProtocolError, match="does not exist"):
            restarted.challenge(SID, STRANGER, NONCE_V)
        for _ in range(2):
            assert restarted.challenge(SID, user, NONCE_V).nonce_v == NONCE_V
    with pytest.raises(ProtocolError, match="is CHALLENGED, not CLOSED"):
        journal.challenge(SID, user, NONCE_C)
    session = journal.session(SID, user)
    assert session.state is SessionState.CHALLENGED and session.signed == closed
    assert session.proof_context("m") == proof_context(ADAPTER, SID, log.root, "m", NONCE_V)


def test_what_is_not_signed_or_not_complete_does_not_close(path: Path, parties: tuple):
    journal = SessionJournal(path)
    user, seller = parties
    key = user.public_key
    journal.budget.add_adapter(ADAPTER, ["m"], BUDGET)
    journal.open_session(SID, ADAPTER, key, NONCE_U, NONCE_C)
    with pytest.raises(ProtocolError, match="empty log"):
        journal.close(SID, key, SignedDocument.sign("close", {"session": SID}, user), seller)
    record(journal, 0, rows(2), user=key)
    log = journal.calls.log(SID)
    by_user = sign(log, user)
    with pytest.raises(SignatureError, match="is signed by"):
        journal.close(SID, key, sign(log, seller), seller)
    forged = SignedDocument("close", by_user.document, key, "00" * 64)
    with pytest.raises(SignatureError):
        journal.close(SID, key, forged, seller)
    floats = by_user.document | {"calls": float(log.calls)}  # to Python they are equal
    for wrong in (sign(log, user, OTHER_SID), SignedDocument.sign("close", floats, user)):
        with pytest.raises(ProtocolError, match="statement differs"):
            journal.close(SID, key, wrong, seller)
    with pytest.raises(ZeroDivisionError):
        record(journal, 1, rows(2), user=key, compute=lambda: 1 // 0)
    with pytest.raises(ProtocolError, match="call 1 has no answer yet"):
        journal.close(SID, key, by_user, seller)
    assert journal.session(SID, key).state is SessionState.OPEN


@pytest.mark.parametrize(
    "y", [np.zeros((1, 5), np.int64), np.zeros((2, 5), np.int32), np.zeros(2, np.int64)]
)
def test_an_answer_of_another_form_is_not_kept(journal: SessionJournal, y: np.ndarray):
    with pytest.raises(ProtocolError):
        record(journal, 0, rows(2), compute=lambda: y)
    np.testing.assert_array_equal(record(journal, 0, rows(2)), answers(rows(2)))
    assert left(journal) == {"m": 8, "n": 10}


def test_an_adapter_that_is_not_served_has_no_rows(journal: SessionJournal):
    with pytest.raises(ProtocolError, match="is not served here"):
        journal.budget.rows_left("ee" * 32)


def test_the_file_is_private_versioned_and_no_other(journal: SessionJournal, path: Path):
    record(journal, 0, rows(1))
    for file in path.parent.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) & 0o077 == 0, file
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        connection.execute("PRAGMA user_version = 7")
    with pytest.raises(ArtifactError, match=f"has schema 7, this version reads {SCHEMA_VERSION}"):
        SessionJournal(path)
    noise = path.with_name("noise.sqlite")
    noise.write_bytes(os.urandom(5000))
    with pytest.raises(ArtifactError, match="cannot be used as a journal"):
        SessionJournal(noise)
