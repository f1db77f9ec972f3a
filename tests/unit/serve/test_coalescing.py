"""Questions that came while others were answered are answered together; nobody pays for others."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from serve.coalescing import Coalescer

BAD = 13


class Double:
    """Doubles numbers, each batch when it is allowed to; one number cannot be doubled."""

    def __init__(
        self, most: int = 100, client: Callable[[int], str] = lambda number: "somebody"
    ) -> None:
        self.batches: list[list[int]] = []
        self.allowed = asyncio.Semaphore(0)
        self.asked = Coalescer(self._answer, size=lambda number: number, most=most, client=client)

    async def _answer(self, numbers: Sequence[int]) -> list[int]:
        self.batches.append(list(numbers))
        await self.allowed.acquire()
        if BAD in numbers:
            raise ValueError("bad")
        return [2 * number for number in numbers]

    def allow(self, count: int = 100) -> None:
        for _ in range(count):
            self.allowed.release()

    def ask(self, *numbers: int) -> "list[asyncio.Task[int]]":
        return [asyncio.create_task(self.asked.ask(number)) for number in numbers]


async def all_of(tasks: "Sequence[asyncio.Task[int]]") -> list[Any]:
    return await asyncio.gather(*tasks, return_exceptions=True)


async def pause() -> None:
    """Let the others go on until they wait."""
    for _ in range(10):
        await asyncio.sleep(0)


def test_whoever_is_free_takes_all_that_came_meanwhile() -> None:
    async def ask() -> None:
        double = Double()
        first = double.ask(1)
        await pause()
        later = double.ask(2, 3)
        await pause()
        later += double.ask(4)
        await pause()
        assert double.batches == [[1]]
        double.allow(1)
        await pause()
        assert first[0].result() == 2
        assert double.batches == [[1], [2, 3, 4]]
        double.allow()
        assert await all_of(later) == [4, 6, 8]
        assert await all_of(double.ask(5)) == [10]  # after a rest

    asyncio.run(ask())


def test_a_batch_is_bounded_and_what_is_larger_is_alone() -> None:
    async def ask() -> None:
        double = Double(most=6)
        double.allow()
        assert await all_of(double.ask(3, 3, 3, 9, 1)) == [6, 6, 6, 18, 2]
        assert double.batches == [[3, 3], [3], [9], [1]]

    asyncio.run(ask())


def test_clients_have_fair_shares_whoever_came_first() -> None:
    async def ask() -> None:
        double = Double(most=4, client=lambda number: str(number % 2))
        double.allow()
        tasks = double.ask(2, 2, 2, 2, 1, 1, 1)
        await all_of(tasks)
        assert double.batches == [[2, 1, 1], [2, 1], [2, 2]]

    asyncio.run(ask())


def test_what_nobody_waits_for_is_not_answered() -> None:
    async def ask() -> None:
        double = Double()
        tasks = double.ask(1)
        await pause()
        tasks += double.ask(2, 3, 4)
        await pause()
        tasks[0].cancel()  # while it is answered
        tasks[2].cancel()
        double.allow()
        answers = await all_of(tasks)
        assert [answers[1], answers[3]] == [4, 8]
        assert all(isinstance(answers[i], asyncio.CancelledError) for i in (0, 2))
        assert double.batches == [[1], [2, 4]]

    asyncio.run(ask())


def test_one_bad_question_does_not_cost_the_others_their_answers() -> None:
    async def ask() -> None:
        double = Double()
        double.allow()
        one, error, other = await all_of(double.ask(1, BAD, 2))
        assert (one, other) == (2, 4)
        assert isinstance(error, ValueError)
        assert double.batches == [[1, BAD, 2], [1], [BAD], [2]]
        with pytest.raises(ValueError, match="bad"):
            await double.asked.ask(BAD)
        assert await double.asked.ask(7) == 14

    asyncio.run(ask())


def test_those_that_wait_are_counted() -> None:
    async def ask() -> None:
        double = Double()
        tasks = double.ask(1)
        await pause()
        tasks += double.ask(2, 3)
        await pause()
        assert len(double.asked) == 2
        double.allow()
        await all_of(tasks)
        assert len(double.asked) == 0

    asyncio.run(ask())


def test_an_answer_too_few_is_told_and_the_next_are_answered() -> None:
    async def answer(numbers: Sequence[int]) -> list[int]:
        return [number for number in numbers if number != BAD]

    async def ask() -> None:
        asked = Coalescer(answer, size=lambda number: number, most=100)
        one, bad, two = await asyncio.gather(
            *(asked.ask(number) for number in (1, BAD, 2)), return_exceptions=True
        )
        assert (one, two) == (1, 2)
        assert isinstance(bad, ValueError)
        assert await asyncio.wait_for(asked.ask(3), 60) == 3

    asyncio.run(ask())
