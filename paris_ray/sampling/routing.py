"""Routing: from router logits to the weight of each expert, and to the velocity that they mix."""

from collections.abc import Collection

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn import functional

from paris_ray.sampling_options import Routing

NEGLIGIBLE_WEIGHT = 1e-6


def without_experts(router_logits: Tensor, barred: Collection[int]) -> Tensor:
    """Return `(B, K)` logits by which these experts get no weight, whatever the routing."""
    if not barred:
        return router_logits
    return router_logits.index_fill(1, torch.tensor(sorted(barred)), -torch.inf)


def expert_weights(router_logits: Tensor, routing: Routing) -> Tensor:
    """Return `(B, K)` weights that sum to 1 over the chosen experts and are 0 elsewhere.

    `top-k` keeps the k most likely experts, `threshold` those of at least that probability (and
    always the most likely one), `top-p` the fewest that have that probability together, so that
    as many are asked as the router is in doubt about; all three renormalise. `agree` asks as top-2
    does (`mix` takes note of what they answer). `full` takes the probabilities as they are.
    An expert with less than a millionth of the weight is never asked, whatever the strategy.
    Source: the strategies of the released Paris model card; top-p as in nucleus sampling, Holtzman
    et al. 2019 (arXiv:1904.09751).

    Args:
        router_logits: `(B, K)`.
        routing: The strategy.
    """
    probabilities = router_logits.float().softmax(dim=-1)
    keep = probabilities >= NEGLIGIBLE_WEIGHT
    if routing.kind == "full":
        return torch.where(keep, probabilities, 0.0)
    if routing.kind in ("top-k", "agree"):
        chosen = probabilities.topk(routing.top_k, dim=-1).indices
        keep &= torch.zeros_like(keep).scatter(-1, chosen, True)
    elif routing.kind == "top-p":
        ordered, order = probabilities.sort(dim=-1, descending=True)
        before = ordered.cumsum(dim=-1) - ordered  # what the more likely ones have together
        keep &= torch.zeros_like(keep).scatter(-1, order, before < routing.top_p)
    else:
        largest = probabilities.max(dim=-1, keepdim=True).values
        keep &= (probabilities >= routing.threshold) | (probabilities == largest)
    kept = torch.where(keep, probabilities, 0.0)
    return kept / kept.sum(dim=-1, keepdim=True)


def mix(weights: Tensor, velocities: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    """Return the mixed velocity `(B, C, H, W)` and the weights `(B, K)` that experts have in it.

    These are the router's but for `agree`: where the second expert's velocity is further from the
    likeliest one's than `routing.disagreement`, that one draws alone, since the mean of two modes
    is in neither. A row's bytes do not depend on the batch.
    Source: that pictures are worse where experts disagree, Villagra, Roy et al. 2026
    (arXiv:2602.02685); this rule is ours.

    Args:
        weights: `(B, K)`, of `expert_weights`.
        velocities: `(B, K, C, H, W)`; zero where an expert has no weight and was not asked.
        routing: The strategy.
    """
    if routing.kind == "agree":
        weights = _agreed_weights(weights, velocities, routing.disagreement)
    mixed = torch.zeros_like(velocities[:, 0])
    for k in range(weights.shape[1]):  # in their order: a sum over a dimension may have another
        mixed += weights[:, k, None, None, None] * velocities[:, k]
    return mixed, weights


def _agreed_weights(weights: Tensor, velocities: Tensor, most: float) -> Tensor:
    """Return the weights, all of it the likeliest expert's in rows where two disagree by more."""
    first, second = weights.topk(2, dim=1).indices.unbind(dim=1)
    rows = torch.arange(len(weights), device=weights.device)
    apart = disagreement(velocities[rows, first], velocities[rows, second])
    alone = functional.one_hot(first, weights.shape[1]).to(weights.dtype)
    return torch.where((apart > most)[:, None], alone, weights)


def disagreement(velocities: Tensor, others: Tensor) -> Tensor:
    """Return `(B,)` the RMS of the others' differences from velocities over the RMS of these.

    Args:
        velocities: `(B, C, H, W)`.
        others: `(B, C, H, W)`.
    """
    # Row by row: how a sum over several is ordered may depend on how many there are.
    pairs = zip(velocities, others, strict=True)
    return torch.stack([vector_norm(other - one) / vector_norm(one) for one, other in pairs])
