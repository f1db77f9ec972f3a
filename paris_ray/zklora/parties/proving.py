"""Proofs that users ask for until they are there."""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

from paris_ray.errors import ParisError, ProtocolError
from paris_ray.zklora.parties.evidence import Progress
from paris_ray.zklora.parties.frames import Message

ANSWER_WITHIN_S = 5.0  # until a user who waits for proofs is told how far they are
MAX_REPEATS = 3  # of proofs that failed
MAX_AT_ONCE = 4  # sessions that are proved; the next one begins when one of them is done
MAX_KEPT = 64  # sessions whose proofs are in memory; others' are made anew when they are asked for

Make = Callable[[Progress], Message]
"""Makes proofs, and returns the answer that has them; it is told whom to tell how far it is."""

logger = logging.getLogger("paris_ray")


class Proofs:
    """The proofs of sessions that have asked for them; the last ones are kept.

    Proofs that a user has are forgotten before those that still wait for theirs. What failed is
    small, and is remembered for as long as the service runs: so is how often it was tried.

    Args:
        total: How many modules are proved of each session.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._jobs: dict[str, Proving] = {}
        # Of these, those that succeeded; who asked last is last.
        self._made: dict[str, Proving] = {}
        self._running = 0
        self._changed = threading.Condition()

    def answer(self, session: str, make: Make) -> Message:
        """Return a session's proofs, or how far they are; they are made if nobody makes them.

        Raises:
            ParisError: what `make` raised; who asks again has it tried again, MAX_REPEATS times.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._may_answer(session), ANSWER_WITHIN_S):
                return Message("proving", {"done": 0, "total": self._total})
            job = self._jobs.get(session)
            if job is None or job.may_be_repeated:
                job = self._begin(session, make, 1 if job is None else job.attempt + 1)
            elif session in self._made:
                self._made[session] = self._made.pop(session)
            self._changed.wait_for(lambda: job.outcome is not None, ANSWER_WITHIN_S)
            return job.tell(self._total)

    def _may_answer(self, session: str) -> bool:
        job = self._jobs.get(session)
        is_to_begin = job is None or job.may_be_repeated
        return not is_to_begin or self._running < MAX_AT_ONCE

    def _begin(self, session: str, make: Make, attempt: int) -> "Proving":
        job = self._jobs[session] = Proving(attempt)
        self._running += 1
        threading.Thread(target=self._make, args=(session, job, make), daemon=True).start()
        return job

    def _make(self, session: str, job: "Proving", make: Make) -> None:
        outcome = _outcome(make, job.note)
        with self._changed:
            job.outcome = outcome
            self._running -= 1
            if isinstance(outcome, Message):
                self._keep(session, job)
            self._changed.notify_all()

    def _keep(self, session: str, job: "Proving") -> None:
        self._made[session] = job
        if len(self._made) > MAX_KEPT:
            had = (name for name, each in self._made.items() if each.was_told)
            forgotten = next(had, next(iter(self._made)))
            del self._made[forgotten], self._jobs[forgotten]


@dataclass(slots=True)
class Proving:
    """The proofs of a session in the making.

    Attributes:
        attempt: How often they are made, with this one.
        done: Modules that are proved.
        outcome: The answer, or what went wrong; None: neither yet.
        was_told: Whether the user knows how it ended.
    """

    attempt: int
    done: int = 0
    outcome: Message | ParisError | None = None
    was_told: bool = False

    def note(self, done: int, total: int) -> None:
        """Take note of how far it is; see `Progress`."""
        self.done = done

    @property
    def may_be_repeated(self) -> bool:
        """Whether the user knows that it failed, and may have it tried again."""
        failed = self.was_told and isinstance(self.outcome, ParisError)
        return failed and self.attempt <= MAX_REPEATS

    def tell(self, total: int) -> Message:
        """Return the answer, or how far it is of so many modules; raises what went wrong."""
        if self.outcome is None:
            return Message("proving", {"done": self.done, "total": total})
        self.was_told = True
        if isinstance(self.outcome, ParisError):
            raise self.outcome
        return self.outcome


def _outcome(make: Make, on_progress: Progress) -> Message | ParisError:
    try:
        return make(on_progress)
    except ParisError as error:
        return error
    except Exception:
        logger.exception("proving failed")
        return ProtocolError("proving failed, by no fault of yours: ask again")
