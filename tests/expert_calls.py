"""The first calls of experts that pictures make, for tests of who answers them."""

from collections.abc import Sequence

import torch

from paris_ray.bundle import Bundle
from paris_ray.models import TextConditioning
from paris_ray.sampling.calls import Call, ExpertCall
from paris_ray.sampling.local import LocalModels
from paris_ray.sampling.sampler import Step, advance, start_denoising
from paris_ray.sampling_options import SamplingOptions


def first_expert_calls(
    bundle: Bundle, text: TextConditioning, seeds: Sequence[int], options: SamplingOptions
) -> list[ExpertCall]:
    """Answer the router's call; return those of the experts that it chose for the first step."""
    denoising = start_denoising(bundle, text, seeds, options)
    step = advance(denoising)
    assert isinstance(step, Step)
    step = advance(denoising, LocalModels(bundle).answer(step.calls))
    assert isinstance(step, Step)
    calls = [call for call in step.calls if isinstance(call, ExpertCall)]
    assert len(calls) == len(step.calls)
    return calls


def answer_alone(models: LocalModels, call: Call) -> torch.Tensor:
    """Return the answer to one call."""
    (answer,) = models.answer([call])
    return answer
