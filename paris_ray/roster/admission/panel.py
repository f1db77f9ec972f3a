"""Who is compared with whom, on what: the candidate, its neighbours and held-out pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from paris_ray.artifacts import MANIFEST, read_manifest
from paris_ray.bundle import Bundle
from paris_ray.diffusion import predict_velocity
from paris_ray.embeddings import LATENTS, num_rows, part_names, read_rows, tensor_column
from paris_ray.errors import BundleError
from paris_ray.folders import Folder
from paris_ray.models import Expert, TextConditioning
from paris_ray.run import EXPERT, EXPERT_WEIGHTS, Run

OWN_ROWS, OTHER_ROWS = 96, 24  # held-out pictures of a cluster that are looked at, at most
BATCH_SIZE = 64


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Captioned pictures that nothing was trained on, of all clusters.

    Attributes:
        captions: N captions.
        latents: `(N, C, H, W)`.
        features: `(N, D)` of the run's image model.
        clusters: `(N,)` the cluster of each.
    """

    captions: tuple[str, ...]
    latents: Tensor
    features: NDArray[np.float32]
    clusters: Tensor

    def of(self, cluster: int) -> Tensor:
        """Return the row numbers of a cluster."""
        return (self.clusters == cluster).nonzero()[:, 0]

    def spread(self, count: int) -> Tensor:
        """Return the numbers of at most `count` rows, evenly spread over the clusters' rows."""
        count = min(count, len(self.captions))
        return torch.arange(count) * len(self.captions) // count


@dataclass(frozen=True)
class Panel:
    """Everything that the checks of a model's behaviour read.

    Attributes:
        candidate: The expert from a stranger.
        index: The cluster that it would stand for.
        neighbours: The bundle's experts but the one in whose place it would stand, by cluster.
        bundle: The bundle, whose text encoder and codec are used; its router is not asked.
        held_out: Pictures of all clusters.
        seed: Decides all noise.
    """

    candidate: Expert
    index: int
    neighbours: Mapping[int, Expert]
    bundle: Bundle
    held_out: HeldOut
    seed: int

    @cached_property
    def text(self) -> TextConditioning:
        """The conditioning of the held-out captions."""
        return self.encode(self.held_out.captions)

    def encode(self, captions: Sequence[str]) -> TextConditioning:
        """Return the conditioning of captions, on the CPU."""
        return self.bundle.texts.encode(captions, exact=False)

    @property
    def experts(self) -> list[Expert]:
        """The candidate, then its neighbours."""
        return [self.candidate, *self.neighbours.values()]


@torch.no_grad()  # not inference_mode: gradients are taken of differences to them
def velocities(expert: Expert, x_t: Tensor, t: float, text: TextConditioning) -> Tensor:
    """Return an expert's velocities `(B, C, H, W)` at one time, on the CPU, a batch at a time."""
    device = expert.pos_embed.device
    found = []
    for start in range(0, len(x_t), BATCH_SIZE):
        rows = slice(start, start + BATCH_SIZE)
        latents = x_t[rows].to(device)
        times = torch.full((len(latents),), t, device=device)
        found.append(predict_velocity(expert, latents, times, text.rows(rows).to(device)).cpu())
    return torch.cat(found)


def held_out_shards(
    bundle: Bundle, run: Run, index: int, cluster: int | None = None
) -> dict[int, Folder]:
    """Return folders with held-out rows by the number of the bundle's expert that they are of.

    Numbers of experts change, those of a run's clusters do not: an expert is known by the digest of
    its weights. Clusters of experts that left are left out.

    Args:
        bundle: The bundle.
        run: The run that trained its experts, except one in whose place the candidate would come.
        index: The candidate's number.
        cluster: The run's cluster that it would stand for; None: that of its number, which is
            allowed where the numbers of all others are those of their clusters.

    Raises:
        BundleError: if the run has not trained one of the others, or the cluster is not told, is
            another expert's, or has no held-out rows.
    """
    trained, found = _trained_clusters(run), {}
    for j in (j for j in range(bundle.num_experts) if j != index):
        digest = bundle.weights_digest(f"expert_{j}")
        if digest not in trained:
            raise BundleError(f"expert_{j} of the bundle was not trained by {run.folder.uri}")
        found[j] = trained[digest]
    for j, own in found.items():
        if cluster is None and own != j:
            raise BundleError(f"expert_{j} is of the run's cluster {own}: give --cluster as well")
        if own == cluster:
            raise BundleError(f"cluster={cluster} is not allowed: expert_{j} is of that cluster")
    found[index] = index if cluster is None else cluster
    shards = run.held_out_shards()
    if found[index] not in shards:
        raise BundleError(f"cluster={found[index]} is not allowed: no row of it is held out")
    return {j: shards[own] for j, own in sorted(found.items()) if own in shards}


def _trained_clusters(run: Run) -> dict[str, int]:
    """Return the clusters of a run by the SHA-256 of the weights that were trained on them."""
    experts = {k: run.expert(k) for k in range(run.num_experts)}
    return {
        read_manifest(folder, EXPERT).files[EXPERT_WEIGHTS]: k
        for k, folder in experts.items()
        if folder.exists(MANIFEST)
    }


def read_held_out(shards: Mapping[int, Folder], index: int) -> HeldOut:
    """Read evenly spread held-out rows of every cluster.

    Args:
        shards: Folders with the held-out rows, by cluster; see `held_out_shards`.
        index: The candidate's cluster, of which more are read.

    Raises:
        BundleError: if the candidate's cluster has none: nothing could be said of it.
        ArtifactError: if a file is missing or damaged.
    """
    if index not in shards:
        raise BundleError(f"index={index} is not allowed: no row of that cluster is held out")
    captions: list[str] = []
    latents, features, clusters = [], [], []
    for cluster, shard in shards.items():
        table = read_rows(
            shard,
            spread_rows(shard, OWN_ROWS if cluster == index else OTHER_ROWS),
            ["caption", LATENTS, "features"],
        )
        captions += table["caption"].to_pylist()
        latents.append(tensor_column(table, LATENTS).astype(np.float32))
        features.append(tensor_column(table, "features").astype(np.float32))
        clusters += [cluster] * len(table)
    return HeldOut(
        tuple(captions),
        torch.from_numpy(np.concatenate(latents)),
        np.concatenate(features),
        torch.tensor(clusters),
    )


def spread_rows(shard: Folder, count: int) -> NDArray[np.int64]:
    """Return the numbers of at most `count` rows of a shard, evenly spread."""
    total = sum(num_rows(shard, name) for name in part_names(shard))
    count = min(count, total)
    return np.arange(count, dtype=np.int64) * total // max(1, count)
