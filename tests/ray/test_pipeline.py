"""The pipeline on a real Ray, from an image folder to a bundle."""

import base64
import json
import logging
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from jobs.command import mendable
from paris_ray.artifacts import REPORT, Manifest, read_manifest
from paris_ray.bundle import load_bundle
from paris_ray.config import Config
from paris_ray.corpora import list_shards
from paris_ray.embeddings import NULL_TEXT, part_names, read_table, tensor_column
from paris_ray.errors import ArtifactError, CorpusError, TrainingError
from paris_ray.folders import Folder
from paris_ray.ledger import read_ledger
from paris_ray.run import (
    CLUSTERS,
    EMBEDDINGS,
    EVALUATION,
    EXPERT,
    EXPERT_WEIGHTS,
    MODEL_CONFIG,
    ROUTER,
    SEED,
    SHARD,
    Run,
)
from paris_ray.sampling import generate

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def finished(ray_session: None, tiny_config: Config) -> Run:
    """A run with all stages finished."""
    from paris_ray.pipeline.stages import run

    run(tiny_config, "pipeline")
    return Run(tiny_config)


@pytest.fixture
def copy_of(finished: Run, tmp_path: Path) -> Callable[[str], Run]:
    """Return a copy of the finished run without some of its folders."""

    def copy(*without: str) -> Run:
        target = tmp_path / "copy"
        shutil.copytree(finished.folder.uri, target)
        for name in without:
            shutil.rmtree(target / name)
        return Run(replace(finished.config, run_dir=str(target)))

    return copy


def test_every_row_is_embedded_or_quarantined_with_its_reason(
    finished: Run, bad_rows: dict[str, str], num_good_rows: int
) -> None:
    facts = read_manifest(finished.embeddings, EMBEDDINGS).facts
    assert facts["rows"] + facts["held_out"] == num_good_rows
    assert 1 <= facts["held_out"] <= 20
    rows = pq.read_table(finished.quarantine.uri).to_pylist()
    assert {row["key"]: row["reason"] for row in rows} == bad_rows
    assert sum(facts["quarantined"].values()) == len(bad_rows)


def test_shards_are_disjoint_and_complete(finished: Run, num_good_rows: int) -> None:
    keys = [
        key for k in range(3) for key in read_table(finished.shard(k), ["key"])["key"].to_pylist()
    ]
    facts = read_manifest(finished.embeddings, EMBEDDINGS).facts
    assert len(keys) == len(set(keys)) == facts["rows"] == num_good_rows - facts["held_out"]
    assert read_manifest(finished.clusters, CLUSTERS).facts["sizes"] == [
        read_manifest(finished.shard(k), SHARD).facts["rows"] for k in range(3)
    ]


def test_the_ledger_tells_what_every_expert_moved_and_that_nothing_came_of_others(
    finished: Run,
) -> None:
    for k in range(3):
        facts = read_manifest(finished.expert(k), EXPERT).facts
        read, written = facts["bytes"]["read"], facts["bytes"]["written"]
        assert read["other experts"] == written["other experts"] == 0
        assert {"elsewhere", "other"}.isdisjoint({*read, *written})
        shard = finished.shard(k)
        names = [NULL_TEXT, *part_names(shard)]  # the manifest is read before the training
        assert read["shard"] == sum(len(shard.read(name)) for name in names)
        assert written["weights"] == sum(
            len(finished.expert(k).read(name)) for name in (MODEL_CONFIG, EXPERT_WEIGHTS)
        )


def test_every_stage_is_in_the_ledger_of_the_run(finished: Run) -> None:
    ledger = read_ledger(finished.folder)
    trainings = {f"experts/expert_{k}" for k in range(3)} | {"router"}
    jobs = {"encoders", "embeddings", "clusters", "evaluation", "bundle"}
    assert trainings | jobs <= set(ledger)
    for place in trainings:
        taken = ledger[place]
        assert taken.device == "CPU"
        assert taken.samples > 0
        assert taken.flops > 0
        assert 0 < taken.hours < 1
        assert taken.bytes["written"]["weights"] > 0
        assert "elsewhere" not in taken.bytes["written"]
    facts = read_manifest(finished.expert(1), EXPERT).facts
    assert ledger["experts/expert_1"].bytes == facts["bytes"]
    assert ledger["experts/expert_1"].samples == facts["samples_seen"]
    assert sum(ledger["embeddings"].bytes["written"].values()) > 0


