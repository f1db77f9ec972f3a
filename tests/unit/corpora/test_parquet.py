"""Parquet files of pictures: columns, types, slices, and what damage costs."""

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from paris_ray.config import CorpusConfig
from paris_ray.corpora import RawRow, not_fetched, open_corpus
from paris_ray.errors import CorpusError
from tests.corpus_files import BLUE, RED, png, problems, read_all


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
        assert [row.key for row in rows] == [
            "a.parquet/x",
            "a.parquet:1",
            "a.parquet/x",
            "b.parquet/7",
            "b.parquet/8",
        ]

    def test_captions_that_are_not_text(self, tmp_path: Path) -> None:
        invalid = pa.array([b"\xff", b"ok"]).view(pa.string())
        self.write(tmp_path / "a.parquet", 2, caption=invalid, key=invalid)
        rows = read_all(self.config(tmp_path))
        assert problems(rows)["a.parquet:0"] == "missing_caption"
        assert rows[1] == RawRow("a.parquet/ok", png((1, 0, 0)), "ok")

    def test_an_unreadable_file_counts_as_much_as_a_readable_one(self, tmp_path: Path) -> None:
        (tmp_path / "a.parquet").write_bytes(b"not parquet")
        self.write(tmp_path / "b.parquet", 2)
        self.write(tmp_path / "c.parquet", 3)
        rows = read_all(self.config(tmp_path, rows_per_shard=2))
        lost = {f"a.parquet:{row}": "unreadable_shard" for row in range(3)}
        assert problems(rows[:3]) == lost and len(rows) == 8
        assert read_all(self.config(tmp_path, rows_per_shard=2, limit=2)) == rows[:2]
        for name in ("b.parquet", "c.parquet"):
            (tmp_path / name).write_bytes(b"")
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

    @pytest.mark.parametrize(
        ("columns", "found"),
        [
            (
                {"jpeg": [b""], "title": ["a"]},
                r"none of caption, .* jpeg \(binary\), title \(string\)$",
            ),
            ({"picture": [b""], "text": ["a"]}, r"none of image, .* picture \(binary\), text"),
            ({"image": ["a.png"], "text": ["a"]}, r"none of image, .* image \(string\)"),
            ({"image": [b""], "text": [1.5]}, r"none of caption, .* text \(double\)"),
            ({"image": [b""], "text": ["a"], "caption": ["a"]}, "both caption and text"),
            ({"image": [b""], "jpg": [b""], "text": ["a"]}, "both image and jpg"),
        ],
    )
    def test_columns_that_do_not_tell(
        self, tmp_path: Path, columns: dict[str, Any], found: str
    ) -> None:
        path = tmp_path / "a.parquet"
        pq.write_table(pa.table(columns), path)
        with pytest.raises(CorpusError, match=rf"a\.parquet has {found}"):
            open_corpus(self.config(path)).shards()

    def test_chosen_columns(self, tmp_path: Path) -> None:
        columns = {"a": [b"a"], "b": [b"b"], "text": ["text"], "title": ["title"]}
        pq.write_table(pa.table(columns), tmp_path / "a.parquet")
        options = {"image_column": "b", "caption_column": "title"}
        assert read_all(self.config(tmp_path, **options)) == [RawRow("a.parquet:0", b"b", "title")]
        with pytest.raises(CorpusError, match=r"no usable titel: corpus\.caption_column='titel'"):
            read_all(self.config(tmp_path, image_column="b", caption_column="titel"))

    @pytest.mark.parametrize(
        ("image", "text"),
        [
            (pa.large_binary(), pa.large_string()),
            (pa.binary_view(), pa.string_view()),
            (pa.dictionary(pa.int32(), pa.binary()), pa.dictionary(pa.int8(), pa.string())),
            (pa.struct({"bytes": pa.large_binary(), "path": pa.string()}), pa.large_string()),
        ],
    )
    def test_types(self, tmp_path: Path, image: pa.DataType, text: pa.DataType) -> None:
        pictures: list[Any] = [png(RED), png(BLUE)]
        if pa.types.is_struct(image):
            pictures = [{"bytes": picture, "path": "x.png"} for picture in pictures]
        columns = {"image": pa.array(pictures, image), "text": pa.array(["a", "b"], text)}
        pq.write_table(pa.table(columns), tmp_path / "a.parquet")
        assert read_all(self.config(tmp_path)) == [
            RawRow("a.parquet:0", png(RED), "a"),
            RawRow("a.parquet:1", png(BLUE), "b"),
        ]

    @pytest.mark.parametrize(
        "captions",
        [
            {"captions": [["a", "b"]]},
            {"text": pa.array([["a", "b"]], pa.large_list(pa.string()))},
            {"caption_0": ["a"], "caption_1": ["b"], "title": ["c"]},
            {"caption1": ["a"], "caption2": ["b"]},
        ],
    )
    def test_several_captions(self, tmp_path: Path, captions: dict[str, Any]) -> None:
        pq.write_table(pa.table({"image": [png()], **captions}), tmp_path / "a.parquet")
        assert [row.caption for row in read_all(self.config(tmp_path))] == [["a", "b"]]

    def test_files_below_and_splits(self, tmp_path: Path) -> None:
        for name in ("train-00000-of-00001", "validation-00000-of-00001", "trained"):
            (tmp_path / "data").mkdir(exist_ok=True)
            self.write(tmp_path / "data" / f"{name}.parquet", 1)
        (tmp_path / ".cache").mkdir()
        self.write(tmp_path / ".cache" / "train-x.parquet", 1)
        (row,) = read_all(self.config(tmp_path))
        assert row.key == "data/train-00000-of-00001.parquet:0"
        (row,) = read_all(self.config(tmp_path, split="validation"))
        assert row.caption == "validation-00000-of-00001 0"
        assert len(read_all(self.config(tmp_path, split="all"))) == 3

    def test_what_img2dataset_could_not_fetch_is_counted_and_no_row(self, tmp_path: Path) -> None:
        status = ["success", "failed_to_download", "success", "failed_to_resize"]
        pictures = [png() if s == "success" else None for s in status]
        table = {"url": ["u"] * 4, "error_message": [""] * 4, "status": status}
        keys = [f"{i:09}" for i in range(4)]
        table |= {"key": keys, "jpg": pictures, "caption": list("abcd")}
        pq.write_table(pa.table(table), tmp_path / "0.parquet")
        config = self.config(tmp_path, rows_per_shard=3)
        assert read_all(config) == [
            RawRow("0.parquet/000000000", png(), "a"),
            RawRow("0.parquet/000000002", png(), "c"),
        ]
        assert not_fetched(config) == {"failed_to_download": 1, "failed_to_resize": 1}

    def test_a_status_of_another_kind_decides_nothing(self, tmp_path: Path) -> None:
        self.write(tmp_path / "a.parquet", 2, status=["new", "old"])
        assert len(read_all(self.config(tmp_path))) == 2
        assert not_fetched(self.config(tmp_path)) == {}

    @pytest.mark.parametrize("claimed", [10**4, 10**12])
    def test_a_file_that_claims_more_rows_is_unreadable(self, tmp_path: Path, claimed: int) -> None:
        """Nobody lists as many rows as a footer of some bytes says."""
        self.write(tmp_path / "a.parquet", 10, row_group_size=4)
        self.write(tmp_path / "b.parquet", 10, row_group_size=4)
        content = (tmp_path / "a.parquet").read_bytes()
        size = int.from_bytes(content[-8:-4], "little")
        at = content.index(b"\x16\x14\x19", len(content) - 8 - size)  # 10, and a list after it
        footer = content[-8 - size : at] + b"\x16" + zigzag(claimed) + content[at + 2 : -8]
        end = len(footer).to_bytes(4, "little") + b"PAR1"
        (tmp_path / "a.parquet").write_bytes(content[: -8 - size] + footer + end)
        rows = read_all(self.config(tmp_path))
        assert Counter(row.problem for row in rows) == {"unreadable_shard": 10, None: 10}

    def test_rows_of_one_picture_are_not_more_than_bytes(self, tmp_path: Path) -> None:
        rows = 200_000
        table = pa.table({"image": [b"x"] * rows, "caption": ["a"] * rows})
        pq.write_table(table, tmp_path / "a.parquet")
        with pytest.raises(CorpusError, match="no readable Parquet rows"):
            open_corpus(self.config(tmp_path)).shards()

    def test_a_column_that_is_there_twice_is_damage(self, tmp_path: Path) -> None:
        table = pa.table({"image": [png()], "caption": ["a"], "key": ["k"]})
        pq.write_table(table.append_column("key", [["l"]]), tmp_path / "a.parquet")
        (row,) = read_all(self.config(tmp_path))
        assert row.key == "a.parquet:0"
        pq.write_table(
            table.append_column("label", [["l"]]).append_column("label", [["m"]]),
            tmp_path / "a.parquet",
        )
        (row,) = read_all(self.config(tmp_path, attributes="label"))
        assert row.problem == "unreadable_shard"

    def test_a_label_that_python_cannot_hold_is_a_bad_row(self, tmp_path: Path) -> None:
        far = pa.array([2**62, 0], pa.timestamp("ms"))
        self.write(tmp_path / "a.parquet", 2, label=far)
        rows = read_all(self.config(tmp_path, attributes="label"))
        assert [row.problem for row in rows] == ["bad_metadata", None]

    def test_shards_may_be_links_but_not_to_themselves(self, tmp_path: Path) -> None:
        """As in the cache of a hub, or where a user links them from several disks."""
        blobs, data = tmp_path / "blobs", tmp_path / "snapshots" / "abc" / "data"
        blobs.mkdir()
        data.mkdir(parents=True)
        self.write(blobs / "1", 3)
        (data / "a.parquet").symlink_to("../../../blobs/1")
        (data / "b.parquet").symlink_to(blobs / "1")
        assert [row.problem for row in read_all(self.config(data))] == [None] * 6
        (data / "c.parquet").symlink_to(data / "c.parquet")
        with pytest.raises(CorpusError, match=r"c\.parquet is a link that leads in a circle"):
            read_all(self.config(data))


def zigzag(value: int) -> bytes:
    rest, parts = value << 1, []
    while rest > 127:
        parts.append(rest & 127 | 128)
        rest >>= 7
    return bytes([*parts, rest])
