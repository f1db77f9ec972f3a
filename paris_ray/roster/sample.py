"""The rows that a router is refitted on: which shard each expert has, and a few rows of each.

Shards are known by digests, never by numbers, since numbers of experts change.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from paris_ray.artifacts import MANIFEST, read_manifest
from paris_ray.bundle import Bundle
from paris_ray.embeddings import (
    LATENTS,
    LATENTS_FLIPPED,
    TEXT_EMBEDDING,
    TOKEN_IDS,
    column_names,
    num_rows,
    part_names,
    read_null_text,
    read_rows,
    tensor_column,
)
from paris_ray.errors import ArtifactError, ConfigError
from paris_ray.folders import Folder
from paris_ray.model_folder.history import Rows, origins
from paris_ray.run import EXPERT, EXPERT_WEIGHTS, SHARD, Run
from paris_ray.seeding import numpy_generator
from paris_ray.training.data import LatentDataset

logger = logging.getLogger("paris_ray")

SAMPLE_SHARE = 0.05  # of the rows of each cluster, at most
MIN_ROWS = 16  # of a cluster, if it has as many
MAX_ROWS = 20_000  # of all clusters together
APART = 5  # every fifth row is not fitted to


@dataclass(frozen=True, slots=True)
class Shard:
    """The rows of one cluster.

    Attributes:
        folder: Where they are.
        digest: Digest of its manifest.
        count: How many there are.
    """

    folder: Folder
    digest: str
    count: int

    @classmethod
    def open(cls, folder: Folder) -> "Shard":
        """Return the shard in a folder; only footers of its files are read.

        Raises:
            ArtifactError: if there is none, or it is empty.
        """
        manifest = read_manifest(folder, SHARD)
        count = sum(num_rows(folder, name) for name in part_names(folder))
        if count != manifest.facts.get("rows") or not count:
            raise ArtifactError(
                f"{folder.uri} has {count} rows, its {MANIFEST} tells {manifest.facts.get('rows')}"
            )
        return cls(folder, manifest.digest, count)

    def told(self, whose: str | None) -> Rows:
        """Return what a history tells of it."""
        return Rows(shard=self.digest, count=self.count, whose=whose)


def find_shards(bundle: Bundle, run: Run, more: Sequence[Folder]) -> list[Shard | None]:
    """Return the shard of each expert of a bundle; None where neither place has it.

    Args:
        bundle: The bundle.
        run: A run that has trained some of its experts, known by the digest of their weights.
        more: Shards of others, known by their digests in the bundle's history.

    Raises:
        ArtifactError: if a shard is not there, or not the one that its expert was trained on.
    """
    trained = _trained_shards(run)
    others = {shard.digest: shard for shard in map(Shard.open, more)}
    found = []
    for k, origin in enumerate(origins(bundle.history, bundle.num_experts)):
        shard = trained.get(bundle.weights_digest(f"expert_{k}"))
        if shard is None and origin is not None and origin.rows_after is not None:
            shard = others.get(origin.rows_after.shard)
        found.append(shard)
    return found


def _trained_shards(run: Run) -> dict[str, Shard]:
    """Return the shards of a run by the SHA-256 of the weights that were trained on them."""
    shards = {}
    for k in range(run.num_experts):
        if not run.expert(k).exists(MANIFEST):
            continue
        expert = read_manifest(run.expert(k), EXPERT)
        shard = Shard.open(run.shard(k))
        if expert.parents.get("shard") != shard.digest:
            raise ArtifactError(f"{run.expert(k).uri} was trained on another shard")
        shards[expert.files[EXPERT_WEIGHTS]] = shard
    return shards


@dataclass(frozen=True, slots=True)
class Sample:
    """A few rows of every cluster, in memory.

    Attributes:
        fitted: What the router is fitted to; clusters are numbered as the experts will be.
        apart: What its temperature is fitted to, and what it is measured on.
    """

    fitted: LatentDataset
    apart: LatentDataset

    def __len__(self) -> int:
        return len(self.fitted) + len(self.apart)


def check_share(share: float) -> None:
    """Raise ConfigError unless so large a sample is allowed."""
    if not 0 < share <= SAMPLE_SHARE:
        raise ConfigError(f"sample_share={share} is not allowed: above 0, at most {SAMPLE_SHARE}")


def draw_sample(shards: Sequence[Shard], share: float, seed: int) -> Sample:
    """Return a sample of some shards, one a cluster.

    Which rows of a shard are drawn depends on it, the share and the seed alone.

    Args:
        shards: In the order of the experts.
        share: Share of the rows, above 0 and at most SAMPLE_SHARE; of each shard at least MIN_ROWS,
            if it has them, and at most its part of MAX_ROWS.
        seed: Decides which.

    Raises:
        ConfigError: if the share is not allowed, or a shard is of other encoders than the first.
        ArtifactError: if a shard cannot be read or lacks a column.
    """
    check_share(share)
    _check_null_text(shards)
    most = max(MIN_ROWS, MAX_ROWS // len(shards))
    drawn = [_draw(shard, share, most, seed) for shard in shards]
    columns = _columns(shards[0].folder)
    parts = [
        {name: tensor_column(table, name) for name in columns}
        for table in (
            read_rows(shard.folder, np.sort(rows), columns)
            for shard, rows in zip(shards, drawn, strict=True)
        )
    ]
    _check_alike(shards, parts)
    clusters = np.repeat(np.arange(len(shards)), [len(rows) for rows in drawn])
    merged = {name: np.concatenate([part[name] for part in parts]) for name in columns}
    place = np.concatenate([np.arange(len(rows)) for rows in drawn])
    null_text = torch.from_numpy(read_null_text(shards[0].folder))
    apart = place % APART == APART - 1
    return Sample(*(_dataset(merged, clusters, null_text, rows) for rows in (~apart, apart)))


def _draw(shard: Shard, share: float, most: int, seed: int) -> NDArray[np.int64]:
    count = min(shard.count, most, max(MIN_ROWS, int(share * shard.count)))
    generator = numpy_generator(seed, f"roster sample of {shard.digest}")
    return generator.permutation(shard.count)[:count]


def _columns(folder: Folder) -> list[str]:
    there = column_names(folder)
    text = next((name for name in (TEXT_EMBEDDING, TOKEN_IDS) if name in there), TEXT_EMBEDDING)
    return [LATENTS, text] + ([LATENTS_FLIPPED] if LATENTS_FLIPPED in there else [])


def _check_null_text(shards: Sequence[Shard]) -> None:
    """Compare what text encoders made of the empty string: it differs where they do."""
    first, *others = (read_null_text(shard.folder) for shard in shards)
    for shard, other in zip(shards[1:], others, strict=True):
        if not np.array_equal(first, other):
            raise ConfigError(
                f"{shard.folder.uri} is of another text encoder than {shards[0].folder.uri}: "
                "their encoded empty strings differ"
            )


def _check_alike(shards: Sequence[Shard], parts: Sequence[dict[str, NDArray[np.generic]]]) -> None:
    for shard, part in zip(shards, parts, strict=True):
        for name, values in part.items():
            wanted, found = parts[0][name].shape[1:], values.shape[1:]
            if wanted != found:
                raise ConfigError(
                    f"{shard.folder.uri}: {name} of shape {found} is not allowed: {wanted}, "
                    f"as in {shards[0].folder.uri}"
                )


def _dataset(
    columns: dict[str, NDArray[np.generic]],
    clusters: NDArray[np.int64],
    null_text: torch.Tensor,
    rows: NDArray[np.bool_],
) -> LatentDataset:
    text = next(name for name in (TEXT_EMBEDDING, TOKEN_IDS) if name in columns)
    flipped = columns.get(LATENTS_FLIPPED)
    return LatentDataset(
        latents=columns[LATENTS][rows],
        latents_flipped=None if flipped is None else flipped[rows],
        text=columns[text][rows],
        null_text=null_text,
        clusters=torch.from_numpy(clusters[rows]),
    )
