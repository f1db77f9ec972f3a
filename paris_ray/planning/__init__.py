"""What a run will take, computed before anything is started: `--dry-run` of every job.

Models are built on the meta device, so nothing is allocated. Clusters are taken to be equal, each
training to have one GPU of its own, and the fleet to be free; labels that pin experts are not read.
Days follow from `fleet.gpus[].mfu`, which counts the model's own arithmetic, as the metric of
training does: what the text encoder, recomputation or waiting for data takes lowers that number.
Of a distillation it counts the teachers' too, which the metric does not.
Not planned are prepare (encoding and clustering), sample grids and evaluation.
"""

from paris_ray.planning.memory import Memory, activation_bytes, training_memory
from paris_ray.planning.render import render
from paris_ray.planning.run import Plan, plan
from paris_ray.planning.schedule import Assignment, Schedule
from paris_ray.planning.training import Fit, TrainingPlan

__all__ = [
    "Assignment",
    "Fit",
    "Memory",
    "Plan",
    "Schedule",
    "TrainingPlan",
    "activation_bytes",
    "plan",
    "render",
    "training_memory",
]
