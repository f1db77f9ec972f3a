"""Prepare, part two: encode the corpus with Ray Data.

Read tasks decode pictures and set bad and filtered rows aside; actor pools add text, features and
latents, and scores where filters want them; write tasks store a block as one Parquet file. No block
holds rows of two corpus shards, so that an interrupted run continues with the shards that are not
complete yet.
"""

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import ray
from ray.data import ActorPoolStrategy, DataContext

from paris_ray.artifacts import Manifest, canonical_json, sha256_hex
from paris_ray.config import Config, PoolConfig
from paris_ray.corpora import (
    Shard,
    captions_per_row,
    held_out_rule,
    not_fetched,
    open_corpus,
)
from paris_ray.errors import CorpusError
from paris_ray.pipeline.accounts import (
    TASK_CPUS,
    Account,
    delete_files,
    files_by_shard,
    in_groups,
    told_of,
    total,
)
from paris_ray.pipeline.duplicates import drop_duplicates
from paris_ray.pipeline.embedders import (
    Encoder,
    Encoders,
    FeatureEmbedder,
    LatentEmbedder,
    RowScorer,
    TextEmbedder,
)
from paris_ray.pipeline.encoders import SECTIONS
from paris_ray.pipeline.file_list import list_files
from paris_ray.pipeline.filtering import drop_filtered
from paris_ray.pipeline.moving import are_listed, num_left, would_leave_again
from paris_ray.pipeline.quarantine import describe_bad_rows, first_bad_row
from paris_ray.pipeline.shards import (
    BUSY,
    ENDED,
    FILTERED,
    QUARANTINED,
    ShardReader,
    ShardWriter,
    file_versions_of,
)
from paris_ray.pipeline.stage import PART, Stage, note_seconds
from paris_ray.planning.disk import row_bytes
from paris_ray.run import EMBEDDINGS, Run

logger = logging.getLogger("paris_ray")

PRINT_INTERVAL_S = 5.0
MAX_BLOCKS = 10_000  # of shards, each of some: Ray Data keeps what it knows of each in one process


def prepare_embeddings(config: Config, encoders: Manifest, shards: Sequence[Shard]) -> Manifest:
    """Publish `embeddings/`, with `held_out/` in it, and `quarantine/`.

    Args:
        config: The run.
        encoders: What it is encoded by.
        shards: All shards of the corpus.

    Raises:
        CorpusError: if more than `corpus.max_bad_share` of the rows are bad, or none are left for
            training.
    """
    run = Run(config)
    corpus = open_corpus(config.corpus)
    held_out = held_out_rule(config.corpus, corpus, shards, config.seed)
    reader = ShardReader(config, held_out, captions_per_row(config.corpus, corpus, shards))
    versions = shard_versions(reader, shards)
    stage = embedding_stage(config, encoders, versions)
    with stage.locked():
        return stage.finished() or _make_embeddings(run, stage, reader, shards, versions)


def _make_embeddings(
    run: Run,
    stage: Stage,
    reader: ShardReader,
    shards: Sequence[Shard],
    versions: Mapping[str, str],
) -> Manifest:
    config = run.config
    lacking = not_fetched(config.corpus)
    stage.begin(run.quarantine)
    pending = _pending(config, shards, versions)
    if pending:
        _follow(stage, config, _embedding(config, reader, pending, versions), len(pending))
    # First: of rows that repeat each other a filtered one does not stay.
    drop_filtered(config, stage.check)
    drop_duplicates(config, versions, stage.check)
    told = told_of(config, files_by_shard(run))
    counts = count_rows({name: each.of_whole for name, each in told.items()})
    refuse_bad_corpus(config, counts)
    for reason, count in lacking.items():
        logger.info("not in the corpus: %d pictures, %s", count, reason)
    facts = {"not_fetched": lacking} if lacking else {}
    facts |= counts | {"attribution": open_corpus(config.corpus).attribution}
    stage.check()  # before the list of files is written
    return stage.publish(facts, files=list_files(run.embeddings))


def embedding_stage(config: Config, encoders: Manifest, versions: Mapping[str, str]) -> Stage:
    """Return the stage as it is for these encoders and versions of shards, by name."""
    return Stage(
        EMBEDDINGS,
        Run(config).embeddings,
        config,
        sections=SECTIONS,
        parents={"encoders": encoders.digest},
        inputs=corpus_input(versions),
    )


def corpus_input(versions: Mapping[str, str]) -> dict[str, str]:
    """Return the corpus as an input of a stage: the versions of its shards, by name."""
    return {"the corpus": sha256_hex(canonical_json(versions))}


