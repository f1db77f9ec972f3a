"""Repeated rows found and moved by tasks of a real Ray, which share the keys out among them."""

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
from repeated_rows import LEFT, ORDER, stored_keys, write_repeated_rows

from paris_ray.config import load
from paris_ray.pipeline.accounts import ShardFiles, delete_files
from paris_ray.run import Run

pytestmark = pytest.mark.ray


@pytest.mark.parametrize("rows_a_task", [8_000_000, 60], ids=["one part", "several parts"])
def test_tasks_move_what_one_process_would(
    ray_session: None, tmp_path: Path, rows_a_task: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from paris_ray.pipeline import duplicates

    monkeypatch.setattr(duplicates, "ROWS_A_TASK", rows_a_task)
    monkeypatch.setattr(duplicates, "FILES_A_TASK", 2)
    run = Run(load("quickstart", [f"run_dir={tmp_path}"]))
    write_repeated_rows(run)
    duplicates.drop_duplicates(run.config, ORDER)
    assert stored_keys(run) == LEFT


def test_files_are_listed_with_their_digests(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from paris_ray.pipeline import file_list

    monkeypatch.setattr(file_list, "FILES_A_TASK", 2)
    run = Run(load("quickstart", [f"run_dir={tmp_path}"]))
    write_repeated_rows(run)
    folder = Path(run.embeddings.uri)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.parquet"))
    for _ in range(2):  # a list that is there already is not in the list
        digests = file_list.list_files(run.embeddings)
        listed = pq.read_table(folder / "_files.parquet").to_pydict()
        assert listed["name"] == names
        assert listed["sha256"] == [
            hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names
        ]
        whole = hashlib.sha256((folder / "_files.parquet").read_bytes()).hexdigest()
        assert digests == {"_files.parquet": whole}


@pytest.fixture
def moved(ray_session: None, tmp_path: Path) -> Run:
    """A run with two shards, in each of which rows were set aside: `a` repeats `b`."""
    from paris_ray.pipeline.duplicates import drop_duplicates

    run = Run(load("quickstart", [f"run_dir={tmp_path}"]))
    write_repeated_rows(run)
    drop_duplicates(run.config, ORDER)
    return run


def pending(run: Run, versions: dict[str, str]) -> list[str]:
    """Return the names of the shards that are encoded again."""
    from paris_ray.pipeline.embed import _pending

    shards: list[Any] = [SimpleNamespace(name=name) for name in versions]
    return [shard.name for shard in _pending(run.config, shards, versions)]


def test_a_shard_that_is_not_whole_is_encoded_again_alone(moved: Run) -> None:
    assert pending(moved, {"b": "1", "a": "1"}) == []
    moved.embeddings.delete("part-b-00000000.parquet")
    assert pending(moved, {"b": "1", "a": "1"}) == ["b"]


def test_what_repeats_a_changed_or_lost_shard_is_encoded_again_too(moved: Run) -> None:
    assert pending(moved, {"a": "1"}) == ["a"]
    assert stored_keys(moved) == {}


def test_a_kill_while_files_are_deleted_forgets_nothing(
    moved: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from paris_ray.pipeline import embed

    deleted: list[ShardFiles] = []

    def delete_one(run: Run, files: ShardFiles) -> None:
        if deleted:
            raise KeyboardInterrupt
        deleted.append(files)
        delete_files(run, files)

    monkeypatch.setattr(embed, "delete_files", delete_one)
    with pytest.raises(KeyboardInterrupt):
        pending(moved, {"b": "2", "a": "1"})
    monkeypatch.undo()
    assert len(deleted) == 1
    assert pending(moved, {"b": "2", "a": "1"}) == ["b", "a"]
