"""A router without training: the cosine to the mean of every cluster.

What a trained router must beat. It routes by whatever its rows are: features of clean pictures,
pooled text, or latents at some noise level.

Source: nearest class mean, Mensink et al. 2013 (TPAMI 35), here with the cosine of spherical
k-means, which made the clusters.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from paris_ray.errors import EvaluationError


@dataclass(frozen=True, slots=True)
class PrototypeRouter:
    """Directions of the clusters.

    Attributes:
        prototypes: `(K, D)` unit vectors, float32, on the CPU.
        temperature: What cosines are divided by; `calibration.fit_temperature` says by how much
            more.
    """

    prototypes: Tensor
    temperature: float = 1.0

    def logits(self, rows: Tensor) -> Tensor:
        """Return `(N, K)` logits of rows `(N, ...)`, which are flattened to `(N, D)`.

        Raises:
            EvaluationError: if they have another D.
        """
        flat = _unit_rows(rows)
        if flat.shape[1] != self.prototypes.shape[1]:
            raise EvaluationError(
                f"rows has {flat.shape[1]} values a row: "
                f"the prototypes have {self.prototypes.shape[1]}"
            )
        return flat @ self.prototypes.T / self.temperature


def fit_prototypes(
    rows: Tensor, clusters: Tensor, *, num_clusters: int, temperature: float = 1.0
) -> PrototypeRouter:
    """Return a router whose prototypes are the mean directions of the clusters.

    Args:
        rows: `(N, ...)` of training pictures, flattened to `(N, D)`; a row of zeros has no say.
        clusters: `(N,)` cluster of each, 0 to K - 1.
        num_clusters: K.
        temperature: Positive; divides the cosines.

    Raises:
        EvaluationError: if shapes or values do not fit, or a cluster has no direction.
    """
    if clusters.shape != rows.shape[:1]:
        raise EvaluationError(
            f"clusters of shape {tuple(clusters.shape)} is not allowed: there are {len(rows)} rows"
        )
    if not temperature > 0:
        raise EvaluationError(f"temperature={temperature} is not allowed: it must be positive")
    if len(clusters) and not 0 <= int(clusters.min()) <= int(clusters.max()) < num_clusters:
        raise EvaluationError(
            f"clusters from {int(clusters.min())} to {int(clusters.max())} are not allowed: "
            f"0 to {num_clusters - 1}"
        )
    flat = _unit_rows(rows)
    sums = torch.zeros(num_clusters, flat.shape[1]).index_add_(0, clusters.cpu().long(), flat)
    empty = (sums.norm(dim=1) == 0).nonzero()[:, 0].tolist()
    if empty:
        raise EvaluationError(f"clusters {empty} have no mean direction: each needs a row or more")
    return PrototypeRouter(F.normalize(sums), temperature)


def _unit_rows(rows: Tensor) -> Tensor:
    return F.normalize(rows.detach().cpu().float().flatten(1))
