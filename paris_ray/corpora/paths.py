"""Which files a corpus on disk is made of. Names of strangers never lead out of its folder."""

import errno
import hashlib
import logging
import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from itertools import product, takewhile
from pathlib import Path, PurePath, PurePosixPath
from urllib.parse import unquote

from paris_ray.config import CorpusConfig
from paris_ray.corpora.places import Place, RemotePath, place, version_of
from paris_ray.errors import CorpusError

logger = logging.getLogger("paris_ray")

# The words that name a split, as the first word of a file's name or as the name of a folder.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
ALL_SPLITS = "all"
_SPECIAL = re.compile(r"[*?\[{]")
_WILDCARD = re.compile(r"[*?\[]")
_BRACES = re.compile(r"\{([^{}]*)\}")
_NUMBERS = re.compile(r"(\d+)\.\.(\d+)")
_MAX_ALTERNATIVES = 100_000
COPY_LINKS = "copy the pictures themselves there (cp -rL, hf download --local-dir)"


def corpus_path(config: CorpusConfig) -> Place:
    """Return `corpus.path` in the form that means the same in every process.

    Of a pattern it is the folder before the first part with `*`, `?`, `[...]` or `{...}`. Links
    stay as they are: a file of a hub's cache has its name from the link alone.

    Raises:
        CorpusError: if it is not set, does not exist or cannot be looked up.
    """
    root, _ = _root_and_patterns(config)
    return root


def _root_and_patterns(config: CorpusConfig) -> tuple[Place, list[PurePosixPath]]:
    """Return what `corpus.path` names, or the folder in which its patterns are looked for."""
    if config.path is None:
        raise CorpusError(f"corpus.path is null; corpus.kind={config.kind!r} needs a path")
    path = place(config.path)
    if isinstance(path, Path):
        path = path.expanduser().absolute()
    try:
        root, pattern = _cut(path)
        if _is_there(path, is_pattern=pattern is not None):
            return path, []
        # Of files that are named one by one, a web server need not show the folder.
        is_known = isinstance(root, RemotePath) and not _WILDCARD.search(pattern or "*")
        if pattern is not None and (is_known or root.exists()):
            return root, _alternatives(config, pattern)
    except OSError as error:
        raise CorpusError(f"corpus.path={config.path!r} cannot be looked up: {error}") from None
    raise CorpusError(f"corpus.path={config.path!r} does not exist ({path})")


def _is_there(path: Place, *, is_pattern: bool) -> bool:
    try:
        return path.exists()
    except PermissionError:
        if is_pattern:  # of what is absent some web servers say so: here, most likely, the pattern
            return False
        raise


def _cut(path: Place) -> tuple[Place, str | None]:
    """Return the folder before the first part of a path that is a pattern, and the rest."""
    if isinstance(path, Path):
        parts = path.parts
        first = next((i for i, part in enumerate(parts) if _SPECIAL.search(part)), None)
        return (path, None) if first is None else (Path(*parts[:first]), "/".join(parts[first:]))
    base, _, options = path.uri.partition("?")
    found = _SPECIAL.search(base)
    if found is None:
        return path, None
    end = base.rindex("/", 0, found.start())
    return RemotePath(base[:end] + (options and f"?{options}")), unquote(base[end + 1 :])


def _alternatives(config: CorpusConfig, pattern: str) -> list[PurePosixPath]:
    """Return what braces stand for: `{a,b}` each of these, `{000..099}` each number so written.

    Raises:
        CorpusError: if that is nothing, or too much.
    """
    texts = _BRACES.split(pattern)  # what stands in braces is every second
    count = math.prod(map(_num_choices, texts[1::2]))
    if not 0 < count <= _MAX_ALTERNATIVES:
        raise CorpusError(
            f"corpus.path={config.path!r} stands for {count} paths: expected 1 to "
            f"{_MAX_ALTERNATIVES}, numbers in braces from the smaller to the larger; * and a "
            "folder have no limit"
        )
    choices = [_choices(text) if i % 2 else [text] for i, text in enumerate(texts)]
    return [PurePosixPath(each) for each in dict.fromkeys(map("".join, product(*choices)))]


def _num_choices(inside: str) -> int:
    numbers = _NUMBERS.fullmatch(inside)
    if numbers is None:
        return inside.count(",") + 1
    return max(0, int(numbers[2]) - int(numbers[1]) + 1)


def _choices(inside: str) -> list[str]:
    numbers = _NUMBERS.fullmatch(inside)
    if numbers is None:
        return inside.split(",")
    first, last = numbers.groups()
    return [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]


def place_of(root: Place, path: Place) -> str:
    """Return the name of one of a corpus's files: its path from `corpus.path`, or its own name."""
    return path.name if path == root else _inner(root, path).as_posix()


def _inner(root: Place, path: Place) -> PurePath:
    return path.relative_to(root)  # type: ignore[arg-type]  # both are here, or in one store


