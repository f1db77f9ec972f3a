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

from paris_ray.artifacts import Manifest, canonical_json, sha256_hex
from paris_ray.config import Config
from paris_ray.corpora import (
    Shard,
    captions_per_row,
    find_duplicates,
    held_out_rule,
    not_fetched,
    open_corpus,
)
from paris_ray.embeddings import num_rows, part_names, read_table
from paris_ray.errors import CorpusError
from paris_ray.pipeline.embedders import FeatureEmbedder, LatentEmbedder, TextEmbedder
from paris_ray.pipeline.encoders import SECTIONS
from paris_ray.pipeline.quarantine import describe_bad_rows, first_bad_row
from paris_ray.pipeline.shards import QUARANTINED, ShardReader, ShardWriter, shard_of, version_of
from paris_ray.pipeline.stage import Stage
from paris_ray.run import EMBEDDINGS, Run

logger = logging.getLogger("paris_ray")

# Small, since readers and writers share a small machine with the encoders' actors; and unlike the
# encoders' default, else Ray Data would fuse reading into the text encoder's actor.
TASK_CPUS = 0.3
PRINT_INTERVAL_S = 5.0
SHARDS_A_TASK = 64  # whose versions one task tells: a worker takes longer to start than to look


def prepare_embeddings(config: Config, encoders: Manifest) -> Manifest:
    """Publish `embeddings/`, with `held_out/` in it, and `quarantine/`.

    Raises:
        CorpusError: if more than `corpus.max_bad_share` of the rows are bad, or none are left for
            training.
    """
    run = Run(config)
    corpus = open_corpus(config.corpus)
    shards = corpus.shards()
    keys = {shard.index: corpus.keys(shard) for shard in shards}
    duplicates = find_duplicates(keys)
    held_out = held_out_rule(config.corpus, corpus, config.seed)
    reader = ShardReader(config, held_out, captions_per_row(config.corpus, corpus))
    versions = shard_versions(reader, shards, duplicates)
    stage = Stage(
        EMBEDDINGS,
        run.embeddings,
        config,
        sections=SECTIONS,
        parents={"encoders": encoders.digest},
        inputs=corpus_input(versions),
    )
    manifest = stage.finished()
    if manifest is not None:
        return manifest
    stage.begin(run.quarantine)
    pending = _pending(run, shards, keys, versions)
    if pending:
        num_pending = sum(len(keys[shard.index]) for shard in pending)
        _follow(_embedding(config, reader, pending, versions, duplicates), num_pending)
    counts = count_rows(run, sum(map(len, keys.values())))
    refuse_bad_corpus(config, counts)
    lacking = not_fetched(config.corpus)
    for reason, count in lacking.items():
        logger.info("not in the corpus: %d pictures, %s", count, reason)
    facts = {"not_fetched": lacking} if lacking else {}
    return stage.publish(counts | facts | {"attribution": corpus.attribution})


def corpus_input(versions: Mapping[str, str]) -> dict[str, str]:
    """Return the corpus as an input of a stage: the versions of its shards, by name."""
    return {"the corpus": sha256_hex(canonical_json(versions))}


def shard_versions(
    reader: ShardReader, shards: Sequence[Shard], duplicates: Mapping[int, frozenset[int]]
) -> dict[str, str]:
    """Return, by name of the shard, what becomes another text when its rows would.

    That is not what is in its files alone: other shards decide which of its keys are duplicates,
    of a small corpus the number of rows decides how many are held out, and its first rows how many
    captions are kept.
    """
    tasks = [
        file_versions_of.remote(reader.config, shards[first : first + SHARDS_A_TASK])
        for first in range(0, len(shards), SHARDS_A_TASK)
    ]
    of_files = [version for group in ray.get(tasks) for version in group]
    rule = [asdict(reader.held_out), reader.num_captions]
    return {
        shard.name: sha256_hex(canonical_json([version, sorted(duplicates[shard.index]), *rule]))
        for shard, version in zip(shards, of_files, strict=True)
    }


@ray.remote(num_cpus=TASK_CPUS)
def file_versions_of(config: Config, shards: Sequence[Shard]) -> list[str]:
    """Return the version of the files of each shard: a folder has one for each of its pictures."""
    corpus = open_corpus(config.corpus)
    return [corpus.version(shard) for shard in shards]


