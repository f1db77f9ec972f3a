"""Print how fast an expert is beside the network of the same size that diffusers would give.

    python tests/benchmarks/bench_kernels.py        (results.py does)

`PixArtTransformer2DModel` has the widths, tokens and text of the B/2 expert. Both run with the same
precision on one thread, in alternation in one run, in seconds of the processor; both steps have
fused AdamW, and each its own average of the weights. Goals are printed with what was measured;
nothing is asserted.
"""

import logging
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DDIMScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

sys.path.append(str(Path(__file__).parent))
from bench_models import print_ratios, seconds, speed_ratios

from paris_ray.config import ExpertConfig
from paris_ray.devices import autocast, resolve_precision
from paris_ray.models import Expert
from paris_ray.models.conditioning import TextConditioning
from paris_ray.sampling.generation import sample_one_expert
from paris_ray.training.ema import ExponentialMovingAverage

BATCH = 4
STEPS = 10  # of one picture
GUIDANCE = 4.5
# Operators of the profile, by the start of their names; the first that fits counts.
PARTS = {
    "matrix products": ("aten::addmm", "aten::mm", "aten::bmm", "aten::linear"),
    "attention": ("aten::_scaled_dot_product",),
    "optimiser": ("aten::_fused_adamw", "Optimizer"),
    "average": ("aten::_foreach_lerp",),
    "norms, modulation, residuals": (
        "aten::native_layer_norm",
        "aten::mul",
        "aten::add",
        "aten::sum",
    ),
    "activations": ("aten::gelu", "aten::silu"),
    "copies": ("aten::copy_", "aten::cat", "aten::fill_", "aten::zero_"),
}


def main() -> None:
    """Print every comparison."""
    torch.set_num_threads(1)  # as training tasks and replicas have by default
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    config = ExpertConfig.preset("B/2")
    ours, theirs = Expert(config), _pixart(config)
    print(f"Parameters: {_millions(ours)} M of ours, {_millions(theirs)} M of theirs\n")
    bench_forward(ours, theirs)
    bench_step(config)
    bench_sampling(ours)
    bench_best(ours, theirs)
    print_profile(Expert(config))


def _millions(model: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.0f}"


def _pixart(config: ExpertConfig) -> Any:
    """Return diffusers' network of the same size, with random weights."""
    return PixArtTransformer2DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.hidden_size // config.num_heads,
        in_channels=config.in_channels,
        out_channels=config.in_channels,
        num_layers=config.num_layers,
        cross_attention_dim=config.hidden_size,
        sample_size=config.input_size,
        patch_size=config.patch_size,
        caption_channels=config.text_embed_dim,
        use_additional_conditions=False,
    )


