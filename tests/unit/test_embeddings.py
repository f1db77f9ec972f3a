"""Arrow tables of arrays."""

from pathlib import Path

import numpy as np
import pytest

from paris_ray.embeddings import read_part, to_table, write_part
from paris_ray.folders import Folder


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_an_axis_of_length_one_may_have_any_stride(tmp_path: Path, axis: int) -> None:
    values = np.arange(5 * 6 * 7, dtype=np.float32).reshape(5, 6, 7)
    array = np.expand_dims(values, axis)
    write_part(Folder(tmp_path), "part-0.parquet", to_table({"values": array}))
    column = read_part(Folder(tmp_path), "part-0.parquet", ["values"])["values"]
    assert np.array_equal(column.combine_chunks().to_numpy_ndarray(), array)
