"""Which rows are set aside before anything is fitted: the hash of a row's group decides.

So it is decided for each row alone, wherever it is read, without a list of all rows; and a corpus
that grows keeps what was held out of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from paris_ray.artifacts import canonical_json, sha256_hex
from paris_ray.config import CorpusConfig
from paris_ray.corpora.labels import labels_of
from paris_ray.corpora.rows import Corpus, RawRow, Shard
from paris_ray.errors import CorpusError

MIN_ROWS = 64  # of a smaller corpus a larger share is held out, to measure anything
MAX_SMALL_SHARE = 0.1  # but not more than this
MAX_ROWS_WITHOUT_GROUP = 256
HASH_RANGE = 1 << 256


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The rule, as every reader of the corpus applies it.

    Attributes:
        key: The labelling that groups rows (`corpora.labels`); None: every row is its own group.
        share: Share of the groups that is held out.
        seed: Seed of the run.
    """

    key: str | None
    share: float
    seed: int

    def holds(self, row: RawRow) -> bool:
        """Return whether a row is held out; a row without a group never is."""
        group: object = row.key
        if self.key is not None:
            group = labels_of(self.key, row.columns, row.first_caption)
        if group is None or self.share == 0:
            return False
        digest = sha256_hex(canonical_json(["held out", self.seed, group]))
        return int(digest, 16) < self.share * HASH_RANGE


def held_out_rule(
    config: CorpusConfig, corpus: Corpus, shards: Sequence[Shard], seed: int
) -> HeldOut:
    """Return the rule of a corpus: `held_out_share`, or more of a corpus with few rows.

    Of a large corpus no more rows are listed than tell that it is large.

    Args:
        config: `held_out_share` and `held_out_key` are used.
        corpus: What reads it.
        shards: All of its shards.
        seed: Seed of the run.

    Raises:
        CorpusError: if `held_out_key` names no group in any of the first rows.
    """
    share = config.held_out_share
    if share == 0:
        return HeldOut(config.held_out_key, 0.0, seed)
    _check_key(config, corpus, shards)
    enough = round(MIN_ROWS / share)
    keys = (key for shard in shards for key in corpus.keys(shard))
    num_rows = max(1, sum(1 for _ in islice(keys, enough)))
    small = min(MIN_ROWS / num_rows, MAX_SMALL_SHARE)
    return HeldOut(config.held_out_key, max(share, small), seed)


def _check_key(config: CorpusConfig, corpus: Corpus, shards: Sequence[Shard]) -> None:
    """Refuse a key that none of the first rows has, before hours of encoding."""
    key, captions = config.held_out_key, []
    if key is None:
        return
    for row in islice(corpus.read(shards[0]), MAX_ROWS_WITHOUT_GROUP):
        if labels_of(key, row.columns, row.first_caption) is not None:
            return
        captions.append(row.first_caption)
    example = next(filter(None, captions), None)
    raise CorpusError(
        f"corpus.held_out_key={key!r} names no group in the first {len(captions)} rows: expected "
        f"columns that they have, or a pattern that their captions hold, such as {example!r}"
    )
