"""A sample comes from all over a corpus, is bounded, and says what becomes of every row."""

from itertools import count
from pathlib import Path

import pytest

from paris_ray.config import load
from paris_ray.corpora import HeldOut
from paris_ray.survey.listing import Listing, list_corpus
from paris_ray.survey.sample import picture_size, sample_corpus, some_rows, spread
from tests.small_corpora import LAYOUTS, jpeg, rows_of, write_image_folder


def listing_of(path: Path, kind: str = "image_folder", rows_per_shard: int = 4) -> Listing:
    overrides = [f"corpus.path={path}", f"corpus.kind={kind}"]
    return list_corpus(load("quickstart", [*overrides, f"corpus.rows_per_shard={rows_per_shard}"]))


@pytest.mark.parametrize("kind", LAYOUTS)
def test_few_rows_come_from_every_shard(kind: str, tmp_path: Path) -> None:
    listing = listing_of(LAYOUTS[kind](tmp_path / "corpus", rows_of(16)), kind)
    sampled = list(some_rows(listing, rows=len(listing.shards) + 1))
    assert len(sampled) == len(listing.shards) + 1
    assert {shard for shard, _ in sampled} == {shard.index for shard in listing.shards}


def test_no_more_shards_are_opened_than_rows_are_wanted(tmp_path: Path) -> None:
    listing = listing_of(write_image_folder(tmp_path / "corpus", rows_of(16)))
    assert len(list(some_rows(listing, rows=2))) == 2


def test_time_ends_it_and_every_shard_had_its_part(tmp_path: Path) -> None:
    listing = listing_of(write_image_folder(tmp_path / "corpus", rows_of(16)))
    seconds = count()  # a second a row
    sampled = list(some_rows(listing, seconds=8, clock=lambda: float(next(seconds))))
    shards = [shard for shard, _ in sampled]
    assert {shard: shards.count(shard) for shard in shards} == dict.fromkeys(shards, 2) | {
        shards[0]: 3  # the first second of all is the first row's
    }
    assert len(set(shards)) == 4


def test_good_and_bad_rows_are_told_apart(tmp_path: Path) -> None:
    rows = rows_of(6)
    rows[1] = (b"<html>404</html>", rows[1][1])
    rows[2] = (rows[2][0], " \n ")
    rows[3] = (jpeg((30, 60), orientation=6), "turned")
    path = write_image_folder(tmp_path / "corpus", rows)
    with (path / "metadata.jsonl").open("a") as metadata:
        metadata.write('{"file_name": "000.jpg", "text": "again"}\n')
    sampled = sample_corpus(listing_of(path), HeldOut(None, 1.0, 0))
    reasons = [(row.key, row.reason) for row in sampled]
    assert reasons[1:6] == [
        ("001.jpg", "not_an_image"),
        ("002.jpg", "empty_caption"),
        ("003.jpg", None),
        ("004.jpg", None),
        ("005.jpg", None),
    ]
    # Shards are read in another order, so either may be the first.
    assert {reasons[0], reasons[6]} == {("000.jpg", None), ("000.jpg", "duplicate_key")}
    by_key = {row.key: row for row in sampled}
    assert by_key["003.jpg"].size == (60, 30)
    assert by_key["003.jpg"].is_held_out
    assert by_key["003.jpg"].picture is not None
    assert by_key["003.jpg"].picture.shape == (64, 64, 3)
    bad = by_key["002.jpg"]  # its picture is shown all the same
    assert bad.picture is not None and not bad.is_held_out and bad.detail
    assert by_key["001.jpg"].picture is None


def test_sizes_of_anything_else_are_unknown() -> None:
    assert picture_size(b"not a picture") is picture_size(None) is None
    assert picture_size(jpeg((30, 60))) == (30, 60)


def test_spread_items_reach_from_the_first_to_the_last() -> None:
    assert spread(range(10), 4) == [0, 3, 6, 9]
    assert spread("ab", 4) == ["a", "b"]
