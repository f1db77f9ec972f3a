"""What a run will take, computed before anything is started: `jobs.plan`, and `--dry-run` of all.

Models are built on the meta device, so nothing is allocated. Each training is to have one GPU of
its own, and the fleet to be free; clusters are taken to be equal unless `fleet.cluster_rows` has
their sizes, and labels that pin experts are not read. Days follow from `samples_per_second` where
it was measured, else from `mfu`, which counts the model's own arithmetic, as the metric of training
does: what the text encoder, recomputation or waiting for data takes lowers that number. Of a
distillation it counts the teachers' too, which the metric does not. Machines that are taken away
repeat half a checkpoint's interval each time (durations.py). Who trains what is found by
assignment.py, and simulation.py lets a run go by with machines taken away at random.
Not planned are prepare (encoding and clustering), sample grids and evaluation.

What a run has taken in the end is in its ledger (paris_ray/ledger.py), which accounting.py puts
beside what the papers tell.
"""

from paris_ray.planning.accounting import ledger_of
from paris_ray.planning.document import document
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
    "document",
    "ledger_of",
    "plan",
    "render",
    "training_memory",
]
