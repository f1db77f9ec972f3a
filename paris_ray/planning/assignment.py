"""Which of several jobs goes to which of several unlike machines.

Longest first, each where it ends first (Graham 1969, "Bounds on multiprocessing timing anomalies";
for machines of unlike speed Gonzalez, Ibarra and Sahni 1977: at most twice the best). From there
one job is moved, or two change places, as long as that is better; and of few jobs all assignments
are searched that a bound does not rule out (Land and Doig 1960). No clock and no chance are in it,
so equal questions have equal answers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, islice

FEW_JOBS = 16  # of more, only neighbours of an assignment are tried
MOST_VISITS = 20_000  # of assignments in part: some tenths of a second
MOST_PLACED = 200_000  # jobs, by whole assignments that are tried: as long
ROUNDING = 1e-9  # sums in another order differ by less

Objective = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Job:
    """What a job takes on each kind of machine; None where it may not run.

    Attributes:
        days: That it holds the machine.
        dollars: That these days cost.
    """

    days: tuple[float | None, ...]
    dollars: tuple[float | None, ...]

    @property
    def least_days(self) -> float:
        """On the machine that is the fastest for it."""
        return min(days for days in self.days if days is not None)

    @property
    def least_dollars(self) -> float:
        """On the machine that is the cheapest for it."""
        return min(dollars for dollars in self.dollars if dollars is not None)


def assign(
    jobs: Sequence[Job], machines: Sequence[int], *, deadline: float | None = None
) -> list[int]:
    """Return the machine of each job.

    Without a deadline all is done as early as possible, and of such assignments the cheapest is
    taken; with one the cheapest that keeps it, or the earliest if none does.

    Args:
        jobs: Each runs on at least one machine.
        machines: The kind of each machine, an index into what a job takes.
        deadline: Days from the beginning, or None.
    """
    search = _Search(jobs, machines, deadline)
    search.greedy()
    search.climb()
    if len(jobs) <= FEW_JOBS:
        search.visit(0, 0.0)
    return search.best


class _Search:
    """Jobs in their order, the days that machines are taken, and the best assignment so far."""

    def __init__(
        self, jobs: Sequence[Job], machines: Sequence[int], deadline: float | None
    ) -> None:
        self.order = sorted(range(len(jobs)), key=lambda i: -jobs[i].least_days)
        self.jobs, self.machines, self.deadline = jobs, machines, deadline
        self.loads = [0.0] * len(machines)
        self.chosen = [-1] * len(jobs)
        self.best: list[int] = []
        self.best_value: Objective = ()
        self.visits = 0
        # Of all jobs from a place in the order on, what they take at least.
        self.days_left, self.dollars_left = [0.0], [0.0]
        for i in reversed(self.order):
            self.days_left.insert(0, self.days_left[0] + jobs[i].least_days)
            self.dollars_left.insert(0, self.dollars_left[0] + jobs[i].least_dollars)

    def greedy(self) -> None:
        """Take the longest job first, and the machine that ends it first."""
        for i in self.order:
            machine = self._choices(i)[0]
            self.loads[machine] += self._days(i, machine)
            self.chosen[i] = machine
        self._try(self.chosen)

    def climb(self) -> None:
        """Go to a better neighbour of the best assignment as long as there is one."""
        for neighbour in islice(self._neighbours(), MOST_PLACED // max(1, len(self.jobs))):
            self._try(neighbour)

    def _neighbours(self) -> Iterator[list[int]]:
        """Yield assignments that differ from the best in one job or two, until all were tried."""
        origin = None
        while origin is not self.best:
            origin = self.best
            for job, kinds in enumerate(job.days for job in self.jobs):
                for machine, kind in enumerate(self.machines):
                    if kinds[kind] is not None:
                        yield [*self.best[:job], machine, *self.best[job + 1 :]]
            for one, other in combinations(range(len(self.jobs)), 2):
                swapped = list(self.best)
                swapped[one], swapped[other] = swapped[other], swapped[one]
                if self._is_allowed(one, swapped[one]) and self._is_allowed(other, swapped[other]):
                    yield swapped

    def _is_allowed(self, job: int, machine: int) -> bool:
        return self.jobs[job].days[self.machines[machine]] is not None

    def _try(self, chosen: Sequence[int]) -> None:
        """Keep an assignment if it is the best so far."""
        self.loads, dollars = [0.0] * len(self.machines), 0.0
        for job, machine in enumerate(chosen):
            self.loads[machine] += self._days(job, machine)
            dollars += self._dollars(job, machine)
        value = self._value(0, dollars, exact=True)
        if not self.best or _is_less(value, self.best_value):
            self.best, self.best_value = list(chosen), value
        self.loads = [0.0] * len(self.machines)

    def visit(self, place: int, dollars: float) -> None:
        """Try all machines for the jobs from a place in the order on."""
        self.visits += 1
        value = self._value(place, dollars, exact=place == len(self.order))
        if self.visits > MOST_VISITS or not _is_less(value, self.best_value):
            return
        if place == len(self.order):
            self.best, self.best_value = list(self.chosen), value
            return
        job = self.order[place]
        for machine in self._choices(job):
            before = self.loads[machine]
            self.loads[machine] += self._days(job, machine)
            self.chosen[job] = machine
            self.visit(place + 1, dollars + self._dollars(job, machine))
            self.loads[machine] = before

    def _choices(self, job: int) -> list[int]:
        """Return machines for a job, the one that ends it first first; of equal ones only one."""
        unlike: dict[tuple[int, float], int] = {}
        for machine, kind in enumerate(self.machines):
            if self._is_allowed(job, machine):
                unlike.setdefault((kind, self.loads[machine]), machine)
        return sorted(unlike.values(), key=lambda m: self.loads[m] + self._days(job, m))

    def _value(self, place: int, dollars: float, *, exact: bool) -> Objective:
        """Return what is to be small, or what it is at least when the rest is assigned."""
        days = max(self.loads)
        if not exact:
            days = max(days, (sum(self.loads) + self.days_left[place]) / len(self.loads))
            dollars += self.dollars_left[place]
        if self.deadline is None:
            return (days, dollars)
        return (max(0.0, days - self.deadline), dollars, days)

    def _days(self, job: int, machine: int) -> float:
        days = self.jobs[job].days[self.machines[machine]]
        assert days is not None
        return days

    def _dollars(self, job: int, machine: int) -> float:
        dollars = self.jobs[job].dollars[self.machines[machine]]
        assert dollars is not None
        return dollars


def _is_less(value: Objective, than: Objective) -> bool:
    """Compare two objectives, the first of which differs by more than rounding deciding."""
    for ours, theirs in zip(value, than, strict=True):
        if abs(ours - theirs) > ROUNDING * max(1.0, abs(theirs)):
            return ours < theirs
    return False
