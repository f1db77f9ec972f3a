"""What a process moves of files is counted, of an expert by category."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from paris_ray.artifacts import open_finished, publish
from paris_ray.config import load
from paris_ray.folders import Folder
from paris_ray.ledger import OTHER_EXPERTS, bytes_by_category, describe
from paris_ray.run import Run
from paris_ray.traffic import Traffic, recorded


def test_a_file_that_is_read_counts_once_and_whole_one_that_is_written_every_time(
    tmp_path: Path,
) -> None:
    folder = Folder(tmp_path)
    folder.write("before", b"....")
    with recorded() as traffic:
        for size in (3, 5):
            folder.write("a/file", bytes(size))
        for _ in range(2):
            folder.read("a/file")
        folder.sha256("before")
        with folder.reading("before"):
            pass
    folder.read("a/file")
    assert traffic.read == {f"{folder.uri}/a/file": 5, f"{folder.uri}/before": 4}
    assert traffic.written == {f"{folder.uri}/a/file": 8}


def test_what_could_not_be_written_is_not_counted(tmp_path: Path) -> None:
    with recorded() as traffic:
        with pytest.raises(ZeroDivisionError), Folder(tmp_path).writing("file"):
            _ = 1 / 0
        publish(Folder(tmp_path), "things", config_digest="", parents={}, facts={})
    assert list(traffic.written) == [f"{tmp_path}/manifest.json"]


def test_threads_are_counted_together(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    with recorded() as traffic, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda k: folder.write(str(k), b"ab"), range(50)))
    assert sum(traffic.written.values()) == 100


def test_recordings_may_stand_in_each_other(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    with recorded() as outer:
        folder.write("one", b"1")
        with recorded() as inner:
            folder.write("two", b"22")
    assert set(outer.written.values()) == {1, 2}
    assert set(inner.written.values()) == {2}


def test_verified_files_count_too(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.write("weights", b"12345")
    publish(folder, "things", config_digest="", parents={}, facts={})
    with recorded() as traffic:
        open_finished(folder, "things").verified_file("weights")
    assert traffic.read[f"{folder.uri}/weights"] == 5


def test_an_experts_bytes_have_a_category_each(tmp_path: Path) -> None:
    run = Run(load("quickstart", [f"run_dir={tmp_path}"]))
    own, other = run.expert(1).uri, run.expert(11).uri
    read = {
        f"{run.shard(1).uri}/part-0.parquet": 1,
        f"{run.held_out_shard(0).uri}/part-0.parquet": 2,
        f"{run.encoders.uri}/text_encoder/model.safetensors": 4,
        f"{tmp_path}/seed/config.json": 8,
        f"{own}/checkpoint.safetensors": 16,
        f"{other}/checkpoint.safetensors": 32,
        f"{run.shard(11).uri}/part-0.parquet": 64,
    }
    written = Counter({f"{own}/samples/step-1.png": 1, f"{own}/samples.png": 2, f"{own}/note": 4})
    seed = str(tmp_path / "seed")
    moved = bytes_by_category(Traffic(read, written), run, run.expert(1), seed, expert=1)
    assert moved == {
        "read": {
            "shard": 1,
            "held-out rows": 2,
            "encoders": 4,
            "initial weights": 8,
            "checkpoints": 16,
            OTHER_EXPERTS: 32,
            "elsewhere": 64,
        },
        "written": {"pictures": 3, "other": 4, OTHER_EXPERTS: 0},
    }
    assert describe(moved).startswith("read 0.00 MB of elsewhere, ")
