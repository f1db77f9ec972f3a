"""The plan of a distillation: trainings whose targets the whole ensemble computes."""

from dataclasses import replace

from paris_ray.config import Config, Stage, TrainingConfig, check_distillation
from paris_ray.models.flops import forward_macs, step_macs, text_length
from paris_ray.planning.training import Teachers, TrainingPlan, plan_training


def plan_distillation(
    config: Config, num_rows: int, *, num_parameters: int, experts_asked: int
) -> list[TrainingPlan]:
    """Return the plans of the student and, if wanted, of the model of few steps.

    Args:
        config: The run.
        num_rows: Rows of all shards.
        num_parameters: Of all experts and the router, which teach.
        experts_asked: Experts that a sampling step asks at most.

    Raises:
        ConfigError: if the distillation is not allowed.
    """
    check_distillation(config)
    # The student's lesson is without guidance; that of few steps has the guidance in it.
    unguided = replace(config, sampling=replace(config.sampling, guidance_scale=1.0))
    share, routed = config.distillation.routed_share, step_macs(unguided, experts_asked)
    alone = forward_macs(config.expert, text_length(config))

    def taught(name: Stage, training: TrainingConfig, macs: float) -> TrainingPlan:
        teachers = Teachers(num_parameters, flops_per_image=round(2 * macs))
        return plan_training(config, name, config.expert, training, num_rows, teachers=teachers)

    student = taught("student", config.distil_training, (1 - share) * alone + share * routed)
    steps = config.distillation.num_inference_steps
    if steps is None:
        return [student]
    step = step_macs(config, experts_asked)
    macs = step * (config.sampling.num_inference_steps // steps)
    if config.distillation.objective == "consistency":
        macs = step + alone  # of the student itself
    return [student, taught("few_step", config.few_step_training, macs)]
