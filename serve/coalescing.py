"""Answering together what came while others were answered: whoever is free takes all that waits."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from paris_ray.sampling.engine.turns import Turns

Question = TypeVar("Question")
Answer = TypeVar("Answer")


@dataclass(frozen=True, eq=False, slots=True)
class _Asked(Generic[Question, Answer]):
    """A question that waits for its answer."""

    client: str
    question: Question
    answered: "asyncio.Future[Answer]"


class Coalescer(Generic[Question, Answer]):
    """Questions that wait; one batch is answered at a time, of which clients have fair shares.

    Args:
        answer: Answers some questions, in their order.
        size: What a question counts.
        most: What the questions of a batch count at most; one of more is alone.
        client: Whose a question is.
    """

    def __init__(
        self,
        answer: Callable[[list[Question]], Awaitable[Sequence[Answer]]],
        *,
        size: Callable[[Question], int],
        most: int,
        client: Callable[[Question], str] = lambda question: "",
    ) -> None:
        self._answer, self._size, self._most, self._client = answer, size, most, client
        self._waiting: Turns[_Asked[Question, Answer]] = Turns()
        self._working: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        """Return how many questions wait for their batch."""
        return len(self._waiting)

    async def ask(self, question: Question) -> Answer:
        """Return the answer to a question; raises what answering it alone raises."""
        answered: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        asked = _Asked(self._client(question), question, answered)
        self._waiting.push(asked, asked, self._size(question))
        if self._working is None:
            self._working = asyncio.create_task(self._work())
        return await answered

    async def _work(self) -> None:
        """Answer until nothing waits."""
        while taken := self._take():
            if not await self._try(taken):  # one of them is at fault, the others are not
                for asked in taken:
                    await self._try([asked])
        self._working = None

    def _take(self) -> list[_Asked[Question, Answer]]:
        """Return what waits, as far as it fits into one batch; at least one question."""
        taken: list[_Asked[Question, Answer]] = []
        size = 0
        while self._waiting:
            asked = self._waiting.peek()
            if not asked.answered.done():  # else nobody waits for it any more
                size += self._size(asked.question)
                if taken and size > self._most:
                    break
                taken.append(asked)
            self._waiting.pop()
        return taken

    async def _try(self, taken: list[_Asked[Question, Answer]]) -> bool:
        """Answer questions together; return whether that was possible. Of one, an error is told."""
        try:
            answers = await self._answer([asked.question for asked in taken])
            pairs = list(zip(taken, answers, strict=True))
        except Exception as error:
            if len(taken) > 1:
                return False
            (asked,) = taken
            if not asked.answered.cancelled():
                asked.answered.set_exception(error)
            return True
        for asked, answer in pairs:
            if not asked.answered.cancelled():
                asked.answered.set_result(answer)
        return True
