"""Distillation: one student of the size of an expert learns what a trained ensemble answers.

First velocities: of the expert of each row's cluster, as long as that is said to be enough, then
of the mixture that the router makes, which is what pictures are drawn with. The target is
a function of the noisy latents, unlike the velocity of the data, so less of it is noise.

Then, if wanted, few steps: one Euler step of the student is to lead where several of the
ensemble's own lead. The student no longer predicts the velocity at t but its mean over a step.
Two objectives have that one solution: all of the ensemble's steps, or the first of them and what
the student makes of the rest.

Source: distillation, Hinton et al. 2015 (arXiv:1503.02531); of steps, progressive distillation,
Salimans and Ho 2022 (arXiv:2202.00512), here on the straight path and all halvings at once;
multistep consistency distillation, Heek et al. 2024 (arXiv:2403.06807), from consistency models,
Song et al. 2023 (arXiv:2303.01469); with the guidance in it, Meng et al. 2022 (arXiv:2210.03142).
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import safetensors.torch
import torch
from torch import Tensor

from paris_ray.config import ExpertConfig, Objective, RouterConfig
from paris_ray.config.release import write_document
from paris_ray.diffusion import predict_velocity
from paris_ray.folders import Folder
from paris_ray.models import Expert, Router, TextConditioning
from paris_ray.run import MODEL_CONFIG, ROUTER_WEIGHTS
from paris_ray.seeding import build_seeded
from paris_ray.training.data import Batch
from paris_ray.training.expert import Lesson

ROUTED = -1  # in place of a row's cluster: the target is the routed mixture


class Teacher(Protocol):
    """An ensemble; `sampling.teacher.EnsembleTeacher` is one and describes the arguments."""

    def of_clusters(
        self, latents: Tensor, t: Tensor, text: TextConditioning, clusters: Tensor
    ) -> Tensor:
        """Return the velocity of the expert of each row's cluster."""

    def routed(self, latents: Tensor, t: Tensor, text: TextConditioning) -> Tensor:
        """Return the velocity of the routed mixture."""

    def mean_velocity(
        self, latents: Tensor, t: Tensor, text: TextConditioning, num_steps: int
    ) -> Tensor:
        """Return the mean velocity of the next Euler steps of the sampler."""


def velocities(teacher: Teacher, routed_share: float) -> Lesson:
    """Return the lesson in velocities.

    Args:
        teacher: The ensemble.
        routed_share: Last share of the steps, of which the routed mixture is the target; before
            them it is the expert of the row's own cluster.
    """

    def prepare(done: float, batch: Batch) -> Batch:
        if done < 1 - routed_share:
            return batch
        return batch._replace(clusters=torch.full_like(batch.clusters, ROUTED))

    def target(
        _student: Expert, latents: Tensor, t: Tensor, text: TextConditioning, clusters: Tensor
    ) -> Tensor:
        if clusters[0] == ROUTED:
            return teacher.routed(latents, t, text)
        return teacher.of_clusters(latents, t, text, clusters)

    return Lesson(prepare=prepare, target=target, identity={"routed_share": routed_share})


def progressive(teacher: Teacher, num_inference_steps: int, num_teacher_steps: int) -> Lesson:
    """Return the lesson in few steps whose targets are all of the ensemble's steps.

    Times are drawn as ever and raised to the next one at which the student will be asked.

    Args:
        teacher: The ensemble.
        num_inference_steps: Euler steps of the student, from noise to a picture.
        num_teacher_steps: Those of the ensemble, a multiple of them.
    """
    each = _steps_in_one(num_inference_steps, num_teacher_steps)

    def target(
        _student: Expert, latents: Tensor, t: Tensor, text: TextConditioning, clusters: Tensor
    ) -> Tensor:
        return teacher.mean_velocity(latents, t, text, each)

    identity = _identity("progressive", num_inference_steps, num_teacher_steps)
    return Lesson(prepare=_raise_times(num_inference_steps), target=target, identity=identity)


def consistency(teacher: Teacher, num_inference_steps: int, num_teacher_steps: int) -> Lesson:
    """Return the lesson in few steps whose targets are one of the ensemble's and the student's own.

    Arguments as in `progressive`.

    The student also learns from within each of its steps to the end of it: from a time of
    the ensemble, one of the ensemble's steps leads to the next time, and from there the student's
    answer to the end. So a target costs two evaluations, however many steps one is to replace.

    Times are drawn as ever and raised to the ensemble's next one; between them nothing is learnt,
    as the mean velocity jumps where one step of the student ends and another begins.
    """
    each = _steps_in_one(num_inference_steps, num_teacher_steps)

    def target(
        student: Expert, latents: Tensor, t: Tensor, text: TextConditioning, clusters: Tensor
    ) -> Tensor:
        num_after = (t * num_teacher_steps).round() - 1  # steps from the ensemble's next time to 0
        first = teacher.mean_velocity(latents, t, text, 1)
        following = latents - first / num_teacher_steps
        rest = predict_velocity(student, following, num_after / num_teacher_steps, text)
        num_rest = num_after % each  # none where the ensemble's step ends with the student's
        return first.lerp(rest, (num_rest / (1 + num_rest)).view(-1, 1, 1, 1))

    identity = _identity("consistency", num_inference_steps, num_teacher_steps)
    return Lesson(prepare=_raise_times(num_teacher_steps), target=target, identity=identity)


OBJECTIVES: Mapping[Objective, Callable[[Teacher, int, int], Lesson]] = {
    "progressive": progressive,
    "consistency": consistency,
}


def _raise_times(num_steps: int) -> Callable[[float, Batch], Batch]:
    """Return what raises a batch's times to those at which one of some steps begins."""
    return lambda _, batch: batch._replace(t=round_up(batch.t, num_steps))


def _identity(
    objective: Objective, num_inference_steps: int, num_teacher_steps: int
) -> Mapping[str, Any]:
    return {
        "objective": objective,
        "num_inference_steps": num_inference_steps,
        "num_teacher_steps": num_teacher_steps,
    }


def _steps_in_one(num_inference_steps: int, num_teacher_steps: int) -> int:
    """Return how many of the ensemble's steps one of the student's replaces."""
    each = num_teacher_steps // num_inference_steps
    if each * num_inference_steps != num_teacher_steps:
        raise ValueError(f"{num_teacher_steps} steps are not {num_inference_steps} times as many")
    return each


def round_up(t: Tensor, num_steps: int) -> Tensor:
    """Return the least of 1 / num_steps, 2 / num_steps ... 1 that is not below each `t (B,)`."""
    return (t * num_steps).ceil().clamp(min=1) / num_steps


def write_single_router(expert: ExpertConfig, output: Folder) -> None:
    """Write the router of a bundle of one expert: as small as can be, it has nothing to choose."""
    config = RouterConfig(
        input_size=expert.input_size,
        patch_size=expert.input_size,
        in_channels=expert.in_channels,
        hidden_size=4,
        num_layers=1,
        num_heads=1,
        num_experts=1,
    )
    router = build_seeded(lambda: Router(config), seed=0)
    output.write_json(MODEL_CONFIG, write_document(config))
    output.write(ROUTER_WEIGHTS, safetensors.torch.save(router.state_dict()))
