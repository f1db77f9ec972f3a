"""The sampling loop: ask the router, ask the experts that it chooses, combine, step.

`denoise` is a generator that yields the calls it wants made and is sent their answers. It does no
I/O, so one loop serves both drivers: `generation` answers the calls of its pictures in this
process, `engine` answers those of many requests together, wherever the models are.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paris_ray.bundle import Bundle
from paris_ray.diffusion import sampling_times
from paris_ray.errors import ExpertsLostError, SamplingError
from paris_ray.models import TextConditioning
from paris_ray.sampling.calls import Call, ExpertCall, RouterCall
from paris_ray.sampling.guidance import KeyedText
from paris_ray.sampling.routing import expert_weights, mix, without_experts
from paris_ray.sampling.solvers import proceed, solve
from paris_ray.sampling_options import SamplingOptions
from paris_ray.seeding import torch_generator


@dataclass(frozen=True, slots=True)
class Step:
    """What a picture waits for.

    Attributes:
        calls: What to ask; the answers go back in their order.
        evaluations: How often the velocity is known already.
        preview: `(B, C, H, W)` the pictures that the last velocity points to; None before it.
    """

    calls: list[Call]
    evaluations: int
    preview: Tensor | None


@dataclass(frozen=True, slots=True)
class Samples:
    """What sampling gives.

    Attributes:
        latents: `(B, C, H, W)` at t = 0.
        expert_weights: `(B, E, K)` the weight of each expert in each of E evaluations of the
            velocity; sums to 1 over the experts.
        num_asked: `(B, E)` how many experts each evaluation asked; more than have weight if they
            disagreed (`agree`).
        missing_experts: Those that were lost and drawn without.
        last_resort: Whether the last resort drew in their place, with their weight.
    """

    latents: Tensor
    expert_weights: Tensor
    num_asked: Tensor
    missing_experts: tuple[int, ...] = ()
    last_resort: bool = False

    @property
    def expert_usage(self) -> Tensor:
        """`(B, K)` mean weight of each expert over the evaluations; rows sum to 1."""
        return self.expert_weights.mean(dim=1)

    @property
    def experts_asked(self) -> Tensor:
        """`(B,)` mean number of experts that an evaluation asked."""
        return self.num_asked.float().mean(dim=1)


Answers = Sequence[Tensor | None]
Denoising = Generator[Step, Answers, Samples]


def initial_noise(shape: Sequence[int], seeds: Sequence[int]) -> Tensor:
    """Return `(len(seeds), *shape)` unit Gaussian noise; a seed means the same in any batch."""
    return torch.stack(
        [torch.randn(*shape, generator=torch_generator(seed, "noise")) for seed in seeds]
    )


def denoise(
    noise: Tensor,
    text: TextConditioning,
    null_text: TextConditioning,
    options: SamplingOptions,
    last_resort: int | None = None,
) -> Denoising:
    """Integrate from noise to latents, yielding the calls of each evaluation of the velocity.

    First comes the router's, then those of the experts that it chooses; the choice serves both
    halves of the guidance. Send one answer a call, in order; None where an expert is lost: the
    pictures are then drawn without it to the end, by the last resort in its place or, if there is
    none, by the others.

    Args:
        noise: `(B, C, H, W)` latents at t = 1; the pictures stay on their device.
        text: Conditioning of the B prompts.
        null_text: Conditioning of the empty string, a batch of one.
        options: Steps, guidance and routing.
        last_resort: Number of the model that draws in the place of a lost expert, if one may: not
            where the request names the experts that may draw.

    Raises:
        SamplingError: if the latents are not finite in the end.
        ExpertsLostError: if no expert is left.
    """
    null = None if options.guidance_scale == 1.0 else KeyedText.of(null_text)
    mixture = _Mixture(KeyedText.of(text), null, options, last_resort)
    times = sampling_times(options.num_inference_steps, options.time_grid).tolist()
    solver = solve(options.solver, noise, times)
    step: tuple[Tensor, float] | Tensor = next(solver)
    while isinstance(step, tuple):
        velocity = yield from mixture.velocity(*step)
        step = proceed(solver, velocity)
    if not step.isfinite().all():
        raise SamplingError("the experts gave latents that are not finite: try dtype=float32")
    return Samples(
        step,
        torch.stack(mixture.weights, dim=1),
        torch.stack(mixture.num_asked, dim=1),
        tuple(sorted(mixture.missing)),
        mixture.last_resort_drew,
    )


class _Mixture:
    """The velocity of the ensemble at some latents, and what became known on the way."""

    def __init__(
        self,
        text: KeyedText,
        null_text: KeyedText | None,
        options: SamplingOptions,
        last_resort: int | None,
    ) -> None:
        self._text, self._null_text, self._options = text, null_text, options
        self._last_resort = last_resort if options.allowed_experts is None else None
        self.weights: list[Tensor] = []
        self.num_asked: list[Tensor] = []
        self.missing: set[int] = set()
        self.last_resort_drew = False
        self._preview: Tensor | None = None

    def velocity(self, latents: Tensor, t: float) -> Generator[Step, Answers, Tensor]:
        """Yield calls and return the velocity `(B, C, H, W)`."""
        (logits,) = yield self._step([RouterCall(latents=latents, t=t, text=self._text)])
        assert logits is not None, "a lost router is none that can be drawn without"
        while True:
            weights = self._weigh(logits)
            chosen = _rows_of_experts(weights)
            calls = [self._call(expert, rows, latents, t) for expert, rows in chosen.items()]
            answers = yield self._step(calls)
            lost = {
                call.expert for call, given in zip(calls, answers, strict=True) if given is None
            }
            if not lost:
                break
            self._lose(lost)
        velocities = latents.new_zeros(*weights.shape, *latents.shape[1:])
        for (expert, rows), answer in zip(chosen.items(), answers, strict=True):
            assert answer is not None
            velocities[rows, expert] = answer
            self.last_resort_drew |= expert in self.missing
        self.num_asked.append((weights > 0).sum(dim=1))
        velocity, weights = mix(weights, velocities, self._options.routing)
        self.weights.append(weights)
        self._preview = latents - t * velocity
        return velocity

    def _step(self, calls: Sequence[Call]) -> Step:
        return Step(list(calls), len(self.weights), self._preview)

    def _weigh(self, logits: Tensor) -> Tensor:
        every, allowed = set(range(logits.shape[1])), self._options.allowed_experts
        left = every if allowed is None else allowed
        if self._last_resort is None:
            left = left - self.missing
        if not left:
            raise ExpertsLostError("all experts that may draw are lost")
        logits = logits / self._options.router_temperature
        return expert_weights(without_experts(logits, every - left), self._options.routing)

    def _lose(self, lost: set[int]) -> None:
        if self._last_resort in lost:
            lost = lost - {self._last_resort}
            self._last_resort = None
        self.missing |= lost

    def _call(self, expert: int, rows: Tensor, latents: Tensor, t: float) -> ExpertCall:
        """Return the question about some rows to an expert, or to who draws in its place."""
        if expert in self.missing:
            assert self._last_resort is not None, "without one, a lost expert has no weight"
            expert = self._last_resort
        return ExpertCall(
            expert=expert,
            lora=self._options.loras.get(expert),
            latents=latents[rows],
            t=t,
            text=self._text.rows(rows),
            null_text=self._null_text,
            guidance_scale=self._options.guidance_scale,
        )


def _rows_of_experts(weights: Tensor) -> dict[int, Tensor]:
    """Return, for each expert that has weight, the rows of the batch in which it has."""
    return {
        expert: weights[:, expert].nonzero()[:, 0]
        for expert in weights.any(dim=0).nonzero()[:, 0].tolist()
    }


def start_denoising(
    bundle: Bundle,
    text: TextConditioning,
    seeds: Sequence[int],
    options: SamplingOptions,
    last_resort: int | None = None,
) -> Denoising:
    """Return `denoise` at its beginning: picture i starts from the noise of `seeds[i]`."""
    noise = initial_noise(bundle.latent_shape, seeds)
    return denoise(noise, text, bundle.null_text, options, last_resort)


@torch.inference_mode()
def advance(denoising: Denoising, answers: Answers | None = None) -> Step | Samples:
    """Send the answers to the last calls; return what is wanted next, or the samples at the end."""
    try:
        # A generator is started by sending None, which its type does not tell.
        return denoising.send(answers)  # type: ignore[arg-type]
    except StopIteration as stop:
        samples: Samples = stop.value
        return samples
