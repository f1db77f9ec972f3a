"""The table that passes from prepare to training: Parquet files of encoded, captioned images.

Columns: `key`, `caption`, `thumbnail` (PNG bytes), `latents (C, H, W)`, `features (D,)` and
`text_embedding (V, D)`, one row of it for each caption template, the caption itself first. Tensor
columns use Arrow's canonical fixed-shape tensor type, which any Arrow implementation reads.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.numpy
from numpy.typing import NDArray

from paris_ray.artifacts import Folder
from paris_ray.errors import ArtifactError

Column = NDArray[np.generic] | Sequence[str] | Sequence[bytes]
NULL_TEXT = "null_text.safetensors"


def to_table(columns: Mapping[str, Column]) -> pa.Table:
    """Return an Arrow table; arrays `(N, ...)` become fixed-shape tensor columns."""
    return pa.table({name: _to_arrow(values) for name, values in columns.items()})


def _to_arrow(values: Column) -> pa.Array:
    if isinstance(values, np.ndarray) and values.ndim > 1:
        return pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(values))
    return pa.array(values)


def write_part(folder: Folder, name: str, table: pa.Table) -> None:
    """Write one Parquet file of a table artefact."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    folder.write(name, sink.getvalue().to_pybytes())


def part_names(folder: Folder) -> list[str]:
    """Return the names of a folder's own Parquet files, in the order of their rows."""
    return [n for n in folder.files() if n.endswith(".parquet") and "/" not in n]


def read_parts(folder: Folder, names: Sequence[str], columns: Sequence[str]) -> pa.Table:
    """Return some columns of some Parquet files as one table.

    Raises:
        ArtifactError: if there is nothing to read.
    """
    if not names:
        raise ArtifactError(f"{folder.uri} holds no Parquet files")
    buffers = (pa.BufferReader(folder.read(name)) for name in names)
    return pa.concat_tables([pq.read_table(buffer, columns=list(columns)) for buffer in buffers])


def read_table(folder: Folder, columns: Sequence[str]) -> pa.Table:
    """Return some columns of all of a folder's Parquet files, in order."""
    return read_parts(folder, part_names(folder), columns)


def tensor_column(table: pa.Table, name: str) -> NDArray[np.generic]:
    """Return a tensor column as one array `(N, ...)`."""
    column = table[name].combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # what combine_chunks leaves of zero or many chunks
        column = pa.concat_arrays(column.chunks)
    array: NDArray[np.generic] = column.to_numpy_ndarray()
    return array


def write_null_text(folder: Folder, null_text: NDArray[np.float32]) -> None:
    """Store the encoded empty string, `(D,)`, which stands for "no text"."""
    folder.write(NULL_TEXT, safetensors.numpy.save({"pooled_text": null_text}))


def read_null_text(folder: Folder) -> NDArray[np.float32]:
    """Return the encoded empty string, `(D,)`."""
    null_text: NDArray[np.float32] = safetensors.numpy.load(folder.read(NULL_TEXT))["pooled_text"]
    return null_text
