"""A cluster in two halves: no row is lost, alike rows stay together, a run can train on them."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from paris_ray.artifacts import publish, read_manifest
from paris_ray.embeddings import read_part, read_table, to_table, write_part
from paris_ray.errors import ArtifactError, ConfigError
from paris_ray.folders import Folder
from paris_ray.roster.sample import Shard
from paris_ray.roster.split import split
from paris_ray.run import SHARD, Run
from tests.unit.roster.conftest import ROWS, Made


def two_kinds(made: Made, folder: Path) -> Shard:
    """A shard whose rows are of two kinds, which their captions and text tell, in turn."""
    shutil.copytree(made.run.shard(0).local_path, folder)
    kind = np.arange(ROWS) % 2
    text = np.random.default_rng(0).normal(0, 0.1, (ROWS, 1, 16))
    text[np.arange(ROWS), 0, 8 + kind] += 3
    columns = {
        "caption": [f"kind {k}" for k in kind],
        "latents": np.zeros((ROWS, 8, 4, 4), np.float16),
        "text_embedding": text.astype(np.float16),
    }
    for name, rows in (("part-0.parquet", slice(40)), ("part-1.parquet", slice(40, None))):
        table = to_table({key: values[rows] for key, values in columns.items()})
        write_part(Folder(folder), name, table)
    publish(Folder(folder), SHARD, config_digest="", parents={}, facts={"rows": ROWS})
    return Shard.open(Folder(folder))


def test_a_cluster_becomes_two(made: Made, tmp_path: Path) -> None:
    shard = two_kinds(made, tmp_path / "shard")
    target = Run(replace(made.config, run_dir=str(tmp_path / "halves")))
    split(shard, made.config, target)
    captions = [read_table(target.shard(k), ["caption"])["caption"].to_pylist() for k in (0, 1)]
    assert sorted(captions) == [["kind 0"] * 30, ["kind 1"] * 30]
    before = [read_manifest(target.shard(k), SHARD) for k in (0, 1)]
    assert [manifest.facts["rows"] for manifest in before] == [30, 30]
    split(shard, made.config, target)
    assert [read_manifest(target.shard(k), SHARD) for k in (0, 1)] == before
    with pytest.raises(ArtifactError, match="was made from another shard"):
        split(Shard.open(made.run.shard(1)), made.config, target)


def test_what_a_killed_split_left_is_not_mixed_in(made: Made, tmp_path: Path) -> None:
    target = Run(replace(made.config, run_dir=str(tmp_path / "halves")))
    rows = read_part(made.run.shard(1), "part-0.parquet")
    write_part(target.shard(0), "part-9.parquet", rows)
    split(two_kinds(made, tmp_path / "shard"), made.config, target)
    manifest = read_manifest(target.shard(0), SHARD)
    assert manifest.facts["rows"] == len(read_table(target.shard(0), ["caption"]))


def test_random_clusters_are_not_split(made: Made, tmp_path: Path) -> None:
    config = replace(made.config, cluster=replace(made.config.cluster, features="random"))
    with pytest.raises(ConfigError, match="features='random' is not allowed"):
        split(Shard.open(made.run.shard(0)), config, Run(replace(config, run_dir=str(tmp_path))))


def test_an_expert_s_rows_are_found(made: Made, tmp_path: Path) -> None:
    made.roster().split(2, str(tmp_path / "halves"))
    halves = Run(replace(made.config, run_dir=str(tmp_path / "halves")))
    keys = [key for k in (0, 1) for key in read_table(halves.shard(k), ["key"])["key"].to_pylist()]
    assert sorted(keys) == sorted(f"2-{i}" for i in range(ROWS))
    with pytest.raises(ConfigError, match="index=3 is not allowed"):
        made.roster().split(3, str(tmp_path / "more"))
