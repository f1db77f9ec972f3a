"""The Sampler: text encoder, router, loop and codec; it asks the experts for velocities.

It drives the generator that `paris_ray.sampling.generate` drives, with the same batch, so a served
picture equals the one that `generate` draws with the same arguments, seed and thread count.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle
from ray.util.metrics import Counter
from torch import Tensor

from paris_ray.sampling.guidance import KeyedText
from paris_ray.sampling.sampler import (
    Denoising,
    ExpertCall,
    LocalExperts,
    Samples,
    SamplingOptions,
    advance,
    start_denoising,
)
from serve.expert import ExpertUnavailableError, TextArrays, to_array
from serve.source import BundleSource


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """What the Sampler answers.

    Attributes:
        pictures: `(n, S, S, 3)`.
        expert_usage: `(n, K)` mean weight of each expert over the steps; rows sum to 1.
    """

    pictures: NDArray[np.uint8]
    expert_usage: list[list[float]]


class Sampler:
    """A deployment that draws pictures.

    Args:
        source: Where the bundle is.
        experts: Handles of the experts, in order; None keeps the experts in this process.
        threads: Torch threads of one computation.
    """

    def __init__(
        self,
        source: BundleSource,
        experts: Sequence[DeploymentHandle[Any]] | None,
        *,
        threads: int,
    ) -> None:
        torch.set_num_threads(threads)
        self._bundle = source.open()
        self._experts = experts
        self._null_text = TextArrays.pack(KeyedText.of(self._bundle.null_text))
        self._local_experts = LocalExperts(self._bundle)
        self._calls = Counter("paris_expert_calls", "Calls of an expert.", tag_keys=("expert",))
        self._load()

    def _load(self) -> None:
        """Load what requests need now: a broken bundle must not become a broken request."""
        _ = self._bundle.router, self._bundle.codec
        if self._experts is None:
            for k in range(self._bundle.num_experts):
                self._bundle.expert(k)
            for name, k in self._bundle.loras.items():
                self._bundle.expert(k, name)

    def check_health(self) -> None:
        """Raise if the device has failed: CUDA errors stick, so the process must be replaced."""
        torch.ones((), device=self._bundle.device).item()

    async def draw(self, prompt: str, seeds: Sequence[int], options: SamplingOptions) -> Drawing:
        """Draw one picture of the prompt for each seed.

        Raises:
            ExpertUnavailableError: if a chosen expert died meanwhile.
        """
        # Torch runs in threads: the event loop stays free for the other requests.
        denoising = await asyncio.to_thread(self._start, prompt, seeds, options)
        step = await asyncio.to_thread(advance, denoising)
        while not isinstance(step, Samples):
            answers = await self._ask_all(step)
            step = await asyncio.to_thread(advance, denoising, answers)
        pictures = await asyncio.to_thread(self._bundle.codec.decode, step.latents)
        return Drawing(pictures=pictures, expert_usage=step.expert_usage.tolist())

    def _start(self, prompt: str, seeds: Sequence[int], options: SamplingOptions) -> Denoising:
        text = self._bundle.encode_text([prompt] * len(seeds))
        return start_denoising(self._bundle, text, seeds, options)

    async def _ask_all(self, calls: list[ExpertCall]) -> list[Tensor]:
        for call in calls:
            self._calls.inc(tags={"expert": str(call.expert)})
        if self._bundle.offload:  # one after the other, in the order that loads the fewest
            return await asyncio.to_thread(self._local_experts.answer_all, calls)
        return await asyncio.gather(*map(self._ask, calls))

    async def _ask(self, call: ExpertCall) -> Tensor:
        if self._experts is None:
            return await asyncio.to_thread(self._local_experts.answer, call)
        null_text = None if call.guidance_scale == 1.0 else self._null_text
        try:
            velocity = await self._experts[call.expert].velocity.remote(
                to_array(call.latents),
                call.t,
                TextArrays.pack(call.text),
                null_text,
                call.guidance_scale,
                call.lora,
            )
        except RayActorError:
            raise ExpertUnavailableError(
                f"Expert {call.expert} stopped while it drew; it is being replaced"
            ) from None
        return torch.tensor(velocity)
