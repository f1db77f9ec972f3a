"""What a check returns: numbers of which more is worse, beside the most that is allowed."""

import reprlib
from dataclasses import dataclass
from typing import Literal

Outcome = Literal["passed", "flagged", "not checked"]

_QUOTES = reprlib.Repr()
_QUOTES.maxstring = 80  # of the 300 characters that a verdict's texts may have


def quoted(text: str) -> str:
    """Return a text that may be a stranger's in quotes, its middle left out if it is long."""
    return _QUOTES.repr(text)


@dataclass(frozen=True, slots=True)
class Reading:
    """One number.

    Attributes:
        name: Of the field of `Limits` that bounds it.
        measure: What it measures, in words.
        value: The number; more is worse, and one that is not a number is worst.
        limit: The most that is allowed.
        detail: Where it was found: a tensor, a cluster, a word.
    """

    name: str
    measure: str
    value: float
    limit: float
    detail: str = ""

    @property
    def is_flagged(self) -> bool:
        """Whether the number is too large, or none."""
        return not self.value <= self.limit


@dataclass(frozen=True, slots=True)
class Check:
    """What one check found.

    Attributes:
        name: Of the check.
        readings: Its numbers; none if it could not be made.
        note: How it was made, or why it was not.
    """

    name: str
    readings: tuple[Reading, ...]
    note: str = ""

    @property
    def outcome(self) -> Outcome:
        """The worst that a reading says."""
        if not self.readings:
            return "not checked"
        return "flagged" if any(reading.is_flagged for reading in self.readings) else "passed"
