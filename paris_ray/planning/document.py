"""A plan as JSON, for machines."""

from dataclasses import asdict
from typing import Any

from paris_ray.planning.run import Plan
from paris_ray.planning.training import TrainingPlan

VERSION = 1


def document(plan: Plan) -> dict[str, Any]:
    """Return a plan as JSON values; days, dollars and kWh that are unknown are null."""
    schedule = plan.schedule
    totals = {} if schedule is None else _totals(plan)
    return {
        "version": VERSION,
        "rows": plan.num_rows,
        "parameters": plan.num_parameters,
        "bytes_of_a_row": dict(plan.row_bytes),
        "bytes_of_the_run": dict(plan.run_bytes),
        "trainings": [_training(plan, training) for training in plan.trainings],
        "assignments": [] if schedule is None else [asdict(a) for a in schedule.assignments],
        "unplaced": [] if schedule is None else list(schedule.unplaced),
        **totals,
    }


def _totals(plan: Plan) -> dict[str, Any]:
    schedule, deadline = plan.schedule, plan.deadline_days
    assert schedule is not None
    kept = None
    if deadline is not None and schedule.days is not None:
        kept = schedule.days <= deadline
    return {
        "days": schedule.days,
        "gpu_days": schedule.gpu_days,
        "dollars": schedule.dollars,
        "kwh": schedule.kwh,
        "deadline_days": deadline,
        "deadline_kept": kept,
    }


def _training(plan: Plan, training: TrainingPlan) -> dict[str, Any]:
    return {
        "name": training.name,
        "stage": training.stage,
        "rows": training.num_rows,
        "batch_size": training.batch_size,
        "accumulation_steps": training.accumulation_steps,
        "steps": training.num_steps,
        "samples": training.samples_seen,
        "flops": training.flops,
        "gpus": [
            {
                "gpu": gpu.name,
                "fits": fit.fits,
                "would_fit_with": fit.advice or None,
                "precision": fit.precision,
                "bytes": fit.num_bytes,
                "days": duration.days,
            }
            for gpu, fit, duration in zip(plan.gpus, training.fits, training.durations, strict=True)
        ],
    }
