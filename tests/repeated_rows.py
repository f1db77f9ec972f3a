"""A run with two shards whose keys repeat each other, and what is left of its files."""

import numpy as np

from paris_ray.embeddings import read_part, to_table, write_part
from paris_ray.pipeline.accounts import Account, part_name, write_account
from paris_ray.run import Run

KEYS = {  # of two shards, whose names do not sort as the corpus does
    "b": {"embeddings": ["x", "y", "x", "z"], "held_out": ["w"]},
    "a": {"embeddings": ["v", "y"], "held_out": ["w"], "more": ["z"]},
}
ORDER = list(KEYS)
LEFT = {
    "embeddings part-a-00000000.parquet": ["v"],
    "embeddings part-b-00000000.parquet": ["x", "y", "z"],
    "held_out part-b-00000000.parquet": ["w"],
}


def write_repeated_rows(run: Run) -> None:
    """Write them; of one file the only row is a repeated one."""
    for shard, kinds in KEYS.items():
        for kind, keys in kinds.items():
            folder = run.held_out if kind == "held_out" else run.embeddings
            number = np.arange(len(keys), dtype=np.float32)
            latents = np.repeat(number, 4).reshape(-1, 2, 2)
            first = 100 if kind == "more" else 0
            write_part(folder, part_name(shard, first), to_table({"key": keys, "latents": latents}))
        good = len(kinds["embeddings"]) + len(kinds.get("more", ()))
        write_account(run.quarantine, shard, Account("1", good, 1), [])


def stored_keys(run: Run) -> dict[str, list[str]]:
    """Return the keys in each file."""
    return {
        f"{folder.uri.rpartition('/')[2]} {name}": read_part(folder, name)["key"].to_pylist()
        for folder in (run.embeddings, run.held_out)
        for name in folder.files()
        if "/" not in name
    }
