"""Rows that a site chose to hand over to train the router on: latents and text, no more.

Latents are a picture, but for what the codec loses, and text vectors say what is on it.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from paris_ray.artifacts import VerifiedFolder
from paris_ray.bundle.weights import read_header
from paris_ray.embeddings import (
    LATENTS,
    NULL_TEXT,
    TEXT_EMBEDDING,
    TOKEN_IDS,
    read_null_text,
    to_table,
    write_part,
)
from paris_ray.errors import FederationError
from paris_ray.folders import Folder
from paris_ray.seeding import numpy_generator
from paris_ray.training.data import LatentDataset

FILE = "rows.safetensors"
MAX_SHARE = 0.05  # of a site's rows of a cluster; at least one
MAX_ROWS = 100_000  # of a site
CLUSTERS = "clusters"


def write_rows(folder: Folder, shards: Mapping[int, LatentDataset], seed: int) -> int:
    """Write a random sample of every cluster's rows; return how many there are.

    Args:
        folder: Where to.
        shards: The rows, by cluster.
        seed: Decides which.
    """
    columns: dict[str, list[NDArray[np.generic]]] = {LATENTS: [], "text": [], CLUSTERS: []}
    for cluster, dataset in shards.items():
        count = min(num_shared(len(dataset)), MAX_ROWS // len(shards))
        chosen = numpy_generator(seed, "shared rows", cluster).permutation(len(dataset))[:count]
        columns[LATENTS].append(dataset.latents[chosen].astype(np.float16))
        text = dataset.text[chosen, 0]
        columns["text"].append(text.astype(np.int32 if dataset.has_token_ids else np.float16))
        columns[CLUSTERS].append(np.full(count, cluster, np.int64))
    tensors = {name: np.concatenate(parts) for name, parts in columns.items()}
    folder.write(FILE, safetensors.numpy.save(tensors))
    return len(tensors[CLUSTERS])


def num_shared(rows: int) -> int:
    """Return the most rows that a site shares of a cluster that has so many."""
    return max(1, int(MAX_SHARE * rows))


def read_rows(
    part: VerifiedFolder, encoders: Folder, latent_shape: Sequence[int], rows: Mapping[int, int]
) -> dict[str, NDArray[np.generic]]:
    """Return the columns of rows that a site sent: `latents`, `text` and `clusters`.

    Args:
        part: The submission.
        encoders: The federation's, whose empty string says what text is like.
        latent_shape: `(C, H, W)`.
        rows: How many rows each of the site's clusters has, by its number.

    Raises:
        FederationError: naming the tensor whose shape, type or values are not allowed.
    """
    where = f"{part.folder.uri}/{FILE}"
    null_text = read_null_text(encoders)
    is_ids = np.issubdtype(null_text.dtype, np.integer)
    stored = read_header(part.verified_file(FILE), where)
    count = stored[CLUSTERS].shape[0] if CLUSTERS in stored and stored[CLUSTERS].shape else 0
    most = min(MAX_ROWS, sum(map(num_shared, rows.values())))
    if not 1 <= count <= most:
        raise FederationError(f"{where} has {count} rows, allowed: 1 to {most}")
    expected = {
        LATENTS: ((count, *latent_shape), "F16"),
        "text": ((count, *null_text.shape), "I32" if is_ids else "F16"),
        CLUSTERS: ((count,), "I64"),
    }
    for name in expected.keys() | stored.keys():
        if stored.get(name) != expected.get(name):
            found, wanted = stored.get(name, "missing"), expected.get(name, "none")
            raise FederationError(f"{where}: tensor {name!r:.80} is {found}, expected {wanted}")
    try:
        columns = safetensors.numpy.load(part.read(FILE))
    except SafetensorError as error:
        raise FederationError(f"{where} is damaged: {error}") from None
    if not set(columns[CLUSTERS].tolist()) <= rows.keys():
        raise FederationError(f"{where}: clusters are not all among {sorted(rows)}")
    if is_ids and not ((columns["text"] >= 0) & (columns["text"] <= null_text.max())).all():
        # The empty string ends with the last token that there is.
        raise FederationError(f"{where}: text has ids of no token, 0 to {null_text.max()}")
    if not np.isfinite(columns[LATENTS]).all() or not np.isfinite(columns["text"]).all():
        raise FederationError(f"{where}: latents or text are not finite")
    return dict(columns)


def write_shard(
    folder: Folder, cluster: int, sites: Sequence[Mapping[str, NDArray[np.generic]]], null: bytes
) -> None:
    """Write the rows of one cluster, of all sites, as a shard that a router is trained on.

    Raises:
        FederationError: if there is none.
    """
    latents, text = (
        np.concatenate([site[name][site[CLUSTERS] == cluster] for site in sites])
        for name in (LATENTS, "text")
    )
    if not len(latents):
        raise FederationError(f"no site shares a row of cluster {cluster}: the router needs some")
    column = TOKEN_IDS if np.issubdtype(text.dtype, np.integer) else TEXT_EMBEDDING
    if column == TOKEN_IDS:
        text = text.astype(np.uint16)
    # Of one caption variant; not text[:, None], whose strides pyarrow takes for another order.
    table = to_table({LATENTS: latents, column: text.reshape(len(text), 1, *text.shape[1:])})
    write_part(folder, "part-000000.parquet", table)
    folder.write(NULL_TEXT, null)
