"""From a raw row to a picture of fixed size and a clean caption, or to the reason why not.

Bad input is expected at scale: nothing here raises for it. Each bad row becomes a `QuarantinedRow`,
and so does one that `corpus.filters` do not want.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from paris_ray.config import CorpusConfig
from paris_ray.corpora.captions import clean_captions
from paris_ray.corpora.filters import wanted_captions
from paris_ray.corpora.labels import labels_of
from paris_ray.corpora.pixels import decode
from paris_ray.corpora.quarantine import BadRow, QuarantinedRow
from paris_ray.corpora.rows import RawRow


@dataclass(frozen=True, slots=True, eq=False)
class DecodedRow:
    """A usable row.

    Attributes:
        key: Identity of the row.
        captions: Its captions with single spaces, of which the first counts most.
        image: uint8 RGB of shape (image_size, image_size, 3).
        attributes: Labels by name, as `corpus.attributes` says; empty if the row lacks one.
    """

    key: str
    captions: tuple[str, ...]
    image: NDArray[np.uint8]
    attributes: Mapping[str, str] = field(default_factory=dict)

    @property
    def caption(self) -> str:
        """The first caption."""
        return self.captions[0]


def decode_row(row: RawRow, config: CorpusConfig) -> DecodedRow | QuarantinedRow:
    """Return the row's picture and caption, or why they cannot be used. Never raises for bad data.

    Args:
        row: What a corpus read.
        config: What `pixels.decode` uses, `attributes`, and the `filters` of one row.
    """
    try:
        if row.problem is not None:
            raise BadRow(row.problem, row.detail)
        captions = wanted_captions(clean_captions(row.caption), config.filters)
        image = decode(row.image, config)
    except BadRow as bad:
        return QuarantinedRow(row.key, bad.reason, bad.detail)
    labelling, attributes = config.attributes, None
    if labelling is not None:
        attributes = labels_of(labelling, row.columns, captions[0])
    return DecodedRow(row.key, captions, image, attributes or {})
