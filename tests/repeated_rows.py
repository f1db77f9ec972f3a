"""Runs whose rows repeat each other, and what is left of their files."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from paris_ray.embeddings import part_names, read_part, to_table, write_part
from paris_ray.pipeline.accounts import (
    Account,
    account_of,
    files_by_shard,
    part_name,
    write_account,
)
from paris_ray.run import Run

KEYS = {  # of two shards, whose names do not sort as the corpus does
    "b": {"embeddings": ["x", "y", "x", "z"], "held_out": ["w"]},
    "a": {"embeddings": ["v", "y"], "held_out": ["w"], "more": ["z"]},
}
ORDER = list(KEYS)
VERSIONS = dict.fromkeys(ORDER, "1")
SIMILAR = {"c": "1", "a": "1", "b": "1"}
LEFT = {
    "embeddings part-a-00000000.parquet": ["v"],
    "embeddings part-b-00000000.parquet": ["x", "y", "z"],
    "held_out part-b-00000000.parquet": ["w"],
}


def write_repeated_rows(run: Run, shards: Iterable[str] = ORDER) -> None:
    """Write some shards of them; of one file the only row is a repeated one."""
    for shard in shards:
        kinds = KEYS[shard]
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


def similar_rows() -> dict[str, list[Any]]:
    """Return rows of three shards, of which a fifth repeats others in each of four ways.

    They are in the order of `part_files`: all to train on first.
    """
    generator, count = np.random.default_rng(0), 240
    features = generator.normal(size=(count, 8))
    hashes = generator.integers(0, 2**64, count, dtype=np.uint64)
    keys, captions = [f"key {i}" for i in range(count)], [f"Caption {i}" for i in range(count)]
    for i, other in generator.integers(0, count, (count // 5, 2)).tolist():
        keys[i] = keys[other]
    for i, other in generator.integers(0, count, (count // 5, 2)).tolist():
        captions[i] = f"caption  {other}!"
    for i, other in generator.integers(0, count, (count // 5, 2)).tolist():
        bits = generator.integers(0, 64, 4).tolist()
        hashes[i] = hashes[other] ^ np.uint64(sum({1 << bit for bit in bits}))
    for i, other in generator.integers(0, count, (count // 5, 2)).tolist():
        features[i] = features[other] + generator.normal(scale=0.2, size=8) * (i % 3 > 0)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    shards = [name for kind in (60, 20) for name in SIMILAR for _ in range(kind)]
    return {
        "id": [f"{shard} {i}" for i, shard in enumerate(shards)],
        "shard": shards,
        "held_out": [i >= 180 for i in range(count)],
        "key": keys,
        "caption": captions,
        "phash": hashes.tolist(),
        "features": features.astype(np.float32).tolist(),
    }


def write_similar_rows(run: Run, shards: Iterable[str], rows_a_file: int = 16) -> None:
    """Write some shards of them, in files of so many rows."""
    rows = similar_rows()
    for shard in shards:
        for held_out, folder in ((False, run.embeddings), (True, run.held_out)):
            chosen = [
                i
                for i, pair in enumerate(zip(rows["shard"], rows["held_out"], strict=True))
                if pair == (shard, held_out)
            ]
            for first in range(0, len(chosen), rows_a_file):
                index = chosen[first : first + rows_a_file]
                columns: dict[str, Any] = {
                    name: [rows[name][i] for i in index] for name in ("id", "key", "caption")
                }
                columns["phash"] = np.array([rows["phash"][i] for i in index], np.uint64)
                columns["features"] = np.array([rows["features"][i] for i in index], np.float32)
                write_part(folder, part_name(shard, first), to_table(columns))
        write_account(run.quarantine, shard, Account("1", 60, 20), [])


def set_aside_rows(run: Run, shards: Iterable[str]) -> dict[str, str]:
    """Return why which of them left, by id, after checking that accounts and files agree."""
    rows = similar_rows()
    keys = dict(zip(rows["id"], rows["key"], strict=True))
    left = set(rows["id"])
    for folder in (run.embeddings, run.held_out):
        for name in part_names(folder):
            left -= set(read_part(folder, name)["id"].to_pylist())
    reasons: dict[str, str] = {}
    for shard in shards:
        quarantined = read_part(run.quarantine, part_name(shard, 0)).to_pylist()
        gone = [row for row in rows["id"] if row in left and row.startswith(f"{shard} ")]
        assert [keys[row] for row in gone] == [row["key"] for row in quarantined]
        reasons |= {row: listed["reason"] for row, listed in zip(gone, quarantined, strict=True)}
    found = files_by_shard(run)
    assert all(account_of(run, found[shard]) for shard in shards)
    return reasons
