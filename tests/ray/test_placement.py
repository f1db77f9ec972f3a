"""Where training tasks run: real raylets with labels, on one machine."""

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from paris_ray.config import TrainingConfig, expert_setup, load
from paris_ray.errors import ConfigError
from paris_ray.folders import Folder
from paris_ray.pipeline.placement import on_reserved_device, placed, why_waiting
from paris_ray.pipeline.progress import Task, watch

pytestmark = pytest.mark.ray

NODES: dict[str, dict[str, Any]] = {
    "spot": {"labels": {"gpu-family": "l40s", "pool": "spot"}},
    "owned": {"labels": {"gpu-family": "a40"}, "resources": {"accelerator_type:A40": 1}},
}


@pytest.fixture(scope="module")
def nodes(ray_session: None) -> Iterator[dict[str, str]]:
    """Two more nodes beside the tests' head; yields names by node id."""
    cluster = Cluster()
    # The tests' Ray listens on loopback alone, which `ray start --address` cannot join.
    cluster.head_node = ray._private.worker._global_node
    cluster.redis_address = cluster.head_node.redis_address
    names = {ray.get_runtime_context().get_node_id(): "head"}
    added = []
    try:
        for name, options in NODES.items():
            added.append(cluster.add_node(num_cpus=1, object_store_memory=80_000_000, **options))
            names[added[-1].node_id] = name
        yield names
    finally:
        for node in added:
            cluster.remove_node(node)


@pytest.fixture
def runs_on(nodes: dict[str, str]) -> Callable[..., str]:
    """A function that submits a task as training is submitted; returns the name of its node."""

    def submit(name: str, training: TrainingConfig) -> str:
        return nodes[ray.get(placed(node_id, name, training).remote(), timeout=60)]

    return submit


@ray.remote
def node_id() -> str:
    return str(ray.get_runtime_context().get_node_id())


def light(**options: Any) -> TrainingConfig:
    return TrainingConfig(num_cpus=0.1, **options)


def test_experts_and_router_run_where_their_configuration_says(
    runs_on: Callable[..., str],
) -> None:
    overrides = [
        "cluster.num_clusters=4",
        "training.num_cpus=0.1",
        "router_training.num_cpus=0.1",
        "router_training.labels.gpu-family=a40",
        "experts.0.training.labels.gpu-family=l40s",
        "experts.1.training.labels.gpu-family=a40",
        "experts.2.training.labels={gpu-family: h100}",
        "experts.2.training.fallback_labels=[{gpu-family: b200}, {gpu-family: l40s}]",
        "experts.3.training.accelerator_type=A40",
    ]
    config = load("quickstart", overrides)
    trainings = [expert_setup(config, k).training for k in range(4)] + [config.router_training]
    found = [runs_on(f"training-{i}", training) for i, training in enumerate(trainings)]
    assert found == ["spot", "owned", "spot", "owned", "owned"]


def test_experts_without_labels_are_spread(nodes: dict[str, str]) -> None:
    @ray.remote
    def stay() -> str:
        time.sleep(1)
        return str(ray.get_runtime_context().get_node_id())

    tasks = [placed(stay, f"expert-{k}", light()).remote() for k in range(6)]
    assert {nodes[found] for found in ray.get(tasks, timeout=60)} == {"head", "spot", "owned"}


@pytest.mark.parametrize(
    ("labels", "allowed"),
    [
        ({"gpu-family": "in(a40, h100)"}, {"owned"}),
        ({"gpu-family": "!a40"}, {"head", "spot"}),
        ({"gpu-family": "!in(a40,l40s)"}, {"head"}),
        ({"gpu-family": "l40s", "pool": "!spot"}, set()),
        ({"gpu-family": "in(h100)"}, set()),
        ({"gpu-family": "L40S"}, set()),
    ],
)
def test_what_waits_is_what_ray_does_not_place(
    nodes: dict[str, str], labels: dict[str, str], allowed: set[str]
) -> None:
    training = light(labels=labels)
    task = placed(node_id, "expert-0", training).remote()
    if allowed:
        assert why_waiting(training) is None
        assert nodes[ray.get(task, timeout=60)] in allowed
        return
    assert "'gpu-family': 'a40'" in (why_waiting(training) or "")
    assert not ray.wait([task], timeout=1)[0]
    ray.cancel(task)


def test_a_task_that_no_node_suits_is_told_and_the_others_go_on(
    nodes: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    nowhere = light(
        labels={"gpu-family": "h100"}, fallback_labels=[{"pool": "gold"}], accelerator_type="A40"
    )
    somewhere = light(labels={"gpu-family": "a40"})
    trainings = {"expert 0": nowhere, "expert 1": somewhere}
    tasks = {
        name: Task(placed(node_id, name, training).remote(), Folder(tmp_path), training)
        for name, training in trainings.items()
    }
    with caplog.at_level(logging.INFO, "paris_ray"), ThreadPoolExecutor() as pool:
        finished = pool.submit(lambda: list(watch(tasks, lambda: None)))
        try:
            deadline = time.monotonic() + 60
            while "waits for a node" not in caplog.text:
                assert not finished.done()
                assert time.monotonic() < deadline, "nothing was told"
                time.sleep(0.1)
        finally:  # the pool waits for `watch`, which waits for the task
            ray.cancel(tasks["expert 0"].result)
        names, errors = zip(*finished.result(timeout=60), strict=True)
    assert names == ("expert 1", "expert 0")
    assert errors[0] is None
    assert isinstance(errors[1], ray.exceptions.TaskCancelledError)
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    for part in (
        "expert 0: waits for a node with labels",
        "{'gpu-family': 'h100'} or {'pool': 'gold'} and accelerator_type=A40",
        "{'gpu-family': 'l40s', 'pool': 'spot'}",
        "{'gpu-family': 'a40'}, accelerator_type:A40",
    ):
        assert part in warning
    assert "node-id" not in warning


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"labels": {"gpu family": "a40"}}, ["labels={'gpu family': 'a40'}", "label key"]),
        ({"labels": {"gpu": "a40 or l40s"}}, ["'a40 or l40s'", "label selector value"]),
        ({"labels": {"a": "b"}, "fallback_labels": [{"c": "d e"}]}, ["[{'c': 'd e'}]"]),
        ({"fallback_labels": [{"gpu": "a40"}]}, ["fallback_labels=[{'gpu': 'a40'}]", "without"]),
    ],
)
def test_what_ray_would_refuse_or_ignore_is_refused_with_its_name(
    options: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        placed(node_id, "expert-3", light(**options))
    assert all(word in str(error.value) for word in ["expert-3", *words])


@pytest.mark.parametrize(
    ("device", "num_gpus", "expected"),
    [("auto", 0, "cpu"), ("auto", 0.5, "auto"), ("cuda", 0, "cuda"), ("cpu", 1, "cpu")],
)
def test_auto_means_a_gpu_only_where_one_is_reserved(
    device: str, num_gpus: float, expected: str
) -> None:
    training = TrainingConfig(device=device, num_gpus=num_gpus)
    assert on_reserved_device(training).device == expected