def shard_versions(reader: ShardReader, shards: Sequence[Shard]) -> dict[str, str]:
    """Return, by name of the shard, what becomes another text when its rows would.

    That is not what is in its files alone: of a small corpus the number of rows decides how many
    are held out, and its first rows how many captions are kept.
    """
    tasks = [file_versions_of.remote(reader.config, group) for group in in_groups(shards)]
    of_files = [version for group in ray.get(tasks) for version in group]
    rule = [asdict(reader.held_out), reader.num_captions]
    return {
        shard.name: sha256_hex(canonical_json([version, *rule]))
        for shard, version in zip(shards, of_files, strict=True)
    }


def _pending(config: Config, shards: Sequence[Shard], versions: Mapping[str, str]) -> list[Shard]:
    """Return the shards that an earlier run did not account for row by row, as they are now.

    What it left of them is deleted: the next run may cut them into files elsewhere. So is what it
    left of shards that are gone. Where the corpus is another one, those of which repeated rows were
    set aside may have to be encoded again, too. What is gone or changed goes last: it alone tells
    the next run, if this one is killed meanwhile, that the corpus is another one.
    """
    run = Run(config)
    found = files_by_shard(run)
    told = told_of(config, found)
    same = {name for name, each in told.items() if each.version == versions.get(name)}
    kept = {name for name in same if told[name].is_whole}
    left = {name for name, each in told.items() if each.account and num_left(each.account)}
    if not (are_listed(config, versions) or would_leave_again(config, told, versions)):
        kept -= left
    for name in sorted(found.keys() - kept, key=lambda name: (name not in same, name)):
        delete_files(run, found[name])
    gone = found.keys() - versions.keys()
    if found:
        logger.info("embed: of %d shards %d are kept, %d gone", len(shards), len(kept), len(gone))
    return [shard for shard in shards if shard.name not in kept]


def _embedding(
    config: Config, reader: ShardReader, shards: Sequence[Shard], versions: Mapping[str, str]
) -> ray.data.Dataset:
    """Return the Ray Data pipeline over some shards; it runs when it is iterated."""
    items = [asdict(shard) | {"version": versions[shard.name]} for shard in shards]
    quiet_ray_data()
    # Blocks are what our encoders yield: Ray Data would join small ones, so that nothing is written
    # before all rows of many megabytes have been encoded. It cuts those of 1.5 times this.
    size = round(0.75 * block_bytes(config, reader.num_captions))
    DataContext.get_current().target_max_block_size = size
    dataset = ray.data.from_items(
        items, override_num_blocks=min(len(items), MAX_BLOCKS)
    ).map_batches(reader, batch_size=1, num_cpus=TASK_CPUS)
    for kinds, pool in actor_pools(config):
        dataset = dataset.map_batches(
            Encoders,
            compute=ActorPoolStrategy(size=pool.num_actors),
            fn_constructor_args=(config, kinds),
            batch_size=None,
            num_cpus=pool.num_cpus,
            num_gpus=pool.num_gpus,
        )
    return dataset.map_batches(ShardWriter(config), batch_size=None, num_cpus=TASK_CPUS)


def block_bytes(config: Config, num_captions: int) -> int:
    """Return how many bytes `corpus.rows_per_shard` rows have when all encoders had them, about."""
    corpus = replace(config.corpus, captions_per_row=num_captions)
    sizes = row_bytes(replace(config, corpus=corpus)).values()
    picture = 3 * corpus.image_size**2
    return corpus.rows_per_shard * (picture + sum(size or 0 for size in sizes))


def actor_pools(config: Config) -> list[tuple[list[type[Encoder]], PoolConfig]]:
    """Return the encoders of each pool of actors, in order, and what such an actor needs.

    Encoders that need no GPU and otherwise the same share their actors, if all together need a CPU
    at most: three pools of four fit two machines of eight, a process of twelve neither.
    """
    pools: dict[Any, list[type[Encoder]]] = {}
    encoders = _encoders(config)
    for encoder, pool in encoders.items():
        is_small = not pool.num_gpus and pool.num_cpus <= 1 / len(encoders)
        shared = (pool.num_actors, pool.num_cpus) if is_small else encoder
        pools.setdefault(shared, []).append(encoder)
    return [
        (kinds, replace(pool, num_cpus=len(kinds) * pool.num_cpus))
        for kinds in pools.values()
        for pool in [encoders[kinds[0]]]
    ]


def _encoders(config: Config) -> dict[type[Encoder], PoolConfig]:
    """Return what adds columns to the rows, in order."""
    encoders: dict[type[Encoder], PoolConfig] = {
        TextEmbedder: config.text.pool,
        FeatureEmbedder: config.features.pool,
        LatentEmbedder: config.codec.pool,
    }
    if config.corpus.filters.scores:
        encoders[RowScorer] = config.corpus.filters.pool
    return encoders


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


