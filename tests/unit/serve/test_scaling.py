"""How many replicas an application wants, over simulated reports and a simulated queue."""

from collections.abc import Mapping, Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from ray.serve._private.autoscaling_state import ApplicationAutoscalingState
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve.autoscaling_policy import _apply_app_level_autoscaling_config
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from serve.scaling import SLACK, Load, Reporter, decide, num_replicas, policy

NUM_EXPERTS = 4
TARGET = 16.0
PERIOD_S = 10.0


class Cluster:
    """Replicas as a policy would have them, and pictures that queue at them.

    Args:
        most: The largest number of replicas of a deployment.
        downscale_delay_s: How long fewer must be enough.
    """

    def __init__(self, *, most: int = 8, downscale_delay_s: float = 0.0) -> None:
        self.config = AutoscalingConfig(
            min_replicas=1,
            max_replicas=most,
            target_ongoing_requests=TARGET,
            upscale_delay_s=0,
            downscale_delay_s=downscale_delay_s,
        )
        names = ["Sampler", *(f"Expert-{k}" for k in range(NUM_EXPERTS))]
        self.ids = [DeploymentID(name, "paris") for name in names]
        self.numbers = dict.fromkeys(names, 1)
        self.now = 0.0
        self._state: dict[DeploymentID, dict[str, object]] = {}

    @property
    def experts(self) -> list[int]:
        return [self.numbers[f"Expert-{k}"] for k in range(NUM_EXPERTS)]

    def contexts(
        self, reports: Sequence[Mapping[str, float]]
    ) -> dict[DeploymentID, AutoscalingContext]:
        """What Serve tells the policy if each Sampler reported this in all of its window."""
        by_name = {
            name: {ReplicaID(f"{i}", self.ids[0]): one[name] for i, one in enumerate(reports)}
            for name in (reports[0] if reports else {})
        }
        return {
            id: AutoscalingContext(
                deployment_id=id,
                deployment_name=id.name,
                app_name=id.app_name,
                current_num_replicas=self.numbers[id.name],
                target_num_replicas=self.numbers[id.name],
                running_replicas=[],
                total_num_requests=0.0,
                total_queued_requests=0.0,
                aggregated_metrics=by_name if id.name == "Sampler" else {},
                raw_metrics={},
                capacity_adjusted_min_replicas=self.config.min_replicas,
                capacity_adjusted_max_replicas=self.config.max_replicas,
                policy_state=self._state.get(id, {}),
                last_scale_up_time=None,
                last_scale_down_time=None,
                current_time=self.now,
                config=self.config,
            )
            for id in self.ids
        }

    def step(self, *reports: Mapping[str, float]) -> None:
        """Let one control period pass, as Serve would: with its delays, and its bounds."""
        self.now += PERIOD_S
        decisions, self._state = _apply_app_level_autoscaling_config(policy)(self.contexts(reports))
        for id, number in decisions.items():
            assert self.config.min_replicas <= number <= self.config.max_replicas
            self.numbers[id.name] = number


def report(
    pictures: float, asked: Sequence[float], unanswered: Sequence[float] | None = None
) -> dict[str, float]:
    """One Sampler's; by default its pictures wait for the experts by their shares."""
    if unanswered is None:
        unanswered = [pictures * count / (sum(asked) or 1) for count in asked]
    by_expert = {
        f"{name}_{k}": value
        for name, values in (("asked", asked), ("unanswered", unanswered))
        for k, value in enumerate(values)
    }
    return {"pictures": pictures, **by_expert}


def at_bottlenecks(pictures: int, shares: Sequence[float], replicas: Sequence[int]) -> list[float]:
    """Where so many pictures wait that go from expert to expert: mean-value analysis.

    Args:
        pictures: How many.
        shares: Of the work, up to a factor.
        replicas: Of each expert.
    """
    queues = [0.0] * NUM_EXPERTS
    for count in range(1, pictures + 1):
        times = [
            share * max(1.0, (1.0 + queue) / number)
            for share, queue, number in zip(shares, queues, replicas, strict=True)
        ]
        queues = [count * time / sum(times) for time in times]
    return queues


def test_a_changed_mix_is_followed_within_two_periods() -> None:
    cluster = Cluster()
    for _ in range(3):
        cluster.step(report(64, [80, 10, 10, 0]))
    assert cluster.experts == [4, 1, 1, 1]
    # The window of two periods holds half of each mix at first, and then the new one alone.
    cluster.step(report(64, [40, 10, 10, 40]))
    assert cluster.experts[3] == 2
    cluster.step(report(64, [0, 10, 10, 80]))
    assert cluster.experts == [1, 1, 1, 4]


def test_replicas_come_with_the_share_before_the_queue() -> None:
    """All wait at expert 0: the others' work shows only in what the router asked for."""
    cluster = Cluster()
    cluster.step(report(64, [40, 40, 20, 0], unanswered=[64, 0, 0, 0]))
    assert cluster.experts == [4, 2, 1, 1]


