"""Rows whose scores are out of their limits, moved to the files of quarantine."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paris_ray.config import FiltersConfig, load
from paris_ray.embeddings import read_part, to_table, write_part
from paris_ray.pipeline import moving
from paris_ray.pipeline.accounts import (
    Account,
    account_of,
    files_by_shard,
    part_name,
    write_account,
)
from paris_ray.pipeline.filtering import filter_shard
from paris_ray.pipeline.moving import part_files
from paris_ray.run import Run

FILTERS = FiltersConfig(min_clip_score=0.2, max_nsfw_score=0.5)
# Keys, and their scores, of two files to train on and of one that is held out.
ROWS = {
    "embeddings 0": {"a": (0.3, 0.1), "b": (0.1, 0.1), "c": (0.3, 0.9)},
    "embeddings 16": {"d": (0.1, 0.9)},
    "held_out 0": {"e": (0.2, 0.5), "f": (0.3, 0.6)},
}
LEFT = {"embeddings": ["a"], "held_out": ["e"]}
COUNTED = Account("1", 1, 1, {}, {"max_nsfw_score": 2, "min_clip_score": 2})


@pytest.fixture
def run(tmp_path: Path) -> Run:
    config = load("quickstart", [f"run_dir={tmp_path}"])
    run = Run(replace(config, corpus=replace(config.corpus, filters=FILTERS)))
    for place, rows in ROWS.items():
        folder, first = place.split()
        scores = np.array(list(rows.values()), np.float32)
        columns = {"key": list(rows), "clip_score": scores[:, 0], "nsfw_score": scores[:, 1]}
        write_part(getattr(run, folder), part_name("s", int(first)), to_table(columns))
    write_account(run.quarantine, "s", Account("1", 4, 2), [])
    return run


def filter_rows(run: Run) -> None:
    filter_shard(run, part_files(files_by_shard(run), ["s"]), FILTERS)


def keys(run: Run) -> dict[str, list[str]]:
    return {
        kind: [
            key
            for name in getattr(files_by_shard(run)["s"], kind)
            for key in read_part(getattr(run, kind), name)["key"].to_pylist()
        ]
        for kind in LEFT
    }


def test_rows_move_with_their_reason_and_are_counted_as_filtered(run: Run) -> None:
    filter_rows(run)
    assert keys(run) == LEFT
    moved = {r["key"]: r for r in read_part(run.quarantine, part_name("s", 0)).to_pylist()}
    assert {key: row["reason"] for key, row in moved.items()} == {
        "b": "min_clip_score",
        "c": "max_nsfw_score",
        "d": "min_clip_score",  # the first of both
        "f": "max_nsfw_score",
    }
    assert moved["c"]["detail"] == "nsfw_score 0.900, corpus.filters.max_nsfw_score=0.5"
    assert account_of(run, files_by_shard(run)["s"]) == COUNTED


def test_a_second_time_nothing_moves(run: Run) -> None:
    filter_rows(run)
    written = run.quarantine.read(part_name("s", 0))
    filter_rows(run)
    assert keys(run) == LEFT
    assert run.quarantine.read(part_name("s", 0)) == written


@pytest.mark.parametrize("rewritten", [0, 1, 2])
def test_a_shard_that_is_left_half_moved_is_not_whole(
    run: Run, rewritten: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[object] = []
    rewrite = moving._rewrite

    def stop_after(*taken: Any) -> None:
        if len(done) == rewritten:
            raise KeyboardInterrupt
        done.append(taken)
        rewrite(*taken)

    monkeypatch.setattr(moving, "_rewrite", stop_after)
    with pytest.raises(KeyboardInterrupt):
        filter_rows(run)
    assert account_of(run, files_by_shard(run)["s"]) is None  # so that it is encoded again
