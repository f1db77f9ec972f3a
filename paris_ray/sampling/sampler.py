"""The sampling loop: route, ask the chosen experts, combine, step.

`denoise` is a generator that yields the calls it wants made and is sent their answers. It does no
I/O, so one loop serves both drivers: `generate` answers the calls in this process, the Serve
application answers them through replicas.
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, get_args

import torch
from PIL import Image
from torch import Tensor

from paris_ray.bundle import Bundle
from paris_ray.config import SolverName, TimeGrid
from paris_ray.diffusion import num_evaluations, router_logits, sampling_times
from paris_ray.errors import ParisError
from paris_ray.models import Expert, Router, TextConditioning
from paris_ray.sampling.guidance import KeyedText, TextCache, guided_velocity
from paris_ray.sampling.routing import Routing, expert_weights, parse_routing
from paris_ray.sampling.solvers import integrate, proceed, solve
from paris_ray.seeding import torch_generator

MAX_BATCH = 10  # pictures at once: with more, eight XL/2 experts' texts outgrow `TextCache`


class SamplingError(RuntimeError):
    """The experts gave latents that are no picture."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertCall:
    """One question to one expert: the velocity of some rows of the batch at one time.

    Attributes:
        expert: Which expert.
        lora: Name of its adapter, or None.
        rows: `(b,)` the rows of the batch.
        latents: `(b, C, H, W)` their noisy latents.
        t: The time, in [0, 1].
        text: Their text.
        guidance_scale: 1 asks for the conditional velocity alone.
    """

    expert: int
    lora: str | None
    rows: Tensor
    latents: Tensor
    t: float
    text: KeyedText
    guidance_scale: float


@dataclass(frozen=True, slots=True)
class Samples:
    """What sampling gives.

    Attributes:
        latents: `(B, C, H, W)` at t = 0.
        expert_usage: `(B, K)` mean weight of each expert over the steps; rows sum to 1.
        experts_asked: `(B,)` mean number of experts that a step asked.
    """

    latents: Tensor
    expert_usage: Tensor
    experts_asked: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingOptions:
    """Checked options of one request; `loras` names the adapter of an expert by its number."""

    num_inference_steps: int
    guidance_scale: float
    routing: Routing
    router_temperature: float
    solver: SolverName = "euler"
    time_grid: TimeGrid = "linspace"
    loras: Mapping[int, str] = field(default_factory=dict)


Denoising = Generator[list[ExpertCall], list[Tensor], Samples]


def sampling_options(
    bundle: Bundle,
    *,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    routing: str | None = None,
    solver: str | None = None,
    time_grid: str | None = None,
    lora: str | None = None,
) -> SamplingOptions:
    """Fill in the bundle's defaults and check.

    Raises:
        ParisError: naming the option, its value and what is allowed.
    """
    defaults = bundle.facts.sampling
    steps = defaults.num_inference_steps if num_inference_steps is None else num_inference_steps
    scale = defaults.guidance_scale if guidance_scale is None else guidance_scale
    if steps < 1:
        raise ParisError(f"num_inference_steps={steps} is not allowed: at least 1")
    if not 0 <= scale <= 100:
        raise ParisError(f"guidance_scale={scale} is not allowed: between 0 and 100")
    bundle.check_lora(lora)
    return SamplingOptions(
        num_inference_steps=steps,
        guidance_scale=scale,
        routing=parse_routing(routing or defaults.routing, bundle.num_experts),
        router_temperature=defaults.router_temperature,
        solver=_named(SolverName, "solver", solver or defaults.solver),
        time_grid=_named(TimeGrid, "time_grid", time_grid or defaults.time_grid),
        loras={} if lora is None else {bundle.loras[lora]: lora},
    )


def _named(names: Any, option: str, value: str) -> Any:
    """Return a value that is one of the names of a `Literal`; raises ParisError otherwise."""
    if value not in get_args(names):
        allowed = ", ".join(get_args(names))
        raise ParisError(f"{option}={value!r} is not allowed: one of {allowed}")
    return value


def initial_noise(shape: Sequence[int], seeds: Sequence[int]) -> Tensor:
    """Return `(len(seeds), *shape)` unit Gaussian noise; a seed means the same in any batch."""
    return torch.stack(
        [torch.randn(*shape, generator=torch_generator(seed, "noise")) for seed in seeds]
    )


def denoise(
    noise: Tensor, text: TextConditioning, router: Router, options: SamplingOptions
) -> Denoising:
    """Integrate from noise to latents, yielding each step's expert calls.

    The router is asked once a step for the whole picture, and its choice serves both halves of
    the guidance. Send the generator one velocity `(b, C, H, W)` a call, in order.

    Args:
        noise: `(B, C, H, W)` latents at t = 1; the picture stays on their device.
        text: Conditioning of the B prompts.
        router: Chooses and weighs the experts, on any device.
        options: Steps, guidance and routing.

    Raises:
        SamplingError: if the latents are not finite in the end.
    """
    keyed_text, text = KeyedText.of(text), text.to(router.pos_embed.device)
    usage = torch.zeros(len(noise), router.config.num_experts, device=noise.device)
    asked = torch.zeros(len(noise), device=noise.device)
    times = sampling_times(options.num_inference_steps, options.time_grid).tolist()
    evaluations = num_evaluations(options.solver, options.num_inference_steps)
    solver = solve(options.solver, noise, times)
    step: tuple[Tensor, float] | Tensor = next(solver)
    while isinstance(step, tuple):
        latents, t = step
        logits = _ask_router(router, latents, t, text) / options.router_temperature
        weights = expert_weights(logits, options.routing)
        calls = _expert_calls(weights, latents, t, keyed_text, options)
        velocity = torch.zeros_like(latents)
        for call, answer in zip(calls, (yield calls), strict=True):
            velocity[call.rows] += weights[call.rows, call.expert, None, None, None] * answer
        step = proceed(solver, velocity)
        usage += weights / evaluations
        asked += (weights > 0).sum(dim=1) / evaluations
    if not step.isfinite().all():
        raise SamplingError("the experts gave latents that are not finite: try dtype=float32")
    return Samples(step, usage, asked)


