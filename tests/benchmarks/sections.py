"""Parts of documents that benchmarks write: from `<!-- bench: NAME -->` to `<!-- end -->`."""

import sys
from collections.abc import Sequence
from pathlib import Path

END = "<!-- end -->"


def check_sections(path: Path, names: Sequence[str]) -> None:
    """Exit unless a document has one place for each section."""
    text = path.read_text()
    for name in names:
        if text.count(_start(name)) != 1 or END not in text.split(_start(name))[1]:
            sys.exit(f"{path} has no place for {name}: {_start(name)}{END}")


def write_section(path: Path, name: str, body: str) -> None:
    """Replace one section of a document; exit if it has no place for it."""
    check_sections(path, [name])
    before, rest = path.read_text().split(_start(name))
    path.write_text(f"{before}{_start(name)}\n{body}\n\n{END}{rest.split(END, 1)[1]}")


def _start(name: str) -> str:
    return f"<!-- bench: {name} -->\n"
