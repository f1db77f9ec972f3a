"""Filters on a real Ray: rows judged by header, caption and models, from `prepare` to its page."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from paris_ray.artifacts import REPORT, read_manifest
from paris_ray.clustering import unit_length
from paris_ray.config import Config, FiltersConfig, load
from paris_ray.corpora import (
    DecodedRow,
    decode_row,
    held_out_rule,
    list_shards,
    open_corpus,
)
from paris_ray.corpora.image_folder import ImageFolder
from paris_ray.corpora.perceptual_hash import perceptual_hashes
from paris_ray.embeddings import part_names, read_table
from paris_ray.encoders.scores.nsfw import NsfwModel
from paris_ray.errors import ArtifactError, ConfigError
from paris_ray.run import EMBEDDINGS, Run

pytestmark = pytest.mark.ray

SMALL, GERMAN = "small.png", "german.png"
BY_CHEAP = {SMALL: "min_size", GERMAN: "languages"}


@pytest.fixture(scope="module")
def pictures(shapes_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shapes, and two that are not wanted."""
    folder = Path(shutil.copytree(shapes_corpus, tmp_path_factory.mktemp("filters") / "pictures"))
    Image.new("RGB", (48, 12), "red").save(folder / SMALL)
    Image.new("RGB", (48, 40), "blue").save(folder / GERMAN)
    add_row(folder, SMALL, "a red line number 0")
    add_row(folder, GERMAN, "ein blaues Rechteck ohne einen Rand")
    return folder


def add_row(folder: Path, name: str, caption: str) -> None:
    with (folder / "metadata.jsonl").open("a") as lines:
        lines.write(json.dumps({"file_name": name, "text": caption}) + "\n")


def nsfw_scores(config: Config) -> dict[str, float]:
    """Return what the model says of every usable row, by key, the first of each."""
    corpus = open_corpus(config.corpus)
    raws = [raw for shard in corpus.shards() for raw in corpus.read(shard)]
    rows = [row for raw in raws if isinstance(row := decode_row(raw, config.corpus), DecodedRow)]
    scores = NsfwModel(None)(np.stack([row.image for row in rows]))
    found: dict[str, float] = {}
    for row, score in zip(rows, scores, strict=True):
        found.setdefault(row.key, float(score))
    return found


