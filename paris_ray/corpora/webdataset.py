"""WebDataset: tar files in which members that share a name up to the first dot are one sample."""

import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice

from paris_ray.config import CorpusConfig
from paris_ray.corpora.img2dataset import num_fetched
from paris_ray.corpora.paths import corpus_path, file_versions, list_files, place_of
from paris_ray.corpora.places import Place, place
from paris_ray.corpora.rows import RawRow, Shard
from paris_ray.corpora.samples import Member, read_sample, wanted_extensions
from paris_ray.corpora.tars import READ_ERRORS, SUFFIXES, Tar
from paris_ray.errors import CorpusError

MAX_KEPT_BYTES = 1 << 28  # of a sample's members that are read in passing
_MAX_LOST = 100_000  # rows of one tar, whatever beside it says how many there were


@dataclass(frozen=True, slots=True)
class _Sample:
    """Members of one key, or, with `damage`, one of those that are lost."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)  # by extension
    damage: str = ""


class _Samples:
    """The keys and members of a tar's samples, and what the way through it found.

    Attributes:
        count: How many there were.
        position: How many bytes of the tar were read for them.
        damage: Why there are no more, if that is not the end.
    """

    def __init__(self, path: Place, wanted: Collection[str]) -> None:
        self._path, self._wanted = path, wanted
        self._kept_of, self._room = "", 0
        self.count, self.position, self.damage = 0, 0, ""

    def __iter__(self) -> Iterator[tuple[str, dict[str, Member]]]:
        """Yield each; members can be loaded until the next one is asked for."""
        try:
            with self._path.open("rb") as stream:
                for sample in self._read(Tar(self._path, stream)):
                    self.count += 1
                    yield sample
        except OSError as error:  # it cannot even be opened
            self.damage = f"{type(error).__name__}: {error}"

    def _read(self, tar: Tar) -> Iterator[tuple[str, dict[str, Member]]]:
        current, members = "", dict[str, Member]()
        try:
            for name, member in tar.members(self._is_wanted):
                key, extension = _split(name)
                if not extension:
                    continue
                # A repeated extension begins another sample: two pictures are two rows.
                if members and (key != current or extension in members):
                    yield current, members
                    members = {}
                current = key
                members[extension] = member
        except READ_ERRORS as error:
            self.damage = f"{type(error).__name__}: {error}"
        self.position = tar.stream.tell()
        if members:
            yield current, members

    def _is_wanted(self, name: str, num_bytes: int) -> bool:
        """Tell whether a member may be kept: one of few bytes in a gzipped tar could fill memory.

        What counts is the sum of a sample.
        """
        key, extension = _split(name)
        if key != self._kept_of:
            self._kept_of, self._room = key, MAX_KEPT_BYTES
        if extension not in self._wanted or num_bytes > self._room:
            return False
        self._room -= num_bytes
        return True


class WebDataset:
    """The samples of one tar, or of a folder of them and those below it, by their names.

    A sample has a picture (`.jpg .png .webp` and others) and a caption: UTF-8 in `.txt` or
    `.caption`, or a field of `.json`, where labels are too. A tar is a shard, and its samples are
    called `TAR/KEY`. What can be read before damage is kept; about as many rows as are lost by it
    say so. Tars may be gzipped. Nothing is extracted to disk.

    Args:
        config: `path`, `split`, `image_column`, `caption_column`, `limit` and `attribution` are
            used.

    Raises:
        CorpusError: if the path does not exist.
    """

    def __init__(self, config: CorpusConfig) -> None:
        self.attribution: str | None = config.attribution
        self._config = config
        self._wanted = wanted_extensions(config)
        self._path = corpus_path(config)

    def shards(self) -> list[Shard]:
        """Return one shard for each tar, or for as many of them as `limit` needs.

        Without a limit `stop` is `sys.maxsize`: counting means reading every header of every tar,
        and no more of them are opened than it takes to find a sample.

        Raises:
            CorpusError: if there is no readable sample.
        """
        paths = list_files(self._config, SUFFIXES)
        if not any(True for path in paths for _ in _Samples(path, self._wanted)):
            raise CorpusError(f"corpus.path={str(self._path)!r} holds no readable samples")
        left = self._config.limit
        if left is None:
            return [Shard(i, str(path), 0, sys.maxsize) for i, path in enumerate(paths)]
        shards: list[Shard] = []
        for path in paths:
            count = sum(1 for _ in islice(self._samples(path), left))
            left -= count
            if count:
                shards.append(Shard(len(shards), str(path), 0, count))
        return shards

    def keys(self, shard: Shard) -> Iterator[str]:
        """Yield the tar's name and the paths of its samples, as `__key__` in WebDataset."""
        samples = self._samples(place(shard.source))
        return (sample.key for sample in islice(samples, shard.stop))

    def read(self, shard: Shard) -> Iterator[RawRow]:
        """Yield the samples of a tar in order."""
        for sample in islice(self._samples(place(shard.source)), shard.stop):
            if sample.damage:
                yield RawRow(sample.key, None, None, "unreadable_shard", sample.damage)
            else:
                yield read_sample(sample.key, sample.members, self._config)

    def version(self, shard: Shard) -> str:
        """Return a digest of the tar's size and time."""
        return file_versions([place(shard.source)])

    def _samples(self, path: Place) -> Iterator[_Sample]:
        """Yield the samples of a tar, then those that are lost by damage."""
        name, samples = place_of(self._path, path), _Samples(path, self._wanted)
        for key, members in samples:
            yield _Sample(f"{name}/{key}", members)
        lost = self._num_lost(path, samples) if samples.damage else 0
        for number in range(lost):
            key = f"{name}:lost-{number}" if number else name
            yield _Sample(key, damage=f"one of about {lost} rows after: {samples.damage}")

    def _num_lost(self, path: Place, found: _Samples) -> int:
        """Return about how many samples a damaged tar has lost.

        img2dataset says it; else it is taken for as long as the longest tar of the corpus, and for
        as densely filled.
        """
        complete = num_fetched(path)
        if complete is None:
            size, per_byte = self._longest
            complete = found.count + round((size - found.position) * per_byte)
        return max(1, min(complete - found.count, _MAX_LOST))

    @cached_property
    def _longest(self) -> tuple[int, float]:
        """The size of the longest tar, and how many samples a byte of it has."""
        files = [path for path in list_files(self._config, SUFFIXES) if path.is_file()]
        size, path = max(((path.stat().st_size, path) for path in files), default=(0, self._path))
        samples = _Samples(path, self._wanted)
        for _ in samples:
            pass
        return size, samples.count / max(1, samples.position)


def _split(name: str) -> tuple[str, str]:
    """Return the key and the extension, in lower case, that WebDataset sees in a name.

    Hidden files and files without an extension have none.
    """
    folder, _, base = name.removeprefix("./").rpartition("/")
    stem, dot, extension = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem, extension.lower()) if stem and dot else ("", "")
