"""Image folders: which tables of pictures are read, and which pictures they may name."""

import json
import logging
import unicodedata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from paris_ray.config import CorpusConfig
from paris_ray.corpora import RawRow, open_corpus
from paris_ray.corpora.image_folder import MAX_CAPTIONS
from paris_ray.corpora.metadata import read_entries
from paris_ray.errors import CorpusError
from tests.corpus_files import BLUE, RED, png, problems, read_all, write_files


def read(folder: Path, **options: Any) -> list[RawRow]:
    return read_all(CorpusConfig(kind="image_folder", path=str(folder), **options))


def jsonl(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def row(file_name: str, text: str = "a", **more: Any) -> dict[str, Any]:
    return {"file_name": file_name, "text": text, **more}


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
            RawRow("2.png", png(BLUE), ["two", None]),
        ]

    def test_bad_metadata_names_its_line(self, tmp_path: Path) -> None:
        lines = [
            {"file_name": "gone.png", "text": "gone"},
            "{not json",
            "",
            "[1]",
            {"text": "no file name"},
            {"file_name": 3},
            r'{"file_name": "\ud800.png"}',
            "[" * 100_000,
        ]
        rows = read_all(self.config(tmp_path, lines, rows_per_shard=3))
        expected = {f"metadata.jsonl:{line}": "bad_metadata" for line in (2, 4, 5, 6, 7, 8)}
        assert problems(rows) == {"gone.png": "missing_file", **expected}
        assert all(row.detail for row in rows)

    def test_larger_files_than_pictures_are_not_read_whole(self, tmp_path: Path) -> None:
        for name, size in (("a.png", 100), ("b.png", 101)):
            (tmp_path / name).write_bytes(b"x" * size)
        lines = [{"file_name": name, "text": "a"} for name in ("a.png", "b.png")]
        rows = read_all(self.config(tmp_path, lines, max_image_bytes=100))
        assert [row.problem for row in rows] == [None, "too_many_bytes"]
        assert rows[1].image is None
        assert rows[1].detail == "it has 101 bytes, at most 100 are read"

    def test_files_outside_the_folder_are_not_read(self, tmp_path: Path) -> None:
        folder = tmp_path / "corpus"
        folder.mkdir()
        (tmp_path / "secret.png").write_bytes(png())
        (folder / "link.png").symlink_to(tmp_path / "secret.png")
        (folder / "loop.png").symlink_to(folder / "loop.png")
        (folder / "real.png").write_bytes(png())
        outside = ["../secret.png", str(folder / "real.png"), "link.png"]
        names = [*outside, "loop.png", ".", "nul\0.png", "x" * 300]
        rows = read_all(self.config(folder, [{"file_name": name, "text": "a"} for name in names]))
        assert {row.problem for row in rows} == {"missing_file"}
        assert all("leaves the folder" in row.detail for row in rows[: len(outside)])
        assert not any(row.image for row in rows)

    @pytest.mark.parametrize(("limit", "sizes"), [(1, [1]), (4, [2, 2]), (5, [2, 2, 1])])
    def test_limit(self, tmp_path: Path, limit: int, sizes: list[int]) -> None:
        lines = [{"file_name": f"{i}.png", "text": "a"} for i in range(7)]
        config = self.config(tmp_path, lines, rows_per_shard=2, limit=limit)
        corpus = open_corpus(config)
        assert [len(list(corpus.keys(shard))) for shard in corpus.shards()] == sizes
        assert [row.key for row in read_all(config)] == [f"{i}.png" for i in range(limit)]

    def test_last_line_without_line_end(self, tmp_path: Path) -> None:
        (tmp_path / "metadata.jsonl").write_text(
            '{"file_name": "a", "text": "a"}\n{"file_name": "b"}'
        )
        config = CorpusConfig(kind="image_folder", path=str(tmp_path))
        assert [row.key for row in read_all(config)] == ["a", "b"]

    def test_empty_metadata(self, tmp_path: Path) -> None:
        (tmp_path / "metadata.jsonl").touch()
        config = CorpusConfig(kind="image_folder", path=str(tmp_path))
        with pytest.raises(CorpusError, match="no rows"):
            open_corpus(config).shards()


