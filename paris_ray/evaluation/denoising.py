"""The error of an expert at fixed noise levels, the same noise for every expert compared."""

from collections.abc import Sequence

import torch
from torch import Tensor

from paris_ray.diffusion import predict_velocity, sample_path
from paris_ray.models import EncodedText, Expert, TextConditioning
from paris_ray.seeding import torch_generator


@torch.inference_mode()
def denoising_losses(
    expert: Expert, latents: Tensor, text: TextConditioning, times: Sequence[float], *, seed: int
) -> Tensor:
    """Return the mean squared error of the velocity, at every level and picture.

    It means the same for all experts, whatever they predict and however training weighs levels.
    All pairs are one batch, and captions are encoded once: each module is called as few times, and
    with as few rows, as can be.

    Args:
        expert: The expert, or a view of it.
        latents: `(B, C, H, W)` of the pictures.
        text: Their captions.
        times: Noise levels in [0, 1].
        seed: Decides the noise, with the number of levels and the shape of `latents`.

    Returns:
        `(len(times), B)` float32, on the CPU.
    """
    device, levels = expert.pos_embed.device, len(times)
    x_0 = latents.float().repeat(levels, 1, 1, 1)
    noise = torch.randn(x_0.shape, generator=torch_generator(seed, "denoising losses"))
    t = torch.tensor(times).repeat_interleave(len(latents))
    path = sample_path(x_0.to(device), noise.to(device), t.to(device))
    encoded = EncodedText.concatenate([expert.encode_text(text.to(device))] * levels)
    velocity = predict_velocity(expert, path.x_t, path.t, encoded)
    error = (velocity - path.velocity).square().flatten(1).mean(dim=1)
    return error.view(levels, len(latents)).cpu()
