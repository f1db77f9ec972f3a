"""The command line of the jobs, as a user types it; nothing here starts Ray."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
VERBS = ("prepare", "train_experts", "train_router", "evaluate", "export", "pipeline")


def run_job(verb: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"jobs.{verb}", *arguments],
        cwd=REPOSITORY,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("verb", [*VERBS, "quickstart"])
def test_help_shows_the_command(verb: str) -> None:
    result = run_job(verb, "--help")
    assert result.returncode == 0
    assert f"python -m jobs.{verb}" in result.stdout


def test_an_unknown_key_is_refused_with_the_allowed_ones() -> None:
    result = run_job("prepare", "training.stepz=5")
    assert result.returncode == 2
    assert result.stderr.startswith("error: unknown key 'training.stepz'; allowed here: steps,")


def test_an_unknown_config_is_refused_with_the_packaged_names() -> None:
    result = run_job("pipeline", "--config", "nowhere")
    assert result.returncode == 2
    assert "quickstart" in result.stderr


def test_a_submitted_job_refuses_a_relative_path() -> None:
    submitted = {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}
    result = run_job("pipeline", "run_dir=runs/mine", **submitted)
    assert result.returncode == 2
    assert "run_dir='runs/mine' is relative" in result.stderr
    assert "run_dir=$PWD/runs/mine" in result.stderr
