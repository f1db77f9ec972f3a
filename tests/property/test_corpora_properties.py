"""Properties of reading: no bytes make it raise, and keys always fit the rows."""

import io
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pillow_heif
import pillow_jxl  # noqa: F401  registers its encoder
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from paris_ray.config import CorpusConfig
from paris_ray.corpora import (
    REASONS,
    DecodedRow,
    RawRow,
    Shard,
    decode_row,
)
from paris_ray.corpora.webdataset import WebDataset
from paris_ray.pipeline.duplicates import KEYS
from paris_ray.pipeline.moving import PLACE

pillow_heif.register_heif_opener()
CONFIG = CorpusConfig(image_size=4, max_pixels=100_000)
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "JPEG2000", "ICO", "HEIF", "JXL")
# Positions as shares of the length, and the bytes to write there.
DAMAGE = st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=8)), max_size=4)


def encoded(image_format: str) -> bytes:
    stream = io.BytesIO()
    Image.linear_gradient("L").resize((12, 16)).convert("RGB").save(stream, image_format)
    return stream.getvalue()


def small_tar() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("a.png", "a.txt", "b\u2665.png", "b\u2665.json"):
            info = tarfile.TarInfo(name)
            info.size = 600
            tar.addfile(info, io.BytesIO(b"x" * 600))
    return stream.getvalue()


PICTURES = {name: encoded(name) for name in FORMATS}
TAR = small_tar()


def overwrite(intact: bytes, damage: list[tuple[float, bytes]], kept: float) -> bytes:
    content = bytearray(intact)
    for share, patch in damage:
        start = int(share * (len(content) - 1))
        content[start : start + len(patch)] = patch
    return bytes(content[: int(kept * len(content))])


@given(st.sampled_from(FORMATS), DAMAGE, st.floats(0, 1))
@settings(deadline=None, max_examples=250)
def test_damaged_pictures_never_raise(
    image_format: str, damage: list[tuple[float, bytes]], kept: float
) -> None:
    row = decode_row(RawRow("k", overwrite(PICTURES[image_format], damage, kept), "c"), CONFIG)
    if isinstance(row, DecodedRow):
        assert row.image.shape == (4, 4, 3)
    else:
        assert row.reason in REASONS


@given(st.one_of(st.none(), st.binary()), st.one_of(st.none(), st.text()))
@settings(deadline=None)
@example(b"BM", "c")
@example(b"RIFF\0\0\0\0WEBP", "c")
def test_arbitrary_bytes_never_raise(image: bytes | None, caption: str | None) -> None:
    row = decode_row(RawRow("k", image, caption), CONFIG)
    assert not isinstance(row, DecodedRow) and row.reason in REASONS


@given(DAMAGE, st.floats(0, 1))
@settings(deadline=None, max_examples=150)
def test_damaged_tars_never_raise(damage: list[tuple[float, bytes]], kept: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "0.tar"
        path.write_bytes(overwrite(TAR, damage, kept))
        corpus = WebDataset(CorpusConfig(kind="webdataset", path=folder))
        shard = Shard(0, str(path), 0, 100)
        assert [row.key for row in corpus.read(shard)] == list(corpus.keys(shard))


@given(st.lists(st.lists(st.integers(0, 9), max_size=6), max_size=6), st.integers(1, 3))
def test_repeated_keys_are_those_of_a_plain_set(files: list[list[int]], num_parts: int) -> None:
    """However they are shared out among tasks."""
    seen: set[int] = set()
    expected = set()
    for number, hashes in enumerate(files):
        for row, key in enumerate(hashes):
            if key in seen:
                expected.add((number, row))
            seen.add(key)
    places = np.array([(h, n, r) for n, f in enumerate(files) for r, h in enumerate(f)], PLACE)
    parts = enumerate(KEYS.split(places, num_parts))
    found = [part[KEYS.repeats(part, number, num_parts)] for number, part in parts]
    assert {(p["file"], p["row"]) for part in found for p in part} == expected
    assert all((np.diff(part["file"].astype(int)) >= 0).all() for part in found)
