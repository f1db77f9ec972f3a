"""Print the numbers of docs/results.md that concern single models: speed and memory.

    python tests/benchmarks/bench_models.py        (results.py does)

Ratios are taken in one run, in alternation, because machines are noisy. Nothing is asserted.
"""

import copy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from paris_ray.config import ExpertConfig
from paris_ray.devices import autocast, resolve_precision
from paris_ray.models import Expert

sys.path.append(str(Path(__file__).parents[1]))
from reference import PlainExpert

PAIRS = 9


def bench_expert() -> None:
    """Compare a B/2 expert with the plain reference, and bfloat16 with float32, on the CPU."""
    torch.set_num_threads(1)  # as training tasks and replicas have by default
    ours, plain = _twin_experts()
    print("\n## Expert B/2, speed over the plain reference in float32\n")
    print("forward, text encoded once: ", end="")
    print_ratios(speed_ratios(_forward(ours), _forward(plain)), ">= 1.05")
    print("training step: ", end="")
    ratios = speed_ratios(_training_step(ours), _training_step(plain))
    print_ratios(ratios, ">= 1.0")
    print("\n## Expert B/2, speed of bfloat16 over float32\n")
    if resolve_precision("auto", torch.device("cpu")) != torch.bfloat16:
        print("this CPU does not multiply bfloat16")
        return
    bench_bfloat16(_twin_experts()[0])  # the first one has been trained by now


def bench_bfloat16(expert: Any) -> None:
    """Compare bfloat16 weights in the forward pass, and autocast in training, with float32."""
    half, full = _forward(copy.deepcopy(expert).bfloat16()), _forward(expert)
    print("forward, text encoded once: ", end="")
    print_ratios(speed_ratios(half, full), ">= 3")
    exact = full()
    error = ((half().float() - exact).norm() / exact.norm()).item()
    print(f"relative L2 of the difference of the outputs {error:.1e} (goal <= 2e-2)")
    print("training step: ", end="")
    steps = _training_step(expert, torch.bfloat16), _training_step(expert)
    print_ratios(speed_ratios(*steps), ">= 2.5")


def _twin_experts() -> tuple[Any, Any]:
    """Return a random B/2 expert and the plain one of the same parameters."""
    config = ExpertConfig.preset("B/2")
    ours, plain = Expert(config), PlainExpert(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in plain.parameters():
        # Activations stay near 1, and no path is silent, as some are after initialisation.
        spread = parameter[0].numel() ** -0.5 if parameter.dim() in (2, 4) else 0.5
        torch.nn.init.normal_(parameter, std=spread, generator=generator)
    ours.load_state_dict(plain.state_dict())
    return ours, plain


def _expert_batch(size: int) -> tuple[Any, Any, Any]:
    """Return latents, timesteps and CLIP-sized text of a batch."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(size, 4, 32, 32, generator=generator)
    timesteps = 1000 * torch.rand(size, generator=generator)
    return latents, timesteps, torch.randn(size, 77, 768, generator=generator)


def _forward(expert: Any) -> Callable[[], Any]:
    """Return a forward pass on both guidance halves of one picture."""
    latents, timesteps, text = _expert_batch(2)
    expert.eval()
    with torch.no_grad():
        # The plain expert has no such method: it encodes its text in each pass.
        text = expert.encode_text(text) if hasattr(expert, "encode_text") else text
    return torch.no_grad()(lambda: expert(latents, timesteps, text))


def _training_step(expert: Any, dtype: Any = None) -> Callable[[], None]:
    """Return a training step: forward, backward, AdamW."""
    latents, timesteps, text = _expert_batch(2)
    expert.train()
    trained = [parameter for parameter in expert.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step() -> None:
        with autocast(latents.device, dtype or torch.float32):
            velocity = expert(latents, timesteps, text)
        (velocity.float() - latents).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def speed_ratios(ours: Callable[[], Any], other: Callable[[], Any]) -> list[float]:
    """Return seconds of the other over seconds of ours, a pair at a time, after a warm-up."""
    ours(), other()
    return [seconds(other) / seconds(ours) for _ in range(PAIRS)]


def seconds(run: Callable[[], Any]) -> float:
    """Return the seconds that the processor took: one thread runs, whatever runs beside it."""
    started = time.process_time()
    run()
    return time.process_time() - started


def print_ratios(ratios: list[float], goal: str) -> None:
    every = ", ".join(f"{ratio:.3f}" for ratio in ratios)
    print(f"median {statistics.median(ratios):.3f} of {every} (goal {goal})", flush=True)


if __name__ == "__main__":
    bench_expert()
