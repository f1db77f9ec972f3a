"""What a site tells of its clusters, so that the coordinator's router can learn to choose them.

Every row goes, noised as in a router's training, through the router that the federation gave. Of
what its last layer reads, only mean and covariance of each cluster leave the site: no row does, and
nobody needs rows of two clusters, as the training of a classifier would. The coordinator draws from
Gaussians with those of all sites, and fits the last layer to what it drew.

Source: CCVR, Luo et al. 2021 (arXiv:2106.05001), algorithm 1.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional

from paris_ray.artifacts import VerifiedFolder
from paris_ray.bundle.weights import read_header
from paris_ray.config import TrainingConfig
from paris_ray.diffusion import router_features, sample_path
from paris_ray.errors import FederationError
from paris_ray.folders import Folder
from paris_ray.models import Router, TextConditioning
from paris_ray.seeding import torch_generator
from paris_ray.training.data import LatentDataset, batches

FILE = "router_statistics.safetensors"
MIN_SAMPLES = 4096  # of each cluster: rows are drawn again, with other noise
MAX_SAMPLES = 100_000
BATCH_SIZE = 256
ROUNDING = 1e-9
VIRTUAL, MAX_VIRTUAL = 2000, 200_000  # features that are drawn of a cluster, and of all
DECAY = 1e-4  # of the last layer's squared weights, beside the mean negative log likelihood
ITERATIONS = 100
BISECTIONS = 100
MOST_ODDS = 10  # by which claims may change the odds of some clusters against the others


@dataclass(frozen=True, slots=True)
class RouterStatistics:
    """Of what the router's last layer reads, d numbers a noised row, in float64.

    Attributes:
        clusters: `(c,)` int64, numbers of the clusters.
        means: `(c, d)` of each cluster.
        covariances: `(c, d, d)` likewise.
    """

    clusters: Tensor
    means: Tensor
    covariances: Tensor

    def of(self, clusters: Sequence[int]) -> "RouterStatistics":
        """Return those of some of the clusters."""
        kept = torch.isin(self.clusters, torch.tensor(clusters))
        return RouterStatistics(self.clusters[kept], self.means[kept], self.covariances[kept])

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
            "covariances": ((count, width, width), "F64"),
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
        in_range = (self.covariances.abs() <= torch.outer(bound, bound)).all()
        if (
            not in_range
            or not torch.equal(self.covariances, self.covariances.mT)
            or torch.linalg.eigvalsh(self.covariances).min() < -ROUNDING * bound.max() ** 2
        ):
            raise FederationError(f"{where}: covariances are none of what the router gives")


def _largest_features(router: Router) -> Tensor:
    """Return the bound `(d,)` of each number that the last layer can read.

    A layer norm's output has length sqrt(d), so none of it is larger.
    """
    norm: Any = router.head[2]
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
    means, covariances = [], []
    for dataset in shards.values():
        features = _features(router, dataset, config, encode, seed)
        means.append(features.mean(dim=0))
        covariance = torch.cov(features.T, correction=0)
        covariances.append((covariance + covariance.T) / 2)
    return RouterStatistics(
        clusters=torch.tensor(list(shards)),
        means=torch.stack(means),
        covariances=torch.stack(covariances),
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


def bounded_shares(claimed: Sequence[int], own: Sequence[int]) -> list[float]:
    """Return which share of all rows each cluster is taken to have; together they are 1.

    They are in proportion to what is claimed, but none is more than sqrt(MOST_ODDS) times the share
    of the coordinator's own rows, nor less than that part of it: a claim cannot be checked, and one
    of 10^12 rows would have the router choose its cluster whatever comes. So whatever some clusters
    claim together, and however many there are, their odds against all others change by at most
    MOST_ODDS: they have at most sqrt(MOST_ODDS) times their share, the others at least that part.

    Args:
        claimed: How many rows each site says its cluster has, at least 1 each.
        own: How many the coordinator has of it, at least 1 each.
    """
    claims, fair = np.array(claimed, np.float64), np.array(own, np.float64) / sum(own)
    claims /= claims.sum()
    low, high = fair / np.sqrt(MOST_ODDS), fair * np.sqrt(MOST_ODDS)

    def shares(log_scale: float) -> NDArray[np.float64]:
        return np.clip(claims * np.exp(log_scale), low, high)

    # At one end all are at their least, and make less than 1; at the other they are at their most.
    least, most = np.log(low / claims).min(), np.log(high / claims).max()
    for _ in range(BISECTIONS):
        middle = (least + most) / 2
        least, most = (middle, most) if shares(middle).sum() < 1 else (least, middle)
    return [float(share) for share in shares(most)]


def fitted_head(
    statistics: Sequence[RouterStatistics], rows: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Return weight `(K, d)` and bias `(K,)` of a router's last layer, in float32.

    Args:
        statistics: Of all sites; together they have every cluster 0 to K - 1 once.
        rows: How many rows each cluster has, or what share, which makes it the likelier.
    """
    features, labels = _virtual(statistics, len(rows))
    shares = torch.tensor(rows, dtype=torch.float32) / sum(rows)
    weight = torch.zeros(len(rows), features.shape[1], requires_grad=True)
    bias = torch.zeros(len(rows), requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [weight, bias], max_iter=ITERATIONS, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        logits = functional.linear(features, weight, bias)
        value = functional.cross_entropy(logits, labels, weight=shares)
        value = value + DECAY * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimiser.step(loss)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()


def _virtual(statistics: Sequence[RouterStatistics], num_clusters: int) -> tuple[Tensor, Tensor]:
    """Return features `(N, d)` that are drawn, as many of each cluster, and those clusters."""
    count = min(VIRTUAL, MAX_VIRTUAL // num_clusters)
    features, labels = [], []
    for each in statistics:
        for k, mean, covariance in zip(
            each.clusters.tolist(), each.means, each.covariances, strict=True
        ):
            generator = torch_generator(0, "virtual features", k)
            noise = torch.randn(count, len(mean), generator=generator, dtype=torch.float64)
            variances, directions = torch.linalg.eigh(covariance)
            root = directions * variances.clamp(min=0).sqrt()
            features.append((mean + noise @ root.T).float())
            labels += [k] * count
    return torch.cat(features), torch.tensor(labels)
