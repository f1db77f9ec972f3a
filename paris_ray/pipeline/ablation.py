"""An ablation: one model with each recipe and without any, and the table that compares them."""

import json
import logging
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from paris_ray.config import Config
from paris_ray.folders import Folder
from paris_ray.pipeline.arms import arms_run, plan_arms
from paris_ray.study.ablation import AblationForm, ablation_arms, ablation_config
from paris_ray.study.ablation_page import ablation_page

logger = logging.getLogger("paris_ray")


def run_ablation(
    config: Config,
    form: AblationForm,
    recipes: Sequence[str],
    *,
    command: str,
    output: Path | None = None,
    known: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """Run what is not finished of an ablation; write its page and `.json` if it is told where.

    Args:
        config: What the arms vary; `run_dir` is the ablation's folder.
        form: How large it is.
        recipes: Names of packaged ones, several joined by `+`.
        command: What the page says that it was written by.
        output: The page, a `.md` file; None: nothing is written.
        known: What the `.json` of an earlier one holds: arms of the very same configuration are
            not run again.

    Returns:
        What the `.json` holds.

    Raises:
        ConfigError: if the configuration does not suit an ablation, or there is no such recipe.
        TrainingError: naming the arms that failed, after all others are done.
    """
    config = ablation_config(config)
    arms = plan_arms(config, ablation_arms(config, form, recipes))
    ablation = {
        "command": command,
        "machine": machine(),
        "image_size": config.corpus.image_size,
        "arms": arms_run(config, arms, known),
    }
    if output is not None:
        target = Folder(output.parent)
        target.write(output.name, ablation_page(ablation).encode())
        payload = json.dumps(ablation, indent=1, allow_nan=False) + "\n"
        target.write(f"{output.stem}.json", payload.encode())
        logger.info("ablation: written to %s", output)
    return ablation


def machine() -> str:
    """Return what the page calls this machine."""
    return f"{os.cpu_count()} cores of {platform.machine()}, {platform.system()}"
