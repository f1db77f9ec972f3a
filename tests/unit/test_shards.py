"""Reading a corpus shard in pieces and writing them, without Ray."""

import io
import json
import tarfile
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from paris_ray.config import Config, FiltersConfig, load
from paris_ray.corpora import REASONS, HeldOut, QuarantinedRow, list_shards, open_corpus
from paris_ray.corpora.perceptual_hash import perceptual_hashes
from paris_ray.embeddings import column_names, part_names, read_table, stream_column
from paris_ray.errors import CorpusError
from paris_ray.folders import Folder
from paris_ray.pipeline import report
from paris_ray.pipeline.accounts import (
    Account,
    ShardFiles,
    account_of,
    delete_files,
    files_by_shard,
    part_name,
    set_aside,
)
from paris_ray.pipeline.embed import count_rows, progress_line, refuse_bad_corpus
from paris_ray.pipeline.encoders import sample_rows
from paris_ray.pipeline.quarantine import describe_bad_rows
from paris_ray.pipeline.shards import Batch, ShardReader, ShardWriter, caption_variants
from paris_ray.run import Run
from tests.small_corpora import rows_of, write_tars

NUM_GOOD = 40
BROKEN = {"broken": b"no picture", "text": b"nor this"}
NO_ROW = HeldOut(None, 0.0, 0)
ATTRIBUTES = ["attribute.article", "attribute.group_2"]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A corpus of one tar: 40 pictures, and among them two that are none."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, format="PNG")
    names = [f"{i:03d}" for i in range(NUM_GOOD)]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in [*names[:7], "broken", *names[7:], "text"]:
            for suffix, payload in (("png", buffer.getvalue()), ("txt", b"a square")):
                member = tarfile.TarInfo(f"{name}.{suffix}")
                content = BROKEN.get(name, payload) if suffix == "png" else payload
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    overrides = [
        f"run_dir={tmp_path / 'run'}",
        "corpus.kind=webdataset",
        f"corpus.path={tmp_path}",
        "corpus.rows_per_shard=16",
        "corpus.held_out_key=null",
        "corpus.held_out_share=0.02",
        "corpus.attributes=(?P<article>an?) (square)",
    ]
    return load("quickstart", overrides)


def read(config: Config, held_out: HeldOut = NO_ROW, num_captions: int = 1) -> list[Batch]:
    (shard,) = open_corpus(config.corpus).shards()
    description: Batch = {name: np.array([value]) for name, value in asdict(shard).items()}
    description |= {"version": np.array(["1"])}
    return list(ShardReader(config, held_out, num_captions)(description))


def encoded(batch: Batch) -> Batch:
    """Return the batch with columns as the encoders add them."""
    count = len(batch["row"])
    columns = {"latents": (2, 4, 4), "features": (3,), "text_embedding": (1, 5)}
    return batch | {name: np.ones((count, *shape), np.float16) for name, shape in columns.items()}


def test_a_large_shard_is_read_in_pieces_that_follow_each_other(config: Config) -> None:
    batches = read(config)
    assert [len(batch["row"]) for batch in batches] == [16, 16, 8]
    assert np.concatenate([batch["row"] for batch in batches]).tolist() == list(range(NUM_GOOD))
    quarantined = pq.read_table(Run(config).quarantine.uri).to_pylist()
    reasons = [(row["key"], row["reason"]) for row in quarantined]
    assert reasons == [("a.tar/broken", "not_an_image"), ("a.tar/text", "not_an_image")]


def test_pieces_of_a_shard_are_written_side_by_side(config: Config) -> None:
    writer = ShardWriter(config)
    for batch in read(config):
        writer(encoded(batch))
    (shard,) = open_corpus(config.corpus).shards()
    assert Run(config).embeddings.files() == [
        f"part-{shard.name}-{first:08d}.parquet" for first in (0, 16, 32)
    ]
    keys = pq.read_table(Run(config).embeddings.uri)["key"].to_pylist()
    assert keys == [f"a.tar/{i:03d}" for i in range(NUM_GOOD)]


