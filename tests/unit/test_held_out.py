"""Which rows are held out, and the labels that say so: for each row alone, in all readers alike."""

import io
import json
import math
import random
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from paris_ray.config import CorpusConfig, load
from paris_ray.corpora import (
    DecodedRow,
    HeldOut,
    RawRow,
    decode_row,
    held_out_rule,
    list_shards,
    open_corpus,
)
from paris_ray.corpora.labels import label_columns, label_names, labels_of, text_columns
from paris_ray.errors import ConfigError, CorpusError

PATTERN = r"an? (?P<object>\w+) on (an? )?(\w+)"
KINDS = ("image_folder", "parquet", "webdataset")
LABELS = "object,count,weight"


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    return buffer.getvalue()


def entry(i: int) -> dict[str, Any]:
    """Row i of the corpora: every tenth lacks a label, and one of them is a list, which is none."""
    labels = {"object": ["cat", "dog", "hen", "cow", "ant"][i % 5], "count": i // 5, "weight": 0.5}
    if i % 10 == 3:
        labels.pop("weight")
    return labels


def write_corpus(kind: str, folder: Path, num_rows: int) -> CorpusConfig:
    """The same rows in the form of a kind."""
    folder.mkdir()
    if kind == "image_folder":
        names = [f"{i}.png" for i in range(num_rows)]
        for name in names:
            (folder / name).write_bytes(png())
        lines = [{"file_name": name, "text": "a"} | entry(i) for i, name in enumerate(names)]
        text = "".join(json.dumps(line | {"tags": ["x"]}) + "\n" for line in lines)
        (folder / "metadata.jsonl").write_text(text)
    elif kind == "parquet":
        rows = [{"image": png(), "text": "a", "weight": None} | entry(i) for i in range(num_rows)]
        pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    else:
        with tarfile.open(folder / "rows.tar", "w") as tar:
            for i in range(num_rows):
                document = json.dumps({"caption": "a"} | entry(i)).encode()
                for suffix, content in (("png", png()), ("json", document)):
                    member = tarfile.TarInfo(f"{i:04d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    labels = {"held_out_key": LABELS, "attributes": "object"}
    return CorpusConfig(kind=kind, path=str(folder), image_size=8, rows_per_shard=16, **labels)  # type: ignore[arg-type]


def rows_of(config: CorpusConfig) -> list[RawRow]:
    corpus = open_corpus(config)
    return [row for shard in corpus.shards() for row in corpus.read(shard)]


# --- labels ---


@pytest.mark.parametrize(
    ("labelling", "columns", "caption", "expected"),
    [
        ("object", {"object": "cat", "other": "x"}, None, {"object": "cat"}),
        ("b,a", {"a": "1", "b": "2"}, "a cat", {"b": "2", "a": "1"}),
        ("a,b", {"a": "1"}, "a cat", None),
        ("a,b", {}, "a,b", None),
        (PATTERN, {}, "see a cat on a mat", {"object": "cat", "group_2": "a ", "group_3": "mat"}),
        (PATTERN, {"object": "dog"}, "a cat on mats", None),  # one group took no part
        (PATTERN, {}, "two cats", None),
        (PATTERN, {}, None, None),
    ],
)
def test_labels_of_a_row(
    labelling: str, columns: dict[str, str], caption: str | None, expected: dict[str, str] | None
) -> None:
    found = labels_of(labelling, columns, caption)
    assert found == expected
    if found is not None:
        assert tuple(found) == label_names(labelling)


def test_labels_have_names_before_there_are_rows() -> None:
    assert label_names(None) == ()
    assert label_names("a,b_2") == ("a", "b_2")
    assert label_names(r"(x) (?P<y>\d)") == ("group_1", "y")
    both = CorpusConfig(held_out_key="b,a", attributes="a,c")
    assert label_columns(both) == ("b", "a", "c")
    assert label_columns(CorpusConfig(held_out_key="(b) a", attributes=None)) == ()


def test_only_plain_values_are_labels() -> None:
    document = {"a": "x", "b": 3, "c": 0.5, "d": ["x"], "e": {"x": 1}, "f": None, "g": "\ud800"}
    wanted = [*document, "absent"]
    assert text_columns(document, wanted) == {"a": "x", "b": "3", "c": "0.5", "g": "?"}
    assert text_columns(document, ["b"]) == {"b": "3"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_reader_reads_the_same_columns(kind: str, tmp_path: Path) -> None:
    config = write_corpus(kind, tmp_path / kind, 40)
    expected = [{name: str(value) for name, value in entry(i).items()} for i in range(40)]
    assert [dict(row.columns) for row in rows_of(config)] == expected
    unlabelled = CorpusConfig(kind=config.kind, path=config.path)
    assert not any(row.columns for row in rows_of(unlabelled))


def test_a_decoded_row_has_its_attributes() -> None:
    row = RawRow("k", png(), " a  cat on a mat ", columns={"object": "dog"})

    def attributes(labelling: str | None) -> dict[str, str]:
        decoded = decode_row(row, CorpusConfig(image_size=8, attributes=labelling))
        assert isinstance(decoded, DecodedRow)
        return dict(decoded.attributes)

    assert attributes(None) == {}
    assert attributes("object") == {"object": "dog"}
    assert attributes("object,place") == {}
    of_caption = {"object": "cat", "group_2": "a ", "group_3": "mat"}  # of the cleaned caption
    assert attributes(PATTERN) == of_caption


ALLOWED = "names of columns such as object,background, or a regular expression with groups"


@pytest.mark.parametrize("key", ["held_out_key", "attributes"])
@pytest.mark.parametrize(
    ("labelling", "reason"),
    [
        ("a (cat", " (missing ), unterminated subpattern at position 2)"),
        ("a cat", ""),
        ("object, background", ""),
    ],
)
def test_labellings_that_name_nothing_are_refused(key: str, labelling: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load("quickstart", ["corpus.kind=openmoji", f"corpus.{key}={labelling}"])
    assert str(caught.value) == f"corpus.{key}={labelling!r} is not allowed: {ALLOWED}{reason}"


# --- held out ---


def keyed(count: int) -> list[RawRow]:
    return [RawRow(f"row {i}", None, None) for i in range(count)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.02, 0.1, 0.5])
def test_the_share_is_held_out_up_to_chance(share: float, seed: int) -> None:
    rule = HeldOut(None, share, seed)
    count = sum(map(rule.holds, keyed(5000)))
    assert abs(count - 5000 * share) < 4.5 * math.sqrt(5000 * share * (1 - share))


def test_each_row_is_decided_for_itself() -> None:
    rows = keyed(500)
    chosen = {row.key for row in rows if HeldOut(None, 0.2, 1).holds(row)}
    random.Random(0).shuffle(rows)
    assert {row.key for row in rows if HeldOut(None, 0.2, 1).holds(row)} == chosen
    assert chosen == {row.key for row in keyed(900)[:500] if HeldOut(None, 0.2, 1).holds(row)}
    other_seed = {row.key for row in rows if HeldOut(None, 0.2, 2).holds(row)}
    assert other_seed != chosen
    larger = {row.key for row in rows if HeldOut(None, 0.3, 1).holds(row)}
    assert chosen < larger  # a larger share takes more, and leaves none back


def test_no_share_holds_nothing_and_all_of_it_everything() -> None:
    assert not any(map(HeldOut(None, 0.0, 0).holds, keyed(100)))
    assert all(map(HeldOut(None, 1.0, 0).holds, keyed(100)))


def test_groups_are_withheld_as_a_whole() -> None:
    rows = [
        RawRow(f"{i}", None, f"picture {i}", columns={"object": f"{i % 50}", "nr": f"{i}"})
        for i in range(1000)
    ]
    for key in ("object", r"picture \d*(\d\d)$"):
        rule = HeldOut(key, 0.3, 0)
        groups: dict[str, set[bool]] = {}
        for row in rows[100:]:
            name = row.columns["object"] if key == "object" else row.key[-2:]
            groups.setdefault(name, set()).add(rule.holds(row))
        assert {len(answers) for answers in groups.values()} == {1}
        assert len({answer for answers in groups.values() for answer in answers}) == 2


def test_a_row_without_a_group_is_never_held_out() -> None:
    rows = [RawRow(f"{i}", None, f"{i}", columns={"object": "cat"}) for i in range(200)]
    for key in ("object,background", "a (cat)"):
        assert not any(map(HeldOut(key, 0.999999, 0).holds, rows))


def test_readers_hold_out_the_same_rows(tmp_path: Path) -> None:
    rule = HeldOut(LABELS, 0.3, 0)
    chosen = [
        [rule.holds(row) for row in rows_of(write_corpus(kind, tmp_path / kind, 200))]
        for kind in KINDS
    ]
    assert chosen[0] == chosen[1] == chosen[2]
    assert 30 < sum(chosen[0]) < 90
    assert not any(chosen[0][3::10])  # they lack a label


@pytest.mark.parametrize(
    ("num_rows", "share", "expected"),
    [
        (40, 0.02, 0.1),
        (640, 0.02, 0.1),
        (1000, 0.02, 0.064),
        (3200, 0.02, 0.02),
        (4000, 0.02, 0.02),
        (1000, 0.2, 0.2),
        (1000, 0.0, 0.0),
    ],
)
def test_of_few_rows_a_larger_share_is_held_out(
    tmp_path: Path, num_rows: int, share: float, expected: float
) -> None:
    """About 64 rows, but at most a tenth."""
    lines = [json.dumps({"file_name": f"{i}.png", "text": "a"}) + "\n" for i in range(num_rows)]
    (tmp_path / "metadata.jsonl").write_text("".join(lines))
    config = CorpusConfig(kind="image_folder", path=str(tmp_path), held_out_share=share)
    rule = held_out_rule(config, open_corpus(config), list_shards(config), seed=7)
    assert (rule.key, rule.seed) == (None, 7)
    assert rule.share == pytest.approx(expected)


def test_a_key_that_names_no_group_is_refused(tmp_path: Path) -> None:
    config = write_corpus("image_folder", tmp_path / "corpus", 20)
    for key in ("object,size", "(b)"):
        wrong = CorpusConfig(
            kind="image_folder", path=config.path, held_out_key=key, rows_per_shard=16
        )
        with pytest.raises(CorpusError) as caught:
            held_out_rule(wrong, open_corpus(wrong), list_shards(wrong), seed=0)
        assert str(caught.value) == (
            f"corpus.held_out_key={key!r} names no group in the first 16 rows: expected "
            "columns that they have, or a pattern that their captions hold, such as 'a'"
        )
    assert held_out_rule(config, open_corpus(config), list_shards(config), seed=0).key == LABELS


def test_a_share_of_0_asks_for_no_group(tmp_path: Path) -> None:
    config = write_corpus("image_folder", tmp_path / "corpus", 20)
    wrong = CorpusConfig(
        kind="image_folder", path=config.path, held_out_key="size", held_out_share=0
    )
    assert held_out_rule(wrong, open_corpus(wrong), list_shards(wrong), seed=0) == HeldOut(
        "size", 0.0, 0
    )


def test_a_group_is_looked_for_in_the_first_rows(tmp_path: Path) -> None:
    """Of a shard with a million rows not all are read before the key is called wrong."""
    lines = [{"file_name": f"{i}.png", "text": "a"} for i in range(300)]
    lines[255]["object"] = "cat"
    path = tmp_path / "metadata.jsonl"
    config = CorpusConfig(
        kind="image_folder", path=str(tmp_path), held_out_key="object", rows_per_shard=1000
    )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert held_out_rule(config, open_corpus(config), list_shards(config), seed=0).key == "object"
    path.write_text("".join(json.dumps(line) + "\n" for line in [lines[299], *lines]))
    with pytest.raises(CorpusError, match="names no group in the first 256 rows"):
        held_out_rule(config, open_corpus(config), list_shards(config), seed=0)
