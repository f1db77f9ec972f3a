"""How long a training holds a machine that may be taken away from it."""

from dataclasses import dataclass

SECONDS_PER_DAY = 86_400


@dataclass(frozen=True, slots=True)
class Duration:
    """What decides how long a training holds one machine; times in days.

    Attributes:
        work: All of its steps, each once.
        interval: From one checkpoint to the next.
        start: From being given a machine to the first new step.
        preemption_rate: How often a day a machine is taken away while it is held.
    """

    work: float
    interval: float
    start: float = 0.0
    preemption_rate: float = 0.0

    @property
    def lost(self) -> float:
        """What one preemption costs: half an interval is trained again, after one more start.

        It falls anywhere between two checkpoints (Young 1974, "A first order approximation to the
        optimum checkpoint interval"). Where a machine gives notice, nothing is trained again
        (training/preemption.py), so this is what machines without notice lose.
        """
        return self.interval / 2 + self.start

    @property
    def days(self) -> float | None:
        """Expected days, preemptions included; None: it would never end.

        Of T days the share `preemption_rate * lost` is lost: T = start + work + rate * lost * T.
        """
        left = 1 - self.preemption_rate * self.lost
        return (self.start + self.work) / left if left > 0 else None

    @property
    def preemptions(self) -> float:
        """Expected number of preemptions; 0 where it would never end."""
        return self.preemption_rate * (self.days or 0.0)
