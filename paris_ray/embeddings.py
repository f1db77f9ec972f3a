"""The table that passes from prepare to training: Parquet files of encoded, captioned images.

Columns, one row an image:

    key, caption        strings
    thumbnail           PNG bytes
    latents             (C, H, W) float16
    latents_flipped     (C, H, W) float16, of the mirror image; only with corpus.horizontal_flip
    features            (D,)
    text_embedding      (V, D) float16, one row of it for each caption in each template; with token
                        states (V, 1 + L, D), as `TextConditioning.vectors` has them; or
    token_ids           (V, L) uint16, if text is a sequence of states: those are too large to keep
    phash               uint64, `corpora.perceptual_hash`; only where pictures are compared by it
    attribute.NAME      strings, one column for each label of corpus.attributes; empty: it has none
    clip_score, aesthetic_score, nsfw_score
                        float32; only those that corpus.filters ask for

The first of V variants is the caption itself; of several captions, `caption` is the first. Tensor
columns use Arrow's canonical fixed-shape tensor type, which any Arrow implementation reads.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from paris_ray.errors import ArtifactError
from paris_ray.folders import Folder, fault_of

Column = NDArray[np.generic] | Sequence[str] | Sequence[bytes]
LATENTS, LATENTS_FLIPPED = "latents", "latents_flipped"
TEXT_EMBEDDING, TOKEN_IDS = "text_embedding", "token_ids"
FEATURES, PICTURE_HASH = "features", "phash"
ATTRIBUTE = "attribute."
NULL_TEXT = "null_text.safetensors"
ROWS_PER_GROUP = 1024  # of a file that is written
ROWS_PER_READ = 256
_PART = re.compile(r"part-[^/]*\.parquet")


def to_table(columns: Mapping[str, Column]) -> pa.Table:
    """Return an Arrow table; arrays `(N, ...)` become fixed-shape tensor columns."""
    return pa.table({name: _to_arrow(values) for name, values in columns.items()})


def _to_arrow(values: Column) -> pa.Array:
    if isinstance(values, np.ndarray) and values.ndim > 1:
        # Arrow believes strides, also those of axes of length 1, where numpy may have any.
        ordered = np.ascontiguousarray(values).ravel().reshape(values.shape)
        return pa.FixedShapeTensorArray.from_numpy_ndarray(ordered)
    return pa.array(values)


def write_part(folder: Folder, name: str, table: pa.Table) -> None:
    """Write one Parquet file of a table artefact; its pages carry checksums."""
    with folder.writing(name) as path:
        pq.write_table(
            table,
            path,
            compression="zstd",
            row_group_size=ROWS_PER_GROUP,
            write_page_checksum=True,
        )


def part_names(folder: Folder) -> list[str]:
    """Return the names of a folder's own files of rows, in the order of their rows."""
    return [n for n in folder.files() if _PART.fullmatch(n)]


def read_parts(folder: Folder, names: Sequence[str], columns: Sequence[str]) -> pa.Table:
    """Return some columns of some Parquet files as one table.

    Raises:
        ArtifactError: if there is nothing to read, or files differ in the types of columns.
    """
    _require_parts(folder, names)
    return _concatenated(folder, [read_part(folder, name, columns) for name in names])


def _concatenated(folder: Folder, tables: Sequence[pa.Table]) -> pa.Table:
    try:
        return pa.concat_tables(tables)
    except pa.ArrowInvalid as error:  # of a damaged footer, or of files that were mixed
        raise ArtifactError(f"{folder.uri} holds Parquet files that differ: {error}") from None


def _require_parts(folder: Folder, names: Sequence[str]) -> None:
    if not names:
        raise ArtifactError(f"{folder.uri} holds no Parquet files")