def _batch(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return latents, timesteps and CLIP-sized text."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(size, 4, 32, 32, generator=generator)
    timesteps = 1000 * torch.rand(size, generator=generator)
    return latents, timesteps, torch.randn(size, 77, 768, generator=generator)


def _our_forward(expert: Any, dtype: torch.dtype, *, once: bool) -> Callable[[], Tensor]:
    """Return a pass over both guidance halves of a picture, its text encoded before or in it."""
    latents, timesteps, text = _batch(2)
    text = text.to(dtype)
    with torch.no_grad():
        conditioning = expert.encode_text(text) if once else text
    return torch.no_grad()(lambda: expert(latents.to(dtype), timesteps, conditioning))


def _their_forward(network: Any, dtype: torch.dtype) -> Callable[[], Tensor]:
    """Return the same of diffusers' network, which encodes its text in every pass."""
    latents, timesteps, text = _batch(2)
    latents, text = latents.to(dtype), text.to(dtype)
    return torch.no_grad()(lambda: _run_pixart(network, latents, timesteps, text))


def _run_pixart(network: Any, latents: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
    no_size = {"resolution": None, "aspect_ratio": None}
    return network(latents, text, timesteps, added_cond_kwargs=no_size).sample


def bench_forward(ours: Any, theirs: Any) -> None:
    """Compare forward passes in float32."""
    full = torch.float32
    ours.eval(), theirs.eval()
    for name, once in (("once a picture", True), ("in every pass", False)):
        print(f"- forward, float32, ours with its text encoded {name}: ", end="")
        pair = _our_forward(ours, full, once=once), _their_forward(theirs, full)
        print_ratios(speed_ratios(*pair), ">= 1.1")


def bench_step(config: ExpertConfig) -> None:
    """Compare training steps in float32: forward, backward, AdamW, average."""
    ours, theirs = Expert(config).train(), _pixart(config).train()
    average = ExponentialMovingAverage(ours, 0.999)
    their_average = EMAModel(theirs.parameters(), decay=0.999)
    print("- training step, float32: ", end="")
    steps = (
        _step(ours, ours, lambda: average.update(ours, 10_000)),
        _step(
            theirs,
            lambda *batch: _run_pixart(theirs, *batch),
            lambda: their_average.step(theirs.parameters()),
        ),
    )
    print_ratios(speed_ratios(*steps), ">= 1.05")


def _step(
    model: nn.Module, forward: Callable[..., Tensor], average: Callable[[], None]
) -> Callable[[], None]:
    latents, timesteps, text = _batch(BATCH)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step() -> None:
        with autocast(latents.device, torch.float32):
            velocity = forward(latents, timesteps, text)
        (velocity - latents).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        average()

    return step


class _AsPixArt(nn.Module):
    """An expert with the calls of diffusers' network, for diffusers' own pipeline."""

    def __init__(self, expert: Any) -> None:
        super().__init__()
        self.expert, self.dtype, self.device = expert, torch.float32, torch.device("cpu")
        channels, size = expert.config.in_channels, expert.config.input_size
        self.config = SimpleNamespace(in_channels=channels, out_channels=channels, sample_size=size)

    def forward(
        self, latents: Tensor, *, encoder_hidden_states: Tensor, timestep: Tensor, **_: object
    ) -> tuple[Tensor]:
        return (self.expert(latents, timestep.float(), encoder_hidden_states),)


def bench_sampling(expert: Any) -> None:
    """Compare one guided picture (its latents) with diffusers' loop around the same network."""
    _, _, embeddings = _batch(2)
    text, null = (TextConditioning(part[None], part[None].mean(dim=1)) for part in embeddings)

    def ours() -> None:
        sample_one_expert(
            expert, text, null, seeds=[0], num_inference_steps=STEPS, guidance_scale=GUIDANCE
        )

    pipeline = PixArtAlphaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=_AsPixArt(expert),
        scheduler=DDIMScheduler(),
    )
    pipeline.set_progress_bar_config(disable=True)
    mask = torch.ones(1, embeddings.shape[1])

    def theirs() -> None:
        pipeline(
            prompt=None,
            negative_prompt=None,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            prompt_embeds=embeddings[:1],
            prompt_attention_mask=mask,
            negative_prompt_embeds=embeddings[1:],
            negative_prompt_attention_mask=mask,
            use_resolution_binning=False,
            output_type="latent",
        )

    print(f"- one picture of {STEPS} steps, the same network in diffusers' loop: ", end="")
    print_ratios(speed_ratios(ours, theirs), ">= 1.2")


@contextmanager
def _compiled(model: Any, blocks: Any) -> Iterator[float]:
    """Compile a model's blocks in place; yield the seconds that its first pass took."""
    for block in blocks:
        block.compile()
    yield seconds(model)
    torch.compiler.reset()


def bench_best(ours: Any, theirs: Any) -> None:
    """Compare each one's fastest setting: compiled blocks, bfloat16 where the CPU multiplies it."""
    half = resolve_precision("auto", torch.device("cpu"))
    full = _their_forward(theirs.eval(), torch.float32)
    before = statistics.median(seconds(full) for _ in range(5))
    our_best = _our_forward(ours.eval().to(half), half, once=True)
    their_best = _their_forward(theirs.to(half), half)
    with (
        _compiled(our_best, ours.layers) as our_warm_up,
        _compiled(their_best, theirs.transformer_blocks) as their_warm_up,
    ):
        name = str(half).removeprefix("torch.")
        print(f"- forward, {name}, compiled (first pass {our_warm_up:.0f} and ", end="")
        print(f"{their_warm_up:.0f} s), over theirs at the same: ", end="")
        print_ratios(speed_ratios(our_best, their_best), "none")
        gain = before / statistics.median(seconds(our_best) for _ in range(5))
        print(f"- the same, over theirs in float32 as it comes: {gain:.3f} (goal >= 3)")


def print_profile(ours: Any) -> None:
    """Print where the time of a training step goes, nothing compiled."""
    ours.train()
    average = ExponentialMovingAverage(ours, 0.999)
    step = _step(ours, ours, lambda: average.update(ours, 10_000))
    step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    times: dict[str, float] = dict.fromkeys(PARTS, 0.0) | {"the rest": 0.0}
    for event in profiler.key_averages():
        part = next((part for part, of in PARTS.items() if event.key.startswith(of)), "the rest")
        times[part] += event.self_cpu_time_total
    total = sum(times.values())
    print("\n| a training step, float32 | share |\n|---|---|")
    for part, time in sorted(times.items(), key=lambda item: -item[1]):
        print(f"| {part} | {time / total:.1%} |")


if __name__ == "__main__":
    main()
