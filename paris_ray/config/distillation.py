"""How the ensemble is distilled into one expert (`jobs.distil`)."""

from dataclasses import dataclass
from typing import Literal

Objective = Literal["progressive", "consistency"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillationConfig:
    """What the student learns; `distil_training` and `few_step_training` say how."""

    # Last share of distil_training's steps, taught by the routed mixture; before it, by the expert
    # of each row's cluster
    routed_share: float = 0.5
    # Euler steps that a second training teaches, each to lead where several of the ensemble's
    # sampling.num_inference_steps lead; null: no second training
    num_inference_steps: int | None = None
    # What leads there in training: the ensemble's steps (progressive), or one of them and then the
    # student itself (consistency)
    objective: Objective = "progressive"
