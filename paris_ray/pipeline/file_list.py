"""The files of an artefact that may have many: hashed by tasks, and listed in a file of their own.

The manifest holds the digest of the list alone, and so stays small.
"""

from collections.abc import Sequence

import pyarrow as pa
import ray

from paris_ray.artifacts import hashed_names
from paris_ray.embeddings import write_part
from paris_ray.folders import Folder
from paris_ray.pipeline.accounts import FILES_A_TASK, TASK_CPUS, in_groups

FILE_LIST = "_files.parquet"  # who reads a folder as one table passes over such names


def list_files(folder: Folder) -> dict[str, str]:
    """Write `_files.parquet`, the `name` and `sha256` of every file; return its own digest by name.

    Args:
        folder: An artefact that is complete but for its manifest.
    """
    digests = digests_of(folder, [name for name in hashed_names(folder) if name != FILE_LIST])
    columns = {"name": digests.keys(), "sha256": digests.values()}
    table = pa.table({name: pa.array(texts, pa.string()) for name, texts in columns.items()})
    write_part(folder, FILE_LIST, table)
    return {FILE_LIST: folder.sha256(FILE_LIST)}


def digests_of(folder: Folder, names: Sequence[str]) -> dict[str, str]:
    """Return the SHA-256 of files by name, as tasks find it."""
    tasks = [_digests.remote(folder.uri, group) for group in in_groups(names, FILES_A_TASK)]
    digests = (digest for group in ray.get(tasks) for digest in group)
    return dict(zip(names, digests, strict=True))


@ray.remote(num_cpus=TASK_CPUS)
def _digests(uri: str, names: Sequence[str]) -> list[str]:
    folder = Folder(uri)
    return [folder.sha256(name) for name in names]
