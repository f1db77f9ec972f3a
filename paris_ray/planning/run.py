"""The plan of a whole run."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from paris_ray.config import Config, GpuConfig, expert_setup
from paris_ray.planning.disk import row_bytes, run_bytes
from paris_ray.planning.distillation import plan_distillation
from paris_ray.planning.schedule import Schedule, schedule
from paris_ray.planning.training import TrainingPlan, plan_training


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a run will take.

    Attributes:
        num_rows: Rows of the corpus.
        num_parameters: Of all experts and the router.
        row_bytes: Bytes of a row of `embeddings/` by what they hold; None is unknown.
        run_bytes: Bytes of a finished run by what they hold; an unknown part is not in them.
        trainings: The seed, if there is one, the experts, the router and, if they are planned, the
            distilled models.
        gpus: The fleet.
        deadline_days: Which the schedule is to keep, or None.
        schedule: None without a fleet.
    """

    num_rows: int
    num_parameters: int
    row_bytes: Mapping[str, int | None]
    run_bytes: Mapping[str, int]
    trainings: Sequence[TrainingPlan]
    gpus: Sequence[GpuConfig]
    deadline_days: float | None
    schedule: Schedule | None


def plan(config: Config, *, distilled_from: int | None = None) -> Plan:
    """Return what a run of this configuration will take.

    Args:
        config: The run.
        distilled_from: Experts that a sampling step asks at most; None leaves the distillation out.

    Raises:
        ConfigError: if the distillation is not allowed.
    """
    num_rows = _num_rows(config)
    seed = config.seed_training
    trainings = [
        *([plan_training(config, "seed", config.expert, seed, num_rows)] if seed.steps else []),
        *_plan_experts(config, num_rows),
        plan_training(config, "router", config.router, config.router_training, num_rows),
    ]
    num_parameters = sum(t.num_parameters for t in trainings if t.stage != "seed")
    models = [t.on_disk for t in trainings]
    students = []
    if distilled_from is not None:
        students = plan_distillation(
            config, num_rows, num_parameters=num_parameters, experts_asked=distilled_from
        )
        trainings += students
    gpus = config.fleet.gpus
    return Plan(
        num_rows=num_rows,
        num_parameters=num_parameters,
        row_bytes=row_bytes(config),
        run_bytes=run_bytes(config, num_rows, models, [s.on_disk for s in students]),
        trainings=trainings,
        gpus=gpus,
        deadline_days=config.fleet.deadline_days,
        schedule=schedule(trainings, gpus, config.fleet.deadline_days) if gpus else None,
    )


def _num_rows(config: Config) -> int:
    fleet = config.fleet
    if fleet.cluster_rows:
        return sum(fleet.cluster_rows)
    return min(fleet.num_images, config.corpus.limit or fleet.num_images)


def _plan_experts(config: Config, num_rows: int) -> list[TrainingPlan]:
    num_experts = config.cluster.num_clusters
    rows = config.fleet.cluster_rows or [math.ceil(num_rows / num_experts)] * num_experts
    setups = [expert_setup(config, k) for k in range(num_experts)]
    return [plan_training(config, k, s.expert, s.training, rows[k]) for k, s in enumerate(setups)]