def test_held_out_rows_are_in_no_shard_but_by_cluster_beside_them(finished: Run) -> None:
    held_out = read_table(finished.held_out, ["key"])["key"].to_pylist()
    shards = [finished.shard(k) for k in range(3)]
    trained = {key for shard in shards for key in read_table(shard, ["key"])["key"].to_pylist()}
    assert trained.isdisjoint(held_out)
    beside = [
        key
        for shard in finished.held_out_shards().values()
        for key in read_table(shard, ["key"])["key"].to_pylist()
    ]
    assert sorted(beside) == sorted(held_out)
    # Encoders are fitted before duplicates are found: to the second 003.png too, if to the first.
    fitted = read_manifest(finished.encoders, "encoders").facts["rows_fitted_to"]
    assert fitted == len(trained) + ("003.png" in trained)


def test_the_evaluation_tells_training_captions_from_held_out_ones(finished: Run) -> None:
    facts = read_manifest(finished.evaluation, EVALUATION).facts
    counts = read_manifest(finished.embeddings, EMBEDDINGS).facts
    assert facts["shown"]["captions"] == counts["rows"]
    assert facts["held_out"]["captions"] == counts["held_out"]
    assert set(facts["shown"]["attributes"]) == {"colour", "shape", "all"}
    assert "caption_recall" not in facts["held_out"]  # there is nothing to recall
    losses = facts["held_out_losses"]
    assert len(losses) == 3
    assert {len(row) for row in losses} == {3}
    clusters = finished.held_out_shards()
    assert all((loss is None) == (k not in clusters) for k, loss in enumerate(losses[0]))
    rows = pq.read_table(f"{finished.evaluation.uri}/held_out.parquet")
    assert rows.num_rows == counts["held_out"]
    shares = [row["captions"] for row in facts["held_out"]["by_cluster"]]
    assert sum(shares) == counts["held_out"]


def test_tensorboard_shows_every_expert_on_every_cluster(copy_of: Callable[..., Run]) -> None:
    from paris_ray.pipeline.evaluate import evaluate

    run = copy_of("evaluation")
    training = replace(run.config.training, tensorboard=True)
    losses = evaluate(replace(run.config, training=training)).facts["held_out_losses"]
    events = EventAccumulator(f"{run.evaluation.uri}/tensorboard").Reload()
    shown = {
        (k, j): events.Scalars(f"held_out_loss/expert_{k}/cluster_{j}")
        for k in range(3)
        for j in run.held_out_shards()
    }
    for (k, j), points in shown.items():
        (point,) = points
        assert point.value == pytest.approx(losses[k][j])
        assert point.step == read_manifest(run.expert(k), EXPERT).facts["samples_seen"]
    assert len(events.Tags()["scalars"]) == len(shown)


def test_experts_are_measured_on_held_out_rows_while_they_train(finished: Run) -> None:
    for k in range(3):
        last = json.loads(finished.expert(k).read("metrics.jsonl").splitlines()[-1])
        own = k in finished.held_out_shards()
        assert ("held_out_loss" in last) == own
        assert "held_out_loss_others" in last


def test_experts_start_from_the_seed_and_see_shared_rows(copy_of: Callable[..., Run]) -> None:
    from paris_ray.pipeline.cluster import prepare_clusters
    from paris_ray.pipeline.experts import train_experts
    from paris_ray.pipeline.seed import train_seed

    run = copy_of("clusters", "experts", "seed", "router", "evaluation", "bundle")
    cluster = replace(run.config.cluster, shared_share=0.25)
    training = replace(run.config.training, steps=2)
    seed = replace(run.config.seed_training, steps=5)
    config = replace(run.config, cluster=cluster, training=training, seed_training=seed)
    run = Run(config)
    embeddings = read_manifest(run.embeddings, EMBEDDINGS)
    prepare_clusters(config, embeddings)
    shared = read_table(run.shared, ["key"])["key"].to_pylist()
    assert len(set(shared)) == embeddings.facts["rows"]  # few enough to be shared all
    with pytest.raises(ArtifactError, match="no finished seed"):
        train_experts(config, only=[0])
    train_seed(config)
    train_experts(config, only=[0])
    manifest = read_manifest(run.expert(0), EXPERT)
    weights = read_manifest(run.seed, SEED).files[EXPERT_WEIGHTS]
    assert manifest.parents["init"] == weights
    assert manifest.parents["shared"] == read_manifest(run.shared, SHARD).digest


