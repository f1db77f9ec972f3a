"""The verbs are called by their names; so each must be where its name says."""

from importlib import import_module

import pytest

from paris_ray.pipeline.stages import OPTIONAL_VERBS, VERBS


@pytest.mark.parametrize(("verb", "module"), (VERBS | OPTIONAL_VERBS).items())
def test_every_verb_is_in_its_module(verb: str, module: str) -> None:
    assert callable(getattr(import_module(f"paris_ray.pipeline.{module}"), verb))
