"""Rows whose key an earlier row has, moved from files of rows to the files of quarantine."""

from pathlib import Path

import pytest

from paris_ray.config import load
from paris_ray.embeddings import read_part, to_table, write_part
from paris_ray.pipeline.accounts import (
    Account,
    account_of,
    files_by_shard,
    part_name,
    write_account,
)
from paris_ray.pipeline.duplicates import drop_few_duplicates
from paris_ray.run import Run
from tests.repeated_rows import LEFT, ORDER, stored_keys, write_repeated_rows


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(load("quickstart", [f"run_dir={tmp_path}"]))
    write_repeated_rows(run)
    return run


def test_the_first_row_in_corpus_order_stays(run: Run) -> None:
    drop_few_duplicates(run.config, ORDER)
    assert stored_keys(run) == LEFT
    kept = read_part(run.embeddings, part_name("b", 0))
    latents = kept["latents"].combine_chunks().to_numpy_ndarray()
    assert latents[:, 0, 0].tolist() == [0, 1, 3]  # rows keep their columns
    moved = read_part(run.quarantine, part_name("a", 0)).to_pylist()
    detail = "an earlier row has this key"
    assert [(row["key"], row["reason"], row["detail"]) for row in moved] == [
        (key, "duplicate_key", detail) for key in ("y", "z", "w")
    ]


def test_a_row_to_train_on_is_earlier_than_any_that_is_held_out(tmp_path: Path) -> None:
    run = Run(load("quickstart", [f"run_dir={tmp_path}"]))
    write_part(run.held_out, part_name("first", 0), to_table({"key": ["x", "y"]}))
    write_part(run.embeddings, part_name("second", 0), to_table({"key": ["x"]}))
    for shard, account in {"first": Account("1", 0, 2), "second": Account("1", 1, 0)}.items():
        write_account(run.quarantine, shard, account, [])
    drop_few_duplicates(run.config, ["first", "second"])
    assert stored_keys(run) == {
        f"embeddings {part_name('second', 0)}": ["x"],
        f"held_out {part_name('first', 0)}": ["y"],
    }


def test_accounts_follow_and_a_second_time_nothing_moves(run: Run) -> None:
    expected = {
        "b": Account("1", 3, 1, {"duplicate_key": 1}),
        "a": Account("1", 1, 0, {"duplicate_key": 3}),
    }
    for _ in range(2):
        drop_few_duplicates(run.config, ORDER)
        found = {name: account_of(run, files) for name, files in files_by_shard(run).items()}
        assert found == expected


def test_a_shard_that_is_half_moved_is_not_whole(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("paris_ray.pipeline.moving._rewrite", killed)
    with pytest.raises(KeyboardInterrupt):
        drop_few_duplicates(run.config, ORDER)
    found = {name: account_of(run, files) for name, files in files_by_shard(run).items()}
    assert found == {"b": None, "a": Account("1", 3, 1)}


def test_nothing_is_moved_of_a_corpus_without_rows(tmp_path: Path) -> None:
    drop_few_duplicates(load("quickstart", [f"run_dir={tmp_path}"]), [])
