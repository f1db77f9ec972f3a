"""What is fuzzed: valid files of each kind, how they are changed, and who in the product reads."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz import formats, mutations
from tests.fuzz.mutations import BYTES, Mutation

OPTIONS: Mapping[str, Sequence[Mutation]] = {
    ".json": [mutations.edit_json],
    ".jsonl": [mutations.edit_lines],
    ".yaml": [mutations.edit_yaml],
    ".safetensors": [mutations.edit_safetensors, mutations.other_tensors],
    ".png": [formats.edit_chunks, formats.too_large],
    ".jpeg": [formats.repeat_scans],
    ".tar": [formats.add_member],
    ".gz": [formats.inside_gzip],
    ".parquet": [formats.claim_rows, formats.other_columns],
}
OF_FORMAT = 0.7  # how often a change is one of the format's own, where it has any
OF_FOLDER = 0.05  # how often a file is none any more
RARELY = 0.003  # what takes seconds


@dataclass(frozen=True)
class Kind:
    """Files of a stranger.

    Attributes:
        write: Puts valid ones into an empty folder; returns what `read` needs beside them.
        read: Reads them all, as the product does, and uses what they say; raises ParisError, or
            what it returns is right. Called with the folder and what `write` returned.
        changed: Which files are changed, by a pattern.
        may_lead_out: Whether links may lead out of the folder: where the user names the file, of
            shards and tables of a corpus, or where the folder is a hub's, whose files are links.
    """

    write: Callable[[Path], Any]
    read: Callable[[Path, Any], object]
    changed: str = "**/*"
    may_lead_out: bool = False


def mutate(rng: Random, path: Path, outside: Path | None) -> str:
    """Change a file, or put in its place a link to `outside` or nothing; say how."""
    if rng.random() < OF_FOLDER:
        return _replace(rng, path, outside)
    own = OPTIONS.get(path.suffix, ())
    if path.suffix == ".gz" and rng.random() < RARELY:
        chosen: Mutation = formats.inflating_members
    else:
        chosen = rng.choice(own if own and rng.random() < OF_FORMAT else BYTES)
    path.write_bytes(chosen(rng, path.read_bytes()))
    return chosen.__name__


def _replace(rng: Random, path: Path, outside: Path | None) -> str:
    """Put something else in the place of a file: a link, a folder or nothing."""
    targets = [path, None]
    if outside is not None:
        targets += [outside / "secret.png", Path("/etc/passwd"), outside]
    target = rng.choice(targets)
    path.unlink()
    if target is not None:
        path.symlink_to(target)
        return f"a link to {target}"
    if rng.random() < 0.5:
        path.mkdir()
        return "a folder"
    return "deleted"
