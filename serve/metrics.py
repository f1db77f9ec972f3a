"""All metrics of the application; docs/operations.md says what they tell and when to act.

Ray exports a metric as `ray_NAME`, a counter as `ray_NAME_total`, from every node. Serve adds the
labels `application`, `deployment` and `replica` to those of replicas, and fills in `route`: the
pattern of a path, its application's prefix included. Labels have few values: never what clients
send, nor who they are.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from ray.serve.metrics import Counter, Gauge, Histogram

# From a millisecond to ten minutes; finer where quantiles are looked at.
SECONDS = [float(f"{digit}e{power}") for power in range(-3, 3) for digit in (1, 2, 5)]
FINE_SECONDS = [
    float(f"{digits}e{power}") for power in range(-3, 3) for digits in (1, 1.5, 2, 3, 4, 5, 7)
]
ROWS = [1.0, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64]


class Metric:
    """What all kinds have. Ray's object is made on first use: in a replica, not at import.

    Args:
        name: Its name.
        description: For people.
        labels: Names of its labels; `route` fills itself in.
    """

    def __init__(self, name: str, description: str, labels: Sequence[str] = ()) -> None:
        self.name, self.description = name, description
        self.labels: Any = tuple(labels)  # Ray's annotation allows for one label alone


class Total(Metric):
    """A number that only grows."""

    @cached_property
    def _counter(self) -> Counter:
        return Counter(self.name, self.description, self.labels)

    def add(self, value: float = 1.0, **labels: str) -> None:
        """Let it grow."""
        if value > 0:  # Ray refuses 0
            self._counter.inc(value, labels)


class Level(Metric):
    """A number that goes up and down."""

    @cached_property
    def _gauge(self) -> Gauge:
        return Gauge(self.name, self.description, self.labels)

    def set(self, value: float, **labels: str) -> None:
        """Say how high it is."""
        self._gauge.set(value, labels)


class Distribution(Metric):
    """Measurements of one kind: how many in each bucket, and their exact sum beside them.

    Ray puts the sum of a histogram together from the middles of its buckets. So means and shares
    are to be computed from `NAME_exact_total`.

    Args:
        name: Its name.
        description: For people.
        buckets: Upper bounds of all buckets but the last.
        labels: Names of its labels; `route` fills itself in.
    """

    def __init__(
        self, name: str, description: str, buckets: Sequence[float], labels: Sequence[str] = ()
    ) -> None:
        super().__init__(name, description, labels)
        self.buckets = list(buckets)
        self._sum = Total(f"{name}_exact", f"Exact sum of: {description}", labels)

    @cached_property
    def _histogram(self) -> Histogram:
        return Histogram(self.name, self.description, self.buckets, self.labels)

    def observe(self, value: float, **labels: str) -> None:
        """Add a measurement."""
        self._histogram.observe(value, labels)
        self._sum.add(value, **labels)

    @contextmanager
    def time(self, **labels: str) -> Iterator[None]:
        """Add the seconds of a block, unless it fails."""
        began = time.monotonic()
        yield
        self.observe(time.monotonic() - began, **labels)


# -- What clients felt ---------------------------------------------------------------------------

HTTP = Distribution(
    "paris_http_seconds",
    "From the head of a request to the last byte of its answer, at the edge of Ray's proxy. "
    "Status 499: the client hung up.",
    FINE_SECONDS,
    ("route", "status"),
)
INGRESS = Distribution(
    "paris_ingress_seconds",
    "The same from within an Ingress: without Ray's proxy and what waits there.",
    FINE_SECONDS,
    ("route", "status"),
)
DRAWINGS = Total(
    "paris_drawings",
    "Requests for pictures that a Sampler was asked for, by outcome: drawn, degraded (without an "
    "expert), refused (no room), late, cancelled, unavailable or failed.",
    ("outcome",),
)
IMAGES = Total("paris_images", "Pictures drawn.")
RESENDS = Total(
    "paris_resends",
    "Requests that were sent again, since their Sampler died or Serve was replacing the bundle.",
)

# -- Where the time goes -------------------------------------------------------------------------

STAGES = Distribution(
    "paris_stage_seconds",
    "Of a request, by stage: queue (admission to first step, text included), text (encoding, with "
    "the wait for the encoder), draw (first to last step), decode (latents to pixels), encode "
    "(pixels to files), transport (between Ingress and Sampler).",
    SECONDS,
    ("stage",),
)
CALLS = Distribution(
    "paris_call_seconds",
    "Of a batch of calls of one model, by part: wait (its oldest call, until it was taken), answer "
    "(taken to answered, as the Sampler sees it), served (the same, as the expert sees it), "
    "compute (the forward passes).",
    SECONDS,
    ("model", "part"),
)
ROWS_COMPUTED = Distribution(
    "paris_batch_rows",
    "Samples that are computed together; a guided picture is two.",
    ROWS,
    ("model",),
)
CALL_FAILURES = Total("paris_call_failures", "Batches that an expert did not answer.", ("model",))
ROUTER_MASS = Total(
    "paris_router_mass",
    "Pictures drawn, shared among the experts as the router weighted them.",
    ("model",),
)

# -- What there is to do -------------------------------------------------------------------------

ACTIVE = Level("paris_active_pictures", "Pictures that are being drawn.")
WAITING = Level("paris_waiting_pictures", "Pictures that wait to be drawn.")
STEPS_LEFT = Level("paris_steps_left", "Velocities that all requests still need.")
WAITING_CALLS = Level("paris_waiting_calls", "Calls that wait for a model.", ("model",))
FAILING = Level(
    "paris_failing_models", "1: the model did not answer when it was last asked.", ("model",)
)