def test_mirrored_latents_and_token_ids_are_kept_as_they_are(config: Config) -> None:
    batch = read(config)[0]
    tensors = {
        "latents": np.full((16, 2, 4, 4), 1, np.float16),
        "latents_flipped": np.full((16, 2, 4, 4), 2, np.float16),
        "features": np.zeros((16, 3), np.float32),
        "token_ids": np.full((16, 1, 77), 65_535, np.uint16),
    }
    ShardWriter(config)(batch | tensors)
    folder = Run(config).embeddings
    assert column_names(folder) == ["key", "caption", "thumbnail", *ATTRIBUTES, *tensors]
    for name, expected in tensors.items():
        (stored,) = stream_column(folder, name)
        assert stored.dtype == expected.dtype
        np.testing.assert_array_equal(stored, expected)


def test_pictures_are_hashed_where_they_are_compared_by_it(config: Config) -> None:
    (shard,) = open_corpus(config.corpus).shards()
    description: Batch = {name: np.array([value]) for name, value in asdict(shard).items()}
    corpus = replace(config.corpus, filters=FiltersConfig(picture_distance=4))
    reader = ShardReader(replace(config, corpus=corpus), NO_ROW)
    batch = next(reader(description | {"version": np.array(["1"])}))
    ShardWriter(config)(encoded(batch))
    table = pq.read_table(Run(config).embeddings.uri)
    assert table.schema.field("phash").type == pa.uint64()
    assert table["phash"].to_pylist() == perceptual_hashes(batch["image"]).tolist()
    assert "phash" not in read(config)[0]


def test_rows_of_two_shards_in_one_block_are_parted_where_they_are_written(config: Config) -> None:
    batch = encoded(read(config)[0])
    batch["shard"] = np.repeat(["0000a", "0000b"], 8)
    batch["row"] = np.tile(np.arange(8), 2)
    ShardWriter(config)(batch)
    names = [part_name(shard, 0) for shard in ("0000a", "0000b")]
    assert part_names(Run(config).embeddings) == names
    assert keys_in(Run(config).embeddings) == batch["key"].tolist()


def test_rows_out_of_their_order_are_an_error(config: Config) -> None:
    batch = encoded(read(config)[0])
    batch["row"] = batch["row"][::-1].copy()
    with pytest.raises(RuntimeError, match="order"):
        ShardWriter(config)(batch)


def test_held_out_rows_go_into_a_folder_of_their_own(config: Config) -> None:
    rule = HeldOut(None, 0.4, seed=0)
    rows = open_corpus(config.corpus).read(open_corpus(config.corpus).shards()[0])
    withheld = {row.key for row in rows if rule.holds(row)} - {"a.tar/broken"}
    assert 5 < len(withheld) < 35
    batches, writer = read(config, rule), ShardWriter(config)
    assert all(len(set(batch["held_out"])) == 1 for batch in batches)
    for batch in batches:
        writer(encoded(batch))
    run = Run(config)
    keys = [f"a.tar/{i:03d}" for i in range(NUM_GOOD)]
    assert keys_in(run.held_out) == [key for key in keys if key in withheld]
    assert keys_in(run.embeddings) == [key for key in keys if key not in withheld]


def test_a_block_of_both_kinds_is_parted_where_it_is_written(config: Config) -> None:
    """Ray Data joins small blocks; each kind counts its own rows."""
    batches = read(config, HeldOut(None, 0.4, seed=0))
    last = {bool(batch["held_out"][0]): encoded(batch) for batch in batches}
    joined = {name: np.concatenate([last[False][name], last[True][name]]) for name in last[True]}
    written = {name: count.tolist() for name, count in ShardWriter(config)(joined).items()}
    run = Run(config)
    assert keys_in(run.embeddings) == last[False]["key"].tolist()
    assert keys_in(run.held_out) == last[True]["key"].tolist()
    assert written == {
        "good": [len(last[False]["key"])],
        "held_out": [len(last[True]["key"])],
        "quarantined": [int(joined["quarantined"].sum())],
        "ended": [1],
    }


