"""What dies while a run is made on real Rays: workers, drivers, nodes, heads. It ends all the same.

Whatever died, what the run holds afterwards has the digests of a run that nothing happened to.
With CHAOS=1, as `make chaos` does, also preemption, nodes under experts and Ray Data, and a head.
"""

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from safetensors import safe_open

from jobs.local_cluster import LocalCluster
from paris_ray import run_lock
from paris_ray.artifacts import CHECKPOINT, PROGRESS, read_manifest
from paris_ray.config import Config
from paris_ray.errors import LockError
from paris_ray.folders import LOCKS, Folder
from paris_ray.run import EMBEDDINGS, EXPERT_WEIGHTS, Run
from tests.chaos.runs import NUM_EXPERTS, another_node, digests, meanwhile, workers
from tests.long_tests import chaos
from tests.serve.waiting import WAIT_S, wait_until

pytestmark = pytest.mark.ray

REPOSITORY = Path(__file__).resolve().parents[2]


def lose(raylet: "subprocess.Popen[bytes]") -> None:
    """Kill a node; its workers look whether it is still there, so it must not stay as a zombie."""
    raylet.kill()
    raylet.wait()


@chaos
def test_experts_on_a_lost_node_go_on_elsewhere(undisturbed: Run, prepared: Config) -> None:
    from paris_ray.pipeline.stages import run

    spot: dict[str, Any] = {"labels": {"pool": "spot"}, "fallback_labels": [{"pool": "!spot"}]}
    config = replace(prepared, training=replace(prepared.training, **spot))
    experts = [Run(config).expert(k) for k in range(NUM_EXPERTS)]
    with another_node(num_cpus=1, labels={"pool": "spot"}) as raylet:

        def lose_it() -> None:
            wait_until(lambda: all(expert.exists(CHECKPOINT) for expert in experts))
            at_work = workers("expert-0", "expert-1")
            assert [worker.ppid() for worker in at_work] == [raylet.pid] * NUM_EXPERTS
            lose(raylet)
            assert not psutil.wait_procs(at_work, timeout=WAIT_S)[1]

        with meanwhile(lose_it):
            run(config, "train_experts")
    assert digests(Run(config)) == digests(undisturbed)


@chaos
def test_a_preempted_worker_saves_its_step_and_another_goes_on(
    undisturbed: Run, prepared: Config
) -> None:
    from paris_ray.pipeline.stages import run

    training = replace(prepared.training, checkpoint_every=10**6)  # at the end alone
    config = replace(prepared, training=training)
    expert = Run(config).expert(0)
    saved = 0

    def preempt() -> None:
        nonlocal saved
        wait_until(lambda: expert.exists(PROGRESS))
        (worker,) = workers("expert-0")
        worker.send_signal(signal.SIGTERM)
        assert not psutil.wait_procs([worker], timeout=WAIT_S)[1]
        with safe_open(expert.local_path / CHECKPOINT, framework="pt") as file:
            saved = int(file.metadata()["samples_seen"])

    with meanwhile(preempt):
        run(config, "train_experts")
    assert 0 < saved < training.steps * training.batch_size
    assert digests(Run(config)) == digests(undisturbed)


def test_tasks_of_a_killed_driver_end_and_the_job_may_run_again_at_once(
    undisturbed: Run, options: list[str], prepared: Config
) -> None:
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-m", "jobs.train_experts", "--address", address]
    command += [f"run_dir={prepared.run_dir}", *options]
    run = Run(prepared)
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL) as driver:
        try:
            wait_until(lambda: run.expert(0).exists(CHECKPOINT))
            at_work = workers("expert-0", "expert-1")
        finally:
            driver.kill()
    assert at_work
    pipe, same = subprocess.PIPE, subprocess.STDOUT
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=pipe, stderr=same, text=True) as again:
        wait_until(lambda: bool(set(workers("expert-0", "expert-1")) - set(at_work)))
        assert not psutil.wait_procs(at_work, timeout=0)[1], "before another one writes"
        told, _ = again.communicate()
    assert again.returncode == 0, told[-3000:]
    assert "taking over the lock" in told
    assert digests(run) == digests(undisturbed)


