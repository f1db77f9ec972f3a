"""What the Sampler sends to experts in other processes."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from paris_ray.bundle import Bundle
from paris_ray.sampling.sampler import sampling_options
from serve.expert import ExpertServer, Floats
from serve.sampler import Sampler
from serve.source import BundleSource

pytestmark = pytest.mark.serve


class Handle:
    """Stands for the handle of an expert: asks it in this process, and keeps what was sent."""

    def __init__(self, server: ExpertServer) -> None:
        self.server, self.sent = server, []

    @property
    def velocity(self) -> "Handle":
        return self

    async def remote(self, *arguments: Any) -> Floats:
        self.sent.append(arguments)
        return self.server.velocity(*arguments)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_only_the_text_that_a_call_needs_is_sent(
    bundle: Bundle, tiny_bundle_path: Path, guidance_scale: float
) -> None:
    source = BundleSource(str(tiny_bundle_path))
    handles = [Handle(ExpertServer(source, k, threads=1)) for k in range(bundle.num_experts)]
    sampler = Sampler(source, handles, threads=1)
    options = sampling_options(bundle, routing="full", guidance_scale=guidance_scale)
    asyncio.run(sampler.draw("a cat", [0, 1, 2], options))
    for latents, _, text, null_text, *_ in (call for handle in handles for call in handle.sent):
        assert len(latents) == 3
        assert len(text.text_embeddings) == 1
        assert (null_text is None) == (guidance_scale == 1.0)
    assert all(handle.sent for handle in handles)
