"""The verbs are called by their names; so each must be where its name says."""

from importlib import import_module
from pathlib import Path

import pytest

from paris_ray.config import load
from paris_ray.pipeline import stages
from paris_ray.pipeline.stages import OPTIONAL_VERBS, VERBS


@pytest.mark.parametrize(("verb", "module"), (VERBS | OPTIONAL_VERBS).items())
def test_every_verb_is_in_its_module(verb: str, module: str) -> None:
    assert callable(getattr(import_module(f"paris_ray.pipeline.{module}"), verb))


@pytest.mark.parametrize(("verb", "is_told"), [("train_experts", True), ("evaluate", False)])
def test_what_trains_says_how_to_watch_it(
    verb: str,
    is_told: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(stages, "_run_one", lambda config, verb: None)
    place = tmp_path / "my run"
    with caplog.at_level("INFO", "paris_ray"):
        stages.run(load("quickstart", [f"run_dir={place}"]), verb)
    assert (f"watch: python -m jobs.watch '{place}'" in caplog.messages) == is_told