def _ask_router(router: Router, latents: Tensor, t: float, text: TextConditioning) -> Tensor:
    device = router.pos_embed.device
    times = torch.full((len(latents),), t, device=device)
    return router_logits(router, latents.to(device), times, text).to(latents.device)


def _expert_calls(
    weights: Tensor, latents: Tensor, t: float, text: KeyedText, options: SamplingOptions
) -> list[ExpertCall]:
    calls = []
    for expert in range(weights.shape[1]):
        rows = weights[:, expert].nonzero()[:, 0]
        if len(rows):
            calls.append(
                ExpertCall(
                    expert=expert,
                    lora=options.loras.get(expert),
                    rows=rows,
                    latents=latents[rows],
                    t=t,
                    text=text.rows(rows),
                    guidance_scale=options.guidance_scale,
                )
            )
    return calls


def start_denoising(
    bundle: Bundle, text: TextConditioning, seeds: Sequence[int], options: SamplingOptions
) -> Denoising:
    """Return `denoise` at its beginning: picture i starts from the noise of `seeds[i]`."""
    noise = initial_noise(bundle.latent_shape, seeds)
    return denoise(noise, text, bundle.router, options)


@torch.inference_mode()
def advance(
    denoising: Denoising, answers: list[Tensor] | None = None
) -> list[ExpertCall] | Samples:
    """Send the answers to the last calls; return the next calls, or the samples at the end."""
    try:
        # A generator is started by sending None, which its type does not tell.
        return denoising.send(answers)  # type: ignore[arg-type]
    except StopIteration as stop:
        samples: Samples = stop.value
        return samples


class LocalExperts:
    """Answers calls with a bundle's experts in this process, from any thread.

    Args:
        bundle: Its experts load when they are first asked.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._bundle, self._texts = bundle, TextCache()
        self._null_text = KeyedText.of(bundle.null_text)
        # An expert in use cannot leave the device: only one at a time, if there is little room.
        self._turn: AbstractContextManager[Any] = Lock() if bundle.offload else nullcontext()

    @torch.inference_mode()
    def answer(self, call: ExpertCall) -> Tensor:
        """Return the velocities `(b, C, H, W)` that a call asks for."""
        with self._turn:
            expert, owner = self._bundle.expert(call.expert, call.lora), (call.expert, call.lora)
            text = self._texts.encode(expert, call.text, owner=owner)
            null_text = None
            if call.guidance_scale != 1.0:
                null_text = self._texts.encode(expert, self._null_text, owner=owner)
            scale = call.guidance_scale
            return guided_velocity(expert, call.latents, call.t, text, null_text, scale)

    def answer_all(self, calls: Sequence[ExpertCall]) -> list[Tensor]:
        """Answer the calls of a step, the experts first that are loaded: no expert loads twice."""
        order = sorted(range(len(calls)), key=lambda i: not self._bundle.holds(calls[i].expert))
        answers = {i: self.answer(calls[i]) for i in order}
        return [answers[i] for i in range(len(calls))]


def sample(
    bundle: Bundle,
    text: TextConditioning,
    seeds: Sequence[int],
    options: SamplingOptions,
) -> Samples:
    """Run `denoise` with the bundle's experts in this process."""
    experts = LocalExperts(bundle)
    denoising = start_denoising(bundle, text, seeds, options)
    step = advance(denoising)
    while not isinstance(step, Samples):
        step = advance(denoising, experts.answer_all(step))
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
    times = sampling_times(num_inference_steps, time_grid).tolist()
    return integrate(
        solve(solver, noise, times),
        lambda latents, t: guided_velocity(expert, latents, t, encoded, null, guidance_scale),
    )


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
) -> list[Image.Image]:
    """Draw one picture a prompt; picture i uses `seed + i`.

    Args:
        bundle: What `load_bundle` returned.
        prompts: Captions.
        seed: Seed of the first picture.
        num_inference_steps: Steps of the solver; None takes the bundle's default, like the others.
        guidance_scale: Classifier-free guidance; 1 switches it off.
        routing: `top-1`, `top-2`, ..., `full` (or `full-ensemble`), `threshold:x`
            or `top-p:x`.
        solver: `euler`, `heun`, `ab2` or `dpm++2m`.
        time_grid: `linspace`, `half-last` or `flow-match-euler`.
        lora: Name of an adapter (`bundle.add_lora`), which its expert draws with; the others and
            the router draw as ever.

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
    )
    codec = bundle.codec  # now: one that is damaged must not cost a whole sampling
    images: list[Image.Image] = []
    for start in range(0, len(prompts), MAX_BATCH):
        batch = prompts[start : start + MAX_BATCH]
        seeds = range(seed + start, seed + start + len(batch))
        samples = sample(bundle, bundle.encode_text(batch), seeds, options)
        images.extend(map(Image.fromarray, codec.decode(samples.latents)))
    return images
