"""What the nodes of a cluster train in a second: one minute on all of them at once.

On every node experts are tried side by side, as many as would have room there, since two on one
machine may each be slower than one alone; before that seed and router, each alone.
"""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import ray

from paris_ray.config import Config, FleetConfig, GpuConfig, Stage, TrainingConfig
from paris_ray.errors import ConfigError
from paris_ray.pipeline.placement import NODE_ID, on_reserved_device, placed, suits
from paris_ray.pipeline.tasks import gather
from paris_ray.training.probe import Probe, probe_machine

logger = logging.getLogger("paris_ray")

PROBE_S = 60.0
UNPRICED = GpuConfig(dollars_per_hour=0.0)
GIGA = 10**9


def probed_fleet(config: Config, seconds: float = PROBE_S) -> FleetConfig:
    """Return the fleet that the nodes of the cluster are.

    What cannot be measured (price, watts, preemptions, start) is taken from the entry of
    `fleet.gpus` whose name is part of the device's.

    Args:
        config: The run; `training` says what a training reserves and where it may run.
        seconds: That each node trains for.

    Raises:
        ConfigError: if no node has room for a training.
    """
    training = on_reserved_device(config.training)
    config = replace(
        config,
        training=training,
        seed_training=on_reserved_device(config.seed_training),
        router_training=on_reserved_device(config.router_training),
    )
    places = {
        node["NodeID"]: count
        for node in ray.nodes()
        if node["Alive"] and suits(node, training) and (count := _num_places(node, training))
    }
    if not places:
        wanted = f"training.num_cpus={training.num_cpus:g}, num_gpus={training.num_gpus:g}"
        raise ConfigError(f"{wanted} are not allowed: no node of the cluster has as many")
    logger.info("probe: %g s on %d nodes", seconds, len(places))
    alone: list[Stage] = ["seed", "router"] if config.seed_training.steps else ["router"]
    first = _probe(config, dict.fromkeys(places, 1), alone, seconds / 2)
    then = _probe(config, places, ["expert"], seconds / 2)
    rates = {node_id: probe.samples_per_second for node_id, probe in first}
    found = [
        (node_id, replace(probe, samples_per_second={**probe.samples_per_second, **rates[node_id]}))
        for node_id, probe in then
    ]
    return replace(config.fleet, gpus=_gpus(found, places, config.fleet.gpus))


def _probe(
    config: Config, places: Mapping[str, int], stages: Sequence[Stage], seconds: float
) -> list[tuple[str, Probe]]:
    """Probe so many places of each node, all at once; return what each found, with its node."""
    tasks, where = [], []
    for node_id, count in places.items():
        here = replace(config.training, labels={NODE_ID: node_id}, fallback_labels=[])
        task = placed(probe_place, "probe", here)
        tasks += [task.remote(config, stages, seconds) for _ in range(count)]
        where += [node_id] * count
    return list(zip(where, gather(tasks, lambda: None), strict=True))


@ray.remote
def probe_place(config: Config, stages: Sequence[Stage], seconds: float) -> Probe:
    """Find out what one place of a node does."""
    return probe_machine(config, stages, seconds)


def _num_places(node: Mapping[str, Any], training: TrainingConfig) -> int:
    """Return how many trainings have room on a node that does nothing else."""
    wanted = {"CPU": training.num_cpus, "GPU": training.num_gpus}
    counts = [node["Resources"].get(k, 0) / amount for k, amount in wanted.items() if amount]
    return int(min(counts, default=1))


def _gpus(
    found: Sequence[tuple[str, Probe]], places: Mapping[str, int], known: Sequence[GpuConfig]
) -> list[GpuConfig]:
    """Return the kinds of places that were found; equal ones of several nodes are one kind."""
    kinds: dict[tuple[str, float, bool], list[Probe]] = {}
    for node_id, probe in found:
        shared_by = places[node_id] if probe.device == "CPU" else 1
        memory_gb = round(probe.memory_bytes / shared_by / GIGA, 1)
        kinds.setdefault((probe.device, memory_gb, probe.bfloat16), []).append(probe)
    return [
        replace(
            _known(device, known),
            name=device,
            count=len(probes),
            memory_gb=memory_gb,
            bfloat16=bfloat16,
            samples_per_second=dict(_means(probes)),
        )
        for (device, memory_gb, bfloat16), probes in kinds.items()
    ]


def _known(device: str, known: Sequence[GpuConfig]) -> GpuConfig:
    """Return the entry of the fleet that a device is of, or one without a price."""
    for gpu in known:
        if re.search(rf"\b{re.escape(gpu.name)}\b", device):
            return gpu
    logger.warning("probe: no entry of the fleet is named as %s is: its price counts as 0", device)
    return UNPRICED


def _means(probes: Sequence[Probe]) -> Iterator[tuple[str, float]]:
    for stage in probes[0].samples_per_second:
        yield stage, round(fmean(probe.samples_per_second[stage] for probe in probes), 2)
