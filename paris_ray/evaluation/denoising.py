"""The error of an expert at fixed noise levels, the same noise for every expert compared."""

from collections.abc import Sequence

import torch
from torch import Tensor

from paris_ray.diffusion import predict_velocity, sample_path
from paris_ray.errors import EvaluationError
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
    shape = (len(times) * len(latents), *latents.shape[1:])
    noise = torch.randn(shape, generator=torch_generator(seed, "denoising losses"))
    return _losses(expert, latents, text, times, noise)


@torch.inference_mode()
def cluster_losses(
    expert: Expert,
    latents: Tensor,
    text: TextConditioning,
    clusters: Tensor,
    times: Sequence[float],
    *,
    num_clusters: int,
    seed: int,
    batch_size: int,
) -> Tensor:
    """Return an expert's mean denoising loss on every cluster: its row of the (K x K) matrix.

    An expert that has specialised has its least loss on its own cluster. A picture's noise depends
    on the seed, its row and its shape only, so rows of the matrix are comparable, and the batch
    size changes nothing but rounding.

    Args:
        expert: The expert, or a view of it.
        latents: `(N, C, H, W)` of held-out pictures, of all clusters.
        text: Their captions.
        clusters: `(N,)` cluster of each, 0 to K - 1.
        times: Noise levels in [0, 1], which are averaged over.
        num_clusters: K.
        seed: Decides the noise.
        batch_size: Pictures at a time, each at all levels.

    Returns:
        `(K,)` float64, on the CPU.

    Raises:
        EvaluationError: if the clusters do not fit, one of them has no picture, or the batch size
            is not positive.
    """
    if batch_size < 1:
        raise EvaluationError(f"batch_size={batch_size} is not allowed: 1 or more")
    labels = _checked_clusters(clusters, len(latents), num_clusters)
    losses = []
    for start in range(0, len(latents), batch_size):
        batch = latents[start : start + batch_size]
        shape = (len(times), *latents.shape[1:])
        noise = [
            torch.randn(shape, generator=torch_generator(seed, "cluster losses", start + i))
            for i in range(len(batch))
        ]
        rows = text.rows(slice(start, start + len(batch)))
        losses.append(_losses(expert, batch, rows, times, torch.stack(noise, 1).flatten(0, 1)))
    means = torch.cat(losses, dim=1).double().mean(dim=0)
    return torch.bincount(labels, means, num_clusters) / torch.bincount(labels)


def _checked_clusters(clusters: Tensor, num_rows: int, num_clusters: int) -> Tensor:
    labels = clusters.cpu().long()
    if labels.shape != (num_rows,):
        raise EvaluationError(
            f"clusters of shape {tuple(labels.shape)} is not allowed: there are {num_rows} latents"
        )
    present = sorted(set(labels.tolist()))
    if present != list(range(num_clusters)):
        raise EvaluationError(
            f"clusters {present} are not allowed: each of 0 to {num_clusters - 1} needs a picture"
        )
    return labels


def _losses(
    expert: Expert, latents: Tensor, text: TextConditioning, times: Sequence[float], noise: Tensor
) -> Tensor:
    """Return `(len(times), B)` losses; the noise is `(len(times) * B, C, H, W)`."""
    device, levels = expert.pos_embed.device, len(times)
    x_0 = latents.float().repeat(levels, 1, 1, 1)
    t = torch.tensor(times).repeat_interleave(len(latents))
    path = sample_path(x_0.to(device), noise.to(device), t.to(device))
    encoded = EncodedText.concatenate([expert.encode_text(text.to(device))] * levels)
    velocity = predict_velocity(expert, path.x_t, path.t, encoded)
    error = (velocity - path.velocity).square().flatten(1).mean(dim=1)
    return error.view(levels, len(latents)).cpu()
