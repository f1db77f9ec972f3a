"""Proofs that a user asks for until they are there; made by tasks, a few modules each."""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from paris_ray.errors import ParisError, ProtocolError
from paris_ray.zklora.fixed_point import Int16, Int64
from paris_ray.zklora.parties.frames import Message
from paris_ray.zklora.parties.results import in_chunks
from paris_ray.zklora.parties.workers import prove_modules

MODULES_AT_ONCE = 4  # that one task proves: enough to pay for its start, few enough to share out
MAX_REPEATS = 3  # of proofs that failed

logger = logging.getLogger("paris_ray")


class Proving:
    """The proofs of a session in the making.

    Args:
        total: How many modules are proved.
        make: Returns the answer that has the proofs; it is given a function to call as modules are
            done.
        attempt: How often they are made, with this one.

    Attributes:
        attempt: See above.
        was_told: Whether the user knows how it ended.
    """

    def __init__(
        self,
        total: int,
        make: Callable[[Callable[[int], None]], Message],
        attempt: int = 1,
    ) -> None:
        self.attempt, self.was_told = attempt, False
        self._done, self._total, self._make = 0, total, make
        self._answer: Message | None = None
        self._error: ParisError | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._answer = self._make(self._count)
        except ParisError as error:
            self._error = error
        except Exception:
            logger.exception("proving failed")
            self._error = ProtocolError("proving failed, by no fault of yours: ask again")

    def _count(self, modules: int) -> None:
        self._done += modules

    @property
    def may_be_repeated(self) -> bool:
        """Whether the user knows that it failed, and may have it tried again."""
        return self._error is not None and self.was_told and self.attempt <= MAX_REPEATS

    def wait(self, seconds: float) -> Message:
        """Return the answer, or how far it is; raises what went wrong."""
        self._thread.join(seconds)
        if self._error is not None:
            self.was_told = True
            raise self._error
        if self._answer is None:
            return Message("proving", {"done": self._done, "total": self._total})
        self.was_told = True
        return self._answer


def prove_all(
    openings: Any,
    names: Sequence[str],
    claim: Callable[[str], tuple[Int16, Int64, bytes]],
    count: Callable[[int], None],
) -> dict[str, bytes]:
    """Return the proof of each module. Rows of a few modules are in memory at a time.

    Args:
        openings: Reference of the weights.
        names: Of the modules.
        claim: Returns inputs, outputs and context of a module.
        count: Is told how many modules more are proved.

    Raises:
        ParisError: if outputs are not those of the weights.
    """

    def prove(chunk: Sequence[str]) -> Any:
        return prove_modules.remote(openings, {name: claim(name) for name in chunk})

    proofs: dict[str, bytes] = {}
    for proved in in_chunks(prove, names, MODULES_AT_ONCE):
        proofs |= proved
        count(len(proved))
    return proofs


def evidence(proofs: Mapping[str, bytes]) -> Message:
    """Return the answer that has the proofs of all modules, by name."""
    tensors = {
        f"{i}.proof": np.frombuffer(proof, np.uint8) for i, proof in enumerate(proofs.values())
    }
    return Message("evidence", {"modules": list(proofs)}, tensors)