def read_part(folder: Folder, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Return some columns of one Parquet file, or all.

    Raises:
        ArtifactError: if it lacks one of them, or as `opened_part`.
    """
    with opened_part(folder, name) as file:
        table = file.read(None if columns is None else list(columns))
    for column in columns or ():
        if column not in table.column_names:  # which pyarrow leaves out
            raise ArtifactError(f"{folder.uri}/{name} has no column {column}")
    return table


@contextmanager
def opened_part(folder: Folder, name: str) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file, whose pages are compared with their checksums when they are read.

    Raises:
        ArtifactError: if it is missing, cannot be read or is damaged, there or while it is read.
    """
    with folder.open(name) as file:
        try:
            yield pq.ParquetFile(file, page_checksum_verification=True)
        except (pa.ArrowException, OSError, UnicodeDecodeError, KeyError) as error:
            raise ArtifactError(f"{folder.uri}/{name} {fault_of(error)}: {error}") from None


def read_table(folder: Folder, columns: Sequence[str]) -> pa.Table:
    """Return some columns of all of a folder's Parquet files, in order."""
    return read_parts(folder, part_names(folder), columns)


def read_rows(folder: Folder, rows: NDArray[np.int64], columns: Sequence[str]) -> pa.Table:
    """Return some columns of some rows, whose numbers ascend and count over all files.

    One file is in memory at a time.

    Raises:
        ArtifactError: if there is nothing to read.
    """
    names = part_names(folder)
    _require_parts(folder, names)
    ends = np.cumsum([num_rows(folder, name) for name in names])
    parts, start = [], 0
    for name, end in zip(names, ends, strict=True):
        inside = rows[(rows >= start) & (rows < end)] - start
        parts.append(read_part(folder, name, columns).take(inside))
        start = end
    return _concatenated(folder, parts)


def num_rows(folder: Folder, name: str) -> int:
    """Return the number of rows of one Parquet file; only its footer is read."""
    with opened_part(folder, name) as file:
        return int(file.metadata.num_rows)


def column_names(folder: Folder) -> list[str]:
    """Return the names of the columns, as the first Parquet file has them.

    Raises:
        ArtifactError: if there is no file.
    """
    names = part_names(folder)
    _require_parts(folder, names)
    with opened_part(folder, names[0]) as file:
        return list(file.schema_arrow.names)


def stream_column(folder: Folder, column: str) -> Iterator[NDArray[np.generic]]:
    """Yield a tensor column `(N, ...)` of all files in order, at most ROWS_PER_READ rows at once.

    A group of rows, as it is stored, is all that is in memory.

    Raises:
        ArtifactError: if a file has no such column.
    """
    for name in part_names(folder):
        with opened_part(folder, name) as parquet:
            if column not in parquet.schema_arrow.names:
                raise ArtifactError(f"{folder.uri}/{name} has no column {column}")
            for group in range(parquet.num_row_groups):  # one reader of all would keep them all
                for batch in parquet.iter_batches(ROWS_PER_READ, [group], [column]):
                    yield batch.column(column).to_numpy_ndarray()


def tensor_column(table: pa.Table, name: str) -> NDArray[np.generic]:
    """Return a tensor column as one array `(N, ...)`."""
    column = table[name].combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # what combine_chunks leaves of zero or many chunks
        column = pa.concat_arrays(column.chunks)
    array: NDArray[np.generic] = column.to_numpy_ndarray()
    return array


def write_null_text(folder: Folder, null_text: NDArray[np.generic]) -> None:
    """Store the empty string, which stands for "no text": encoded, or token ids `(L,)`.

    Encoded it is `(D,)` or, with token states, `(1 + L, D)`.
    """
    if np.issubdtype(null_text.dtype, np.integer):
        stored = {TOKEN_IDS: null_text.astype(np.int32)}
    else:
        stored = {"pooled_text": null_text.astype(np.float32)}
    folder.write(NULL_TEXT, safetensors.numpy.save(stored))


def read_null_text(folder: Folder) -> NDArray[np.generic]:
    """Return the empty string as it was stored: encoded in float32, or token ids in int32.

    Raises:
        ArtifactError: if its file is missing or damaged.
    """
    try:
        (null_text,) = safetensors.numpy.load(folder.read(NULL_TEXT)).values()
    except ArtifactError:  # it could not be had, which is no damage
        raise
    except (SafetensorError, ValueError, KeyError) as error:
        raise ArtifactError(f"{folder.uri}/{NULL_TEXT} is damaged: {error}") from None
    return null_text
