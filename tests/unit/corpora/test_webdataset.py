"""WebDataset tars: samples, keys, captions, and img2dataset's output as it is."""

import json
import logging
import tarfile
from pathlib import Path
from typing import Any

import pytest

from paris_ray.config import CorpusConfig
from paris_ray.corpora import RawRow, not_fetched, open_corpus
from paris_ray.errors import CorpusError
from tests.corpus_files import RED, png, problems, read_all, write_files, write_tar


class TestWebDataset:
    def config(self, path: Path, **options: Any) -> CorpusConfig:
        return CorpusConfig(kind="webdataset", path=str(path), **options)

    def test_samples(self, tmp_path: Path) -> None:
        write_tar(
            tmp_path / "0.tar",
            {
                "a/1.png": png(RED),
                "a/1.seg.png": b"ignored",
                "a/1.txt": "rot \u2665".encode(),
                "2.JPG": b"jpg",
                "2.json": b'{"caption": "two"}',
                "._2.JPG": b"left by another system",
                "README": b"no extension",
            },
        )
        write_tar(
            tmp_path / "1.tar",
            {"3.json": b'{"text": "three"}', "3.webp": b"webp", "2.jpeg": b"", "4.txt": b"four"},
        )
        rows = read_all(self.config(tmp_path))
        assert rows[:4] == [
            RawRow("0.tar/a/1", png(RED), "rot \u2665"),
            RawRow("0.tar/2", b"jpg", "two"),
            RawRow("1.tar/3", b"webp", "three"),
            RawRow("1.tar/2", b"", None, "missing_caption", "no caption in: jpeg"),
        ]
        assert (rows[4].key, rows[4].problem) == ("1.tar/4", "missing_file")

    def test_bad_captions(self, tmp_path: Path) -> None:
        captions = {"1.txt": b"\xff", "2.json": b"{", "3.json": b"[]", "4.json": b"[" * 100_000}
        members = [(f"{name[0]}.png", png()) for name in captions]
        write_tar(tmp_path / "0.tar", sorted([*members, *captions.items()]))
        assert problems(read_all(self.config(tmp_path))) == {
            "0.tar/1": "missing_caption",
            "0.tar/2": "bad_metadata",
            "0.tar/3": "bad_metadata",
            "0.tar/4": "bad_metadata",
        }

    def test_repeated_member_is_another_row(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "0.tar", [("1.png", b"x"), ("1.txt", b"x"), ("1.png", b"y")])
        assert [row.image for row in read_all(self.config(tmp_path))] == [b"x", b"y"]

    @pytest.mark.parametrize("limit", [1, 3, 4, 9])
    def test_limit(self, tmp_path: Path, limit: int) -> None:
        for name in ("a", "b"):
            write_tar(tmp_path / f"{name}.tar", {f"{name}{i}.png": b"x" for i in range(3)})
        every = read_all(self.config(tmp_path))
        assert len(every) == 6
        assert read_all(self.config(tmp_path, limit=limit)) == every[:limit]

    def test_rows_before_damage_are_kept(self, tmp_path: Path) -> None:
        path = tmp_path / "0.tar"
        write_tar(path, {"1.png": png(), "1.txt": b"one", "2.png": png(), "2.txt": b"two"})
        intact = path.read_bytes()
        second = intact.index(b"2.png")
        for damaged in (
            intact[: second + 520],  # within the data of 2.png
            intact[: second + 100],  # within its header
            intact[:second],  # between two members, without the end mark
            intact[: second + 20] + b"\xff" * 8 + intact[second + 28 :],  # wrong checksum
        ):
            path.write_bytes(damaged)
            rows = read_all(self.config(tmp_path))
            assert rows[0] == RawRow("0.tar/1", png(), "one")
            assert rows[1].key == "0.tar" and {r.problem for r in rows[1:]} == {"unreadable_shard"}
            assert f"one of about {len(rows) - 1} rows after: " in rows[1].detail

    def test_negative_size_ends(self, tmp_path: Path) -> None:
        path = tmp_path / "0.tar"
        info = tarfile.TarInfo("2.png")
        info.size = -1024
        write_tar(path, {"1.png": b"x"})
        kept = path.read_bytes()[:1024]
        path.write_bytes(kept + info.tobuf(tarfile.GNU_FORMAT) + bytes(10_240))
        rows = read_all(self.config(path))
        assert [row.key for row in rows[:2]] == ["0.tar/1", "0.tar"]
        assert rows[1].problem == "unreadable_shard" and "is negative" in rows[1].detail

    def test_nothing_readable(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "0.tar", {})
        (tmp_path / "1.tar").write_bytes(b"not a tar")
        with pytest.raises(CorpusError, match="no readable samples"):
            open_corpus(self.config(tmp_path)).shards()
        write_tar(tmp_path / "2.tar", {"1.png": b"x"})
        rows = read_all(self.config(tmp_path))
        assert (rows[0].key, rows[0].problem) == ("1.tar", "unreadable_shard")
        assert rows[-1] == RawRow("2.tar/1", b"x", None, "missing_caption", "no caption in: png")

    def test_keys_may_restart_in_every_tar(self, tmp_path: Path) -> None:
        for name in ("a.tar", "deep/b.tar"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            write_tar(tmp_path / name, {"0.png": png(), "0.txt": b"a", "./1.png": png()})
        corpus = open_corpus(self.config(tmp_path))
        keys = {shard.index: list(corpus.keys(shard)) for shard in corpus.shards()}
        assert keys == {0: ["a.tar/0", "a.tar/1"], 1: ["deep/b.tar/0", "deep/b.tar/1"]}
        (alone,) = open_corpus(self.config(tmp_path / "a.tar")).shards()
        assert list(corpus.keys(alone)) == keys[0]

    def test_names_as_webdataset_reads_them(self, tmp_path: Path) -> None:
        names = [
            "A.B/x.JPG",
            "A.B/x.cls",
            "A.B/README",
            "A.B/x.Txt",
            ".x.jpg",
            "y.seg.png",
            "x #1.gif",
        ]
        write_tar(tmp_path / "a.tar", [(name, name.encode()) for name in names])
        rows = read_all(self.config(tmp_path))
        assert [row.key for row in rows] == ["a.tar/A.B/x", "a.tar/y", "a.tar/x #1"]
        assert rows[0] == RawRow("a.tar/A.B/x", b"A.B/x.JPG", "A.B/x.Txt")
        assert [row.problem for row in rows[1:]] == ["missing_file", "missing_caption"]

    def test_chosen_members(self, tmp_path: Path) -> None:
        fields = json.dumps({"caption": "short", "long": "long"}).encode()
        members = {
            "0.jpg": b"j",
            "0.depth.png": b"d",
            "0.txt": b"t",
            "0.cap": b"c",
            "0.json": fields,
        }
        write_tar(tmp_path / "a.tar", members)
        (row,) = read_all(self.config(tmp_path, image_column="depth.png", caption_column="cap"))
        assert (row.image, row.caption) == (b"d", "c")
        for column, caption in ((None, "t"), ("json", "short"), ("long", "long"), ("x", None)):
            (row,) = read_all(self.config(tmp_path, caption_column=column))
            assert (row.image, row.caption) == (b"j", caption)

    @pytest.mark.parametrize(
        ("members", "caption"),
        [
            ({"0.txt": b"", "0.json": b'{"caption": "json"}'}, "json"),
            ({"0.caption": b"caption"}, "caption"),
            ({"0.json": b'{"text": null, "prompt": "p"}'}, "p"),
            ({"0.json": b'{"captions": ["a", "b"]}'}, ["a", "b"]),
        ],
    )
    def test_captions(self, tmp_path: Path, members: dict[str, bytes], caption: Any) -> None:
        write_tar(tmp_path / "a.tar", {"0.gif": b"x", **members})
        assert [row.caption for row in read_all(self.config(tmp_path))] == [caption]

    def test_a_tar_that_cannot_be_opened_is_counted(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "a.tar", {"0.png": b"x", "0.txt": b"a"})
        (tmp_path / "b.tar").symlink_to(tmp_path / "gone")
        rows = read_all(self.config(tmp_path))
        assert rows[0] == RawRow("a.tar/0", b"x", "a")
        assert rows[1].problem == "unreadable_shard" and "FileNotFoundError" in rows[1].detail

    def test_splits_are_names_of_tars(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        for name in ("train-0.tar", "val-0.tar.gz"):
            write_tar(tmp_path / name, {"0.png": b"x", "0.txt": name.encode()})
        with caplog.at_level(logging.INFO, "paris_ray"):
            assert [row.caption for row in read_all(self.config(tmp_path))] == ["train-0.tar"]
        assert "split train is read of: 1 of train, 1 of validation" in caplog.text


class TestImg2dataset:
    """Tars of 10 samples with their statistics and their Parquet files beside them."""

    def folder(self, path: Path, count: int = 10) -> CorpusConfig:
        for shard in ("00000", "00001"):
            members = {}
            for i in range(count):
                fields = {"caption": f"cap {i}", "url": "u", "status": "success", "key": str(i)}
                members[f"{shard}{i:04}.jpg"] = png()
                members[f"{shard}{i:04}.json"] = json.dumps(fields).encode()
                members[f"{shard}{i:04}.txt"] = f"cap {i}".encode()
            write_tar(path / f"{shard}.tar", members)
            counts = {"successes": count, "failed_to_download": 3, "failed_to_resize": 1}
            write_files(path, {f"{shard}_stats.json": json.dumps({"count": 14, **counts})})
            write_files(path, {f"{shard}.parquet": b"not read"})
        return CorpusConfig(kind="webdataset", path=str(path))

    def test_output_is_read_as_it_is(self, tmp_path: Path) -> None:
        rows = read_all(self.folder(tmp_path))
        assert len(rows) == 20 and all(row.problem is None for row in rows)
        assert rows[11] == RawRow("00001.tar/000010001", png(), "cap 1")

    def test_what_could_not_be_fetched_is_counted(self, tmp_path: Path) -> None:
        config = self.folder(tmp_path)
        assert not_fetched(config) == {"failed_to_download": 6, "failed_to_resize": 2}
        for text in ("[]", "{", '{"failed_to_download": -1, "failed_to_resize": true}', "[" * 9999):
            write_files(tmp_path, {"00000_stats.json": text, "00001_stats.json": text})
            assert not_fetched(config) == {}

    def test_of_a_truncated_tar_the_statistics_know_the_loss(self, tmp_path: Path) -> None:
        config = self.folder(tmp_path)
        path = tmp_path / "00001.tar"
        path.write_bytes(path.read_bytes()[:2600])  # within the data of the second sample
        rows = read_all(config)
        assert len(rows) == 20
        assert [row.problem for row in rows[11:]] == ["unreadable_shard"] * 9

    def test_statistics_that_lie_do_not_fill_memory(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("paris_ray.corpora.webdataset._MAX_LOST", 50)
        config = self.folder(tmp_path)
        (tmp_path / "00001.tar").write_bytes(b"")
        write_files(tmp_path, {"00001_stats.json": json.dumps({"successes": 10**18})})
        assert len(read_all(config)) == 60


def test_a_tar_of_which_a_tenth_arrived_counts_with_what_is_lost(tmp_path: Path) -> None:
    members = [(f"{i:03}.{e}", bytes(2000)) for i in range(60) for e in ("png", "txt")]
    for name in ("a.tar", "b.tar"):
        write_tar(tmp_path / name, members)
    whole = (tmp_path / "b.tar").read_bytes()
    for share, lost in ((0.1, 54), (0.5, 30), (0.0, 60)):
        (tmp_path / "b.tar").write_bytes(whole[: int(share * len(whole))])
        rows = read_all(CorpusConfig(kind="webdataset", path=str(tmp_path)))
        found = sum(row.problem == "unreadable_shard" for row in rows)
        assert abs(found - lost) <= 3
