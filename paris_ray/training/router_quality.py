"""How well a router finds the cluster of a noisy latent: accuracy and calibration, by noise level.

On held-out rows, if there are any: the rows that it was trained on flatter it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paris_ray.diffusion import PathSample, router_logits, sample_path
from paris_ray.evaluation.calibration import calibration, fit_temperature
from paris_ray.evaluation.prototypes import PrototypeRouter, fit_prototypes
from paris_ray.models import Router, TextConditioning
from paris_ray.seeding import torch_generator
from paris_ray.training.data import LatentDataset

NOISE_LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
BATCH_SIZE = 256
MAX_ROWS = 50_000
MAX_PROTOTYPE_ROWS = 20_000
# If all held-out rows are routed right, the likelihood asks for no doubt at all about any prompt
# ever, and if all are routed at random, for nothing but doubt: more than so few rows can tell.
TEMPERATURES = (0.2, 5.0)

Encode = Callable[[Tensor], TextConditioning]


@dataclass(frozen=True, slots=True)
class _Noisy:
    """Rows at one noise level, and what routers say of them, on the CPU."""

    logits: Tensor
    prototype_logits: Tensor
    clusters: Tensor


@torch.no_grad()
def right_cluster(
    router: Router, dataset: LatentDataset, encode: Encode, seed: int
) -> dict[str, float]:
    """Return the share of rows whose most likely cluster is their own, by noise level t.

    Of very many rows, evenly spread ones count.
    """
    shares = {}
    for t in NOISE_LEVELS:
        hits = [
            (router_logits(router, path.x_t, path.t, text).argmax(dim=1).cpu() == clusters)
            for path, text, clusters in _batches(router, dataset, encode, t, seed)
        ]
        shares[f"{t:g}"] = torch.cat(hits).double().mean().item()
    return shares


@torch.no_grad()
def held_out_quality(
    router: Router,
    training: LatentDataset,
    held_out: LatentDataset,
    encode: Encode,
    seed: int,
) -> dict[str, Any]:
    """Return temperature, accuracy and calibration on held-out rows.

    The temperature minimises the negative log likelihood over all noise levels together, within
    TEMPERATURES. Beside
    the router stands one without training, by the cosine to the mean of every cluster: of pooled
    text and noisy latents, or of noisy latents alone if the router reads no text.

    Args:
        router: In evaluation mode.
        training: Rows that the prototypes are means of; `clusters` are 0 to K - 1.
        held_out: Rows to measure on.
        encode: From their text to its conditioning.
        seed: Decides the noise.

    Returns:
        `temperature`, and under `levels` by noise level t: `accuracy`, `prototype_accuracy`,
        expected calibration error before (`ece`) and after dividing by the temperature
        (`ece_calibrated`), and after it the negative log likelihood in nats (`nll_calibrated`) and
        the reliability table.
    """
    prototypes = _fit_prototypes(router, training, encode)
    levels = {t: _at(router, prototypes, held_out, encode, t, seed) for t in NOISE_LEVELS}
    logits = torch.cat([noisy.logits for noisy in levels.values()])
    clusters = torch.cat([noisy.clusters for noisy in levels.values()])
    temperature = float(np.clip(fit_temperature(logits, clusters), *TEMPERATURES))
    table = {f"{t:g}": _row(noisy, temperature) for t, noisy in levels.items()}
    return {"rows": len(held_out), "temperature": temperature, "levels": table}


def _row(noisy: _Noisy, temperature: float) -> dict[str, Any]:
    raw = calibration(noisy.logits, noisy.clusters)
    calibrated = calibration(noisy.logits / temperature, noisy.clusters)
    prototype = calibration(noisy.prototype_logits, noisy.clusters)
    return {
        "accuracy": raw.accuracy,
        "prototype_accuracy": prototype.accuracy,
        "ece": raw.expected_calibration_error,
        "ece_calibrated": calibrated.expected_calibration_error,
        "nll_calibrated": calibrated.negative_log_likelihood,
        "reliability": {
            "counts": calibrated.reliability.counts.tolist(),
            "confidence": calibrated.reliability.confidence.tolist(),
            "accuracy": calibrated.reliability.accuracy.tolist(),
        },
    }


def _at(
    router: Router,
    prototypes: PrototypeRouter,
    dataset: LatentDataset,
    encode: Encode,
    t: float,
    seed: int,
) -> _Noisy:
    logits, prototype_logits, labels = [], [], []
    for path, text, clusters in _batches(router, dataset, encode, t, seed):
        logits.append(router_logits(router, path.x_t, path.t, text).cpu())
        prototype_logits.append(prototypes.logits(_evidence(router, path.x_t, text)))
        labels.append(clusters)
    return _Noisy(torch.cat(logits), torch.cat(prototype_logits), torch.cat(labels))


def _fit_prototypes(router: Router, dataset: LatentDataset, encode: Encode) -> PrototypeRouter:
    rows, labels = [], []
    for path, text, clusters in _batches(router, dataset, encode, 0.0, 0, MAX_PROTOTYPE_ROWS):
        rows.append(_evidence(router, path.x_t, text))
        labels.append(clusters)
    num_clusters = router.config.num_experts
    return fit_prototypes(torch.cat(rows), torch.cat(labels), num_clusters=num_clusters)


def _evidence(router: Router, latents: Tensor, text: TextConditioning) -> Tensor:
    """Return what a prototype router goes by, each kind of evidence with an equal part."""
    unit = torch.nn.functional.normalize
    parts = [unit(latents.float().flatten(1))]
    if router.config.text_embed_dim:
        parts.append(unit(text.pooled_text.float()))
    return torch.cat(parts, dim=1).cpu()


def _batches(
    router: Router,
    dataset: LatentDataset,
    encode: Encode,
    t: float,
    seed: int,
    max_rows: int = MAX_ROWS,
) -> Iterator[tuple[PathSample, TextConditioning, Tensor]]:
    """Yield evenly spread rows with noise of level t, their text and their clusters."""
    device = router.pos_embed.device
    generator = torch_generator(seed, "router accuracy", round(1000 * t))
    count = min(len(dataset), max_rows)
    for rows in (torch.arange(count) * len(dataset) // count).split(BATCH_SIZE):
        latents = dataset.read_latents(rows)
        noise = torch.randn(latents.shape, generator=generator)
        times = torch.full((len(rows),), t, device=device)
        path = sample_path(latents.to(device), noise.to(device), times)
        text = encode(dataset.read_text(rows, 0).to(device))
        yield path, text, dataset.clusters[rows]
