"""Captions in files beside their pictures."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from paris_ray.config import CorpusConfig
from paris_ray.corpora import RawRow, open_corpus
from paris_ray.corpora.paths import names_in
from paris_ray.errors import CorpusError
from tests.corpus_files import BLUE, RED, png, problems, read_all, write_files


def read(folder: Path, **options: Any) -> list[RawRow]:
    return read_all(CorpusConfig(kind="sidecars", path=str(folder), **options))


def test_captions_of_each_form(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {
        "a.png": png(RED),
        "a.txt": "\ufeffa red square\n",
        "b.v2.PNG": png(BLUE),
        "b.v2.CAPTION": "blau \u2665",
        "10_cats/c #1.jpg": b"jpg",
        "10_cats/c #1.json": '{"prompt": "three"}',
        "10_cats/notes.md": "no picture",
        ".hidden/d.png": png(),
    }
    assert read(write_files(tmp_path, files)) == [
        RawRow("a.png", png(RED), "a red square\n"),
        RawRow("b.v2.PNG", png(BLUE), "blau \u2665"),
        RawRow("10_cats/c #1.jpg", b"jpg", "three"),
    ]


def test_the_first_caption_that_says_something_is_taken(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {
        "a.png": b"a",
        "a.txt": " \n",
        "a.json": '{"caption": null, "text": "json"}',
        "b.png": b"b",
        "b.txt": "txt",
        "b.caption": "caption",
        "b.json": '{"text": "json", "title": "field"}',
    }
    folder = write_files(tmp_path, files)
    assert [row.caption for row in read(folder)] == ["json", "txt"]
    assert [row.caption for row in read(folder, caption_column="caption")] == [None, "caption"]
    assert [row.caption for row in read(folder, caption_column="json")] == ["json", "json"]
    assert [row.caption for row in read(folder, caption_column="title")] == [None, "field"]


def test_labels_are_fields_of_the_json(tmp_path: Path) -> None:
    files = {"a.png": b"a", "a.txt": "txt", "a.json": '{"object": "cat", "size": 3}'}
    (row,) = read(write_files(tmp_path, files), held_out_key="object,size")
    assert row.columns == {"object": "cat", "size": "3"}


def test_two_pictures_of_one_stem_are_two_rows(tmp_path: Path) -> None:
    folder = write_files(tmp_path, {"a.jpg": b"jpg", "a.png": b"png", "a.txt": "both"})
    assert read(folder) == [RawRow("a.jpg", b"jpg", "both"), RawRow("a.png", b"png", "both")]
    assert read(folder, image_column="png") == [RawRow("a.png", b"png", "both")]


def test_masks_are_no_pictures(tmp_path: Path) -> None:
    files = {"a.png": b"a", "a.txt": "a", "a-masklabel.png": b"m", "a-condlabel.png": b"c"}
    assert problems(read(write_files(tmp_path, files))) == {"a.png": None}


def test_what_is_wrong_is_said_of_each_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paris_ray.corpora.samples.MAX_CAPTION_BYTES", 200)
    texts: dict[str, bytes | str] = {
        "b.txt": b"\xff",
        "c.json": "{",
        "d.json": "[]",
        "e.json": "[" * 190,
        "f.txt": "x" * 201,
    }
    pictures: dict[str, bytes | str] = {f"{name}.png": b"x" for name in "abcdef"}
    rows = read(
        write_files(tmp_path, texts | pictures | {"g.png": b"x" * 101}), max_image_bytes=100
    )
    assert problems(rows) == {
        "a.png": "missing_caption",
        "b.png": "missing_caption",
        "c.png": "bad_metadata",
        "d.png": "bad_metadata",
        "e.png": "bad_metadata",
        "f.png": "bad_metadata",
        "g.png": "too_many_bytes",
    }
    assert rows[0].detail == "no caption in: png"
    assert "it has 201 bytes, at most 200 are read" in rows[5].detail


def test_links_do_not_lead_out(tmp_path: Path) -> None:
    write_files(tmp_path, {"secret.txt": "secret", "secret.png": png(), "c/a.png": png()})
    folder = tmp_path / "c"
    (folder / "a.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "b.png").symlink_to(tmp_path / "secret.png")
    rows = read(folder)
    assert problems(rows) == {"a.png": "bad_metadata", "b.png": "missing_file"}
    assert all("leaves the folder" in row.detail and row.caption is None for row in rows)


@pytest.mark.parametrize("rows_per_shard", [1, 2, 100])
def test_shards_are_slices_of_folders(tmp_path: Path, rows_per_shard: int) -> None:
    names = ["0", "1", "2", "a/3", "a/4", "b/c/5"]
    write_files(tmp_path, {f"{name}.png": name for name in names})
    write_files(tmp_path, {f"{name}.txt": name for name in names})
    rows = read(tmp_path, rows_per_shard=rows_per_shard)
    assert [row.caption for row in rows] == names
    for limit in (1, 3, 5, 9):
        assert read(tmp_path, rows_per_shard=rows_per_shard, limit=limit) == rows[:limit]


def test_a_folder_has_at_most_32_shards_and_is_listed_once_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(tmp_path, {f"{i:02d}.png": b"x" for i in range(70)})
    config = CorpusConfig(kind="sidecars", path=str(tmp_path), rows_per_shard=2)
    corpus = open_corpus(config)
    shards = corpus.shards()
    assert [shard.stop - shard.start for shard in shards] == [4] * 17 + [2]
    listed: list[object] = []

    def names(folder: Path) -> list[str]:
        listed.append(folder)
        return names_in(folder)

    monkeypatch.setattr("paris_ray.corpora.sidecars.names_in", names)
    assert len({corpus.version(shard) for shard in shards}) == 18
    assert [row.key for shard in shards for row in corpus.read(shard)] == [
        f"{i:02d}.png" for i in range(70)
    ]
    assert listed == [tmp_path]


def test_a_folder_that_grows_is_cut_elsewhere_only_when_it_has_doubled(tmp_path: Path) -> None:
    corpus = open_corpus(CorpusConfig(kind="sidecars", path=str(tmp_path), rows_per_shard=1))

    def starts(num_pictures: int) -> list[int]:
        write_files(tmp_path, {f"{i:03d}.png": b"x" for i in range(num_pictures)})
        return [shard.start for shard in corpus.shards()]

    assert starts(32) == list(range(32))
    for count in (33, 64):
        assert starts(count) == list(range(0, count, 2))
    for count in (65, 100, 128):  # 97 are more than three times 32
        assert starts(count) == list(range(0, count, 4))


def test_kohyas_repeats_are_not_followed_and_that_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_files(tmp_path, {f"{folder}/a.png": b"x" for folder in ("10_me", "10_you")})
    assert len(read(tmp_path)) == 2
    assert not caplog.messages  # among equals they mean nothing
    write_files(tmp_path / "years", {f"{year}_trip/a.png": b"x" for year in (2023, 2024)})
    assert len(read(tmp_path / "years")) == 2
    assert not caplog.messages
    shutil.rmtree(tmp_path / "years")
    write_files(tmp_path, {"1_all/a.png": b"x"})
    assert len(read(tmp_path)) == 3
    assert caplog.messages == [
        "corpus: the repeats of folders such as 10_me are not followed: every picture is one row"
    ]


def test_splits_are_folders_and_not_pictures(tmp_path: Path) -> None:
    names = ["train/test 1", "train/10_cat/a", "test/b", "c"]
    write_files(tmp_path, {f"{name}.png": b"x" for name in names})
    write_files(tmp_path, {f"{name}.txt": name for name in names})
    assert [row.caption for row in read(tmp_path)] == ["train/test 1", "train/10_cat/a"]
    assert [row.caption for row in read(tmp_path, split="test")] == ["test/b"]


def test_a_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    write_files(tmp_path, {"a.txt": "a"})
    with pytest.raises(CorpusError, match=r"holds no pictures; expected names such as cat\.jpg"):
        open_corpus(CorpusConfig(kind="sidecars", path=str(tmp_path))).shards()
    with pytest.raises(CorpusError, match="is a file; expected a folder"):
        open_corpus(CorpusConfig(kind="sidecars", path=str(tmp_path / "a.txt")))


def test_a_version_is_that_of_pictures_and_captions(tmp_path: Path) -> None:
    files = {f"{name}.{e}": "a" for name in "abc" for e in ("png", "txt")}
    write_files(tmp_path, files)
    corpus = open_corpus(CorpusConfig(kind="sidecars", path=str(tmp_path), rows_per_shard=1))

    def versions() -> list[str]:
        return [corpus.version(shard) for shard in corpus.shards()]

    before = versions()
    for name in ("a.txt", "b.png"):
        write_files(tmp_path, {name: "another"})
    write_files(tmp_path, {"notes.md": "no part of it"})
    recaptioned = versions()
    assert [new == old for new, old in zip(recaptioned, before, strict=True)] == [
        False,
        False,
        True,
    ]
    (tmp_path / "c.txt").unlink()
    (tmp_path / "c.caption").write_text("a")
    assert versions()[2] != before[2]


def test_a_link_in_a_circle_is_a_missing_picture(tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to(tmp_path / "a.png")
    (row,) = read_all(CorpusConfig(kind="sidecars", path=str(tmp_path)))
    assert row.problem == "missing_file"
