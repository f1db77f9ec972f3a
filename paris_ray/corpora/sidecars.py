"""Pictures with captions in files of the same name beside them: `a.jpg` and `a.txt`.

As kohya's scripts, SimpleTuner and OneTrainer have them.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

from paris_ray.artifacts import canonical_json, sha256_hex
from paris_ray.config import CorpusConfig
from paris_ray.corpora.paths import (
    corpus_path,
    file_versions,
    folders_of,
    names_in,
    of_split,
    place_of,
)
from paris_ray.corpora.places import Place, place
from paris_ray.corpora.rows import RawRow, Shard, rows_per_slice
from paris_ray.corpora.samples import FileMember, image_extensions, read_sample
from paris_ray.errors import CorpusError

logger = logging.getLogger("paris_ray")

# At the beginning of a folder's name, as kohya's scripts have it; four digits are a year.
_REPEATS = re.compile(r"(\d{1,3})_.")
# Masks and conditions that OneTrainer keeps beside pictures; they are no pictures of their own.
_ATTACHED = ("-masklabel", "-condlabel")


class Sidecars:
    """The pictures of a folder and those below it, each with its own file of a caption.

    Captions are UTF-8 in `.txt` or `.caption`, or a field of `.json`. A key is the path of the
    picture. A shard is some of the pictures of one folder, which are sorted by name: at most 32 of
    a folder, since whoever reads one lists the folder. kohya's repeats, of folders such as
    `10_name`, are not followed: every picture is one row.

    Args:
        config: `path`, `split`, `image_column`, `caption_column`, `limit`, `rows_per_shard` and
            `attribution` are used.

    Raises:
        CorpusError: if the folder does not exist.
    """

    def __init__(self, config: CorpusConfig) -> None:
        self.attribution: str | None = config.attribution
        self._config = config
        self._extensions = frozenset(image_extensions(config))
        self._root = corpus_path(config)
        self._listed: tuple[Place | None, list[str]] = (None, [])
        if not self._root.is_dir():
            raise CorpusError(f"corpus.path={config.path!r} is a file; expected a folder")

    def shards(self) -> list[Shard]:
        """Return slices of folders.

        Raises:
            CorpusError: if there is no picture.
        """
        counts = {folder: len(self._pictures(names)) for folder, names in folders_of(self._config)}
        folders = [folder for folder, count in counts.items() if count]
        if not folders:
            raise CorpusError(
                f"corpus.path={self._config.path!r} holds no pictures; expected names such as "
                "cat.jpg, with their captions in cat.txt, cat.caption or cat.json"
            )
        shards: list[Shard] = []
        left = self._config.limit
        chosen = of_split(self._config, folders, by_folder=True)
        _tell_repeats(chosen)
        for folder in chosen:
            total = counts[folder] if left is None else min(counts[folder], left)
            left = None if left is None else left - total
            size = rows_per_slice(total, self._config.rows_per_shard)
            for start in range(0, total, size):
                stop = min(start + size, total)
                shards.append(Shard(len(shards), str(folder), start, stop))
        return shards

    def keys(self, shard: Shard) -> Iterator[str]:
        """Yield the paths of a shard's pictures."""
        folder = place(shard.source)
        within = self._within(folder)
        for name in self._pictures(self._names(folder))[shard.start : shard.stop]:
            yield (within / name).as_posix()

    def read(self, shard: Shard) -> Iterator[RawRow]:
        """Yield each picture and its caption."""
        folder = place(shard.source)
        for name, files in self._samples(shard):
            members = {e: FileMember(self._root, folder, n) for e, n in files.items()}
            key = (self._within(folder) / name).as_posix()
            yield read_sample(key, members, self._config)

    def version(self, shard: Shard) -> str:
        """Return a digest of the names, sizes and times of pictures and what is beside them."""
        names = [name for _, files in self._samples(shard) for name in files.values()]
        versions = file_versions(place(shard.source) / name for name in names)
        return sha256_hex(canonical_json([*names, versions]))

    def _within(self, folder: Place) -> PurePosixPath:
        return PurePosixPath("" if folder == self._root else place_of(self._root, folder))

    def _samples(self, shard: Shard) -> Iterator[tuple[str, dict[str, str]]]:
        """Yield the name of each picture, and its and its captions' names by extension."""
        names = self._names(place(shard.source))
        beside: dict[str, dict[str, str]] = {}  # names by stem and extension
        for name in names:
            stem, _, extension = name.rpartition(".")
            beside.setdefault(stem, {})[extension.lower()] = name
        for name in self._pictures(names)[shard.start : shard.stop]:
            stem, _, extension = name.rpartition(".")
            files = {e: n for e, n in beside[stem].items() if e not in self._extensions}
            yield name, files | {extension.lower(): name}

    def _names(self, folder: Place) -> list[str]:
        """Return what is in a folder; of the shards of one, it is asked once."""
        if self._listed[0] != folder:
            self._listed = (folder, names_in(folder))
        return self._listed[1]

    def _pictures(self, names: list[str]) -> list[str]:
        pictures = []
        for name in names:
            stem, dot, extension = name.rpartition(".")
            is_picture = dot and extension.lower() in self._extensions
            if is_picture and not stem.endswith(_ATTACHED):
                pictures.append(name)
        return pictures


def _tell_repeats(folders: Sequence[Place]) -> None:
    """Warn where folders ask to be weighed: among those that ask for the same it means nothing."""
    found = [_REPEATS.match(folder.name) for folder in folders]
    if len({match and match[1] for match in found}) > 1:
        logger.warning(
            "corpus: the repeats of folders such as %s are not followed: every picture is one row",
            next(folder.name for folder, match in zip(folders, found, strict=True) if match),
        )
