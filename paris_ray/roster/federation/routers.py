"""The router of a federation: fitted to what sites tell, or trained on what they share."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch

from paris_ray.artifacts import VerifiedFolder, canonical_json, sha256_hex
from paris_ray.config import Config
from paris_ray.embeddings import NULL_TEXT
from paris_ray.errors import FederationError, ParisError
from paris_ray.folders import Folder
from paris_ray.roster.federation.parts import CPU, open_router
from paris_ray.roster.federation.receive import Received
from paris_ray.roster.federation.shared_rows import read_rows, write_shard
from paris_ray.roster.federation.statistics import (
    RouterStatistics,
    bounded_shares,
    fitted_head,
)
from paris_ray.roster.refit import write_router
from paris_ray.run import ENCODERS, ROUTER, Run
from paris_ray.seeding import derive_seed
from paris_ray.training.data import LatentDataset, load_dataset
from paris_ray.training.loop import Progress
from paris_ray.training.router import measure_router, train_router
from paris_ray.training.text import text_reader

logger = logging.getLogger("paris_ray")

RouterFrom = Literal["statistics", "rows"]
TOLD_CHANGE = 0.01  # of a share: less is rounding, or room for a cluster that was raised
Owners = Mapping[int, Received]  # whose expert each cluster has, in the order of the clusters


def router_of_statistics(
    run: Run, config: Config, source: VerifiedFolder, owners: Owners, output: Folder
) -> dict[str, Any]:
    """Write `router/`: the one that the federation gave, its last layer fitted to statistics.

    Args:
        run: The coordinator's, on whose rows it is measured, and whose shares of rows bound those
            that sites claim.
        config: What all sites share.
        source: What the federation gave.
        owners: Whose statistics count for each cluster.
        output: Where to.

    Returns:
        What `training.router.measure_router` returns.

    Raises:
        FederationError: naming the site and the file that is refused.
    """
    router = open_router(source.part(ROUTER), config.router)
    statistics = []
    for received, clusters in _by_site(owners):
        with refused_by(received):
            sent = RouterStatistics.load(received.files, router, received.stated.clusters)
        statistics.append(sent.of(clusters))
    dataset = load_dataset([run.shard(k) for k in owners])
    weight, bias = fitted_head(statistics, _shares(owners, dataset))
    # In place of the tensors that are there, whose memory is the file that was given.
    router.head[-1].load_state_dict({"weight": weight, "bias": bias}, assign=True)
    write_router(router, torch.float32, output / ROUTER)
    encode = text_reader(dataset, source.folder / ENCODERS, CPU)
    return measure_router(router, dataset, run.held_out_shards(), encode, config.seed)


def _shares(owners: Owners, dataset: LatentDataset) -> list[float]:
    """Return the share of each cluster; tell both, and warn of a claim that does not count."""
    claimed = [received.facts(k).rows for k, received in owners.items()]
    own = dataset.clusters.bincount(minlength=len(owners)).tolist()
    shares = bounded_shares(claimed, own)
    for (k, received), rows, share in zip(owners.items(), claimed, shares, strict=True):
        counts = math.isclose(share, rows / sum(claimed), rel_tol=TOLD_CHANGE)
        logger.log(
            logging.INFO if counts else logging.WARNING,
            "cluster %d: %s claims %.3g %% of all rows, the coordinator has %.3g %%: "
            "%.3g %% counts for the router",
            k,
            received.stated.site,
            100 * rows / sum(claimed),
            100 * own[k] / sum(own),
            100 * share,
        )
    return shares


def router_of_rows(
    run: Run, config: Config, source: VerifiedFolder, owners: Owners, output: Folder
) -> dict[str, Any]:
    """Write `router/`: the one that the federation gave, trained on rows that all sites shared.

    Arguments and result are those of `router_of_statistics`.

    Raises:
        FederationError: naming the site that shares none, or the file that is refused.
    """
    sites = []
    for received, clusters in _by_site(owners):
        with refused_by(received):
            if not received.stated.shares_rows:
                raise FederationError("shares no rows, which the router is to be trained on")
            sizes = {each.cluster: each.rows for each in received.stated.experts}
            columns = read_rows(received.files, source.folder / ENCODERS, _latents(config), sizes)
        sites.append((clusters, columns))
    null_text = source.part(ENCODERS).read(NULL_TEXT)
    shards = {k: output / "rows" / f"cluster={k}" for k in owners}
    for k, folder in shards.items():
        write_shard(folder, k, [columns for clusters, columns in sites if k in clusters], null_text)
    digests = [received.files.digests for received, _ in _by_site(owners)]
    return train_router(
        config.router,
        replace(config.router_training, init_from=(source.folder / ROUTER).uri),
        shards=list(shards.values()),
        shards_digest=sha256_hex(canonical_json(digests)),
        seed=derive_seed(config.seed, "router"),
        output=output / ROUTER,
        on_progress=_say,
        held_out=run.held_out_shards(),
        text_encoder=source.folder / ENCODERS,
    )


ROUTERS: Mapping[RouterFrom, Callable[..., dict[str, Any]]] = {
    "statistics": router_of_statistics,
    "rows": router_of_rows,
}


def _by_site(owners: Owners) -> list[tuple[Received, list[int]]]:
    """Return every site with the clusters whose expert is its own."""
    sites = {received.stated.site: received for received in owners.values()}
    return [
        (received, [k for k, owner in owners.items() if owner is received])
        for received in sites.values()
    ]


@contextmanager
def refused_by(received: Received) -> Iterator[None]:
    """Raise what is wrong with a site's files with its name."""
    try:
        yield
    except ParisError as error:
        raise FederationError(f"{received.stated.site}: {error}") from None


def _latents(config: Config) -> tuple[int, int, int]:
    size = config.router.input_size
    return config.router.in_channels, size, size


def _say(progress: Progress) -> None:
    logger.info("router: step %d of %d", progress.step, progress.num_steps)
