"""The board, the alert rules and docs/operations.md fit together; tests/serve has real metrics."""

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve import metrics

DOCS = Path(__file__).parents[3] / "docs"
OPERATIONS = (DOCS / "operations.md").read_text()
BOARD = json.loads((DOCS / "deploy" / "grafana.json").read_text())
(GROUP,) = yaml.safe_load((DOCS / "deploy" / "alerts.yaml").read_text())["groups"]


@pytest.mark.parametrize(
    "metric",
    [m for m in vars(metrics).values() if isinstance(m, metrics.Metric)],
    ids=lambda m: m.name,
)
def test_every_metric_is_explained(metric: metrics.Metric) -> None:
    suffix = "_total" if isinstance(metric, metrics.Total) else ""
    labels = f"{{{','.join(metric.labels)}}}" if metric.labels else ""
    assert f"`{metric.name}{suffix}{labels}`" in OPERATIONS


@pytest.mark.parametrize("rule", GROUP["rules"], ids=lambda rule: rule["alert"])
def test_every_alert_is_whole_and_explained(rule: dict[str, Any]) -> None:
    assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}
    assert rule["labels"]["severity"] in ("page", "ticket")
    assert rule["annotations"]["summary"]
    (row,) = [line for line in OPERATIONS.splitlines() if line.startswith(f"| `{rule['alert']}` |")]
    assert all(cell.strip() for cell in row.strip("|").split("|"))


def test_no_alert_is_explained_that_is_not_there() -> None:
    rows = [line for line in OPERATIONS.splitlines() if line.startswith("| `Paris")]
    assert [row.split("`")[1] for row in rows] == [rule["alert"] for rule in GROUP["rules"]]


def test_buckets_rise_and_have_no_more_than_half_again_where_quantiles_are_looked_at() -> None:
    for buckets in (metrics.SECONDS, metrics.FINE_SECONDS, metrics.ROWS):
        assert buckets == sorted(set(buckets))
    steps = zip(metrics.FINE_SECONDS, metrics.FINE_SECONDS[1:], strict=False)
    assert max(later / one for one, later in steps) <= 1.5


def test_the_panels_of_the_board_have_places_of_their_own() -> None:
    panels = BOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for one, other in combinations([panel["gridPos"] for panel in panels], 2):
        apart = (one["x"] + one["w"] <= other["x"], other["x"] + other["w"] <= one["x"])
        apart += (one["y"] + one["h"] <= other["y"], other["y"] + other["h"] <= one["y"])
        assert any(apart), (one, other)
