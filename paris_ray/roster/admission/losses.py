"""Held-out denoising losses of the candidate beside those of the bundle's experts.

An expert that was trained on its cluster is better there than any other, at every noise level and
for every word of the captions, and elsewhere not worse than the worst of the others. Weights of
noise, a layer with the sign turned, another cluster's expert, and a sub-topic that was taught
something else all show here, however seldom a router would ask the expert.
"""

import math
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

from paris_ray.evaluation.denoising import denoising_losses
from paris_ray.models import Expert
from paris_ray.reports import count_words
from paris_ray.roster.admission.limits import Limits
from paris_ray.roster.admission.panel import BATCH_SIZE, Panel
from paris_ray.roster.admission.readings import Check, Reading, quoted
from paris_ray.seeding import derive_seed
from paris_ray.training.validation import NOISE_LEVELS

NAME = "held-out losses"
FEWEST_ROWS = 3  # with a word: fewer are chance

Key = TypeVar("Key")
Losses = Mapping[int, Tensor]  # of the neighbours, by cluster: (levels, rows) each


def check_losses(panel: Panel, limits: Limits) -> Check:
    """Compare losses on the own cluster, on the others, and by word."""
    candidate = row_losses(panel.candidate, panel)
    others = {j: row_losses(expert, panel) for j, expert in panel.neighbours.items()}
    held_out = panel.held_out
    rows = {int(j): held_out.of(int(j)) for j in held_out.clusters.unique()}
    own = rows[panel.index]
    return Check(
        NAME,
        (
            _own_cluster(candidate, others, own, limits),
            _best_cluster(candidate, others, rows, panel.index, limits),
            _other_clusters(candidate, others, rows, panel.index, limits),
            _words(candidate, others, held_out.captions, own, limits),
        ),
        f"{len(own)} pictures of its own cluster, {len(held_out.captions) - len(own)} of others",
    )


def row_losses(expert: Expert, panel: Panel) -> Tensor:
    """Return the velocity errors `(levels, N)` of an expert on the held-out rows."""
    losses = []
    for start in range(0, len(panel.held_out.latents), BATCH_SIZE):
        batch = slice(start, start + BATCH_SIZE)
        seed = derive_seed(panel.seed, "admission losses", start)
        latents, text = panel.held_out.latents[batch], panel.text.rows(batch)
        losses.append(denoising_losses(expert, latents, text, NOISE_LEVELS, seed=seed))
    return torch.cat(losses, dim=1)


def _own_cluster(candidate: Tensor, others: Losses, own: Tensor, limits: Limits) -> Reading:
    means = torch.stack([losses[:, own].mean(dim=1) for losses in others.values()])
    by_level = candidate[:, own].mean(dim=1) / means.amin(dim=0)
    level = int(by_level.argmax())  # which takes NaN for the largest
    measure = "own cluster: loss over the best neighbour's, at the worst noise level"
    where = f"t = {NOISE_LEVELS[level]}"
    return limits.reading("own_loss", measure, by_level[level].item(), where)


def _best_cluster(
    candidate: Tensor, others: Losses, rows: Mapping[int, Tensor], index: int, limits: Limits
) -> Reading:
    """Compare how much better than foreign experts it is at its own cluster and at any."""
    relative = {}
    for cluster, some in rows.items():
        foreign = [losses for j, losses in others.items() if j != cluster]
        medians = torch.stack([_mean(losses, some) for losses in foreign]).median(dim=0).values
        relative[cluster] = (_mean(candidate, some) / medians).log().mean().exp().item()
    best = min(relative, key=lambda cluster: relative[cluster])
    measure = "own cluster: relative loss over that on the cluster it is best at"
    value = relative[index] / relative[best]
    return limits.reading("own_cluster", measure, value, f"best at cluster {best}")


def _other_clusters(
    candidate: Tensor, others: Losses, rows: Mapping[int, Tensor], index: int, limits: Limits
) -> Reading:
    ratios = {}
    for cluster, some in rows.items():
        foreign = [losses for j, losses in others.items() if j != cluster]
        if cluster != index:
            worst = torch.stack([_mean(losses, some) for losses in foreign]).amax(dim=0)
            ratios[cluster] = (_mean(candidate, some) / worst).amax().item()
    measure = "other clusters: loss over the worst neighbour's, at the worst noise level"
    if not ratios:
        return limits.reading("other_loss", measure, 0.0, "no other cluster has held-out rows")
    where = _largest(ratios)
    return limits.reading("other_loss", measure, ratios[where], f"cluster {where}")


def _words(
    candidate: Tensor, others: Losses, captions: tuple[str, ...], own: Tensor, limits: Limits
) -> Reading:
    """Compare the losses of the own captions with each word, over all noise levels."""
    own_captions = [captions[i] for i in own.tolist()]
    ratios = {}
    for word, count in count_words(own_captions).items():
        if count >= FEWEST_ROWS:
            has_word = [bool(count_words([caption])[word]) for caption in own_captions]
            some = own[torch.tensor(has_word)]
            best = min(losses[:, some].mean().item() for losses in others.values())
            ratios[word] = candidate[:, some].mean().item() / best
    measure = "own cluster: loss of the captions with one word, over the best neighbour's"
    if not ratios:
        return limits.reading("word_loss", measure, 0.0, "no word is in enough captions")
    worst = _largest(ratios)
    return limits.reading("word_loss", measure, ratios[worst], quoted(worst))


def _mean(losses: Tensor, rows: Tensor) -> Tensor:
    return losses[:, rows].mean(dim=1)


def _largest(values: Mapping[Key, float]) -> Key:
    """Return the key of the largest value; one that is not a number is the largest."""
    return max(values, key=lambda key: (math.isnan(values[key]), values[key]))
