"""A stage and the lock of its artefact: who meets whom, and what is not written without it."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from paris_ray import run_lock
from paris_ray.artifacts import MANIFEST
from paris_ray.config import Config, load, load_lora
from paris_ray.errors import LockError
from paris_ray.folders import LOCKS, Folder
from paris_ray.pipeline.stage import Stage
from paris_ray.run import Run
from paris_ray.run_lock import Claim
from tests.serve.waiting import wait_until


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(run_lock, "POLL_S", 0.05)


def stage(config: Config, folder: Folder) -> Stage:
    return Stage("part", folder, config, sections=("seed",), parents={})


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load("quickstart", [f"run_dir={tmp_path / 'run'}"])


def named(config: Config, name: str) -> Config:
    return replace(config, evaluation=replace(config.evaluation, name=name))


def test_only_writers_of_the_same_artefact_meet(config: Config) -> None:
    run = Run(config)
    evaluations = [Run(named(config, name)).evaluation for name in ("one", "two")]
    student = run.evaluation_of("student")
    folders = [run.expert(0), run.expert(1), run.router, run.evaluation, student, *evaluations]
    for folder in folders:
        with stage(config, folder).locked():
            for other in folders:
                again = stage(config, other).locked()
                if other is folder:
                    with pytest.raises(LockError, match=f"{folder.uri} is in use by"):
                        again.__enter__()
                else:
                    with again:
                        pass
    assert not any(folder.exists() for folder in folders), "nothing is in what others copy"


def test_a_lora_keeps_its_lock_when_its_folder_is_made_ready(tmp_path: Path) -> None:
    made = Stage("lora", Folder(tmp_path), load_lora("lora", []), sections=("lora",), parents={})
    with made.locked():
        made.begin()
        (claim,) = (made.folder / LOCKS).files()
        made.check()
    assert (made.folder / LOCKS).files() == [], claim


def test_nothing_is_begun_or_published_without_the_lock(config: Config) -> None:
    folder = Run(config).router
    claims = Run(config).folder / LOCKS / "router"

    def work() -> None:
        made = stage(config, folder)
        with made.locked():
            taken = replace(Claim.own(), took_over=claims.files())
            claims.write_json("other.json", asdict(taken))
            wait_until(lambda: _is_lost(made))
            for write in (made.begin, lambda: made.publish({})):
                with pytest.raises(LockError, match="another one took it over"):
                    write()

    with pytest.raises(LockError, match="another one took it over"):
        work()
    assert not folder.exists(MANIFEST)


def _is_lost(made: Stage) -> bool:
    try:
        made.check()
    except LockError:
        return True
    return False
