"""How many replicas an application wants: the policy that `serve/config.yaml` names.

Serve's own policy counts the requests of each deployment, which says little here: a Sampler asks an
expert for everything that waits in one call, so an expert has one or two requests however long its
queue is. The Samplers know more: how many pictures they have, how many calls of each expert are
unanswered, and how the router has lately shared its calls among the experts. Each reports that
(`Reporter`), and one policy for the whole application (`policy`) makes of it

    load of the Samplers   all pictures, drawn or waiting
    load of expert k       fair_k = all unanswered calls * its share of the calls,
                           or its own unanswered calls, if they are more; SLACK * fair_k at most

The fair load moves with the mix before queues do: an expert that the router turns to is given
replicas for its share at once, and the queue of the busiest does not hide the next one's work. The
own queue finds an expert that is slower than the others.

All calls wait somewhere, so a replica more here is a longer queue there. A number therefore only
falls when SLACK * fair_k, which no move of queues exceeds, needs less: while pictures and mix stay
as they are, numbers settle.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from ray.serve._private.common import DeploymentID
from ray.serve.config import AutoscalingContext

SAMPLER, EXPERT_PREFIX = "Sampler", "Expert-"
SLACK = 2.0  # how much slower than the others an expert may be, or how much too many are kept
PICTURES, UNANSWERED, ASKED = "pictures", "unanswered_", "asked_"

Contexts = dict[DeploymentID, AutoscalingContext]


class Demand(Protocol):
    """What a Sampler's engine tells, see `paris_ray.sampling.engine.Engine`."""

    @property
    def num_active(self) -> int:
        """How many pictures are being drawn."""

    @property
    def num_waiting(self) -> int:
        """How many pictures wait to be drawn."""

    def unanswered(self, model: int) -> int:
        """Return how many calls of a model wait or are being answered."""

    def asked(self, model: int) -> int:
        """Return how many calls of a model pictures have wanted so far."""


class Reporter:
    """Makes a Sampler's reports.

    Args:
        num_experts: Of the bundle.
    """

    def __init__(self, num_experts: int) -> None:
        self._asked = [0] * num_experts  # at the last report

    def report(self, demand: Demand) -> dict[str, float]:
        """Return what there is to do now, and the calls since the last report."""
        stats = {PICTURES: float(demand.num_active + demand.num_waiting)}
        for k, before in enumerate(self._asked):
            self._asked[k] = demand.asked(k)
            stats[f"{UNANSWERED}{k}"] = float(demand.unanswered(k))
            stats[f"{ASKED}{k}"] = float(self._asked[k] - before)
        return stats


class Load(NamedTuple):
    """What a deployment has to do, in the unit of its target.

    Attributes:
        now: What it needs replicas for.
        most: What it may come to need them for if nothing but the numbers of replicas changes.
    """

    now: float
    most: float


def expert_loads(unanswered: Mapping[int, float], asked: Mapping[int, float]) -> dict[int, Load]:
    """Return the load of each expert.

    Args:
        unanswered: Calls that wait or are being answered, by expert.
        asked: Calls that the router has lately wanted, by expert; only their shares matter.
    """
    backlog, total = sum(unanswered.values()), sum(asked.values())
    fair = {k: backlog * count / total if total else 0.0 for k, count in asked.items()}
    return {
        k: Load(min(max(fair[k], calls), SLACK * fair[k]), SLACK * fair[k])
        for k, calls in unanswered.items()
    }


def num_replicas(load: Load, target: float, current: int, *, fewest: int, most: int) -> int:
    """Return how many replicas a load wants: the present number, if it is neither too low nor high.

    Args:
        load: What there is to do.
        target: What one replica should have of it.
        current: How many there are to be now.
        fewest: The least that is allowed.
        most: The most.
    """
    wanted = min(max(current, _needed(load.now, target)), _needed(load.most, target))
    return min(most, max(fewest, wanted))


def _needed(load: float, target: float) -> int:
    """Return how many times the target a load is, rounded up, but not for the error of a sum."""
    return math.ceil(round(load / target, 6))


def decide(contexts: Contexts) -> dict[DeploymentID, int]:
    """Return how many replicas each deployment that scales should have.

    Args:
        contexts: What Serve knows of each; a deployment with a fixed number is not among them.

    Returns:
        By deployment. None is named, and so none changes, while no Sampler has reported: that there
        is nothing to do would have to be said.
    """
    reports = next((_sums(c) for id, c in contexts.items() if id.name == SAMPLER), {})
    loads = _loads(reports) if reports else {}
    return {id: _decide(c, loads[id.name]) for id, c in contexts.items() if id.name in loads}


def _decide(context: AutoscalingContext, load: Load) -> int:
    assert context.config is not None, "Serve scales by a configuration"
    return num_replicas(
        load,
        context.config.target_ongoing_requests,
        context.target_num_replicas,
        fewest=context.capacity_adjusted_min_replicas,
        most=context.capacity_adjusted_max_replicas,
    )


def policy(contexts: Contexts) -> tuple[dict[DeploymentID, int], dict[DeploymentID, Any]]:
    """Serve's `autoscaling_policy` of the application; Serve adds the delays of each deployment."""
    return decide(contexts), {}


def _loads(reports: Mapping[str, float]) -> dict[str, Load]:
    """Return the load of each deployment by name."""
    experts = range(sum(name.startswith(ASKED) for name in reports))
    by_expert = expert_loads(
        {k: reports[f"{UNANSWERED}{k}"] for k in experts},
        {k: reports[f"{ASKED}{k}"] for k in experts},
    )
    named = {f"{EXPERT_PREFIX}{k}": load for k, load in by_expert.items()}
    pictures = reports[PICTURES]
    return {SAMPLER: Load(pictures, SLACK * pictures), **named}


def _sums(context: AutoscalingContext) -> dict[str, float]:
    """Return what all replicas of a deployment report, each number averaged over its window."""
    return {
        name: sum(by_replica.values())
        for name, by_replica in (context.aggregated_metrics or {}).items()
        if name.startswith((PICTURES, UNANSWERED, ASKED))
    }
