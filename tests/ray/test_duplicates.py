"""Repeated rows found and moved by tasks of a real Ray, which share the keys out among them."""

import hashlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from paris_ray.clustering import nearest
from paris_ray.config import load
from paris_ray.duplicates import (
    bands,
    comparable_caption,
    equal_to_earlier,
    fit_cells,
    hashes_of,
    near_earlier,
    num_cells,
    similar_to_earlier,
)
from paris_ray.embeddings import to_table, write_part
from paris_ray.errors import LockError
from paris_ray.pipeline.accounts import (
    Account,
    ShardFiles,
    account_of,
    delete_files,
    files_by_shard,
    write_account,
)
from paris_ray.run import Run
from paris_ray.seeding import derive_seed
from tests.repeated_rows import (
    LEFT,
    SIMILAR,
    VERSIONS,
    set_aside_rows,
    similar_rows,
    stored_keys,
    write_repeated_rows,
    write_similar_rows,
)

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
    duplicates.drop_duplicates(run.config, VERSIONS)
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


MAX_SIMILARITY = 0.9
FILTERS = [
    "corpus.filters.picture_distance=6",
    "corpus.filters.repeated_captions=true",
    f"corpus.filters.max_similarity={MAX_SIMILARITY}",
]


@pytest.fixture
def similar(ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run whose rows are like each other in every way; tasks share them out in several parts."""
    from paris_ray.pipeline import duplicates

    monkeypatch.setattr(duplicates, "FILES_A_TASK", 3)
    monkeypatch.setattr(duplicates, "ROWS_A_TASK", 300)
    monkeypatch.setattr(duplicates, "FEATURES_A_READ", 128)
    monkeypatch.setattr(duplicates, "FEATURES_A_TASK", 200)
    monkeypatch.setattr("paris_ray.duplicates.ROWS_A_CELL", 60)
    monkeypatch.setattr(duplicates, "FIT_ROWS_A_CELL", 1000)  # all rows are the sample
    run = Run(load("quickstart", [f"run_dir={tmp_path}/run", *FILTERS]))
    write_similar_rows(run, SIMILAR)
    return run


def repeated_in_one_process(run: Run) -> dict[str, str]:
    """Return why which rows leave, by key, with all in memory."""
    rows = similar_rows()
    features = np.array(rows["features"], np.float32)
    seed = derive_seed(run.config.seed, "semantic duplicates")
    cells = nearest(features, fit_cells(features, num_cells(len(features)), seed))
    assert len(np.unique(cells)) > 2
    hashes = np.array(rows["phash"], np.uint64)
    captions = hashes_of(comparable_caption(c).encode() for c in rows["caption"])
    near = [near_earlier(hashes, 6, band) for band in bands(6)]
    found = {
        "max_similarity": similar_to_earlier(features, cells, MAX_SIMILARITY),
        "picture_distance": np.logical_or.reduce(near),
        "repeated_captions": equal_to_earlier(captions),
        "duplicate_key": equal_to_earlier(hashes_of(key.encode() for key in rows["key"])),
    }
    leaving: dict[str, str] = {}
    for reason, repeats in found.items():
        leaving |= {rows["id"][i]: reason for i in np.flatnonzero(repeats)}
    assert set(leaving.values()) == found.keys()
    return leaving


def test_a_lost_lock_moves_nothing(similar: Run) -> None:
    from paris_ray.pipeline.duplicates import drop_duplicates

    def check() -> None:
        raise LockError("another job has it")

    before = similar.embeddings.files()
    with pytest.raises(LockError):
        drop_duplicates(similar.config, SIMILAR, check)
    assert similar.embeddings.files() == before
    assert set_aside_rows(similar, SIMILAR) == {}


def test_tasks_compare_rows_as_one_process_does(similar: Run) -> None:
    from paris_ray.pipeline.duplicates import drop_duplicates

    expected = repeated_in_one_process(similar)
    for _ in range(2):  # what is left is not asked again
        drop_duplicates(similar.config, SIMILAR)
        assert set_aside_rows(similar, SIMILAR) == expected


def test_a_run_that_was_killed_among_its_moves_ends_like_another(
    similar: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from paris_ray.pipeline import duplicates
    from paris_ray.pipeline.moving import move_listed, part_files

    def killed(config: Any, files: Any, check: Any) -> None:
        move_listed(config, [file for file in files if file.shard == "b"], check)
        raise KeyboardInterrupt

    monkeypatch.setattr(duplicates, "move_listed", killed)
    with pytest.raises(KeyboardInterrupt):
        duplicates.drop_duplicates(similar.config, SIMILAR)
    monkeypatch.setattr(duplicates, "move_listed", move_listed)
    assert pending(similar, SIMILAR) == []
    files = files_by_shard(similar)
    similar.embeddings.delete(files["a"].embeddings[0])  # as if it were half moved
    assert pending(similar, SIMILAR) == ["a"]
    write_similar_rows(similar, ["a"], rows_a_file=9)  # encoded again, and cut elsewhere
    assert len(part_files(files_by_shard(similar), list(SIMILAR))) > 10
    duplicates.drop_duplicates(similar.config, SIMILAR)
    assert set_aside_rows(similar, SIMILAR) == repeated_in_one_process(similar)


def test_no_rows_repeat_nothing(ray_session: None, tmp_path: Path) -> None:
    from paris_ray.pipeline.duplicates import drop_duplicates

    run = Run(load("quickstart", [f"run_dir={tmp_path}", *FILTERS]))
    drop_duplicates(run.config, {})
    assert stored_keys(run) == {}


@pytest.fixture
def moved(ray_session: None, tmp_path: Path) -> Run:
    """A run with two shards, in each of which rows were set aside: `a` repeats `b`."""
    from paris_ray.pipeline.duplicates import drop_duplicates

    run = Run(load("quickstart", [f"run_dir={tmp_path}"]))
    write_repeated_rows(run)
    drop_duplicates(run.config, VERSIONS)
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


GROWN = {"new": "1", **VERSIONS}


@pytest.fixture
def grown(moved: Run) -> Run:
    """The run after a shard came in before the others, which has a key of each."""
    assert pending(moved, GROWN) == ["new"]
    write_part(moved.embeddings, "part-new-00000000.parquet", to_table({"key": ["z", "v", "u"]}))
    write_account(moved.quarantine, "new", Account("1", 3, 0), [])
    return moved


GROWN_LEFT = {
    "embeddings part-b-00000000.parquet": ["x", "y"],
    "embeddings part-new-00000000.parquet": ["z", "v", "u"],
    "held_out part-b-00000000.parquet": ["w"],
}


def test_what_repeats_stays_away_where_shards_came_in(grown: Run) -> None:
    from paris_ray.pipeline.duplicates import drop_duplicates

    for _ in range(2):
        drop_duplicates(grown.config, GROWN)
        assert stored_keys(grown) == GROWN_LEFT
        accounts = {name: account_of(grown, f) for name, f in files_by_shard(grown).items()}
        assert accounts == {
            "new": Account("1", 3, 0),
            "b": Account("1", 2, 1, {"duplicate_key": 2}),
            "a": Account("1", 0, 0, {"duplicate_key": 4}),
        }
        assert pending(grown, GROWN) == []


def test_what_left_before_leaves_a_shard_that_is_encoded_again(
    grown: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from paris_ray.pipeline import duplicates

    def killed(config: Any, files: Any, check: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(duplicates, "move_listed", killed)
    with pytest.raises(KeyboardInterrupt):
        duplicates.drop_duplicates(grown.config, GROWN)
    monkeypatch.undo()
    grown.embeddings.delete("part-b-00000000.parquet")  # as if it were half moved
    assert pending(grown, GROWN) == ["b"]
    write_repeated_rows(grown, ["b"])
    duplicates.drop_duplicates(grown.config, GROWN)
    assert stored_keys(grown) == GROWN_LEFT


def test_a_shard_all_of_whose_rows_left_keeps_its_list(grown: Run) -> None:
    from paris_ray.pipeline.duplicates import drop_duplicates

    drop_duplicates(grown.config, GROWN)
    grown.quarantine.delete("part-a-00000000.parquet")
    assert pending(grown, GROWN) == ["a"]
    write_repeated_rows(grown, ["a"])
    drop_duplicates(grown.config, GROWN)
    assert stored_keys(grown) == GROWN_LEFT


def test_what_repeats_stays_away_where_a_new_shard_was_interrupted(grown: Run) -> None:
    grown.embeddings.delete("part-new-00000000.parquet")
    assert pending(grown, GROWN) == ["new"]


def test_what_repeats_in_other_ways_is_encoded_again_where_a_shard_is_new(moved: Run) -> None:
    filters = replace(moved.config.corpus.filters, repeated_captions=True)
    corpus = replace(moved.config.corpus, filters=filters)
    run = Run(replace(moved.config, corpus=corpus))
    assert pending(run, GROWN) == ["new", "b", "a"]


def test_what_repeats_is_encoded_again_where_a_shard_is_new_and_another_changed(moved: Run) -> None:
    assert pending(moved, {"b": "1", "new": "1", "a": "2"}) == ["b", "new", "a"]


@pytest.mark.parametrize(
    ("versions", "goes_first"),
    [
        ({"b": "2", "a": "1"}, "a"),
        ({"b": "1", "a": "2"}, "b"),
        ({"a": "1"}, "a"),
        ({"b": "1"}, "b"),
    ],
    ids=["b changed", "a changed", "b gone", "a gone"],
)
def test_a_kill_while_files_are_deleted_forgets_nothing(
    moved: Run, monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], goes_first: str
) -> None:
    """What changed goes last: else rows would stay away that repeat nothing any more."""
    from paris_ray.pipeline import embed

    deleted: list[str] = []

    def delete_one(run: Run, files: ShardFiles) -> None:
        if deleted:
            raise KeyboardInterrupt
        deleted.extend(files.quarantine)
        delete_files(run, files)

    monkeypatch.setattr(embed, "delete_files", delete_one)
    with pytest.raises(KeyboardInterrupt):
        pending(moved, versions)
    monkeypatch.undo()
    assert deleted == [f"part-{goes_first}-00000000.parquet"]
    assert pending(moved, versions) == list(versions)


def test_what_repeats_goes_before_what_changed(moved: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a kill in between would leave rows away that repeat nothing any more."""
    from paris_ray.pipeline import embed

    write_part(moved.embeddings, "part-0-00000000.parquet", to_table({"key": ["only"]}))
    write_account(moved.quarantine, "0", Account("1", 1, 0), [])
    deleted: list[str] = []

    def note(run: Run, files: ShardFiles) -> None:
        deleted.extend(files.quarantine)

    monkeypatch.setattr(embed, "delete_files", note)
    assert pending(moved, {"0": "2", **VERSIONS}) == ["0", "b", "a"]
    assert deleted[-1] == "part-0-00000000.parquet"
