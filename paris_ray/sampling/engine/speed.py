"""How fast pictures are drawn, and so how long those that are here will take."""

import math
from dataclasses import dataclass

HALF_LIFE_S = 10.0  # of what the measured speed remembers
REMEMBERED_S = 60.0  # a speed that was not measured for longer is not known any more


@dataclass(slots=True)
class _Measured:
    """Evaluations, the seconds that they took, and pictures times seconds; old ones fade."""

    evaluations: float = 0.0
    seconds: float = 0.0
    picture_seconds: float = 0.0
    at: float = -math.inf

    def add(self, evaluations: int, pictures: int, seconds: float, now: float) -> None:
        kept = 0.5 ** (seconds / HALF_LIFE_S)
        self.evaluations = kept * self.evaluations + evaluations
        self.seconds = kept * self.seconds + seconds
        self.picture_seconds = kept * self.picture_seconds + pictures * seconds
        self.at = now


class Speed:
    """Evaluations a second while there is work, by how many pictures are drawn at a time.

    Few pictures make small batches, which tell little of how fast many are drawn. So speeds are
    kept apart by powers of two; more pictures than have been measured lately are taken to share
    batches without a loss: they are let in rather than refused, and so are measured.

    Args:
        max_batch_rows: How many samples a batch has at most.
    """

    def __init__(self, max_batch_rows: int) -> None:
        self._most_shared = max_batch_rows
        self._by_level: dict[int, _Measured] = {}
        self._last: float | None = None

    def begin(self, now: float) -> None:
        """There is work from now on, if there was none."""
        if self._last is None:
            self._last = now

    def record(self, evaluations: int, pictures: int, now: float) -> None:
        """Some evaluations are done, while so many pictures were drawn."""
        assert self._last is not None, "work was recorded that has not begun"
        level = self._by_level.setdefault(pictures.bit_length(), _Measured())
        level.add(evaluations, pictures, now - self._last, now)
        self._last = now

    def pause(self) -> None:
        """There is no work any more."""
        self._last = None

    def seconds(self, evaluations: int, pictures: int, now: float) -> float:
        """Return how long so many will take if so many pictures are drawn at a time.

        0 as long as nothing is known.
        """
        wanted = pictures.bit_length()
        known = [
            (abs(level - wanted), level)
            for level, measured in self._by_level.items()
            if measured.evaluations and measured.seconds and now - measured.at <= REMEMBERED_S
        ]
        if not known:
            return 0.0
        nearest = self._by_level[min(known)[1]]
        drawn = nearest.picture_seconds / nearest.seconds
        shared = min(max(1.0, pictures / drawn), self._most_shared)
        return evaluations * nearest.seconds / nearest.evaluations / shared