def test_a_job_whose_lock_is_taken_over_ends_its_tasks_first(
    prepared: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    from paris_ray.pipeline.stages import run

    monkeypatch.setattr(run_lock, "HEARTBEAT_S", 0.1)
    claims, at_work = claims_of_expert_0(prepared), []

    def take_over() -> None:
        wait_until(lambda: Run(prepared).expert(0).exists(CHECKPOINT))
        at_work.extend(workers("expert-0", "expert-1"))
        (own,) = claims.files()
        other = replace(run_lock.Claim.own(), took_over=[own])
        claims.write_json("other.json", asdict(other))

    with pytest.raises(LockError, match="another one took it over"), meanwhile(take_over):
        run(prepared, "train_experts")
    assert len(at_work) == NUM_EXPERTS
    assert not psutil.wait_procs(at_work, timeout=5)[1], "Ray ends no worker that is merely idle"
    assert not Run(prepared).expert(1).exists(EXPERT_WEIGHTS)


def claims_of_expert_0(config: Config) -> Folder:
    return Run(config).folder / LOCKS / "experts" / "expert_0"


def test_a_second_job_that_trains_one_of_the_experts_is_refused(
    prepared: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    from paris_ray.pipeline.stages import run

    monkeypatch.setattr(run_lock, "HEARTBEAT_S", 0.1)
    words = rf"in use by .* \(process {os.getpid()}, begun"
    claims = claims_of_expert_0(prepared)
    with run_lock.locked(claims, "expert 0"), pytest.raises(LockError, match=words):
        run(prepared, "train_experts")
    assert not Run(prepared).expert(0).exists()


@chaos
def test_a_node_lost_while_ray_data_embeds_changes_nothing(
    undisturbed: Run, prepared: Config
) -> None:
    from paris_ray.pipeline.stages import run

    for name in ("embeddings", "quarantine", "clusters"):
        shutil.rmtree(Path(prepared.run_dir) / name)
    with another_node(num_cpus=4) as raylet:

        def lose_it() -> None:
            node = psutil.Process(raylet.pid)
            wait_until(lambda: any(_is_at_work(process) for process in node.children()))
            lose(raylet)

        with meanwhile(lose_it):
            run(prepared, "prepare")
    manifests = [read_manifest(r.embeddings, EMBEDDINGS) for r in (Run(prepared), undisturbed)]
    assert manifests[0].digest == manifests[1].digest


def _is_at_work(process: psutil.Process) -> bool:
    title = " ".join(process.cmdline())
    return title.startswith("ray::") and "IDLE" not in title


@chaos
def test_when_the_head_dies_the_job_may_be_submitted_again(
    undisturbed: Run, options: list[str], prepared: Config, tmp_path: Path
) -> None:
    cluster, run = LocalCluster(tmp_path / "cluster"), Run(prepared)
    command = [str(Path(sys.executable).parent / "ray"), "job", "submit", "--working-dir", "."]
    command += ["--", sys.executable, "-m", "jobs.train_experts", f"run_dir={prepared.run_dir}"]

    def submit() -> "subprocess.Popen[str]":
        cluster.start()
        return subprocess.Popen(
            [*command, *options],
            cwd=REPOSITORY,
            env=cluster.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    try:
        with submit() as first:
            wait_until(lambda: run.expert(0).exists(CHECKPOINT))
            head = cluster._process()
            assert head is not None
            for process in [head, *head.children(recursive=True)]:
                process.kill()
            first.kill()
        cluster.stop()
        with submit() as second:
            told, _ = second.communicate()
        assert second.returncode == 0, told[-3000:]
    finally:
        cluster.stop()
    assert digests(run) == digests(undisturbed)
