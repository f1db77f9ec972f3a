"""A small run on the tests' Ray, and another one like it whose experts are not trained yet."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from paris_ray.config import Config, load
from paris_ray.run import Run
from tests.chaos.runs import OPTIONS
from tests.ray.conftest import shapes_corpus, tiny_overrides

__all__ = ["shapes_corpus", "tiny_overrides"]


@pytest.fixture(scope="session")
def options(tiny_overrides: list[str]) -> list[str]:
    """The overrides, all but run_dir, of both runs."""
    return [*tiny_overrides, *OPTIONS]


@pytest.fixture(scope="session")
def undisturbed(
    ray_session: None, options: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Run:
    """A run up to its experts, which nothing happened to."""
    from paris_ray.pipeline.stages import run

    config = load("quickstart", [f"run_dir={tmp_path_factory.mktemp('run')}", *options])
    for verb in ("prepare", "train_experts"):
        run(config, verb)
    return Run(config)


@pytest.fixture
def prepared(undisturbed: Run, tmp_path: Path) -> Config:
    """The configuration of another run, whose experts are to be trained."""
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed.folder.uri, run_dir, ignore=shutil.ignore_patterns("experts"))
    return replace(undisturbed.config, run_dir=str(run_dir))
