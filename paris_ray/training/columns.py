"""Columns of shards in mapped memory, so that a shard may be larger than what a machine has.

A column is copied once, a few rows at a time, from Parquet into a plain array in an unnamed file of
the temporary folder, from where single rows are read. Such a file is gone when the process ends, in
whatever way it ends.

The temporary folder must be on a disk: in a tmpfs, as /tmp is on some systems, the copy would be in
memory after all. In a Ray worker `TMPDIR` is the one that `ray start` had on its node.
"""

import mmap
import tempfile
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import IO

import numpy as np
from numpy.typing import NDArray

from paris_ray.embeddings import stream_column
from paris_ray.errors import TrainingError
from paris_ray.folders import Folder
from paris_ray.storage import disk_is_full


def map_column(shards: Sequence[Folder], column: str) -> NDArray[np.generic]:
    """Return a tensor column of all shards, `(N, ...)`, read-only and as it is stored.

    Args:
        shards: Folders with Parquet files, with at least one row among them.
        column: Name of the column.

    Raises:
        TrainingError: if rows differ in shape or type, or the temporary folder has no room.
        ArtifactError: if a file has no such column.
    """
    chunks = chain.from_iterable(stream_column(shard, column) for shard in shards)
    try:
        with tempfile.TemporaryFile() as file:
            # Not written through a map: a full disk is an error here, and a crash there.
            row = _append_all(file, chunks, column)
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        if not disk_is_full(error):
            raise
        raise TrainingError(
            f"column {column} of {len(shards)} shards does not fit into {tempfile.gettempdir()} "
            f"({error.strerror}): set TMPDIR to a folder on a larger disk"
        ) from None
    mapped.madvise(mmap.MADV_RANDOM)  # else the system reads many rows for one
    return np.frombuffer(mapped, row.dtype).reshape(-1, *row.shape)


def _append_all(
    file: IO[bytes], chunks: Iterator[NDArray[np.generic]], column: str
) -> NDArray[np.generic]:
    """Write chunks of rows one after the other; return a row, which tells shape and type."""
    row = None
    for chunk in chunks:
        row = chunk[0] if row is None else row
        if (chunk.shape[1:], chunk.dtype) != (row.shape, row.dtype):
            raise TrainingError(
                f"column {column} holds {chunk.dtype} {chunk.shape[1:]} beside "
                f"{row.dtype} {row.shape}: all rows must be alike"
            )
        file.write(np.ascontiguousarray(chunk).data)
    file.flush()
    assert row is not None
    return row
