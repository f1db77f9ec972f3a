"""How many captions each row of a table of embeddings has room for."""

from collections.abc import Sequence
from itertools import chain, islice

from paris_ray.config import PATH_KINDS, CorpusConfig
from paris_ray.corpora.columns import is_said
from paris_ray.corpora.rows import Corpus, Shard

ROWS_LOOKED_AT = 256


def captions_per_row(config: CorpusConfig, corpus: Corpus, shards: Sequence[Shard]) -> int:
    """Return `corpus.captions_per_row`, or the most that any of the first rows has.

    Args:
        config: `captions_per_row` and `kind` are used.
        corpus: What reads the corpus.
        shards: All of its shards.

    Raises:
        CorpusError: if there is nothing to read.
    """
    if config.captions_per_row is not None:
        return config.captions_per_row
    if config.kind not in PATH_KINDS:  # rows take long to draw, and have one
        return 1
    rows = chain.from_iterable(map(corpus.read, shards))
    lists = (row.caption for row in islice(rows, ROWS_LOOKED_AT) if isinstance(row.caption, list))
    return max((sum(map(is_said, captions)) for captions in lists), default=1) or 1