def test_progress_counts_every_row_of_a_shard(config: Config) -> None:
    """Also of blocks that Ray Data cuts in two."""
    writer, counts = ShardWriter(config), Counter[str]()
    for batch in map(encoded, read(config, HeldOut(None, 0.4, seed=0))):
        for half in (slice(0, 3), slice(3, None)):
            piece = {name: column[half] for name, column in batch.items()}
            counts.update({name: int(count[0]) for name, count in writer(piece).items()})
    withheld = len(keys_in(Run(config).held_out))
    told = {"good": NUM_GOOD - withheld, "held_out": withheld, "quarantined": 2}
    assert counts == told | {"ended": 1}
    rest = f"{NUM_GOOD - withheld} good, {withheld} held out, 2 quarantined"
    assert progress_line(counts, 3, 21.0) == f"1/3 shards, 42 rows, 2 rows/s, ETA 42 s; {rest}"
    assert progress_line(Counter(told), 3, 21.0) == f"0/3 shards, 42 rows, 2 rows/s; {rest}"


def test_labels_are_kept_as_columns(config: Config) -> None:
    batch = read(config)[0]
    assert batch["attribute.article"].tolist() == ["a"] * 16
    assert batch["attribute.group_2"].tolist() == ["square"] * 16


def test_several_captions_become_variants_of_text(config: Config, tmp_path: Path) -> None:
    """Rows have one, two and three captions; there is room for two."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, format="PNG")
    captions = [["a"], ["a", "b"], ["a", "b", "c"]]
    table = pa.table({"image": [buffer.getvalue()] * 3, "caption": captions})
    pq.write_table(table, tmp_path / "rows.parquet")
    corpus = replace(config.corpus, kind="parquet")
    batch = read(replace(config, corpus=corpus), num_captions=2)[0]
    assert batch["caption"].tolist() == ["a", "a", "a"]
    assert batch["caption.1"].tolist() == ["a", "b", "b"]
    texts = caption_variants(batch, ["{}", "a picture of {}"])
    assert texts[:8] == [
        *("a", "a picture of a", "a", "a picture of a"),
        *("a", "a picture of a", "b", "a picture of b"),
    ]
    ShardWriter(config)(encoded(batch))
    assert "caption.1" not in column_names(Run(config).embeddings)


def keys_in(folder: Folder) -> list[str]:
    return read_table(folder, ["key"])["key"].to_pylist()


def test_held_out_rows_are_counted_apart(config: Config) -> None:
    writer = ShardWriter(config)
    for batch in read(config, HeldOut(None, 0.4, seed=0)):
        writer(encoded(batch))
    run = Run(config)
    withheld = len(keys_in(run.held_out))
    counts = count_rows(accounts_in(run))
    quarantined = {"not_an_image": 2}
    assert counts == {
        "rows": NUM_GOOD - withheld,
        "held_out": withheld,
        "quarantined": quarantined,
        "filtered": {},
    }
    refuse_bad_corpus(config, counts)
    name = run.embeddings.files()[0]
    run.embeddings.delete(name)
    with pytest.raises(CorpusError, match="1 of 1 shards were not written as they were read, such"):
        count_rows(accounts_in(run))


def accounts_in(run: Run) -> dict[str, Account | None]:
    return {name: account_of(run, files) for name, files in files_by_shard(run).items()}


def test_a_shard_that_is_not_written_yet_has_no_account(config: Config) -> None:
    run, writer = Run(config), ShardWriter(config)
    batches = [encoded(batch) for batch in read(config)]  # its file of quarantine/ is there
    assert list(accounts_in(run).values()) == [None]
    for batch in batches[:-1]:
        writer(batch)
    assert list(accounts_in(run).values()) == [None]
    writer(batches[-1])
    assert list(accounts_in(run).values()) == [Account("1", NUM_GOOD, 0, {"not_an_image": 2})]
    (files,) = files_by_shard(run).values()
    delete_files(run, replace_quarantine(files))
    assert list(accounts_in(run).values()) == [None]


def replace_quarantine(files: ShardFiles) -> ShardFiles:
    return replace(files, embeddings=[], held_out=[])


def test_a_corpus_that_is_held_out_as_a_whole_is_refused(config: Config) -> None:
    counts = {"rows": 0, "held_out": 40, "quarantined": {}, "filtered": {}}
    with pytest.raises(CorpusError) as caught:
        refuse_bad_corpus(config, counts)
    assert str(caught.value) == (
        "all 40 usable rows are held out (corpus.held_out_share=0.02, corpus.held_out_key=None): "
        "none are left to train on"
    )


def test_a_corpus_with_too_many_bad_rows_is_refused_with_an_example(
    config: Config, tmp_path: Path
) -> None:
    for batch in read(config, HeldOut(None, 0.0, seed=0)):
        ShardWriter(config)(encoded(batch))
    config = replace(config, corpus=replace(config.corpus, max_bad_share=0.0))
    with pytest.raises(CorpusError) as caught:
        refuse_bad_corpus(config, count_rows(accounts_in(Run(config))))
    message = str(caught.value)
    assert message.startswith(f"2 of {NUM_GOOD + 2} rows are bad (")
    assert ": 2 not_an_image (the b" in message
    detail = "10 bytes that begin with b'no pictu'"
    assert f"; such as 'a.tar/broken', not_an_image: {detail!r}; see {tmp_path}" in message


def test_a_corpus_without_a_usable_row_says_why(tmp_path: Path) -> None:
    rows = [{"file_name": f"{i}.png", "prompt": "a cat"} for i in range(12)]
    for row in rows:
        (tmp_path / row["file_name"]).write_text("no picture")
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["corpus.kind=image_folder", f"corpus.path={tmp_path}", "corpus.held_out_share=0"]
    config = load("quickstart", given)
    with pytest.raises(CorpusError) as caught:
        sample_rows(config, list_shards(config.corpus))
    detail = "10 bytes that begin with b'no pictu'"
    assert str(caught.value) == (
        f"corpus.path={str(tmp_path)!r} has no usable row that is not held out: 12 not_an_image "
        f"({REASONS['not_an_image']}); such as '0.png', not_an_image: {detail!r}"
    )


def with_filters(config: Config, **limits: Any) -> Config:
    return replace(config, corpus=replace(config.corpus, filters=FiltersConfig(**limits)))


def test_filtered_rows_are_counted_apart_from_bad_ones(config: Config) -> None:
    limited = with_filters(config, min_size=9, languages=["en"])
    assert read(limited) == []
    counts = count_rows(accounts_in(Run(limited)))
    assert counts == {
        "rows": 0,
        "held_out": 0,
        "quarantined": {"not_an_image": 2},
        "filtered": {"min_size": NUM_GOOD},
    }
    with pytest.raises(CorpusError) as caught:
        refuse_bad_corpus(limited, counts)
    message = str(caught.value)
    assert message.startswith("corpus.filters leave none of 42 rows, 40 filtered and 2 bad: 40 min")
    assert f"2 not_an_image ({REASONS['not_an_image']}); such as 'a.tar/000', min_size: " in message


def test_filtered_rows_are_not_bad(config: Config) -> None:
    strict = replace(config, corpus=replace(config.corpus, max_bad_share=0.05))
    counts = {"rows": 1, "held_out": 0, "filtered": {"min_size": 39}}
    refuse_bad_corpus(strict, counts | {"quarantined": {"not_an_image": 2}})
    read(config)
    with pytest.raises(CorpusError, match=r"3 of 43 rows are bad \(7.0%"):
        refuse_bad_corpus(strict, counts | {"quarantined": {"not_an_image": 3}})


def test_progress_tells_what_each_filter_took(config: Config, tmp_path: Path) -> None:
    path = write_tars(tmp_path / "mixed", rows_of(20))  # 40 x 20 to 40 x 39, in two tars
    config = replace(config, corpus=replace(config.corpus, path=str(path), limit=10))
    limited = with_filters(config, min_size=26, max_caption_length=100)
    counts: Counter[str] = Counter()
    for batch in read(limited):
        written = ShardWriter(limited)(encoded(batch))
        counts.update({name: int(values[0]) for name, values in written.items()})
    line = progress_line(counts, num_shards=1, seconds=1.0)
    assert line == (
        "1/1 shards, 10 rows, 10 rows/s, ETA 0 s; 4 good, 0 held out, 0 quarantined, "
        "6 (6 min_size) filtered"
    )


def test_scores_are_stored_beside_the_rest(config: Config) -> None:
    batch = encoded(read(config)[0])
    scores = np.linspace(0, 1, len(batch["row"]), dtype=np.float32)
    ShardWriter(config)(batch | {"nsfw_score": scores})
    stored = read_table(Run(config).embeddings, ["nsfw_score"])["nsfw_score"].to_numpy()
    np.testing.assert_array_equal(stored, scores)


def test_a_corpus_that_filters_leave_empty_is_refused_before_anything_is_fitted(
    config: Config,
) -> None:
    with pytest.raises(CorpusError, match=r"no usable row that is not held out: 34 min_size \("):
        sample_rows(with_filters(config, min_size=9), list_shards(config.corpus))


def test_an_example_of_a_bad_row_is_short_and_plain() -> None:
    bad = QuarantinedRow("\x1b[31m" + "x" * 10_000, "bad_metadata", "y\n" * 10_000)
    described = describe_bad_rows({"bad_metadata": 3}, bad)
    assert described.startswith("3 bad_metadata (the row's metadata is not JSON")
    assert len(described) < 1000
    assert described.isprintable()


def test_bad_rows_are_found_again_for_the_report_with_their_pictures(config: Config) -> None:
    read(config)
    (shard,) = open_corpus(config.corpus).shards()
    again = QuarantinedRow("a.tar/007", "duplicate_key", "")
    set_aside(Run(config).quarantine, shard.name, 1, 0, [again])
    bad = report._bad_rows(Run(config).quarantine, {"not_an_image": 1, "duplicate_key": 1})
    assert {reason: {row.key for _, row in rows} for reason, rows in bad.items()} == {
        "not_an_image": {"a.tar/broken", "a.tar/text"},
        "duplicate_key": {"a.tar/007"},
    }
    sizes, pictures, note = report._from_corpus(config, [shard], bad)
    assert (set(sizes), note) == ({(8, 8)}, "")
    shown = {key: picture is not None for (_, key), picture in pictures.items()}
    assert shown == {"a.tar/broken": False, "a.tar/text": False, "a.tar/007": True}


def test_a_report_without_its_corpus_says_so(config: Config) -> None:
    corpus = replace(config.corpus, path="/absent")
    assert report._from_corpus(replace(config, corpus=corpus), [], {}) == (
        [],
        {},
        "The corpus cannot be read again, for sizes of pictures: corpus.path='/absent' does not "
        "exist (/absent)",
    )


def test_time_of_a_part_is_that_of_all_attempts(tmp_path: Path) -> None:
    rows = [("prepare: embeddings", 2.5), ("prepare: embeddings", 1.0), ("train_seed", 9.0)]
    lines = [json.dumps({"stage": stage, "seconds": seconds}) for stage, seconds in rows]
    (tmp_path / "timings.jsonl").write_text("\n".join(lines) + "\n")
    assert report._seconds(Folder(tmp_path)) == {"embeddings": 3.5}
    assert report._seconds(Folder(tmp_path / "absent")) == {}
