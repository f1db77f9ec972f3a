"""Turns: shares of clients by rows, requests of a client in turn, nothing lost."""

from collections import Counter
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from paris_ray.sampling.engine.turns import Turns


@dataclass(eq=False)
class Asked:
    """A request: equal to itself alone."""

    client: str


def pop_all(turns: Turns[str], most: int = 1000) -> str:
    return "".join(turns.pop() for _ in range(min(most, len(turns))))


def pushed(rows: dict[str, int], counts: dict[str, int]) -> Turns[str]:
    """One request a client, whose items bear its name."""
    turns: Turns[str] = Turns()
    for client, count in counts.items():
        asked = Asked(client)
        for _ in range(count):
            turns.push(asked, client, rows[client])
    return turns


def test_clients_take_turns_whoever_came_first_and_with_how_much() -> None:
    turns = pushed({"a": 2, "b": 2, "c": 2}, {"a": 4, "b": 2, "c": 1})
    assert pop_all(turns) == "abcabaa"


def test_shares_are_of_rows() -> None:
    turns = pushed({"a": 2, "b": 1}, {"a": 30, "b": 60})
    assert Counter(pop_all(turns, 45)) == {"a": 15, "b": 30}


def test_an_item_of_more_rows_than_a_turn_has_waits_for_several() -> None:
    turns = pushed({"a": 6, "b": 2}, {"a": 2, "b": 6})
    assert Counter(pop_all(turns, 4)) == {"a": 1, "b": 3}


def test_the_requests_of_a_client_take_turns() -> None:
    turns: Turns[str] = Turns()
    large, small = Asked("a"), Asked("a")
    for item in "LLL":
        turns.push(large, item, 1)
    turns.push(small, "s", 1)
    assert pop_all(turns) == "LsLL"


def test_a_client_that_had_nothing_left_begins_anew() -> None:
    turns = pushed({"a": 1, "b": 1}, {"a": 1, "b": 8})
    assert pop_all(turns, 2) == "ab"  # of two rows that each may have
    late = Asked("a")
    for _ in range(4):
        turns.push(late, "a", 1)
    assert pop_all(turns, 9) == "bbbaabbaa"


def test_a_discarded_request_leaves_nothing() -> None:
    turns: Turns[str] = Turns()
    gone, stays = Asked("a"), Asked("a")
    for owner, item in ((gone, "g"), (stays, "s"), (gone, "g")):
        turns.push(owner, item, 1)
    turns.discard(gone)
    turns.discard(gone)
    turns.discard(Asked("b"))
    assert (len(turns), list(turns), pop_all(turns)) == (1, ["s"], "s")
    assert not turns


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 2), st.integers(1, 5)) | st.none()))
def test_every_item_comes_once_and_after_those_before_it(
    events: list[tuple[str, int, int] | None],
) -> None:
    """An event is an item of one of a client's requests, or None: the next is taken."""
    turns: Turns[tuple[str, int, int]] = Turns()
    owners = {(client, number): Asked(client) for client in "ab" for number in range(3)}
    came: list[tuple[str, int, int]] = []
    count = 0
    for event in [*events, *[None] * len(events)]:
        if event is not None:
            client, number, rows = event
            turns.push(owners[client, number], (client, number, count), rows)
            count += 1
        elif turns:
            expected = turns.peek()
            came.append(turns.pop())
            assert came[-1] == expected
        assert len(turns) == count - len(came) == len(list(turns))
    assert len(set(came)) == len(came) == count
    for owner in owners:
        order = [place for client, number, place in came if (client, number) == owner]
        assert order == sorted(order)