class TestTables:
    """Pictures 0 to 4 with captions that spreadsheets find hard, in each form of a table."""

    CAPTIONS = ("plain", 'a "quoted", comma', "two\nlines", "caf\u00e9 \u2665", "last")

    def write(self, folder: Path, form: str) -> None:
        names = [f"{i}.png" for i in range(5)]
        write_files(folder, {name: png() for name in names})
        if form == "jsonl":
            pairs = zip(names, self.CAPTIONS, strict=True)
            write_files(folder, {"metadata.jsonl": jsonl(*(row(*pair) for pair in pairs))})
        elif form == "csv":
            quoted = [text.replace('"', '""') for text in self.CAPTIONS]
            lines = [f'{name},"{text}"\r\n' for name, text in zip(names, quoted, strict=True)]
            text = "\ufefffile_name,text\r\n" + "\r\n".join(lines)  # with blank lines between
            write_files(folder, {"metadata.csv": text})
        else:
            table = pa.table({"file_name": names, "text": self.CAPTIONS, "raw": [b"\xff"] * 5})
            pq.write_table(table, folder / "metadata.parquet", row_group_size=2)

    @pytest.mark.parametrize("rows_per_shard", [1, 2, 100])
    @pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
    def test_forms(self, tmp_path: Path, form: str, rows_per_shard: int) -> None:
        self.write(tmp_path, form)
        rows = read(tmp_path, rows_per_shard=rows_per_shard)
        assert [row.key for row in rows] == [f"{i}.png" for i in range(5)]
        assert tuple(row.caption for row in rows) == self.CAPTIONS
        assert all(row.image == png() for row in rows)
        assert read(tmp_path, rows_per_shard=rows_per_shard, limit=3) == rows[:3]

    def test_several_tables_name_pictures_relative_to_themselves(self, tmp_path: Path) -> None:
        write_files(tmp_path, {name: png() for name in ("0.png", "cats/0.png", "cats/b/1.png")})
        write_files(
            tmp_path,
            {
                "metadata.jsonl": jsonl(row("0.png", "root")),
                "cats/metadata.csv": "text,file_name\ncat,0.png\nkitten,b/1.png\n",
            },
        )
        rows = read(tmp_path)
        assert rows == [
            RawRow("0.png", png(), "root"),
            RawRow("cats/0.png", png(), "cat"),
            RawRow("cats/b/1.png", png(), "kitten"),
        ]
        assert read(tmp_path, limit=2) == rows[:2]

    def test_two_tables_in_one_folder_are_refused(self, tmp_path: Path) -> None:
        write_files(tmp_path, {"metadata.jsonl": jsonl(row("a")), "metadata.csv": "file_name,text"})
        with pytest.raises(CorpusError, match=r"metadata\.csv and metadata\.jsonl: expected one"):
            read(tmp_path)

    def test_blank_lines_are_no_rows_and_count_as_lines(self, tmp_path: Path) -> None:
        text = f"\n{jsonl(row('0.png'))}\n  \n{{}}\n\n"
        write_files(tmp_path, {"0.png": png(), "metadata.jsonl": text})
        rows = read(tmp_path, rows_per_shard=1)
        assert problems(rows) == {"0.png": None, "metadata.jsonl:5": "bad_metadata"}

    def test_lines_of_csv_that_do_not_fit_are_bad_rows(self, tmp_path: Path) -> None:
        lines = ["file_name,text", "0.png,one", "0.png", "0.png,a,b", ",c", "1.png,two"]
        text = "\n".join(lines).encode() + b"\n\xff.png,x\n2.png," + b"x" * 200_000
        write_files(tmp_path, {"0.png": png(), "1.png": png(), "metadata.csv": text})
        rows = read(tmp_path)
        bad = {f"metadata.csv:{n}": "bad_metadata" for n in (3, 4, 5, 7, 8)}
        assert problems(rows) == bad | {"0.png": None, "1.png": None}
        assert [found.caption for found in rows if found.problem is None] == ["one", "two"]
        assert "1 values were found where the first line names 2" in rows[1].detail

    def test_tables_that_cannot_be_read_are_named(self, tmp_path: Path) -> None:
        utf16 = jsonl(row("0.png")).encode("utf-16")
        for name, content, problem in (
            ("metadata.jsonl", utf16, "metadata.jsonl is UTF-16: save it as UTF-8"),
            ("metadata.csv", utf16, "metadata.csv is UTF-16: save it as UTF-8"),
            ("metadata.csv", b"", "no first line with the names of its columns"),
            ("metadata.jsonl", b"file_name,text\n0.png,a\n", "cannot be read: JSONDecodeError"),
            ("metadata.parquet", b"PAR1", "is not readable Parquet"),
        ):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(CorpusError, match=problem):
                read(tmp_path)
            (tmp_path / name).unlink()

    def test_a_line_without_end_does_not_fill_memory(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("paris_ray.corpora.metadata.MAX_LINE_BYTES", 100)
        text = jsonl(row("0.png")) + "x" * 250 + "\n" + jsonl(row("1.png"))
        write_files(tmp_path, {"0.png": png(), "1.png": png(), "metadata.jsonl": text})
        reasons = [found.problem for found in read(tmp_path)]
        assert reasons == [None, "bad_metadata", "bad_metadata", "bad_metadata", None]


class TestColumns:
    @pytest.mark.parametrize("name", ["caption", "captions", "text", "prompt", "description"])
    def test_usual_names_of_captions(self, tmp_path: Path, name: str) -> None:
        write_files(tmp_path, {"metadata.jsonl": jsonl({"file_name": "0.png", name: "found"})})
        assert [found.caption for found in read(tmp_path)] == ["found"]

    def test_a_caption_that_says_nothing_gives_way(self, tmp_path: Path) -> None:
        texts = ("", " \n", "\t")
        rows = [row(f"{i}.png", text, caption="found") for i, text in enumerate(texts)]
        write_files(tmp_path, {"metadata.jsonl": jsonl(*rows, row("3.png", " ", caption=None))})
        assert [found.caption for found in read(tmp_path)] == ["found", "found", "found", " "]

    def test_an_ambiguous_caption_is_refused_before_rows_are_read(self, tmp_path: Path) -> None:
        write_files(tmp_path, {"metadata.jsonl": jsonl(row("0.png", "long", prompt="short"))})
        with pytest.raises(CorpusError) as caught:
            read(tmp_path)
        assert str(caught.value) == (
            f"{tmp_path}/metadata.jsonl has both text and prompt: corpus.caption_column=None must "
            "name one of the columns file_name (str), text (str), prompt (str)"
        )
        assert [r.caption for r in read(tmp_path, caption_column="prompt")] == ["short"]

    def test_a_missing_column_is_refused_before_rows_are_read(self, tmp_path: Path) -> None:
        write_files(tmp_path, {"metadata.csv": "file_name,title\n0.png,a\n"})
        with pytest.raises(CorpusError, match=r"has none of caption, .*title \(str\)$"):
            read(tmp_path)
        with pytest.raises(CorpusError, match=r"has no usable titel: corpus\.caption_column="):
            read(tmp_path, caption_column="titel")
        assert [r.caption for r in read(tmp_path, caption_column="title")] == ["a"]
        with pytest.raises(CorpusError, match=r"no usable path: corpus\.image_column='path'"):
            read(tmp_path, caption_column="title", image_column="path")

    def test_a_chosen_column_may_begin_late(self, tmp_path: Path) -> None:
        lines = [row("0.png", "a"), {"file_name": "1.png", "title": "b"}]
        write_files(tmp_path, {"metadata.jsonl": jsonl(*lines)})
        assert [r.caption for r in read(tmp_path, caption_column="title")] == [None, "b"]

    def test_columns_that_end_in_file_name(self, tmp_path: Path) -> None:
        fields = {"image_file_name": "0.png", "text": "a"}
        write_files(tmp_path, {"0.png": png(), "metadata.jsonl": jsonl(fields)})
        assert read(tmp_path) == [RawRow("0.png", png(), "a")]
        fields["mask_file_name"] = "1.png"
        write_files(tmp_path, {"metadata.jsonl": jsonl(fields)})
        with pytest.raises(CorpusError, match="both image_file_name and mask_file_name"):
            read(tmp_path)
        assert read(tmp_path, image_column="image_file_name") == [RawRow("0.png", png(), "a")]


class TestSeveralCaptions:
    @pytest.mark.parametrize("rows_per_shard", [1, 2, 100])
    def test_lines_of_one_picture_are_one_row(self, tmp_path: Path, rows_per_shard: int) -> None:
        lines = [row("0.png", "a"), row("0.png", "b"), row("1.png", "c")]
        lines += [row("2.png", f"{i}") for i in range(5)]
        text = jsonl(*lines[:2]) + "\n" + jsonl(*lines[2:]) + "{\n{\n"
        write_files(tmp_path, {f"{i}.png": png() for i in range(3)} | {"metadata.jsonl": text})
        rows = read(tmp_path, rows_per_shard=rows_per_shard)
        assert rows[:3] == [
            RawRow("0.png", png(), ["a", "b"]),
            RawRow("1.png", png(), "c"),
            RawRow("2.png", png(), ["0", "1", "2", "3", "4"]),
        ]
        assert [found.key for found in rows[3:]] == ["metadata.jsonl:10", "metadata.jsonl:11"]
        assert read(tmp_path, rows_per_shard=rows_per_shard, limit=2) == rows[:2]

    def test_lists_of_a_picture_are_joined(self, tmp_path: Path) -> None:
        lines = [{"file_name": "0.png", "text": text} for text in (["a", "b"], "c", ["d"])]
        write_files(tmp_path, {"0.png": png(), "metadata.jsonl": jsonl(*lines)})
        assert read(tmp_path) == [RawRow("0.png", png(), ["a", "b", "c", "d"])]

    def test_a_picture_without_end_is_cut_into_rows(self, tmp_path: Path) -> None:
        lines = jsonl(*(row("0.png", f"{i}") for i in range(MAX_CAPTIONS + 3)))
        write_files(tmp_path, {"0.png": png(), "metadata.jsonl": lines})
        rows = read(tmp_path, rows_per_shard=1)
        assert [(found.key, len(found.caption or "")) for found in rows] == [
            ("0.png", MAX_CAPTIONS),
            ("0.png", 3),
        ]


class TestNames:
    NAMES = (
        "a #1.png",
        "with space/and \u00fcml\u00e4ut.png",
        "100%20.png",
        "\u732b/\U0001f431.png",
        "deep/er/and/deeper/0.png",
        "UPPER.PNG",
        "no_extension",
        "?&=+.png",
    )

    @pytest.mark.parametrize("form", ["jsonl", "csv"])
    def test_unusual_names(self, tmp_path: Path, form: str) -> None:
        folder = tmp_path / "corpus #1 %20"
        write_files(folder, {name: png() for name in self.NAMES})
        text = "file_name,text\n" + "".join(f"{name},a\n" for name in self.NAMES)
        text = jsonl(*map(row, self.NAMES)) if form == "jsonl" else text
        write_files(folder, {f"metadata.{form}": text})
        assert read(folder) == [RawRow(name, png(), "a") for name in self.NAMES]

    def test_other_systems_write_the_same_name_otherwise(self, tmp_path: Path) -> None:
        composed, decomposed = (unicodedata.normalize(f, "caf\u00e9.png") for f in ("NFC", "NFD"))
        write_files(tmp_path, {decomposed: png(RED), f"a/{composed}": png(BLUE)})
        names = [composed, f"a\\{decomposed}"]
        write_files(tmp_path, {"metadata.jsonl": jsonl(*map(row, names))})
        assert [found.image for found in read(tmp_path)] == [png(RED), png(BLUE)]

    def test_backslashes_do_not_lead_out(self, tmp_path: Path) -> None:
        write_files(
            tmp_path, {"secret.png": png(), "c/metadata.jsonl": jsonl(row("..\\secret.png"))}
        )
        (found,) = read(tmp_path / "c")
        assert found.problem == "missing_file" and "leaves the folder" in found.detail

    def test_a_link_that_leaves_names_the_remedy(self, tmp_path: Path) -> None:
        write_files(tmp_path, {"store/0": png(), "c/metadata.jsonl": jsonl(row("0.png"))})
        (tmp_path / "c" / "0.png").symlink_to(tmp_path / "store" / "0")
        (found,) = read(tmp_path / "c")
        assert found.image is None and "cp -rL, hf download --local-dir" in found.detail

    def test_a_folder_that_leaves_as_a_link_is_said(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        write_files(tmp_path, {"secret/metadata.jsonl": jsonl(row("0.png"))})
        write_files(tmp_path, {"secret/0.png": png(), "c/metadata.jsonl": jsonl(row("1.png"))})
        (tmp_path / "c" / "link").symlink_to(tmp_path / "secret")
        (tmp_path / "c" / "circle").symlink_to(tmp_path / "c")
        with caplog.at_level(logging.WARNING, "paris_ray"):
            assert [found.key for found in read(tmp_path / "c")] == ["1.png"]
        assert "link leads out of corpus.path" in caplog.text

    def test_the_cache_of_a_hub_consists_of_links(self, tmp_path: Path) -> None:
        snapshot = tmp_path / "datasets--a--b" / "snapshots" / "0123"
        write_files(snapshot.parents[1], {"blobs/1": png(), "blobs/2": jsonl(row("0.png"))})
        snapshot.mkdir(parents=True)
        (snapshot / "0.png").symlink_to("../../blobs/1")
        (snapshot / "metadata.jsonl").symlink_to("../../blobs/2")
        assert read(snapshot) == [RawRow("0.png", png(), "a")]


class TestSplits:
    def folder(self, path: Path, *splits: str) -> Path:
        for split in splits:
            text = jsonl(row("0.png", split or "none"))
            write_files(path / split, {"0.png": png(), "metadata.jsonl": text})
        return path

    def captions(self, folder: Path, **options: Any) -> list[Any]:
        return [found.caption for found in read(folder, **options)]

    def test_train_is_read_and_said(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        folder = self.folder(tmp_path, "train", "validation", "test", "")
        with caplog.at_level(logging.INFO, "paris_ray"):
            assert self.captions(folder) == ["train"]
        said = "split train is read of: 1 of no split, 1 of test, 1 of train, 1 of validation"
        assert said in caplog.text

    def test_a_split_is_chosen(self, tmp_path: Path) -> None:
        folder = self.folder(tmp_path, "train", "dev", "mine/a", "")
        assert self.captions(folder, split="validation") == ["dev"]
        assert self.captions(folder, split="dev") == ["dev"]
        assert self.captions(folder, split="mine") == ["mine/a"]
        assert self.captions(folder, split="all") == ["none", "dev", "mine/a", "train"]
        with pytest.raises(CorpusError, match=r"split='other': .* holds 2 of no split, 1 of vali"):
            read(folder, split="other")

    def test_without_train_what_has_no_split_is_read(self, tmp_path: Path) -> None:
        assert self.captions(self.folder(tmp_path, "", "test")) == ["none"]

    def test_without_any_of_them_a_choice_is_asked_for(self, tmp_path: Path) -> None:
        folder = self.folder(tmp_path, "test", "val")
        with pytest.raises(CorpusError, match="1 of test, 1 of validation; expected one of these"):
            read(folder)
        assert self.captions(folder, split="all") == ["test", "val"]

    def test_a_table_may_be_a_link_but_not_to_itself(self, tmp_path: Path) -> None:
        write_files(tmp_path, {"c/0.png": png()})
        (tmp_path / "table.jsonl").write_text(jsonl(row("0.png")))
        table = tmp_path / "c" / "metadata.jsonl"
        table.symlink_to(tmp_path / "table.jsonl")
        assert [found.problem for found in read(tmp_path / "c")] == [None]
        table.unlink()
        table.symlink_to(table)
        with pytest.raises(CorpusError, match=r"metadata\.jsonl is a link that leads in a circle"):
            read(tmp_path / "c")

    def test_a_value_that_python_cannot_hold_makes_a_bad_row(self, tmp_path: Path) -> None:
        write_files(tmp_path, {"0.png": png(), "1.png": png()})
        taken = pa.array([0, 2**62, 0], pa.timestamp("ms"))
        names = ["0.png", "0.png", "1.png"]
        columns = {"file_name": names, "text": ["a", "b", "c"], "taken": taken}
        pq.write_table(pa.table(columns), tmp_path / "metadata.parquet")
        rows = read(tmp_path)
        assert [found.problem for found in rows] == [None, "bad_metadata", None]
        entries = list(read_entries(tmp_path / "metadata.parquet", start=1, first=2))
        assert [(entry.number, entry.end) for entry in entries] == [(2, 2), (3, 3)]
        assert [entry.fields.get("text") for entry in entries] == [None, "c"]
