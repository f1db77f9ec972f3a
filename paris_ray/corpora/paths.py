"""Where a corpus on disk is."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from paris_ray.config import CorpusConfig
from paris_ray.errors import CorpusError


def corpus_path(config: CorpusConfig) -> Path:
    """Return `corpus.path` in the form that means the same in every process.

    Raises:
        CorpusError: if it is not set or does not exist.
    """
    if config.path is None:
        raise CorpusError(f"corpus.path is null; corpus.kind={config.kind!r} needs a path")
    path = Path(config.path).expanduser().resolve()
    if not path.exists():
        raise CorpusError(f"corpus.path={config.path!r} does not exist ({path})")
    return path


def list_files(path: Path, suffix: str) -> list[Path]:
    """Return the file itself, or the files of a folder that end in `suffix`, sorted by name.

    Raises:
        CorpusError: if there are none.
    """
    files = [path] if path.is_file() else sorted(p for p in path.glob(f"*{suffix}") if p.is_file())
    if not files:
        raise CorpusError(f"corpus.path={str(path)!r} holds no *{suffix} files")
    return files


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