@pytest.fixture(scope="module")
def config(
    pictures: Path, tiny_overrides: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Config:
    """A run whose limit of the NSFW score is the widest gap between two of its rows."""
    overrides = [
        *tiny_overrides,
        f"run_dir={tmp_path_factory.mktemp('filtered') / 'run'}",
        f"corpus.path={pictures}",
        "corpus.filters.min_size=20",
        "corpus.filters.languages=[en]",
    ]
    cheap = load("quickstart", overrides)
    scores = np.sort(list(nsfw_scores(cheap).values()))[20:-5]  # that some are left on both sides
    i = int(np.argmax(np.diff(scores)))
    limit = float(scores[i : i + 2].mean())
    return load("quickstart", [*overrides, f"corpus.filters.max_nsfw_score={limit}"])


@pytest.fixture(scope="module")
def prepared(ray_session: None, config: Config) -> Run:
    from paris_ray.pipeline.stages import run

    run(config, "prepare")
    return Run(config)


def set_aside(run: Run) -> dict[str, str]:
    rows = pq.read_table(run.quarantine.uri).to_pylist()
    assert len({row["key"] for row in rows}) == len(rows)
    return {row["key"]: row["reason"] for row in rows}


def stored(run: Run) -> list[str]:
    folders = [folder for folder in (run.embeddings, run.held_out) if part_names(folder)]
    tables = (read_table(folder, ["key"]) for folder in folders)
    return [key for table in tables for key in table["key"].to_pylist()]


def taken_by_score(config: Config) -> set[str]:
    limit = config.corpus.filters.max_nsfw_score
    assert limit is not None
    return {key for key, score in nsfw_scores(config).items() if score > limit}


def test_every_row_is_stored_or_set_aside_with_its_reason(
    prepared: Run, bad_rows: dict[str, str], num_good_rows: int
) -> None:
    taken = taken_by_score(prepared.config)
    assert 5 <= len(taken) < num_good_rows
    # The second 003.png: a filter looks at each row before keys are compared.
    expected = dict.fromkeys(taken, "max_nsfw_score") | BY_CHEAP
    found = set_aside(prepared)
    assert {k: r for k, r in found.items() if k != "003.png"} == {
        k: r for k, r in (bad_rows | expected).items() if k != "003.png"
    }
    assert len(set(stored(prepared))) == len(stored(prepared))
    facts = read_manifest(prepared.embeddings, EMBEDDINGS).facts
    assert facts["filtered"] == {"languages": 1, "max_nsfw_score": len(taken), "min_size": 1}
    assert sum(facts["quarantined"].values()) == len(bad_rows)
    assert facts["rows"] + facts["held_out"] == len(stored(prepared)) == num_good_rows - len(taken)


def test_the_page_shows_what_was_filtered(prepared: Run) -> None:
    page = prepared.clusters.read(REPORT).decode()
    for reason in ("min_size", "languages", "max_nsfw_score"):
        assert f" {reason}: " in page
    assert f"{SMALL}: 48 x 12 pixels, corpus.filters.min_size=20" in page


def test_another_limit_is_another_artefact(prepared: Run) -> None:
    from paris_ray.pipeline.embed import prepare_embeddings

    corpus = prepared.config.corpus
    looser = replace(corpus, filters=replace(corpus.filters, max_nsfw_score=0.9))
    encoders = read_manifest(prepared.encoders, "encoders")
    with pytest.raises(ArtifactError):
        prepare_embeddings(replace(prepared.config, corpus=looser), encoders, list_shards(looser))


def test_only_what_changed_is_encoded_and_filtered_again(
    prepared: Run, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from paris_ray.pipeline.embed import prepare_embeddings

    changed = Path(shutil.copytree(pictures, tmp_path / "pictures"))
    shutil.copytree(prepared.encoders.uri, tmp_path / "run" / "encoders")
    corpus = replace(prepared.config.corpus, path=str(changed))
    run = Run(replace(prepared.config, run_dir=str(tmp_path / "run"), corpus=corpus))
    encoders = read_manifest(run.encoders, "encoders")
    shards = list_shards(corpus)
    with monkeypatch.context() as patch:
        patch.delattr(
            ImageFolder, "shards"
        )  # listing a large corpus takes a while: it is done once
        prepare_embeddings(run.config, encoders, shards)
    first = set_aside(run)
    (changed / "small_too.png").write_bytes((changed / SMALL).read_bytes())
    add_row(changed, "small_too.png", "a red line number 1")
    prepare_embeddings(run.config, encoders, list_shards(corpus))
    assert set_aside(run) == first | {"small_too.png": "min_size"}


def test_pictures_that_are_like_earlier_ones_leave(prepared: Run, tmp_path: Path) -> None:
    from paris_ray.pipeline.embedders import FeatureEmbedder
    from paris_ray.pipeline.stages import run as run_verb

    filters = FiltersConfig(min_size=20, languages=["en"], picture_distance=0)
    corpus = replace(prepared.config.corpus, filters=filters)
    rows = rows_in_order(replace(prepared.config, corpus=corpus))
    images = np.stack([row.image for row in rows])
    features = FeatureEmbedder(prepared.config).columns({"image": images})["features"]
    cosines = np.tril(unit_length([features]) @ unit_length([features]).T, -1)
    hashes, keys = perceptual_hashes(images), [row.key for row in rows]
    others = [i for i in range(1, len(rows)) if hashes[i] not in hashes[:i]]
    nearest = np.sort(cosines[others].max(axis=1))
    i = int(np.argmax(np.diff(nearest)))
    limit = float(nearest[i : i + 2].mean())
    corpus = replace(corpus, filters=replace(filters, max_similarity=limit))
    cluster = replace(prepared.config.cluster, num_clusters=2, num_fine=2)
    run = Run(replace(prepared.config, run_dir=str(tmp_path), corpus=corpus, cluster=cluster))
    run_verb(run.config, "prepare")
    digests = (read_manifest(r.encoders, "encoders").files for r in (run, prepared))
    assert len({files["features/open_clip_model.safetensors"] for files in digests}) == 1

    expected = Counter[str]()
    for row, key in enumerate(keys):
        if key in keys[:row]:
            expected["duplicate_key"] += 1
        elif hashes[row] in hashes[:row]:
            expected["picture_distance"] += 1
        elif (cosines[row] > limit).any():
            expected["max_similarity"] += 1
    found = Counter(pq.read_table(run.quarantine.uri)["reason"].to_pylist())
    assert expected["picture_distance"] and expected["max_similarity"]
    assert {reason: found[reason] for reason in expected} == expected
    assert len(stored(run)) == len(rows) - expected.total()
    page = run.clusters.read(REPORT).decode()
    assert all(f" {reason}: " in page for reason in ("picture_distance", "max_similarity"))


def rows_in_order(config: Config) -> list[DecodedRow]:
    """Return the usable rows that filters of rows leave: those to train on, then those held out."""
    corpus = open_corpus(config.corpus)
    rule = held_out_rule(config.corpus, corpus, corpus.shards(), config.seed)
    kinds: dict[bool, list[DecodedRow]] = {False: [], True: []}
    for shard in corpus.shards():
        for raw in corpus.read(shard):
            row = decode_row(raw, config.corpus)
            if isinstance(row, DecodedRow):
                kinds[rule.holds(raw)].append(row)
    return kinds[False] + kinds[True]


def test_a_model_that_is_not_there_is_told_by_its_field(prepared: Run, tmp_path: Path) -> None:
    from paris_ray.pipeline.embed import prepare_embeddings

    shutil.copytree(prepared.encoders.uri, tmp_path / "encoders")
    lost = FiltersConfig(max_nsfw_score=0.5, nsfw_model="/nowhere/model.onnx")
    corpus = replace(prepared.config.corpus, filters=lost)
    config = replace(prepared.config, run_dir=str(tmp_path), corpus=corpus)
    with pytest.raises(ConfigError, match=r"nsfw_model='/nowhere/model\.onnx' does not"):
        prepare_embeddings(
            config, read_manifest(prepared.encoders, "encoders"), list_shards(corpus)
        )
