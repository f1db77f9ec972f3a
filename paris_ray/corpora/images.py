"""From a raw row to a picture of fixed size and a clean caption, or to the reason why not.

Bad input is expected at scale: nothing here raises for it. Each bad row becomes a `QuarantinedRow`.
"""

import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from paris_ray.config import CorpusConfig
from paris_ray.corpora.columns import is_said
from paris_ray.corpora.labels import labels_of
from paris_ray.corpora.rows import RawRow

REASONS: Mapping[str, str] = {
    "missing_file": "there is no picture where the corpus says there is one",
    "unreadable_shard": "a file of the corpus cannot be read from here on",
    "bad_metadata": "the row's metadata is not JSON of the expected form",
    "too_many_bytes": "the file of the picture is larger than pictures are",
    "empty_image": "the picture has no bytes",
    "not_an_image": "the bytes are not PNG, JPEG, WEBP, BMP or GIF",
    "truncated_image": "the picture begins well but cannot be decoded to its end",
    "too_many_pixels": "the header announces more than corpus.max_pixels",
    "missing_caption": "there is no caption, or it is not text",
    "empty_caption": "the caption is only whitespace",
    "duplicate_key": "an earlier row has the same key",
}

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
# A file too short for its header still shows what it was; BMP's "BM" may also begin a sentence.
_SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a")


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


@dataclass(frozen=True, slots=True)
class QuarantinedRow:
    """A row that is set aside.

    Attributes:
        key: Identity of the row.
        reason: One of `REASONS`.
        detail: What was found.
    """

    key: str
    reason: str
    detail: str


class _BadRow(Exception):
    """Carries a reason and a detail up to `decode_row`."""


def decode_row(row: RawRow, config: CorpusConfig) -> DecodedRow | QuarantinedRow:
    """Return the row's picture and caption, or why they cannot be used. Never raises for bad data.

    Transparent pictures are composited over white, EXIF orientation is honoured, the shorter side
    is resized to `config.image_size` and the centre is cropped.

    Args:
        row: What a corpus read.
        config: `image_size`, `resize` and `max_pixels` are used. Pillow refuses more than
            178,956,970 pixels whatever `max_pixels` says.
    """
    try:
        if row.problem is not None:
            raise _BadRow(row.problem, row.detail)
        captions = _clean_captions(row.caption)
        image = _decode(row.image, config)
    except _BadRow as bad:
        reason, detail = bad.args
        return QuarantinedRow(row.key, reason, detail)
    labelling, attributes = config.attributes, None
    if labelling is not None:
        attributes = labels_of(labelling, row.columns, captions[0])
    return DecodedRow(row.key, captions, np.array(image), attributes or {})


def find_duplicates(keys_by_shard: Mapping[int, Sequence[str]]) -> dict[int, frozenset[int]]:
    """Return, for each shard, the positions of the rows whose key an earlier row already has.

    The first occurrence in shard order stays. Keys are compared as 64-bit hashes first, so that a
    corpus of millions of rows needs eight bytes a row and not a set of strings; only the few keys
    with equal hashes are compared as text.
    """
    order = sorted(keys_by_shard)
    every_key = (key for index in order for key in keys_by_shard[index])
    hashes = np.fromiter(map(hash, every_key), np.int64)
    values, counts = np.unique(hashes, return_counts=True)
    candidates = np.flatnonzero(np.isin(hashes, values[counts > 1]))
    ends = np.cumsum([len(keys_by_shard[index]) for index in order], dtype=np.int64)
    repeats: dict[int, set[int]] = {index: set() for index in order}
    seen: set[str] = set()
    for position, place in zip(candidates, np.searchsorted(ends, candidates, "right"), strict=True):
        index = order[place]
        row = int(position - ends[place]) + len(keys_by_shard[index])
        key = keys_by_shard[index][row]
        if key in seen:
            repeats[index].add(row)
        seen.add(key)
    return {index: frozenset(rows) for index, rows in repeats.items()}


def _clean_captions(caption: object) -> tuple[str, ...]:
    """Return the caption, or all of several that say something, each once."""
    if not isinstance(caption, list | tuple):
        return (_clean_caption(caption),)
    said = [each for each in caption if is_said(each)] or [next(iter(caption), None)]
    return tuple(dict.fromkeys(map(_clean_caption, said)))


def _clean_caption(caption: object) -> str:
    if not isinstance(caption, str):
        raise _BadRow("missing_caption", f"the caption is {type(caption).__name__}, not text")
    try:
        caption.encode()
    except UnicodeEncodeError as error:  # a lone surrogate, which no table can store
        raise _BadRow("missing_caption", f"the caption is not Unicode: {error.reason}") from None
    cleaned = " ".join(caption.split())
    if not cleaned:
        raise _BadRow("empty_caption", f"the caption is {caption[:20]!r}")
    return cleaned


def _decode(encoded: bytes | None, config: CorpusConfig) -> Image.Image:
    if encoded is None:
        raise _BadRow("missing_file", "the row has no picture")
    if not encoded:
        raise _BadRow("empty_image", "the picture has 0 bytes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns where we quarantine
        image = _open(encoded)
        if image.width * image.height > config.max_pixels:
            size = f"{image.width} x {image.height} pixels"
            raise _BadRow("too_many_pixels", f"{size}, corpus.max_pixels={config.max_pixels}")
        return _load(image, config)


def _open(encoded: bytes) -> Image.Image:
    """Read the header only."""
    try:
        return Image.open(io.BytesIO(encoded), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise _BadRow("too_many_pixels", str(error)) from None
    except Exception:  # decoders of arbitrary bytes raise almost anything
        known = encoded.startswith(_SIGNATURES) or encoded[8:12] == b"WEBP"
        reason = "truncated_image" if known else "not_an_image"
        begin = f"{len(encoded)} bytes that begin with {encoded[:8]!r}"
        raise _BadRow(reason, begin) from None


def _load(image: Image.Image, config: CorpusConfig) -> Image.Image:
    """Decode the pixels and return their centre, upright, as RGB."""
    resample = Image.Resampling.LANCZOS
    try:
        image.load()
        picture = _to_rgb(_upright(image))
        if config.resize == "adm":
            picture, resample = _halve(picture, config.image_size), Image.Resampling.BICUBIC
        return ImageOps.fit(picture, (config.image_size, config.image_size), resample)
    except Exception as error:  # as above
        raise _BadRow("truncated_image", f"{type(error).__name__}: {error}") from None


def _halve(image: Image.Image, side: int) -> Image.Image:
    """Halve by averaging while the shorter side stays at least `side`, as ADM and DiT do.

    Source: Dhariwal and Nichol 2021 (arXiv 2105.05233), the preprocessing of their training data.
    """
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    return image


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF says nothing about the orientation; the pixels are fine
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel; Pillow's own conversion clips at 255
        return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    picture = image.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")
