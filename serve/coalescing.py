"""Answering together what came while others were answered: whoever is free takes all that waits."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

Question = TypeVar("Question")
Answer = TypeVar("Answer")


class Coalescer(Generic[Question, Answer]):
    """A queue of questions, of which one batch is answered at a time.

    Args:
        answer: Answers some questions, in their order.
        size: What a question counts.
        most: What the questions of a batch count at most; one of more is alone.
    """

    def __init__(
        self,
        answer: Callable[[list[Question]], Awaitable[Sequence[Answer]]],
        *,
        size: Callable[[Question], int],
        most: int,
    ) -> None:
        self._answer, self._size, self._most = answer, size, most
        self._waiting: deque[tuple[Question, asyncio.Future[Answer]]] = deque()
        self._working: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        """Return how many questions wait for their batch."""
        return len(self._waiting)

    async def ask(self, question: Question) -> Answer:
        """Return the answer to a question; raises what answering it alone raises."""
        answered: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((question, answered))
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

    def _take(self) -> "list[tuple[Question, asyncio.Future[Answer]]]":
        """Return what waits, as far as it fits into one batch; at least one question."""
        taken: list[tuple[Question, asyncio.Future[Answer]]] = []
        size = 0
        while self._waiting:
            question, answered = self._waiting[0]
            if not answered.done():  # else nobody waits for it any more
                size += self._size(question)
                if taken and size > self._most:
                    break
                taken.append((question, answered))
            self._waiting.popleft()
        return taken

    async def _try(self, taken: "list[tuple[Question, asyncio.Future[Answer]]]") -> bool:
        """Answer questions together; return whether that was possible. Of one, an error is told."""
        try:
            answers = await self._answer([question for question, _ in taken])
            pairs = list(zip(taken, answers, strict=True))
        except Exception as error:
            if len(taken) > 1:
                return False
            ((_, answered),) = taken
            if not answered.cancelled():
                answered.set_exception(error)
            return True
        for (_, answered), answer in pairs:
            if not answered.cancelled():
                answered.set_result(answer)
        return True
