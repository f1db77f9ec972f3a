"""Prepare, part two: encode the corpus with Ray Data.

Read tasks decode pictures and set bad rows aside; three actor pools add text, features and
latents; write tasks store a block as one Parquet file. No block holds rows of two corpus shards, so
that an interrupted run continues with the shards that are not complete yet.
"""

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import ray
from ray.data import ActorPoolStrategy, DataContext

from paris_ray.artifacts import Manifest
from paris_ray.config import Config
from paris_ray.corpora import HeldOut, Shard, find_duplicates, held_out_rule, open_corpus
from paris_ray.embeddings import num_rows, part_names, read_table
from paris_ray.errors import CorpusError
from paris_ray.pipeline.embedders import FeatureEmbedder, LatentEmbedder, TextEmbedder
from paris_ray.pipeline.encoders import SECTIONS
from paris_ray.pipeline.shards import ShardReader, ShardWriter, shard_of
from paris_ray.pipeline.stage import Stage
from paris_ray.run import EMBEDDINGS, Run

logger = logging.getLogger("paris_ray")

# Small, since readers and writers share a small machine with the encoders' actors; and unlike the
# encoders' default, else Ray Data would fuse reading into the text encoder's actor.
TASK_CPUS = 0.3
PRINT_INTERVAL_S = 5.0


def prepare_embeddings(config: Config, encoders: Manifest) -> Manifest:
    """Publish `embeddings/`, with `held_out/` in it, and `quarantine/`.

    Raises:
        CorpusError: if more than `corpus.max_bad_share` of the rows are bad, or none are left for
            training.
    """
    run = Run(config)
    parents = {"encoders": encoders.digest}
    stage = Stage(EMBEDDINGS, run.embeddings, config, sections=SECTIONS, parents=parents)
    manifest = stage.finished()
    if manifest is not None:
        return manifest
    stage.begin(run.quarantine)
    corpus = open_corpus(config.corpus)
    shards = corpus.shards()
    keys = {shard.index: corpus.keys(shard) for shard in shards}
    duplicates = find_duplicates(keys)
    pending = _pending(run, shards, keys)
    if pending:
        num_pending = sum(len(keys[shard.index]) for shard in pending)
        held_out = held_out_rule(config.corpus, corpus, config.seed)
        _follow(_embedding(config, pending, duplicates, held_out), num_pending)
    counts = count_rows(run, sum(map(len, keys.values())))
    refuse_bad_corpus(config, counts)
    return stage.publish(counts | {"attribution": corpus.attribution})


def _pending(run: Run, shards: Sequence[Shard], keys: Mapping[int, Sequence[str]]) -> list[Shard]:
    """Return the shards that an earlier, interrupted run did not account for row by row.

    What it left of them is deleted: the next run may cut them into files elsewhere.
    """
    found: Counter[int] = Counter()
    folders = (run.embeddings, run.held_out, run.quarantine)
    for folder in folders:
        for name in part_names(folder):
            found[shard_of(name)] += num_rows(folder, name)
    read_to_the_end = {shard_of(name) for name in part_names(run.quarantine)}
    pending = [
        shard
        for shard in shards
        if shard.index not in read_to_the_end or found[shard.index] != len(keys[shard.index])
    ]
    indices = {shard.index for shard in pending}
    for folder in folders:
        for name in part_names(folder):
            if shard_of(name) in indices:
                folder.delete(name)
    return pending


def _embedding(
    config: Config,
    shards: Sequence[Shard],
    duplicates: Mapping[int, frozenset[int]],
    held_out: HeldOut,
) -> ray.data.Dataset:
    """Return the Ray Data pipeline over some shards; it runs when it is iterated."""
    items = [asdict(s) | {"duplicates": sorted(duplicates.get(s.index, ()))} for s in shards]
    _quiet_ray_data()
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        ShardReader(config, held_out), batch_size=1, num_cpus=TASK_CPUS
    )
    for encoder, pool in (
        (TextEmbedder, config.text.pool),
        (FeatureEmbedder, config.features.pool),
        (LatentEmbedder, config.codec.pool),
    ):
        dataset = dataset.map_batches(
            encoder,
            compute=ActorPoolStrategy(size=pool.num_actors),
            fn_constructor_args=(config,),
            batch_size=None,
            num_cpus=pool.num_cpus,
            num_gpus=pool.num_gpus,
        )
    return dataset.map_batches(ShardWriter(config), batch_size=None, num_cpus=TASK_CPUS)


def _quiet_ray_data() -> None:
    """Leave the terminal to our own progress lines."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.issue_detectors_config.detectors = []
    logging.getLogger("ray.data").setLevel(logging.WARNING)


def _follow(dataset: ray.data.Dataset, num_keys: int) -> None:
    """Run the pipeline and print how far it is."""
    started = printed_at = time.monotonic()
    done = 0
    for written in dataset.iter_rows():
        done += written["rows"]
        now = time.monotonic()
        if done and now - printed_at > PRINT_INTERVAL_S:
            printed_at, rate = now, done / (now - started)
            eta = (num_keys - done) / rate
            logger.info("embed: %d/%d rows, %.0f rows/s, ETA %.0f s", done, num_keys, rate, eta)


def count_rows(run: Run, num_keys: int) -> dict[str, Any]:
    """Count what became of every row, good ones and bad ones by reason.

    Raises:
        CorpusError: if one is unaccounted for.
    """
    reasons: Counter[str] = Counter()
    if part_names(run.quarantine):
        reasons.update(read_table(run.quarantine, ["reason"])["reason"].to_pylist())
    good, held_out = (
        sum(num_rows(folder, name) for name in part_names(folder))
        for folder in (run.embeddings, run.held_out)
    )
    read = good + held_out + reasons.total()
    if read != num_keys:
        raise CorpusError(
            f"{num_keys} rows were listed but {read} were read: the corpus "
            "changed meanwhile; run again"
        )
    for reason, count in sorted(reasons.items()):
        logger.warning("quarantined: %d rows, %s", count, reason)
    logger.info(
        "embed: %d rows for training, %d held out, %d quarantined", good, held_out, reasons.total()
    )
    quarantined = dict(sorted(reasons.items()))
    return {"rows": good, "held_out": held_out, "quarantined": quarantined}


def refuse_bad_corpus(config: Config, counts: Mapping[str, Any]) -> None:
    """Raise CorpusError if a larger share of the rows is bad than `corpus.max_bad_share`."""
    good, bad = counts["rows"] + counts["held_out"], sum(counts["quarantined"].values())
    share = bad / max(1, good + bad)
    if share > config.corpus.max_bad_share or good == 0:
        raise CorpusError(
            f"{bad} of {good + bad} rows are bad ({share:.1%}, "
            f"corpus.max_bad_share={config.corpus.max_bad_share}): {counts['quarantined']}; "
            f"see {Run(config).quarantine.uri}"
        )
    if counts["rows"] == 0:
        raise CorpusError(
            f"all {good} usable rows are held out (corpus.held_out_share="
            f"{config.corpus.held_out_share}, corpus.held_out_key={config.corpus.held_out_key!r}): "
            "none are left to train on"
        )
