"""The board of trainings is whole, and asks for metrics that trainings have."""

import json
import re
from dataclasses import fields
from itertools import combinations
from pathlib import Path
from typing import Any

import jsonschema
import promql_parser
import pytest

from paris_ray.pipeline.progress import GAUGE_LABELS, GAUGE_PREFIX, GAUGES
from paris_ray.training.loop import Progress

DEPLOY = Path(__file__).parents[2] / "docs" / "deploy"
TRAINING = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
METRICS = {f"ray_{GAUGE_PREFIX}{name}" for name in GAUGES}

# What Grafana reads of a board, of the parts that ours have.
PLACE = {
    "type": "object",
    "properties": {
        "x": {"type": "integer", "minimum": 0, "maximum": 23},
        "y": {"type": "integer", "minimum": 0},
        "w": {"type": "integer", "minimum": 1, "maximum": 24},
        "h": {"type": "integer", "minimum": 1},
    },
    "required": ["x", "y", "w", "h"],
    "additionalProperties": False,
}
SOURCE = {
    "type": "object",
    "properties": {"type": {"const": "prometheus"}, "uid": {"const": "${datasource}"}},
    "required": ["type", "uid"],
}
TARGET = {
    "type": "object",
    "properties": {
        "refId": {"type": "string", "pattern": "^[A-Z]$"},
        "expr": {"type": "string", "minLength": 1},
        "legendFormat": {"type": "string"},
    },
    "required": ["refId", "expr", "legendFormat"],
    "additionalProperties": False,
}
PANEL = {
    "type": "object",
    "properties": {
        "id": {"type": "integer"},
        "type": {"enum": ["row", "timeseries", "stat"]},
        "title": {"type": "string", "minLength": 1},
        "gridPos": PLACE,
        "datasource": SOURCE,
        "targets": {"type": "array", "items": TARGET, "minItems": 1},
    },
    "required": ["id", "type", "title", "gridPos"],
    "if": {"properties": {"type": {"const": "row"}}},
    "else": {"required": ["datasource", "fieldConfig", "targets"]},
}
BOARD = {
    "type": "object",
    "properties": {
        "uid": {"type": "string", "pattern": "^[a-z0-9-]{1,40}$"},
        "title": {"type": "string"},
        "schemaVersion": {"type": "integer", "minimum": 36},
        "panels": {"type": "array", "items": PANEL, "minItems": 1},
        "templating": {"type": "object", "required": ["list"]},
    },
    "required": ["uid", "title", "schemaVersion", "panels", "templating", "time", "refresh"],
}


def board(name: str) -> dict[str, Any]:
    return dict(json.loads((DEPLOY / name).read_text()))


def expressions() -> list[str]:
    targets = [t for panel in board(TRAININGS)["panels"] for t in panel.get("targets", [])]
    return [target["expr"].replace("$model", ".*") for target in targets]


TRAININGS = "grafana-training.json"


@pytest.mark.parametrize("name", [TRAININGS, "grafana.json"])
def test_the_board_is_one(name: str) -> None:
    document = board(name)
    jsonschema.validate(document, BOARD)
    panels = document["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for one, other in combinations([panel["gridPos"] for panel in panels], 2):
        apart = (one["x"] + one["w"] <= other["x"], other["x"] + other["w"] <= one["x"])
        apart += (one["y"] + one["h"] <= other["y"], other["y"] + other["h"] <= one["y"])
        assert any(apart), (one, other)


def test_boards_do_not_replace_one_another() -> None:
    assert board(TRAININGS)["uid"] != board("grafana.json")["uid"]


def test_the_board_asks_for_what_trainings_have() -> None:
    asked = set()
    for expression in expressions():
        for selector in selectors(promql_parser.parse(expression)):
            asked.add(selector.name)
            assert {matcher.name for matcher in selector.matchers.matchers} <= set(GAUGE_LABELS)
    assert asked == METRICS  # all of them are shown, and no other


def test_the_models_to_choose_from_are_a_label_of_a_metric() -> None:
    (variable,) = [v for v in board(TRAININGS)["templating"]["list"] if v["type"] == "query"]
    metric, label = re.fullmatch(
        r"label_values\((\w+), (\w+)\)", variable["query"]["query"]
    ).groups()
    assert metric in METRICS and label in GAUGE_LABELS
    assert variable["name"] == label


def test_every_metric_is_a_field_of_progress_and_explained() -> None:
    assert GAUGES.keys() <= {field.name for field in fields(Progress)}
    for metric in METRICS:
        assert f"`{metric}`" in TRAINING


def selectors(expression: promql_parser.Expr) -> list[Any]:
    found: list[Any] = []
    promql_parser.walk(
        expression,
        lambda part: found.append(part) if isinstance(part, promql_parser.VectorSelector) else None,
    )
    return found
