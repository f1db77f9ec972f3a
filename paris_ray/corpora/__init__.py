"""Captioned pictures in: all kinds of corpora behind one interface."""

import numpy as np
from numpy.typing import NDArray

from paris_ray.artifacts import canonical_json, sha256_hex
from paris_ray.config import CorpusConfig
from paris_ray.corpora import img2dataset
from paris_ray.corpora.filters import require_packages
from paris_ray.corpora.held_out import HeldOut, held_out_rule
from paris_ray.corpora.image_folder import ImageFolder
from paris_ray.corpora.images import DecodedRow, decode_row
from paris_ray.corpora.openmoji import OpenMoji
from paris_ray.corpora.parquet import Parquet
from paris_ray.corpora.paths import corpus_path, folders_of, list_files
from paris_ray.corpora.quarantine import REASONS, QuarantinedRow
from paris_ray.corpora.rows import Corpus, RawRow, Shard
from paris_ray.corpora.scenes import Scenes, scene_compositions
from paris_ray.corpora.sidecars import Sidecars
from paris_ray.corpora.tars import SUFFIXES
from paris_ray.corpora.variants import captions_per_row
from paris_ray.corpora.webdataset import WebDataset

__all__ = [
    "REASONS",
    "Corpus",
    "DecodedRow",
    "HeldOut",
    "QuarantinedRow",
    "RawRow",
    "Shard",
    "captions_per_row",
    "compositions",
    "corpus_version",
    "decode_row",
    "held_out_rule",
    "list_shards",
    "not_fetched",
    "open_corpus",
]


def compositions(
    config: CorpusConfig,
) -> tuple[NDArray[np.uint8], dict[str, list[str]]] | None:
    """Return all that captions of a corpus can ask for, whether it is in the corpus or not.

    Returns:
        `(M, 32, 32, 3)` pictures and their attributes by name; None of a corpus that does not know.
    """
    return scene_compositions() if config.kind == "scenes" else None


def corpus_version(corpus: Corpus) -> str:
    """Return a digest that is another one when rows of a corpus change, come or go."""
    versions = {shard.name: corpus.version(shard) for shard in corpus.shards()}
    return sha256_hex(canonical_json(versions))


def not_fetched(config: CorpusConfig) -> dict[str, int]:
    """Return how many pictures the corpus itself says it lacks, by reason, as img2dataset does."""
    if config.kind == "parquet":
        return Parquet(config).not_fetched()
    if config.kind == "webdataset":
        return img2dataset.not_fetched(list_files(config, SUFFIXES))
    if config.kind == "sidecars":
        root = corpus_path(config)
        folders = (folder for folder, _ in folders_of(config))
        return img2dataset.not_fetched(folder for folder in folders if folder != root)
    return {}


def list_shards(config: CorpusConfig) -> list[Shard]:
    """Return all shards of a corpus, in its order: of a large one this takes a while.

    Raises:
        CorpusError: if there is nothing to read.
    """
    return open_corpus(config).shards()


def open_corpus(config: CorpusConfig) -> Corpus:
    """Return the corpus that `config.kind` names.

    Raises:
        CorpusError: if the path does not exist or a package is missing.
    """
    require_packages(config.filters)
    match config.kind:
        case "scenes":
            return Scenes(config)
        case "openmoji":
            return OpenMoji(config)
        case "image_folder":
            return ImageFolder(config)
        case "sidecars":
            return Sidecars(config)
        case "parquet":
            return Parquet(config)
        case "webdataset":
            return WebDataset(config)
