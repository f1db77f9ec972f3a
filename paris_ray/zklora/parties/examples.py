"""What a user tries an adapter with: captioned pictures from a folder."""

import logging

import numpy as np
from numpy.typing import NDArray

from paris_ray.bundle import load_bundle
from paris_ray.config import CorpusConfig
from paris_ray.corpora import DecodedRow, decode_row, open_corpus
from paris_ray.errors import ConfigError

MAX_PICTURES = 64

logger = logging.getLogger("paris_ray")


def read_pictures(path: str, bundle: str) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    """Return the first pictures of a folder, as the bundle's experts see them, and captions.

    Rows that are bad are counted and left out.

    Args:
        path: A folder with `metadata.jsonl`.
        bundle: Says how large pictures are.

    Returns:
        `(n, S, S, 3)` pictures and n captions.

    Raises:
        ConfigError: if there is no usable picture.
        CorpusError: if it is no such folder.
    """
    size = load_bundle(bundle).facts.picture_size
    config = CorpusConfig(kind="image_folder", path=path, image_size=size)
    corpus = open_corpus(config)
    pictures: list[NDArray[np.uint8]] = []
    captions: list[str] = []
    bad = 0
    for shard in corpus.shards():
        for raw in corpus.read(shard):
            row = decode_row(raw, config)
            if not isinstance(row, DecodedRow):
                bad += 1
            elif len(pictures) < MAX_PICTURES:
                pictures.append(row.image)
                captions.append(row.caption)
    if bad:
        logger.warning("pictures: %d of %s are unusable and left out", bad, path)
    if not pictures:
        raise ConfigError(f"pictures={path!r} has no usable picture")
    return np.stack(pictures), tuple(captions)
