"""What `prepare` refuses before it reads anything."""

from pathlib import Path

import pytest

from paris_ray.artifacts import publish
from paris_ray.config import load
from paris_ray.errors import ArtifactError
from paris_ray.pipeline import prepare
from paris_ray.run import ENCODERS, Run


def test_encoders_of_another_configuration_are_told_before_the_corpus_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def listed(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(prepare, "list_shards", listed)
    config = load("quickstart", [f"run_dir={tmp_path}"])
    publish(Run(config).encoders, ENCODERS, config_digest="another", parents={}, facts={})
    with pytest.raises(ArtifactError, match="encoders"):
        prepare.encode(config)
