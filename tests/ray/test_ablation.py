"""An ablation in small, on a real Ray: arms are runs that are kept, and the page is on demand."""

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from paris_ray.config import Config, load
from paris_ray.errors import TrainingError
from paris_ray.run import Run
from paris_ray.study.ablation import AblationForm, compare

pytestmark = pytest.mark.ray

FORM = AblationForm(total_steps=16, seeds=1, totals=(Fraction(1),))
RECIPES = ["muon+layersync"]
OVERRIDES = ["router_training.steps=10", "evaluation.max_captions=16", "training.num_cpus=0.5"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_overrides: list[str]) -> Config:
    run_dir = tmp_path_factory.mktemp("ablation") / "runs"
    return load("quickstart", [f"run_dir={run_dir}", *tiny_overrides, *OVERRIDES])


def test_an_ablation_is_printed_kept_and_written_on_demand(
    ray_session: None, config: Config, tmp_path: Path
) -> None:
    from paris_ray.pipeline.ablation import run_ablation

    first = run_ablation(config, FORM, RECIPES, command="a test")
    assert [arm["name"] for arm in first["arms"]] == ["base", *RECIPES]
    assert all(arm["cpu_seconds"] > 0 for arm in first["arms"])
    assert [each.recipe for each in compare(first["arms"])] == ["base", *RECIPES]
    runs = Path(config.run_dir)
    finished = {path: path.stat().st_mtime_ns for path in runs.rglob("manifest.json")}
    page = tmp_path / "ablation.md"
    second = run_ablation(config, FORM, RECIPES, command="a test", output=page)
    assert as_written(second) == as_written(first)
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("manifest.json")} == finished
    written = json.loads(page.with_suffix(".json").read_text())
    assert written == as_written(first)
    assert "| `muon+layersync` | `base` | 1 | 256 |" in page.read_text()
    broken = Run(load_arm(config, "base.0")).evaluation
    whole = broken.read("manifest.json")
    broken.write("manifest.json", whole.replace(b'"config_digest": "', b'"config_digest": "0'))
    with pytest.raises(TrainingError, match=r"1 of 2 arms failed: base\.0: .*another config"):
        run_ablation(config, FORM, RECIPES, command="a test")
    again = run_ablation(config, FORM, RECIPES, command="a test", known=written)
    assert as_written(again) == written


def as_written(ablation: dict[str, Any]) -> Any:
    """An ablation as its file has it, without tuples."""
    return json.loads(json.dumps(ablation))


def load_arm(config: Config, name: str) -> Config:
    return load("quickstart", [f"run_dir={config.run_dir}/arms/{name}"])
