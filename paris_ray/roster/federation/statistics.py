"""What a site tells of its clusters, so that the coordinator's router can learn to choose them.

Every row goes, noised as in a router's training, through the router that the federation gave; of
what its last layer reads, only the mean of each cluster and one covariance of all leave the site.
From those of all sites the last layer follows in closed form, by linear discriminant analysis: no
row leaves, nothing is trained, and nobody needs rows of two clusters, as a classifier would.

Source: Mensink et al. 2013 (doi:10.1109/TPAMI.2013.83), class means as a classifier of features
that stay; Hastie, Tibshirani and Friedman, The Elements of Statistical Learning (2009), eq. 4.10.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from paris_ray.artifacts import Folder, VerifiedFolder
from paris_ray.bundle.weights import read_header
from paris_ray.config import TrainingConfig
from paris_ray.diffusion import router_features, sample_path
from paris_ray.errors import FederationError
from paris_ray.models import Router, TextConditioning
from paris_ray.training.data import LatentDataset, batches

FILE = "router_statistics.safetensors"
MIN_SAMPLES = 4096  # of each cluster: rows are drawn again, with other noise
MAX_SAMPLES = 100_000
BATCH_SIZE = 256
ROUNDING = 1e-9
RIDGE = 1e-3  # added to the covariance, as a share of its mean variance


@dataclass(frozen=True, slots=True)
class RouterStatistics:
    """Of what the router's last layer reads, d numbers a noised row, in float64.

    Attributes:
        clusters: `(c,)` int64, numbers of the clusters.
        means: `(c, d)` of each cluster.
        covariance: `(d, d)` around those means, of all clusters alike.
    """

    clusters: Tensor
    means: Tensor
    covariance: Tensor

    def of(self, clusters: Sequence[int]) -> "RouterStatistics":
        """Return those of some of the clusters; the covariance stays that of all."""
        kept = torch.isin(self.clusters, torch.tensor(clusters))
        return replace(self, clusters=self.clusters[kept], means=self.means[kept])

    def save(self, folder: Folder) -> None:
        """Write the file."""
        tensors = {name: getattr(self, name).contiguous() for name in self.__slots__}
        folder.write(FILE, safetensors.torch.save(tensors))

    @classmethod
    def load(
        cls, part: VerifiedFolder, router: Router, clusters: Sequence[int]
    ) -> "RouterStatistics":
        """Read what a site sent, which must be what this router can give.

        Raises:
            FederationError: naming the tensor whose shape, type or values are not allowed.
        """
        where = f"{part.folder.uri}/{FILE}"
        count, width = len(clusters), router.config.hidden_size
        expected = {
            "clusters": ((count,), "I64"),
            "means": ((count, width), "F64"),
            "covariance": ((width, width), "F64"),
        }
        found = read_header(part.verified_file(FILE), where)
        for name in expected.keys() | found.keys():
            if found.get(name) != expected.get(name):
                raise FederationError(
                    f"{where}: tensor {name!r:.80} is {found.get(name, 'missing')}, "
                    f"expected {expected.get(name, 'none')}"
                )
        try:
            statistics = cls(**safetensors.torch.load(part.read(FILE)))
        except SafetensorError as error:
            raise FederationError(f"{where} is damaged: {error}") from None
        statistics._check(where, router, clusters)
        return statistics

    def _check(self, where: str, router: Router, clusters: Sequence[int]) -> None:
        if self.clusters.tolist() != list(clusters):
            raise FederationError(f"{where}: clusters are not {list(clusters)}")
        bound = _largest_features(router)
        if not (self.means.abs() <= bound).all():  # so is what is not a number refused
            raise FederationError(f"{where}: means are no means of what the router gives")
        allowed = (self.covariance.abs() <= torch.outer(bound, bound)).all() and torch.equal(
            self.covariance, self.covariance.T
        )
        if not allowed or torch.linalg.eigvalsh(self.covariance)[0] < -ROUNDING * bound.max() ** 2:
            raise FederationError(f"{where}: covariance is none of what the router gives")


def _largest_features(router: Router) -> Tensor:
    """Return the bound `(d,)` of each number that the last layer can read.

    A layer norm's output has length sqrt(d), so none of it is larger.
    """
    norm = router.head[2]
    length = float(router.config.hidden_size) ** 0.5
    return norm.weight.abs().double() * length + norm.bias.abs().double() + 1e-6


@torch.no_grad()
def router_statistics(
    router: Router,
    shards: Mapping[int, LatentDataset],
    config: TrainingConfig,
    encode: Callable[[Tensor], TextConditioning],
    *,
    seed: int,
) -> RouterStatistics:
    """Return the statistics of a site's clusters.

    Args:
        router: The one that the federation gave, in evaluation mode.
        shards: The rows, by cluster.
        config: Of the router's training: how times, noise and text are drawn.
        encode: From text of a batch to its conditioning.
        seed: Decides what is drawn.
    """
    means, scatter, total = [], torch.zeros(router.config.hidden_size, dtype=torch.float64), 0
    for dataset in shards.values():
        features = _features(router, dataset, config, encode, seed)
        means.append(features.mean(dim=0))
        deviations = features - means[-1]
        scatter = scatter + deviations.T @ deviations
        total += len(features)
    covariance = scatter / total
    return RouterStatistics(
        clusters=torch.tensor(list(shards)),
        means=torch.stack(means),
        covariance=(covariance + covariance.T) / 2,
    )


def _features(
    router: Router,
    dataset: LatentDataset,
    config: TrainingConfig,
    encode: Callable[[Tensor], TextConditioning],
    seed: int,
) -> Tensor:
    """Return what the last layer reads of noised rows, `(N, d)` float64."""
    count = min(max(len(dataset), MIN_SAMPLES), MAX_SAMPLES)
    drawn = replace(config, batch_size=BATCH_SIZE)
    draw = batches(dataset, drawn, seed=seed, purpose="router statistics")
    found = []
    for step in range(-(-count // BATCH_SIZE)):
        batch = draw(step)
        path = sample_path(batch.latents, batch.noise, batch.t)
        found.append(router_features(router, path.x_t, path.t, encode(batch.text)).double())
    return torch.cat(found)


def fitted_head(
    statistics: Sequence[RouterStatistics], rows: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return weight `(K, d)` and bias `(K,)` of a router's last layer, in float32.

    The logits are those of Gaussian clusters with one covariance, log p(features | k) + log p(k),
    but for what is alike for all k.

    Args:
        statistics: Of all sites; together they have every cluster 0 to K - 1 once.
        rows: How many rows each cluster has; at least one.
    """
    clusters = torch.cat([each.clusters for each in statistics])
    means = torch.cat([each.means for each in statistics])[clusters.argsort()]
    counts = torch.tensor(rows, dtype=torch.float64)
    shares = counts / counts.sum()
    covariance = sum(
        (shares[each.clusters].sum() * each.covariance for each in statistics),
        start=torch.zeros_like(statistics[0].covariance),
    )
    ridge = RIDGE * covariance.diagonal().mean().clamp(min=1e-12)
    weight = torch.linalg.solve(covariance + ridge * torch.eye(len(covariance)), means.T).T
    bias = shares.log() - (weight * means).sum(dim=1) / 2
    return weight.float(), bias.float()
