"""A study: one dense model against experts in many arms, and the page that compares them."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from paris_ray.config import Config
from paris_ray.folders import Folder
from paris_ray.pipeline.arms import arms_run, plan_arms
from paris_ray.study.forms import Form
from paris_ray.study.numbers import samples_to_target
from paris_ray.study.order import paris_order
from paris_ray.study.page import draw_charts, study_page
from paris_ray.study.plan import study_arms, study_config

logger = logging.getLogger("paris_ray")


def run_study(
    config: Config,
    form: Form,
    output: Path,
    *,
    command: str,
    known: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """Run what is not finished of a study and write its page, charts and `.json`.

    Args:
        config: What the arms vary; `run_dir` is the study's folder.
        form: How large the study is.
        output: The page, a `.md` file; the `.json` stands beside it, charts in `images/`.
        command: What the page says that it was written by.
        known: What the `.json` of an earlier study holds: arms of the very same configuration are
            not run again.

    Returns:
        What the `.json` holds.

    Raises:
        ConfigError: if the configuration does not suit a study.
        TrainingError: naming the arms that failed, after all others are done.
    """
    config = study_config(config)
    numbers = arms_run(config, plan_arms(config, study_arms(config, form)), known)
    study = {
        "command": command,
        "form": form.name,
        "features": config.cluster.features,
        "max_imbalance": config.cluster.max_imbalance,
        "image_size": config.corpus.image_size,
        "samples": form.total_steps * config.training.batch_size,
        "arms": numbers,
        "samples_to_target": samples_to_target(numbers),
        "paris_order": paris_order(numbers),
    }
    _write(study, output)
    return study


def _write(study: dict[str, Any], output: Path) -> None:
    target = Folder(output.parent)
    charts = draw_charts(study, output.parent / "images", output.stem)
    links = {name: f"images/{path.name}" for name, path in charts.items()}
    target.write(output.name, study_page(study, links).encode())
    payload = json.dumps(study, indent=1, allow_nan=False) + "\n"
    target.write(f"{output.stem}.json", payload.encode())
    logger.info("study: written to %s", output)
