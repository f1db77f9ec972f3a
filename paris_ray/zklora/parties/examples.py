"""What an adapter is tried with: captioned pictures from a folder."""

import logging
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from paris_ray.bundle import load_bundle
from paris_ray.config import CorpusConfig
from paris_ray.corpora import DecodedRow, decode_row, open_corpus
from paris_ray.errors import ConfigError
from paris_ray.zklora.fixed_point import QuantisedModule
from paris_ray.zklora.manifest import AdapterManifest
from paris_ray.zklora.share import Worth

MAX_PICTURES = 64
LEVELS = (0.3, 0.7)  # of noise, at which losses are compared

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


def measure_worth(
    bundle: str,
    pictures: str,
    modules: Mapping[str, QuantisedModule],
    manifest: AdapterManifest,
    levels: Sequence[float] = LEVELS,
) -> Worth:
    """Return what an adapter is worth on pictures that it was not trained on.

    Args:
        bundle: Where its base is.
        pictures: A folder, as for `read_pictures`.
        modules: The adapter.
        manifest: Of its offer.
        levels: Noise levels.

    Raises:
        ConfigError: as `read_pictures`, or if there are fewer than two.
    """
    loaded = load_bundle(bundle)
    images, captions = read_pictures(pictures, bundle)
    assert manifest.base.expert is not None
    return Worth(
        loaded.expert(manifest.base.expert),
        modules,
        manifest.scale,
        loaded.codec.encode(images),
        loaded.encode_text(captions),
        levels,
    )