def _pending(
    run: Run,
    shards: Sequence[Shard],
    keys: Mapping[int, Sequence[str]],
    versions: Mapping[str, str],
) -> list[Shard]:
    """Return the shards that an earlier run did not account for row by row, as they are now.

    What it left of them is deleted: the next run may cut them into files elsewhere. So is what it
    left of shards that are gone.
    """
    found: Counter[str] = Counter()
    folders = (run.embeddings, run.held_out, run.quarantine)
    for folder in folders:
        for name in part_names(folder):
            found[shard_of(name)] += num_rows(folder, name)
    read_to_the_end = {
        shard_of(name): version_of(run.quarantine, name) for name in part_names(run.quarantine)
    }
    pending = [
        shard
        for shard in shards
        if read_to_the_end.get(shard.name) != versions[shard.name]
        or found[shard.name] != len(keys[shard.index])
    ]
    kept = versions.keys() - {shard.name for shard in pending}
    for folder in folders:
        for name in part_names(folder):
            if shard_of(name) not in kept:
                folder.delete(name)
    if found:
        gone = len(found.keys() - versions.keys())
        logger.info("embed: of %d shards %d are kept, %d gone", len(shards), len(kept), gone)
    return pending


def _embedding(
    config: Config,
    reader: ShardReader,
    shards: Sequence[Shard],
    versions: Mapping[str, str],
    duplicates: Mapping[int, frozenset[int]],
) -> ray.data.Dataset:
    """Return the Ray Data pipeline over some shards; it runs when it is iterated."""
    items = [shard_item(shard, versions, duplicates) for shard in shards]
    quiet_ray_data()
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        reader, batch_size=1, num_cpus=TASK_CPUS
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


def shard_item(
    shard: Shard, versions: Mapping[str, str], duplicates: Mapping[int, frozenset[int]]
) -> dict[str, Any]:
    """Return what a `ShardReader` is given of a shard."""
    more = {"version": versions[shard.name], "duplicates": sorted(duplicates[shard.index])}
    return asdict(shard) | more


def quiet_ray_data() -> None:
    """Leave the terminal to our own progress lines, and errors to who reports them."""
    context = DataContext.get_current()
    context.raise_original_map_exception = True  # else its type is lost on the way
    context.enable_progress_bars = False
    context.issue_detectors_config.detectors = []
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    # They print the traceback of an error that is raised all the same, and call it a bug of Ray.
    for name in ("exceptions", "_internal.execution.streaming_executor_state"):
        logging.getLogger(f"ray.data.{name}").setLevel(logging.CRITICAL)


def _follow(dataset: ray.data.Dataset, num_keys: int) -> None:
    """Run the pipeline and print how far it is."""
    started = printed_at = time.monotonic()
    counts: Counter[str] = Counter()
    for written in dataset.iter_rows():
        counts.update(written)
        now = time.monotonic()
        if now - printed_at > PRINT_INTERVAL_S:
            printed_at = now
            logger.info("embed: %s", progress_line(counts, num_keys, now - started))


def progress_line(counts: Counter[str], num_keys: int, seconds: float) -> str:
    """Return how far encoding is.

    Args:
        counts: What became of the rows so far, at least of one: what `ShardWriter` returns, summed.
        num_keys: How many rows there are.
        seconds: How long it took.
    """
    done = counts.total()
    rate = done / seconds
    return (
        f"{done}/{num_keys} rows, {rate:.0f} rows/s, ETA {(num_keys - done) / rate:.0f} s; "
        f"{counts['good']} good, {counts['held_out']} held out, {counts[QUARANTINED]} quarantined"
    )


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
        quarantine = Run(config).quarantine
        raise CorpusError(
            f"{bad} of {good + bad} rows are bad ({share:.1%}, "
            f"corpus.max_bad_share={config.corpus.max_bad_share}): "
            f"{describe_bad_rows(counts['quarantined'], first_bad_row(quarantine))}; "
            f"see {quarantine.uri}"
        )
    if counts["rows"] == 0:
        raise CorpusError(
            f"all {good} usable rows are held out (corpus.held_out_share="
            f"{config.corpus.held_out_share}, corpus.held_out_key={config.corpus.held_out_key!r}): "
            "none are left to train on"
        )