def list_files(config: CorpusConfig, suffixes: Sequence[str]) -> list[Place]:
    """Return the file at `corpus.path`, or those in its folders, of the wanted split, by name.

    Raises:
        CorpusError: if there are none, or there is no telling which split is meant.
    """
    path, patterns = _root_and_patterns(config)
    if not patterns and path.is_file():
        return [path]
    if patterns and not any(_WILDCARD.search(str(pattern)) for pattern in patterns):
        files = [path / str(name) for name in patterns]  # a web server tells no list of its files
        if all(name.name.endswith(tuple(suffixes)) for name in files):
            return of_split(config, files)
    endings = tuple(suffixes)
    files = [
        folder / name
        for folder, names in folders_of(config)
        for name in names
        if name.endswith(endings)
    ]
    _refuse_circles(files)
    if not files:
        expected = ", ".join(f"*{suffix}" for suffix in suffixes)
        raise CorpusError(f"corpus.path={config.path!r} holds no files {expected}")
    return of_split(config, files)


def _refuse_circles(files: Iterable[Place]) -> None:
    """Raise CorpusError for a link that leads to itself.

    Others may lead anywhere: users link shards and tables from other disks, hubs from their blobs.
    """
    for file in files:
        try:
            if isinstance(file, Path) and file.is_symlink():
                file.stat()
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise CorpusError(f"{file} is a link that leads in a circle") from None


def folders_of(config: CorpusConfig) -> Iterator[tuple[Place, list[str]]]:
    """Yield every folder of a corpus, sorted, and the names of its files, sorted."""
    root, patterns = _root_and_patterns(config)
    if not patterns:
        yield from walk(root)
        return
    by_prefix: dict[PurePosixPath, list[PurePosixPath]] = {}
    for pattern in patterns:
        by_prefix.setdefault(_prefix(root, pattern), []).append(pattern)
    found: dict[PurePosixPath, set[str]] = {}
    for prefix, matching in by_prefix.items():
        for folder, names in walk(root / str(prefix)):
            inner = PurePosixPath(_inner(root, folder))
            chosen = (n for n in names if any(_matches(inner / n, p) for p in matching))
            found.setdefault(inner, set()).update(chosen)
    for inner in sorted(found):
        yield (root / str(inner) if inner.parts else root), sorted(found[inner])


def _prefix(root: Place, pattern: PurePosixPath) -> PurePosixPath:
    """Return the folder in which the files are that a pattern names: nothing else is listed."""
    literal = list(takewhile(lambda part: not _WILDCARD.search(part), pattern.parts))
    if len(literal) == len(pattern.parts) and not (root / str(pattern)).is_dir():
        literal = literal[:-1]
    return PurePosixPath(*literal)


def _matches(path: PurePosixPath, pattern: PurePosixPath) -> bool:
    """Return whether a pattern names a file, or a folder that it is in."""
    pairs = zip(path.parts, pattern.parts, strict=False)
    return len(path.parts) >= len(pattern.parts) and all(fnmatchcase(*pair) for pair in pairs)


def walk(path: Place) -> Iterator[tuple[Place, list[str]]]:
    """Yield every folder from `path` down, sorted, and the names of its files, sorted.

    What is hidden is left out, and links to folders outside, with a warning.
    """
    if isinstance(path, Path):
        yield from _walk_here(path)
        return
    for folder, names in path.walk():
        if not any(part.startswith(".") for part in folder.relative_to(path).parts):
            yield folder, [name for name in names if not name.startswith(".")]


def _walk_here(path: Path) -> Iterator[tuple[Path, list[str]]]:
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


def names_in(folder: Place) -> list[str]:
    """Return the names of a folder's own files, sorted, as `walk` tells them."""
    if isinstance(folder, Path):
        with os.scandir(folder) as entries:
            return sorted(
                e.name for e in entries if not (_leads_to_folder(e) or _is_hidden(e.name))
            )
    return [name for name in folder.names() if not _is_hidden(name)]


def _leads_to_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links in a circle
        return False


def _is_hidden(name: str) -> bool:
    return name.startswith(".")


def of_split(
    config: CorpusConfig, paths: Sequence[Place], *, by_folder: bool = False
) -> list[Place]:
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
    places = [_inner(root, path) / ("*" if by_folder else "") for path in paths]
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


def inside(root: Place, folder: Place, name: str) -> Place:
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
            is_link = isinstance(path, Path) and path.is_symlink()
            link = f", as a link: {COPY_LINKS}" if is_link else ""
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


def _is_within(root: Place, path: Place) -> bool:
    """Return whether a path leads into the corpus, or, from a hub's snapshot, to its blobs."""
    if isinstance(path, RemotePath) or isinstance(root, RemotePath):
        return path.parts[: len(root.parts)] == root.parts
    real, home = path.resolve(), root.resolve()
    if home.parent.name == "snapshots" and real.is_relative_to(home.parent.parent / "blobs"):
        return True
    return real.is_relative_to(home)


def file_versions(paths: Iterable[Place]) -> str:
    """Return a digest of when files were written and how large they are, also of missing ones."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            digest.update(f"{version_of(path)}\n".encode())
        except (OSError, ValueError, RuntimeError):  # names that no file system takes, loops
            digest.update(b"none\n")
    return digest.hexdigest()
