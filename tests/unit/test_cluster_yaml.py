"""cluster.yaml against Ray's own schema and rules."""

from pathlib import Path
from typing import Any

import pytest
import yaml

CLUSTER_YAML = Path(__file__).resolve().parents[2] / "cluster.yaml"


def load() -> dict[str, Any]:
    return yaml.safe_load(CLUSTER_YAML.read_text())


def validate(document: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(document))


def test_ray_accepts_it() -> None:
    validate(load())


def test_ray_refuses_what_is_not_in_the_schema() -> None:
    with pytest.raises(Exception, match="colour"):
        validate(load() | {"colour": "blue"})


def test_workers_are_spot_gpus_of_two_families_with_a_token() -> None:
    document = load()
    workers = {k: v for k, v in document["available_node_types"].items() if k != "head"}
    families = {w["node_config"]["InstanceType"].split(".")[0] for w in workers.values()}
    assert len(families) == 2
    for worker in workers.values():
        assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
        assert worker["resources"]["GPU"] == 1
    for commands in (document["head_start_ray_commands"], document["worker_start_ray_commands"]):
        assert "RAY_AUTH_MODE=token" in commands[-1]
