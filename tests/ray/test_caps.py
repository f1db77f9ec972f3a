"""What a training may spend, from the command to its exit code."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.command import EXIT_CAP_REACHED
from paris_ray.artifacts import MANIFEST, SPENT
from paris_ray.config import Config
from paris_ray.run import EXPERT_WEIGHTS, Run
from tests.long_tests import chaos

pytestmark = [pytest.mark.ray, chaos]

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def uncapped(ray_session: None, tiny_config: Config) -> Run:
    """A run whose experts are trained."""
    from paris_ray.pipeline.stages import run

    for verb in ("prepare", "train_seed", "train_experts"):
        run(tiny_config, verb)
    return Run(tiny_config)


def train_experts(*overrides: str) -> "subprocess.CompletedProcess[str]":
    """Run the command on the tests' Ray."""
    import ray

    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-m", "jobs.train_experts", "--address", address, *overrides]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def test_a_capped_job_ends_with_a_code_of_its_own_and_goes_on_without_the_cap(
    uncapped: Run, tiny_overrides: list[str], tmp_path: Path
) -> None:
    shutil.copytree(uncapped.folder.uri, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "experts")
    run = Run(replace(uncapped.config, run_dir=str(tmp_path / "run")))
    arguments = [f"run_dir={tmp_path / 'run'}", *tiny_overrides]
    capped = train_experts(*arguments, "training.max_hours=1e-7")
    assert capped.returncode == EXIT_CAP_REACHED, capped.stdout[-3000:] + capped.stderr[-3000:]
    stopped = next(line for line in capped.stderr.splitlines() if line.startswith("stopped: "))
    assert stopped.startswith("stopped: 3 of 3 experts reached a cap of theirs: expert ")
    assert stopped.count("max_hours=1e-07 is reached") == 3
    assert capped.stdout.count(": stopped: max_hours=") == 3 and "FAILED" not in capped.stdout
    assert run.expert(0).exists(SPENT) and not run.expert(0).exists(MANIFEST)
    finished = train_experts(*arguments)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    for k in range(3):
        weights = [each.expert(k).read(EXPERT_WEIGHTS) for each in (run, uncapped)]
        assert weights[0] == weights[1]