def test_a_slow_expert_gets_replicas_for_its_queue() -> None:
    cluster = Cluster()
    cluster.step(report(64, [25, 25, 25, 25], unanswered=[10, 10, 14, 30]))
    assert cluster.experts == [1, 1, 1, 2]
    cluster.step(report(128, [25, 25, 25, 25], unanswered=[0, 0, 0, 128]))
    assert cluster.experts == [2, 2, 2, 2 * SLACK]


def test_samplers_follow_their_pictures() -> None:
    cluster = Cluster()
    cluster.step(report(33, [1, 1, 1, 1]), report(15, [1, 1, 1, 1]))
    assert cluster.numbers["Sampler"] == 3
    cluster.step(report(0, [0, 0, 0, 0]))
    assert cluster.numbers["Sampler"] == 1


def test_no_traffic_wants_the_fewest() -> None:
    cluster = Cluster()
    cluster.step(report(200, [10, 0, 0, 0]))
    assert cluster.experts[0] == cluster.config.max_replicas
    cluster.step(report(0, [0, 0, 0, 0]))
    assert set(cluster.numbers.values()) == {1}


def test_an_expert_without_mass_stays_at_the_fewest() -> None:
    cluster = Cluster()
    for pictures in (1, 16, 64, 500):
        cluster.step(report(pictures, [5, 5, 5, 0]))
        assert cluster.experts[3] == 1


def test_silence_changes_nothing() -> None:
    """As when every Sampler has died: what there is to do is not known to be nothing."""
    cluster = Cluster()
    cluster.step(report(64, [1, 1, 0, 0]))
    before = dict(cluster.numbers)
    assert max(before.values()) > 1
    for _ in range(100):
        cluster.step()
    assert cluster.numbers == before


def test_only_what_scales_is_decided() -> None:
    cluster = Cluster()
    contexts = cluster.contexts([report(64, [10, 10, 10, 10])])
    fixed = DeploymentID("Expert-2", "paris")
    del contexts[fixed]
    assert decide(contexts).keys() == contexts.keys()


@given(
    pictures=st.integers(0, 120),
    mix=st.lists(st.integers(0, 100), min_size=NUM_EXPERTS, max_size=NUM_EXPERTS).filter(any),
    slow=st.floats(1, 4),
)
@example(pictures=111, mix=[34, 64, 34, 90], slow=1.0)  # exactly four times a target
def test_a_steady_load_settles(pictures: int, mix: list[int], slow: float) -> None:
    """Where pictures wait depends on the replicas, and the replicas on where they wait."""
    cluster = Cluster(most=20)
    work = [mix[0] * slow, *mix[1:]]
    seen = []
    for _ in range(40):
        waiting = at_bottlenecks(pictures, work, cluster.experts)
        cluster.step(report(pictures, mix, waiting))
        seen.append(tuple(cluster.experts))
    assert len(set(seen[20:])) == 1, seen


@given(noise=st.lists(st.floats(0.8, 1.2), min_size=20, max_size=20))
def test_noise_moves_a_number_once(noise: list[float]) -> None:
    cluster = Cluster()
    seen = []
    for factor in noise:
        cluster.step(report(64 * factor, [60, 20, 20, 0]))
        seen.append(cluster.experts)
    for numbers in zip(*seen, strict=True):
        assert list(numbers) == sorted(numbers)
        assert numbers[-1] - numbers[0] <= 1


def test_serve_waits_before_it_ends_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(downscale_delay_s=3 * PERIOD_S)
    monkeypatch.setattr("ray.serve.autoscaling_policy.time.time", lambda: cluster.now)
    seen = []
    for pictures in (64, 0, 0, 64, 0, 0, 0, 0):
        cluster.step(report(pictures, [pictures, 0, 0, 0]))
        seen.append(cluster.experts[0])
    assert seen == [4, 4, 4, 4, 4, 4, 4, 1]


@given(
    now=st.floats(0, 1e4),
    slack=st.floats(1, 3),
    current=st.integers(1, 100),
    fewest=st.integers(1, 10),
    more=st.integers(0, 100),
)
def test_numbers_keep_their_bounds_and_the_load_its_replicas(
    now: float, slack: float, current: int, fewest: int, more: int
) -> None:
    most, load = fewest + more, Load(now, slack * now)
    number = num_replicas(load, TARGET, current, fewest=fewest, most=most)
    assert fewest <= number <= most
    assert number == most or load.now <= number * TARGET * (1 + 1e-9)
    assert number <= max(fewest, load.most / TARGET + 1)
    assert num_replicas(load, TARGET, number, fewest=fewest, most=most) == number


def test_a_report_counts_what_was_asked_since_the_last() -> None:
    class Demand:
        num_active, num_waiting = 3, 4

        def unanswered(self, model: int) -> int:
            return 10 + model

        def asked(self, model: int) -> int:
            return 100 * (model + 1)

    reporter = Reporter(2)
    first = {"pictures": 7.0, "unanswered_0": 10.0, "asked_0": 100.0}
    assert reporter.report(Demand()) == first | {"unanswered_1": 11.0, "asked_1": 200.0}
    assert reporter.report(Demand())["asked_1"] == 0.0


def test_serve_finds_the_policy_by_its_name() -> None:
    state = ApplicationAutoscalingState("paris")
    state.register(AutoscalingPolicy(policy_function="serve.scaling:policy"))
    assert state.has_policy()
