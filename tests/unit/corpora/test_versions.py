"""A shard's version and name: other text where its rows may have changed, and nowhere else."""

import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from paris_ray.config import CorpusConfig
from paris_ray.corpora import Corpus, corpus_version, open_corpus


def write_folder(folder: Path) -> None:
    for i in range(6):
        Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(folder / f"{i}.png")
    write_captions(folder, "red")


def write_captions(folder: Path, last: str) -> None:
    rows = [{"file_name": f"{i}.png", "text": last if i == 5 else "red"} for i in range(6)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_tars(folder: Path) -> None:
    for name in "ab":
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            (folder / "1.txt").write_text("a caption")
            tar.add(folder / "1.txt", "1.txt")


def write_parquet(folder: Path) -> None:
    for name in "ab":
        write_table(folder / f"{name}.parquet", "one")


def write_table(path: Path, caption: str) -> None:
    pq.write_table(pa.table({"image": [b"png"] * 4, "caption": [caption] * 4}), path)


def rewrite(path: Path) -> None:
    """Write a file with other content."""
    if path.suffix == ".parquet":
        write_table(path, "another caption")
    else:
        path.write_bytes(path.read_bytes() + b"\n")


def touch(path: Path) -> None:
    """Give a file of the same bytes another time."""
    before = path.stat()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000))


KINDS = {
    "image_folder": (write_folder, "5.png"),
    "webdataset": (write_tars, "b.tar"),
    "parquet": (write_parquet, "b.parquet"),
}


def opened(kind: str, folder: Path) -> Corpus:
    return open_corpus(CorpusConfig(kind=kind, path=str(folder), rows_per_shard=2))


def versions(kind: str, folder: Path) -> dict[str, str]:
    corpus = opened(kind, folder)
    return {shard.name: corpus.version(shard) for shard in corpus.shards()}


@pytest.mark.parametrize("change", [rewrite, touch])
@pytest.mark.parametrize("kind", KINDS)
def test_shards_of_a_changed_file_have_other_versions(
    kind: str, change: Callable[[Path], None], tmp_path: Path
) -> None:
    write, name = KINDS[kind]
    write(tmp_path)
    before, whole = versions(kind, tmp_path), corpus_version(opened(kind, tmp_path))
    assert versions(kind, tmp_path) == before
    assert corpus_version(opened(kind, tmp_path)) == whole
    change(tmp_path / name)
    after = versions(kind, tmp_path)
    assert after.keys() == before.keys()
    changed = {shard for shard in before if before[shard] != after[shard]}
    sources = {s.name: s.source for s in opened(kind, tmp_path).shards()}
    expected = (
        {max(before)}  # the last two of six pictures
        if kind == "image_folder"
        else {shard for shard, source in sources.items() if source.endswith(name)}
    )
    assert changed == expected
    assert corpus_version(opened(kind, tmp_path)) != whole


def test_captions_and_missing_pictures_count(tmp_path: Path) -> None:
    write_folder(tmp_path)
    before = versions("image_folder", tmp_path)
    write_captions(tmp_path, "blue")
    recaptioned = versions("image_folder", tmp_path)
    assert [recaptioned[name] == before[name] for name in sorted(before)] == [True, True, False]
    (tmp_path / "0.png").unlink()
    lost = versions("image_folder", tmp_path)
    assert [lost[name] == recaptioned[name] for name in sorted(before)] == [False, True, True]


def test_names_of_shards_stay_when_other_files_come(tmp_path: Path) -> None:
    write_tars(tmp_path)
    before = versions("webdataset", tmp_path)
    (tmp_path / "aa.tar").write_bytes((tmp_path / "a.tar").read_bytes())
    after = versions("webdataset", tmp_path)
    assert after.items() > before.items()
    assert len(after) == 3


def test_names_sort_in_the_order_of_their_source() -> None:
    corpus = open_corpus(CorpusConfig(kind="scenes", rows_per_shard=512))
    names = [shard.name for shard in corpus.shards()]
    assert len(names) > 9
    assert names == sorted(names)
    assert len(set(names)) == len(names)