def test_centres_are_fitted_to_some_of_very_many_rows(
    finished: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from paris_ray.pipeline import cluster

    captions = tensor_column(read_table(finished.embeddings, ["text_embedding"]), "text_embedding")
    every = cluster.unit_length([captions])  # the quickstart clusters those
    monkeypatch.setattr(cluster, "MAX_FIT_ROWS", 10)
    sample = cluster._sample_features(finished)
    assert len(sample) == 10 < len(every)
    rows = [int(np.flatnonzero((every == features).all(axis=1))[0]) for features in sample]
    assert rows == sorted(set(rows))


def test_reports_and_sample_grids_are_there(finished: Run) -> None:
    report = finished.clusters.read("report.html").decode()
    for part in ("Cluster 2", "data:image/png", "Quarantined", "<svg", "Overlap", "embeddings"):
        assert part in report
    assert REPORT not in read_manifest(finished.clusters, CLUSTERS).files  # it tells times
    for k in range(3):
        assert finished.expert(k).read("samples.png").startswith(b"\x89PNG")
    report = finished.evaluation.read("report.html").decode()
    assert "never shown" in report
    assert "Held-out loss, expert by cluster" in report


def test_the_router_reports_accuracy_by_noise_level(finished: Run) -> None:
    facts = read_manifest(finished.router, ROUTER).facts
    assert set(facts["right_cluster"]) == {"0.1", "0.3", "0.5", "0.7", "0.9", "1"}
    assert all(0 <= share <= 1 for share in facts["right_cluster"].values())
    held_out = facts["held_out"]
    assert set(held_out["levels"]) == set(facts["right_cluster"])
    assert held_out["rows"] == read_manifest(finished.embeddings, EMBEDDINGS).facts["held_out"]
    bundle = load_bundle(finished.bundle.uri)
    assert bundle.facts.sampling.router_temperature == held_out["temperature"] > 0


def test_the_bundle_draws_and_its_card_shows_measured_numbers(finished: Run) -> None:
    bundle = load_bundle(finished.bundle.uri)
    images = generate(bundle, ["a red square number 1", "a blue circle number 0"], seed=1)
    size = bundle.facts.picture_size
    assert [image.size for image in images] == [(size, size)] * 2
    sizes = read_manifest(finished.clusters, CLUSTERS).facts["sizes"]
    assert [cluster.rows for cluster in bundle.clusters] == sizes
    for cluster in bundle.clusters:
        assert cluster.words
        for picture in cluster.pictures:
            assert base64.b64decode(picture).startswith(b"\x89PNG")
    recall = read_manifest(finished.evaluation, EVALUATION).facts["shown"]["caption_recall"]
    assert f"{recall['mean']:.4f}" in finished.bundle.read("README.md").decode()


def test_running_again_keeps_everything(finished: Run, caplog: pytest.LogCaptureFixture) -> None:
    from paris_ray.pipeline.stages import run

    before = {name: finished.folder.read(name) for name in finished.folder.files()}
    with caplog.at_level(logging.INFO, "paris_ray"):
        run(finished.config, "pipeline")
    assert caplog.text.count("already finished, kept") == 10
    assert "caption recall" in caplog.records[-1].message
    after = {name: finished.folder.read(name) for name in finished.folder.files()}
    assert {n for n in before if before[n] != after[n]} == {"timings.jsonl"}


def test_another_configuration_is_refused_and_nothing_is_lost(finished: Run) -> None:
    from paris_ray.pipeline.stages import run

    other = replace(finished.config, seed=1)
    with pytest.raises(ArtifactError, match="another configuration"):
        run(other, "prepare")
    assert read_manifest(finished.embeddings, EMBEDDINGS).facts["rows"]


def test_an_expert_alone_is_identical_to_one_beside_the_others(
    finished: Run, copy_of: Callable[..., Run]
) -> None:
    from paris_ray.pipeline.experts import train_experts

    alone = copy_of("experts")
    train_experts(alone.config, only=[1])
    apart = read_manifest(alone.expert(1), EXPERT)
    beside = read_manifest(finished.expert(1), EXPERT)
    assert apart.files[EXPERT_WEIGHTS] == beside.files[EXPERT_WEIGHTS]
    assert apart.digest == beside.digest
    assert not alone.expert(0).exists()
    other = read_manifest(finished.expert(0), EXPERT)
    assert other.files[EXPERT_WEIGHTS] != beside.files[EXPERT_WEIGHTS]


def test_a_failed_expert_is_named_and_the_others_finish(copy_of: Callable[..., Run]) -> None:
    from paris_ray.pipeline.experts import train_experts

    run = copy_of("experts")
    shard = Path(run.shard(1).uri)
    part = next(shard.glob("*.parquet"))
    intact = part.read_bytes()
    for file in shard.glob("*.parquet"):
        file.rename(file.with_suffix(".hidden"))
    with pytest.raises(TrainingError, match="1 of 3 experts failed: expert 1"):
        train_experts(run.config)
    assert read_manifest(run.expert(0), EXPERT)
    assert read_manifest(run.expert(2), EXPERT)
    assert not run.expert(1).exists("manifest.json")
    for file in shard.glob("*.hidden"):
        file.rename(file.with_suffix(".parquet"))
    assert part.read_bytes() == intact
    train_experts(run.config)
    assert read_manifest(run.expert(1), EXPERT)


def test_a_killed_expert_is_retried_and_ends_as_if_nothing_had_happened(
    copy_of: Callable[..., Run],
) -> None:
    from paris_ray.pipeline.experts import train_experts

    run = copy_of("experts")
    longer = replace(run.config.training, steps=600, checkpoint_every=20)
    config = replace(run.config, training=longer)
    with ThreadPoolExecutor() as pool:
        kills = pool.submit(_kill_after_first_checkpoint, run.expert(0))
        train_experts(config, only=[0])
    assert kills.result() == 1
    killed = read_manifest(run.expert(0), EXPERT)
    shutil.rmtree(run.expert(0).uri)
    train_experts(config, only=[0])
    assert read_manifest(run.expert(0), EXPERT).digest == killed.digest


def _kill_after_first_checkpoint(folder: Folder) -> int:
    """Kill the process that trains expert 0; return how many there were."""
    deadline = time.monotonic() + 60
    while not folder.exists("checkpoint.safetensors"):
        assert time.monotonic() < deadline, "no checkpoint"
        time.sleep(0.01)
    # Another Ray on this machine may train its own expert 0: only this one's are our descendants.
    ours = {child.pid for child in psutil.Process().children(recursive=True)}
    processes = [p for p in psutil.process_iter(["cmdline"]) if p.pid in ours]
    workers = [p for p in processes if (p.info["cmdline"] or [""])[0] == "ray::expert-0"]
    for worker in workers:
        worker.kill()
    return len(workers)


def test_embedding_resumes_with_the_missing_shards(
    copy_of: Callable[..., Run], num_good_rows: int
) -> None:
    from paris_ray.pipeline.embed import prepare_embeddings

    run = copy_of("experts", "clusters")
    folder = Path(run.embeddings.uri)
    before = read_manifest(run.embeddings, EMBEDDINGS)
    (folder / "manifest.json").unlink()
    identity = {"config_digest": before.config_digest, "parents": dict(before.parents)}
    run.embeddings.write_json("in_progress.json", identity)
    lost, kept = sorted(folder.glob("*.parquet"))[:2]
    lost.unlink()
    kept_at = kept.stat().st_mtime_ns
    encoders = read_manifest(run.encoders, "encoders")
    manifest = prepare_embeddings(run.config, encoders, list_shards(run.config.corpus))
    assert manifest.facts["rows"] + manifest.facts["held_out"] == num_good_rows
    assert kept.stat().st_mtime_ns == kept_at
    assert manifest.digest == before.digest


def test_what_another_configuration_left_unfinished_is_not_mixed_in(
    copy_of: Callable[..., Run], num_good_rows: int
) -> None:
    from paris_ray.pipeline.cluster import prepare_clusters

    run = copy_of("experts")
    (Path(run.clusters.uri) / "manifest.json").unlink()  # interrupted with three clusters
    cluster = replace(run.config.cluster, num_clusters=2)
    fewer = Run(replace(run.config, cluster=cluster))
    manifest = prepare_clusters(fewer.config, read_manifest(run.embeddings, EMBEDDINGS))
    held_out = read_manifest(run.embeddings, EMBEDDINGS).facts["held_out"]
    assert sum(manifest.facts["sizes"]) == num_good_rows - held_out
    assert not fewer.shard(2).exists()


def test_an_evaluation_of_other_experts_stays_out_of_the_model_card(
    copy_of: Callable[..., Run],
) -> None:
    from paris_ray.pipeline.export import export

    run = copy_of("bundle")
    manifest = run.expert(0).read_json("manifest.json")
    manifest["config_digest"] = "0" * 64
    run.expert(0).write_json("manifest.json", manifest)
    with pytest.raises(ArtifactError, match="is of other experts"):
        export(run.config)


def test_where_a_corpus_changed_it_is_encoded_again(
    finished: Run,
    shapes_corpus: Path,
    tmp_path: Path,
    num_good_rows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And where there are more shards than blocks, so that two share one."""
    from paris_ray.pipeline import embed
    from paris_ray.pipeline.embed import prepare_embeddings

    monkeypatch.setattr(embed, "MAX_BLOCKS", 2)

    pictures = Path(shutil.copytree(shapes_corpus, tmp_path / "pictures"))
    shutil.copytree(finished.encoders.uri, tmp_path / "run" / "encoders")
    corpus = replace(finished.config.corpus, path=str(pictures))
    run = Run(replace(finished.config, run_dir=str(tmp_path / "run"), corpus=corpus))

    def prepare() -> Manifest:
        return prepare_embeddings(
            run.config,
            read_manifest(run.encoders, "encoders"),
            list_shards(run.config.corpus),
        )

    first = prepare()
    whole = read_manifest(finished.embeddings, EMBEDDINGS).facts
    assert all(first.facts[name] == whole[name] for name in ("rows", "held_out", "quarantined"))
    written = {path.name: path.stat().st_mtime_ns for path in Path(run.embeddings.uri).glob("*")}
    # Two pictures are repaired and a caption is corrected, all of the last shard; one is added.
    for name in ("truncated.png", "empty.png"):
        shutil.copy(pictures / "000.png", pictures / name)
    lines = (pictures / "metadata.jsonl").read_text().replace('"  "', '"no longer silent"')
    (pictures / "metadata.jsonl").write_text(lines + '{"file_name": "001.png", "text": "more"}\n')
    second = prepare()
    assert second.digest != first.digest
    bad = {row["key"] for row in pq.read_table(run.quarantine.uri).to_pylist()}
    assert bad == {"text.png", "missing.png", "003.png", "001.png"}  # the last two stand twice
    captions = {
        caption
        for folder in (run.embeddings, run.held_out)
        for caption in read_table(folder, ["caption"])["caption"].to_pylist()
    }
    assert "no longer silent" in captions
    counted = second.facts["rows"] + second.facts["held_out"]
    assert counted == num_good_rows + 3
    again = {path.name: path.stat().st_mtime_ns for path in Path(run.embeddings.uri).glob("part-*")}
    kept = [name for name, at in again.items() if written.get(name) == at]
    assert len(kept) == len(again) - 1  # all but the last shard's
    manifest = Path(run.embeddings.uri) / "manifest.json"
    published = manifest.stat().st_mtime_ns
    assert prepare() == second
    assert manifest.stat().st_mtime_ns == published


def test_a_mostly_bad_corpus_is_refused(ray_session: None, finished: Run, tmp_path: Path) -> None:
    from paris_ray.pipeline.embed import prepare_embeddings

    # Six rows a shard: the last one then holds bad rows only.
    corpus = replace(finished.config.corpus, max_bad_share=0.01, rows_per_shard=6)
    target = tmp_path / "refused"
    shutil.copytree(finished.encoders.uri, target / "encoders")
    config = replace(finished.config, run_dir=str(target), corpus=corpus)
    with pytest.raises(CorpusError, match=r"6 of 78 rows are bad.*max_bad_share=0.01"):
        prepare_embeddings(
            config, read_manifest(finished.encoders, "encoders"), list_shards(config.corpus)
        )
    assert pq.read_table(str(target / "quarantine")).num_rows == 6


def test_an_error_in_ray_data_is_told_as_it_was_raised(
    ray_session: None, capfd: pytest.CaptureFixture[str]
) -> None:
    import ray

    from paris_ray.pipeline.embed import quiet_ray_data

    def fill(batch: dict[str, Any]) -> dict[str, Any]:
        raise ArtifactError("/runs/x cannot be written: No space left on device")

    quiet_ray_data()
    with pytest.raises(ArtifactError) as caught:
        list(ray.data.range(1).map_batches(fill).iter_rows())
    assert str(mendable(caught.value)) == "/runs/x cannot be written: No space left on device"
    assert "Traceback" not in "".join(capfd.readouterr())