def _follow(stage: Stage, config: Config, dataset: ray.data.Dataset, num_shards: int) -> None:
    """Run the pipeline and print how far it is, and in the end how busy the encoders were."""
    started = printed_at = time.monotonic()
    counts, busy = Counter[str](), Counter[str]()
    for written in dataset.iter_rows():
        stage.check()
        now = time.monotonic()
        busy.update({name: written.pop(name) for name in list(written) if name.startswith(BUSY)})
        counts.update(written)
        if now - printed_at > PRINT_INTERVAL_S:
            printed_at = now
            logger.info("embed: %s", progress_line(counts, num_shards, now - started))
    _tell_busy(config, busy, time.monotonic() - started)


def _tell_busy(config: Config, busy: Mapping[str, float], seconds: float) -> None:
    """Note how long each encoder computed, and say for how much of the time its actors did."""
    shares = []
    for encoder, pool in _encoders(config).items():
        spent = busy[f"{BUSY}{encoder.step}"]
        note_seconds(config, f"{PART}embeddings, {encoder.step} computing", spent)
        shares.append(f"{encoder.step} {spent / (seconds * pool.num_actors):.0%}")
    told = ", ".join(shares)
    logger.info("embed: of %.0f s, start included, encoders computed: %s", seconds, told)


def progress_line(counts: Counter[str], num_shards: int, seconds: float) -> str:
    """Return how far encoding is; when it ends is told by the first shard that did.

    Args:
        counts: What became of the rows so far, at least of one: what `ShardWriter` returns, summed.
        num_shards: How many shards there are.
        seconds: How long it took.
    """
    ended = counts[ENDED]
    done = counts.total() - ended
    eta = f", ETA {(num_shards - ended) * seconds / ended:.0f} s" if ended else ""
    filtered = {
        name.removeprefix(FILTERED): count
        for name, count in counts.items()
        if name.startswith(FILTERED) and count
    }
    return (
        f"{ended}/{num_shards} shards, {done} rows, {done / seconds:.0f} rows/s{eta}; "
        f"{counts['good']} good, {counts['held_out']} held out, {counts[QUARANTINED]} quarantined"
        + (f", {_by_reason(filtered)} filtered" if filtered else "")
    )


def _by_reason(counts: Mapping[str, int]) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items())
    return f"{sum(counts.values())} ({reasons})"


def count_rows(accounts: Mapping[str, Account | None]) -> dict[str, Any]:
    """Count what became of every row, good ones, and bad and filtered ones by reason.

    Raises:
        CorpusError: if some of a shard are unaccounted for.
    """
    lost = [name for name, account in accounts.items() if account is None]
    if lost:
        raise CorpusError(
            f"{len(lost)} of {len(accounts)} shards were not written as they were read, such as "
            f"{lost[0]}: run again"
        )
    counts = total(filter(None, accounts.values()))
    for reason, count in counts.quarantined.items():
        logger.warning("quarantined: %d rows, %s", count, reason)
    for reason, count in counts.filtered.items():
        logger.info("filtered: %d rows, %s", count, reason)
    logger.info(
        "embed: %d rows for training, %d held out, %d quarantined, %d filtered",
        counts.good,
        counts.held_out,
        sum(counts.quarantined.values()),
        sum(counts.filtered.values()),
    )
    return {
        "rows": counts.good,
        "held_out": counts.held_out,
        "quarantined": dict(counts.quarantined),
        "filtered": dict(counts.filtered),
    }


def refuse_bad_corpus(config: Config, counts: Mapping[str, Any]) -> None:
    """Raise CorpusError if none of the rows are left to train on, or too many are bad.

    Too many are a larger share of all than `corpus.max_bad_share`; filtered ones are not bad.
    """
    good, bad = counts["rows"] + counts["held_out"], sum(counts["quarantined"].values())
    filtered = sum(counts["filtered"].values())
    total = good + bad + filtered
    share = bad / max(1, total)
    if share > config.corpus.max_bad_share or total == bad:
        raise CorpusError(
            f"{bad} of {total} rows are bad ({share:.1%}, "
            f"corpus.max_bad_share={config.corpus.max_bad_share}): "
            f"{_described(config, counts['quarantined'])}"
        )
    if good == 0:
        raise CorpusError(
            f"corpus.filters leave none of {total} rows, {filtered} filtered and {bad} bad: "
            f"{_described(config, {**counts['filtered'], **counts['quarantined']})}"
        )
    if counts["rows"] == 0:
        taken = f"corpus.filters took {filtered} rows, and " if filtered else ""
        raise CorpusError(
            f"{taken}all {good} usable rows are held out (corpus.held_out_share="
            f"{config.corpus.held_out_share}, corpus.held_out_key={config.corpus.held_out_key!r}): "
            "none are left to train on"
        )


def _described(config: Config, counts: Mapping[str, int]) -> str:
    """Return what is wrong with rows that were set aside, with one of them, and where they are."""
    quarantine = Run(config).quarantine
    example = first_bad_row(quarantine, counts)
    return f"{describe_bad_rows(counts, example)}; see {quarantine.uri}"
