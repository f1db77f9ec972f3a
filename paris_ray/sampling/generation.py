"""Drawing in this process, with the models of a bundle, or with one expert alone."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from paris_ray.bundle import Bundle
from paris_ray.config import SolverName, TimeGrid
from paris_ray.diffusion import sampling_times
from paris_ray.models import EncodedText, Expert, TextConditioning
from paris_ray.sampling.guidance import guided_velocity
from paris_ray.sampling.local import LocalModels
from paris_ray.sampling.sampler import Samples, advance, initial_noise, start_denoising
from paris_ray.sampling.solvers import integrate, solve
from paris_ray.sampling_options import SamplingOptions, sampling_options

MAX_BATCH = 10  # pictures at once


def sample(
    bundle: Bundle,
    text: TextConditioning,
    seeds: Sequence[int],
    options: SamplingOptions,
) -> Samples:
    """Run `denoise` with the bundle's models in this process."""
    models = LocalModels(bundle)
    denoising = start_denoising(bundle, text, seeds, options)
    step = advance(denoising)
    while not isinstance(step, Samples):
        step = advance(denoising, models.answer_all(step.calls))
    return step


@torch.inference_mode()
def sample_one_expert(
    expert: Expert,
    text: TextConditioning,
    null_text: TextConditioning,
    *,
    seeds: Sequence[int],
    num_inference_steps: int,
    guidance_scale: float,
    solver: SolverName = "euler",
    time_grid: TimeGrid = "linspace",
) -> Tensor:
    """Return latents `(B, C, H, W)`, on the CPU, that one expert draws without a router.

    Args:
        expert: On any device.
        text: Conditioning of the B captions.
        null_text: Conditioning of the empty string, a batch of one.
        seeds: One a picture.
        num_inference_steps: Steps of the solver.
        guidance_scale: 1 switches guidance off.
        solver: Which one.
        time_grid: Its times.
    """
    config, device = expert.config, expert.pos_embed.device
    noise = initial_noise((config.in_channels, config.input_size, config.input_size), seeds)
    encoded, null = (expert.encode_text(part.to(device)) for part in (text, null_text))
    count, is_guided = len(noise), guidance_scale != 1.0
    nulls = EncodedText.concatenate([null] * count) if is_guided else None
    scales, guided = torch.full((count,), guidance_scale), torch.arange(count * is_guided)

    def velocity(latents: Tensor, t: float) -> Tensor:
        times = torch.full((count,), t)
        return guided_velocity(expert, latents, times, encoded, nulls, scales, guided)

    times = sampling_times(num_inference_steps, time_grid).tolist()
    return integrate(solve(solver, noise, times), velocity)


def generate(
    bundle: Bundle,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    routing: str | None = None,
    solver: str | None = None,
    time_grid: str | None = None,
    lora: str | None = None,
    allowed_experts: Sequence[int] | None = None,
) -> list[Image.Image]:
    """Draw one picture a prompt; picture i uses `seed + i`.

    Args:
        bundle: What `load_bundle` returned.
        prompts: Captions.
        seed: Seed of the first picture.
        num_inference_steps: Steps of the solver; None takes the bundle's default, like the others.
        guidance_scale: Classifier-free guidance; 1 switches it off.
        routing: `top-1`, `top-2`, ..., `full` (or `full-ensemble`), `threshold:x`,
            `top-p:x` or `agree:x`.
        solver: `euler`, `heun`, `ab2` or `dpm++2m`.
        time_grid: `linspace`, `half-last` or `flow-match-euler`.
        lora: Name of an adapter (`bundle.add_lora`), which its expert draws with; the others and
            the router draw as ever.
        allowed_experts: Numbers of the experts that may draw, as if there were no others; None:
            all.

    Raises:
        ParisError: if an option is not allowed.
        SamplingError: if the latents are not finite in the end.
    """
    options = sampling_options(
        bundle,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        routing=routing,
        solver=solver,
        time_grid=time_grid,
        lora=lora,
        allowed_experts=allowed_experts,
    )
    codec = bundle.codec  # now: one that is damaged must not cost a whole sampling
    images: list[Image.Image] = []
    for start in range(0, len(prompts), MAX_BATCH):
        batch = prompts[start : start + MAX_BATCH]
        seeds = range(seed + start, seed + start + len(batch))
        samples = sample(bundle, bundle.encode_text(batch), seeds, options)
        # One by one: the last bits of a codec's picture depend on the batch that it is in.
        images.extend(Image.fromarray(codec.decode(row[None])[0]) for row in samples.latents)
    return images
