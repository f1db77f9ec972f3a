"""Proofs that users ask for until they are there."""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait

from paris_ray.errors import ParisError, ProtocolError
from paris_ray.zklora.parties.evidence import Progress
from paris_ray.zklora.parties.frames import Message

ANSWER_WITHIN_S = 5.0  # until a user who waits for proofs is told how far they are
MAX_REPEATS = 3  # of proofs that failed
MAX_KEPT = 64  # sessions whose proofs are in memory; others' are made anew when they are asked for

Make = Callable[[Progress], Message]
"""Makes proofs, and returns the answer that has them; it is told whom to tell how far it is."""

logger = logging.getLogger("paris_ray")


class Proofs:
    """The proofs of sessions that have asked for them; the last ones are kept.

    Args:
        total: How many modules are proved of each session.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._jobs: dict[str, Proving] = {}  # who asked last comes last
        self._lock = threading.Lock()

    def answer(self, session: str, make: Make) -> Message:
        """Return a session's proofs, or how far they are; they are made if nobody makes them.

        Raises:
            ParisError: what `make` raised; who asks again has it tried again, MAX_REPEATS times.
        """
        with self._lock:
            job = self._jobs.pop(session, None)
            if job is None or job.may_be_repeated:
                job = Proving(self._total, make, 1 if job is None else job.attempt + 1)
            self._jobs[session] = job
            finished = [name for name, known in self._jobs.items() if known.is_finished]
            for name in finished[: max(0, len(self._jobs) - MAX_KEPT)]:
                del self._jobs[name]
        return job.wait(ANSWER_WITHIN_S)


class Proving:
    """The proofs of a session in the making.

    Args:
        total: How many modules are proved.
        make: Makes them.
        attempt: How often they are made, with this one.

    Attributes:
        attempt: See above.
        was_told: Whether the user knows how it ended.
    """

    def __init__(self, total: int, make: Make, attempt: int = 1) -> None:
        self.attempt, self.was_told = attempt, False
        self._done, self._total, self._make = 0, total, make
        self._answer = Future[Message]()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            self._answer.set_result(self._make(self._note))
        except ParisError as error:
            self._answer.set_exception(error)
        except Exception:
            logger.exception("proving failed")
            told = ProtocolError("proving failed, by no fault of yours: ask again")
            self._answer.set_exception(told)

    def _note(self, done: int, total: int) -> None:
        self._done, self._total = done, total

    @property
    def is_finished(self) -> bool:
        """Whether there is an answer, or an error."""
        return self._answer.done()

    @property
    def may_be_repeated(self) -> bool:
        """Whether the user knows that it failed, and may have it tried again."""
        failed = self.was_told and self._answer.exception() is not None
        return failed and self.attempt <= MAX_REPEATS

    def wait(self, seconds: float) -> Message:
        """Return the answer, or how far it is; raises what went wrong."""
        wait([self._answer], seconds)
        if not self.is_finished:
            return Message("proving", {"done": self._done, "total": self._total})
        self.was_told = True
        return self._answer.result()
