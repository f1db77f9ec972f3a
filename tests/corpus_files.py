"""Corpora on disk, as tests write and read them."""

import io
import pickle
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from paris_ray.config import CorpusConfig
from paris_ray.corpora import REASONS, RawRow, open_corpus
from tests.picture_files import encode

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def png(color: tuple[int, ...] = RED, size: tuple[int, int] = (8, 8)) -> bytes:
    return encode(Image.new("RGB" if len(color) == 3 else "RGBA", size, color))


def read_all(config: CorpusConfig) -> list[RawRow]:
    """Every row of a corpus, read as tasks do it: from a pickled corpus, one shard at a time."""
    corpus = pickle.loads(pickle.dumps(open_corpus(config)))
    shards = pickle.loads(pickle.dumps(corpus.shards()))
    assert [shard.index for shard in shards] == list(range(len(shards)))
    rows: list[RawRow] = []
    for shard in shards:
        part = list(corpus.read(shard))
        assert list(corpus.keys(shard)) == [row.key for row in part]
        assert all(row.problem is None or row.problem in REASONS for row in part)
        rows += part
    return rows


def problems(rows: list[RawRow]) -> dict[str, str | None]:
    return {row.key: row.problem for row in rows}


def write_tar(
    path: Path,
    members: Mapping[str, bytes] | Sequence[tuple[str, bytes]],
    mode: str = "w",
    **options: Any,
) -> None:
    pairs = members.items() if isinstance(members, Mapping) else members
    with tarfile.open(path, mode, **options) as tar:
        for name, content in pairs:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def write_files(folder: Path, files: Mapping[str, bytes | str]) -> Path:
    """Write files by their paths in a folder, which is returned."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder
