"""A bounded sample of a corpus, from all over it: what becomes of its rows, and how they look."""

import io
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from paris_ray.config import CorpusConfig, FiltersConfig
from paris_ray.corpora import DecodedRow, HeldOut, RawRow, Shard, decode_row
from paris_ray.seeding import numpy_generator
from paris_ray.survey.listing import Listing

ROWS, SECONDS = 512, 10.0
SHARDS = 64  # at most so many are opened
PICTURE_SIDE = 128  # pixels; larger pictures are kept smaller
# Values of EXIF's Orientation that exchange width and height.
ORIENTATION, TURNED = 0x0112, (5, 6, 7, 8)

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True, eq=False)
class SampledRow:
    """One row and what becomes of it.

    Attributes:
        key: Identity of the row.
        caption: As it is trained on; of a bad row as it is written, if it is text.
        reason: Why the row is quarantined, one of `corpora.REASONS`; None: it is good.
        detail: The reason in words.
        is_held_out: Whether the row is set aside to measure with.
        size: Width and height of the upright picture in pixels; None if it cannot be decoded.
        picture: uint8 `(S, S, 3)`, cut as for training, S at most PICTURE_SIDE; None likewise.
    """

    key: str
    caption: str
    reason: str | None
    detail: str
    is_held_out: bool
    size: tuple[int, int] | None
    picture: NDArray[np.uint8] | None


def some_rows(
    listing: Listing,
    *,
    rows: int = ROWS,
    seconds: float = SECONDS,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[tuple[int, RawRow]]:
    """Yield some rows with the numbers of their shards: the first few of shards from all over.

    Args:
        listing: The corpus.
        rows: At most so many.
        seconds: About so long; every opened shard gives at least one row.
        clock: Tells seconds.
    """
    shards = _some_shards(listing)[:rows]
    started, counts = clock(), np.diff(np.linspace(0, rows, len(shards) + 1).astype(int))
    for i, (shard, count) in enumerate(zip(shards, counts, strict=True), 1):
        # A shard that needs less than its part of the time leaves the rest to the next ones.
        deadline = started + seconds * i / len(shards)
        for raw in islice(listing.corpus.read(shard), int(count)):
            yield shard.index, raw
            if clock() > deadline:
                break


def sample_corpus(listing: Listing, held_out: HeldOut) -> list[SampledRow]:
    """Return some rows in corpus order, and what becomes of them under a rule of held-out rows."""
    seen: set[str] = set()
    judged = [
        (shard, _judge(raw, listing.config.corpus, held_out, seen))
        for shard, raw in some_rows(listing)
    ]
    return [row for _, row in sorted(judged, key=lambda pair: pair[0])]


def _some_shards(listing: Listing) -> list[Shard]:
    generator = numpy_generator(listing.config.seed, "survey")
    order = generator.permutation(len(listing.shards))[:SHARDS]
    return [listing.shards[i] for i in order]


def _judge(raw: RawRow, config: CorpusConfig, held_out: HeldOut, seen: set[str]) -> SampledRow:
    """Return what becomes of a row; `seen` has the keys of those before it, and gets its own."""
    row = decode_row(raw, config)
    written = raw.caption if isinstance(raw.caption, str) else ""
    is_repeated = raw.key in seen
    seen.add(raw.key)
    if isinstance(row, DecodedRow) and not is_repeated:
        picture, size = shrink(row.image), picture_size(raw.image)
        return SampledRow(raw.key, row.caption, None, "", held_out.holds(raw), size, picture)
    reason, detail = ("duplicate_key", "an earlier row has this key")
    if not isinstance(row, DecodedRow):
        reason, detail = row.reason, row.detail
    shown = picture_of(raw, config)
    size = None if shown is None else picture_size(raw.image)
    return SampledRow(raw.key, written, reason, detail, False, size, shown)


def picture_of(raw: RawRow, config: CorpusConfig) -> NDArray[np.uint8] | None:
    """Return the picture of a row, whatever else is wrong with it; None if it has none."""
    unfiltered = replace(config, filters=FiltersConfig())
    row = decode_row(replace(raw, caption="any", problem=None), unfiltered)
    return shrink(row.image) if isinstance(row, DecodedRow) else None


def shrink(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return a picture `(S, S, 3)` with S at most PICTURE_SIDE."""
    if image.shape[0] <= PICTURE_SIDE:
        return image
    side = (PICTURE_SIDE, PICTURE_SIDE)
    return np.asarray(Image.fromarray(image).resize(side, Image.Resampling.BOX))


def picture_size(encoded: bytes | None) -> tuple[int, int] | None:
    """Return width and height of an upright picture by its header; None if that cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pictures that the decoder has accepted
            image = Image.open(io.BytesIO(encoded or b""))
            is_turned = image.getexif().get(ORIENTATION) in TURNED
        return (image.height, image.width) if is_turned else image.size
    except Exception:  # decoders of arbitrary bytes raise almost anything
        return None


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """Return evenly spread items, all if there are not more than `count`."""
    if len(items) <= count:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, count).astype(int)]


def examples(rows: Sequence[SampledRow], count: int) -> Iterator[tuple[str, list[SampledRow]]]:
    """Yield every reason why rows are bad, the most frequent first, with some of its rows."""
    by_reason: dict[str, list[SampledRow]] = {}
    for row in rows:
        if row.reason is not None:
            by_reason.setdefault(row.reason, []).append(row)
    for reason, bad in sorted(by_reason.items(), key=lambda item: (-len(item[1]), item[0])):
        yield reason, bad[:count]
