"""On which nodes a training task may run: CPUs, GPUs, accelerator and labels.

A task that no node suits waits, since a fitting one may join the cluster. Ray says nothing of it,
so `why_waiting` does.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import ray

from paris_ray.config import TrainingConfig
from paris_ray.errors import ConfigError

# Ray's condition on a label: a value, or in(one, another); a ! before it negates.
CONDITION = re.compile(r"(?P<negated>!?)(?:in\((?P<values>.*)\)|(?P<value>.*))")
NODE_ID = "ray.io/node-id"  # a label of every node, of no use to people


def placed(task: Any, name: str, training: TrainingConfig) -> Any:
    """Return a remote function that runs where a training asks for.

    A node with `training.labels` is taken or, where none has room, one with the first of
    `training.fallback_labels` that has. `training.accelerator_type` must hold for all of them.

    Args:
        task: The remote function.
        name: What Ray calls the task.
        training: The resources.

    Raises:
        ConfigError: if there are fallbacks from no labels, or Ray does not allow a value.
    """
    labels, fallbacks = training.labels, training.fallback_labels
    where = f"{name}: labels={labels}, fallback_labels={fallbacks}"
    if fallbacks and not labels:
        raise ConfigError(f"{where} are not allowed: without labels, every node is as good")
    options: dict[str, Any] = {}
    if labels:
        options["label_selector"] = labels
        options["fallback_strategy"] = [{"label_selector": other} for other in fallbacks]
    if training.accelerator_type is not None:
        options["accelerator_type"] = training.accelerator_type
    try:
        return task.options(
            name=name,
            num_cpus=training.num_cpus,
            num_gpus=training.num_gpus,
            max_retries=training.max_retries,
            scheduling_strategy="SPREAD",
            **options,
        )
    except ValueError as error:
        raise ConfigError(f"{where} are not allowed: {error}") from None


def on_reserved_device(training: TrainingConfig) -> TrainingConfig:
    """Return a training whose `device=auto` means a GPU only if it reserves one.

    Ray leaves every GPU of a node visible to tasks that reserve none; those must not crowd it.
    """
    if training.device == "auto" and training.num_gpus == 0:
        return replace(training, device="cpu")
    return training


def why_waiting(training: TrainingConfig) -> str | None:
    """Return what a training waits for if no node of the cluster is one it may run on."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if any(suits(node, training) for node in nodes):
        return None
    wanted = " or ".join(map(str, (training.labels, *training.fallback_labels)))
    if training.accelerator_type is not None:
        wanted += f" and accelerator_type={training.accelerator_type}"
    return f"waits for a node with labels {wanted}; there are {'; '.join(map(_describe, nodes))}"


def suits(node: Mapping[str, Any], training: TrainingConfig) -> bool:
    """Return whether a training may run on a node, by accelerator and labels; room aside."""
    accelerator = training.accelerator_type
    if accelerator is not None and f"accelerator_type:{accelerator}" not in node["Resources"]:
        return False
    selectors = (training.labels, *training.fallback_labels)
    return any(_has(node["Labels"], selector) for selector in selectors)


def _has(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    return all(_holds(condition, labels.get(name)) for name, condition in selector.items())


def _holds(condition: str, value: str | None) -> bool:
    match = CONDITION.fullmatch(condition)
    assert match is not None, "anything matches"
    allowed = re.split(", ?", match["values"]) if match["value"] is None else [match["value"]]
    return (value in allowed) != bool(match["negated"])


def _describe(node: Mapping[str, Any]) -> str:
    labels = {name: value for name, value in sorted(node["Labels"].items()) if name != NODE_ID}
    accelerators = [name for name in node["Resources"] if name.startswith("accelerator_type:")]
    return ", ".join([str(labels), *accelerators])
