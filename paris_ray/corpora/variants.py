"""How many captions each row of a table of embeddings has room for."""

from itertools import chain, islice

from paris_ray.config import PATH_KINDS, CorpusConfig
from paris_ray.corpora.columns import is_said
from paris_ray.corpora.rows import Corpus

ROWS_LOOKED_AT = 256


def captions_per_row(config: CorpusConfig, corpus: Corpus) -> int:
    """Return `corpus.captions_per_row`, or the most that any of the first rows has.

    Raises:
        CorpusError: if there is nothing to read.
    """
    if config.captions_per_row is not None:
        return config.captions_per_row
    if config.kind not in PATH_KINDS:  # rows take long to draw, and have one
        return 1
    rows = chain.from_iterable(map(corpus.read, corpus.shards()))
    lists = (row.caption for row in islice(rows, ROWS_LOOKED_AT) if isinstance(row.caption, list))
    return max((sum(map(is_said, captions)) for captions in lists), default=1) or 1
