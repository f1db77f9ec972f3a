"""Which files a corpus on disk is made of. Names of strangers never lead out of its folder."""

import hashlib
import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePath

from paris_ray.config import CorpusConfig
from paris_ray.errors import CorpusError

logger = logging.getLogger("paris_ray")

# The words that name a split, as the first word of a file's name or as the name of a folder.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
ALL_SPLITS = "all"
COPY_LINKS = "copy the pictures themselves there (cp -rL, hf download --local-dir)"


def corpus_path(config: CorpusConfig) -> Path:
    """Return `corpus.path` in the form that means the same in every process.

    Links stay as they are: a file of a hub's cache has its name from the link alone.

    Raises:
        CorpusError: if it is not set or does not exist.
    """
    if config.path is None:
        raise CorpusError(f"corpus.path is null; corpus.kind={config.kind!r} needs a path")
    path = Path(config.path).expanduser().absolute()
    if not path.exists():
        raise CorpusError(f"corpus.path={config.path!r} does not exist ({path})")
    return path


def place_of(root: Path, path: Path) -> str:
    """Return the name of one of a corpus's files: its path from `corpus.path`, or its own name."""
    return path.name if path == root else path.relative_to(root).as_posix()


def list_files(config: CorpusConfig, suffixes: Sequence[str]) -> list[Path]:
    """Return the file at `corpus.path`, or those in its folders, of the wanted split, by name.

    Raises:
        CorpusError: if there are none, or there is no telling which split is meant.
    """
    path = corpus_path(config)
    if path.is_file():
        return [path]
    endings = tuple(suffixes)
    files = [folder / n for folder, names in walk(path) for n in names if n.endswith(endings)]
    if not files:
        expected = ", ".join(f"*{suffix}" for suffix in suffixes)
        raise CorpusError(f"corpus.path={str(path)!r} holds no files {expected}")
    return of_split(config, files)


def walk(path: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield every folder from `path` down, sorted, and the names of its files, sorted.

    What is hidden is left out, and links to folders outside, with a warning.
    """
    seen = set()
    for name, folders, files in os.walk(path, followlinks=True):
        folder = Path(name)
        visible = sorted(n for n in folders if not n.startswith("."))
        outside = [n for n in visible if not _is_within(path, folder / n)]
        for link in outside:
            logger.warning("%s leads out of corpus.path: %s", folder / link, COPY_LINKS)
        folders[:] = [n for n in visible if n not in outside]
        real = folder.resolve()
        if real in seen:  # links in a circle
            folders.clear()
            continue
        seen.add(real)
        yield folder, sorted(n for n in files if not n.startswith("."))


def of_split(config: CorpusConfig, paths: Sequence[Path], *, by_folder: bool = False) -> list[Path]:
    """Return those files that are of the split that `corpus.split` names.

    Without a name, that is the train split where there is one, and else what is of no split.

    Args:
        config: `path` and `split` are used.
        paths: Files; or folders, of which no name is more than the name of a folder.
        by_folder: That they are folders.

    Raises:
        CorpusError: if nothing is of that split, or others are told apart and train is not.
    """
    root, wanted = corpus_path(config), config.split
    places = [path.relative_to(root) / ("*" if by_folder else "") for path in paths]
    if wanted == ALL_SPLITS:
        return list(paths)
    splits = [_split_of(place) for place in places]
    if wanted is None and "train" in splits:
        wanted = "train"
    pairs = list(zip(paths, places, splits, strict=True))
    chosen = [path for path, place, split in pairs if split == wanted or _is_of(place, wanted)]
    found = ", ".join(f"{n} of {split or 'no split'}" for split, n in Counter(splits).items())
    if not chosen:
        raise CorpusError(
            f"corpus.split={config.split!r}: {root} holds {found}; expected one of these splits, "
            f"the name of a folder or the first word of files, or {ALL_SPLITS!r}"
        )
    if len(chosen) < len(paths):
        logger.info("corpus: split %s is read of: %s", wanted or "none", found)
    return chosen


def _split_of(place: PurePath) -> str | None:
    for split, words in SPLITS.items():
        if any(_is_of(place, word) for word in words):
            return split
    return None


def _is_of(place: PurePath, split: str | None) -> bool:
    """Return whether a folder is called so, or the file begins so: `train-00000.parquet`."""
    if split is None:
        return False
    *folders, name = place.parts
    begin = re.match(rf"{re.escape(split)}(?![A-Za-z0-9])", name, re.IGNORECASE)
    return begin is not None or split.lower() in (folder.lower() for folder in folders)


def inside(root: Path, folder: Path, name: str) -> Path:
    """Return the file that a corpus names, relative to one of its folders.

    If there is none, the same name with slashes for backslashes, and in the other Unicode form, is
    looked for: metadata is written on Windows, and folders are copied from a Mac.

    Raises:
        ValueError: if it is not a file, or leaves the corpus.
        OSError: if it cannot be looked up.
        RuntimeError: if links lead in a circle.
    """
    for spelling in _spellings(name):
        path = folder / spelling
        if PurePath(spelling).is_absolute() or not _is_within(root, path):
            link = f", as a link: {COPY_LINKS}" if path.is_symlink() else ""
            raise ValueError(f"{name!r} leaves the folder {root}{link}")
        if path.is_file():
            return path
    raise ValueError(f"{name!r} is not a file in {folder}")


def _spellings(name: str) -> Iterator[str]:
    for form in dict.fromkeys((name, name.replace("\\", "/"))):
        yield form
        for unicode_form in ("NFC", "NFD"):
            if not unicodedata.is_normalized(unicode_form, form):
                yield unicodedata.normalize(unicode_form, form)


def _is_within(root: Path, path: Path) -> bool:
    """Return whether a path leads into the corpus, or, from a hub's snapshot, to its blobs."""
    real, home = path.resolve(), root.resolve()
    if home.parent.name == "snapshots" and real.is_relative_to(home.parent.parent / "blobs"):
        return True
    return real.is_relative_to(home)


def file_versions(paths: Iterable[Path]) -> str:
    """Return a digest of when files were written and how large they are, also of missing ones."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            found = path.stat()
            digest.update(f"{found.st_size} {found.st_mtime_ns}\n".encode())
        except (OSError, ValueError, RuntimeError):  # names that no file system takes, loops
            digest.update(b"none\n")
    return digest.hexdigest()
