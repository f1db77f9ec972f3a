"""Nothing passes between experts: seen from outside, at the sockets of the processes that train."""

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from paris_ray.artifacts import METRICS
from paris_ray.config import Config
from paris_ray.errors import TrainingError
from paris_ray.folders import Folder
from paris_ray.run import EXPERT_WEIGHTS, Run
from tests.chaos.runs import NUM_EXPERTS, another_node, digests, meanwhile, workers
from tests.chaos.trainings import STEPS, Inputs, result, start, write_shards
from tests.serve.waiting import wait_until

REPOSITORY = Path(__file__).resolve().parents[2]
EACH_OTHER = "each other"
# A network namespace of its own: all that it has is a loopback interface, and that is down.
WITHOUT_NETWORK = ["unshare", "--user", "--map-root-user", "--net"]
needs_unshare = pytest.mark.skipif(shutil.which("unshare") is None, reason="util-linux")
needs_ss = pytest.mark.skipif(shutil.which("ss") is None, reason="ss of iproute2")
TRAIN = """
import sys
from pathlib import Path
import psutil
from paris_ray.folders import Folder
from tests.chaos.trainings import OBJECTIVES, Inputs

def note(progress):
    print(progress.step, len(psutil.Process().net_connections("all")))

objective, shards, bundle, output = sys.argv[1:]
OBJECTIVES[objective](Inputs(shards=Path(shards), bundle=Path(bundle)), Folder(output), note)
"""


@needs_unshare
def test_without_any_network_and_socket_training_gives_the_same(
    tiny_bundle_path: Path, tmp_path: Path
) -> None:
    shards, objective = tmp_path / "shards", "flow matching"
    write_shards(shards)
    beside = start(objective, Inputs(shards=shards, bundle=tiny_bundle_path), tmp_path / "beside")
    command = [*WITHOUT_NETWORK, sys.executable, "-c", TRAIN, objective]
    alone = subprocess.run(
        [*command, str(shards), str(tiny_bundle_path), str(tmp_path / "alone")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    beside.join()
    if "unshare failed" in alone.stderr:
        pytest.skip(f"this machine gives nobody a network of its own: {alone.stderr}")
    assert alone.returncode == 0, alone.stderr
    assert alone.stdout == "".join(f"{step} 0\n" for step in range(1, STEPS + 1))
    assert result(tmp_path / "alone") == result(tmp_path / "beside")


def bytes_by_peer(pids: list[int]) -> Counter[str]:
    """Return how many bytes processes' connections have carried, both ways, by who is there.

    Of connections between two of the processes it is EACH_OTHER.
    """
    listed = subprocess.run(["ss", "-tinpHO"], capture_output=True, text=True, check=True).stdout
    ends = {_ports(line): line for line in listed.splitlines()}
    total: Counter[str] = Counter()
    for (ours, theirs), line in ends.items():
        if _is_of(line, pids):
            peer = ends.get((theirs, ours), "")
            name = re.search(r'"(.+?)",pid=', peer)
            carried = sum(map(int, re.findall(r"bytes_(?:sent|received):(\d+)", line)))
            known = name[1] if name else "unknown"
            total[EACH_OTHER if _is_of(peer, pids) else known] += carried
    return total


def _is_of(line: str, pids: list[int]) -> bool:
    return any(f"pid={pid}," in line for pid in pids)


def _ports(line: str) -> tuple[str, str]:
    local, remote = line.split()[3:5]
    return local.rpartition(":")[2], remote.rpartition(":")[2]


@pytest.mark.ray
@needs_ss
def test_workers_that_train_have_no_connection_to_each_other(
    undisturbed: Run, prepared: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what they carry to and from Ray in many steps is less than an expert's weights.

    They train on a node of their own: a worker that had another task before keeps connections.
    """
    from paris_ray.pipeline.stages import run

    training = replace(prepared.training, labels={"pool": "new"})
    config = replace(prepared, training=training)
    experts = [Run(config).expert(k) for k in range(NUM_EXPERTS)]
    carried: Counter[str] = Counter()
    steps: list[int] = []

    def watch() -> None:
        pids = [worker.pid for worker in training_together(experts)]
        before = bytes_by_peer(pids)
        steps.append(_step(experts[0]))
        wait_until(lambda: _step(experts[0]) > steps[0] + 200)
        steps.append(_step(experts[0]))
        after = bytes_by_peer(pids)
        assert EACH_OTHER not in after
        carried.update(after - before)

    with another_node(num_cpus=1, labels={"pool": "new"}), meanwhile(watch):
        run(config, "train_experts")
    assert digests(Run(config)) == digests(undisturbed)
    with capsys.disabled():
        print(f"\nbytes of two training workers in {steps[1] - steps[0]} steps, by peer: {carried}")
    assert carried.total() > 0, "Ray's own are seen"
    assert carried.total() < len(experts[0].read(EXPERT_WEIGHTS))


def training_together(experts: list[Folder]) -> list[psutil.Process]:
    """Return the workers of experts when all of them train: who is first waits for the others."""
    found: dict[int, psutil.Process] = {}

    def all_train() -> bool:
        for k, expert in enumerate(experts):
            if k not in found and expert.exists(METRICS):
                (found[k],) = workers(f"expert-{k}")
                found[k].suspend()
        return len(found) == len(experts)

    wait_until(all_train)
    for worker in found.values():
        worker.resume()
    return list(found.values())


def _step(expert: Folder) -> int:
    (*_, last) = expert.read(METRICS).splitlines()
    return int(json.loads(last)["samples_seen"]) // 16


@pytest.mark.ray
def test_an_expert_that_calls_a_collective_fails_the_run(
    undisturbed: Run, prepared: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    from paris_ray.pipeline import experts

    @ray.remote
    def join_another(setup: Config, expert: int) -> None:
        """As `train_one_expert`, of an expert whose code wants to hear of the other."""
        import torch

        def train(*_arguments: Any, **_options: Any) -> None:
            torch.distributed.init_process_group(
                "gloo", init_method="tcp://127.0.0.1:1", world_size=NUM_EXPERTS, rank=expert
            )

        run, name = Run(setup), f"expert-{expert}"
        data, output = experts._expert_data(run, expert), run.expert(expert)
        experts.train_and_draw(setup, data, name=name, seed=0, output=output, train=train)

    monkeypatch.setattr(experts, "train_one_expert", join_another)
    with pytest.raises(TrainingError, match=r"2 of 2 experts failed: .*expert-0 asked for a proc"):
        experts.train_experts(prepared)
