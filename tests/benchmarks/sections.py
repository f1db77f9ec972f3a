"""Parts of documents that benchmarks write: from `<!-- bench: NAME -->` to `<!-- end -->`."""

import sys
from pathlib import Path


def write_section(path: Path, name: str, body: str) -> None:
    """Replace one section of a document; exit if it has no place for it."""
    text = path.read_text()
    start, end = f"<!-- bench: {name} -->\n", "<!-- end -->"
    if text.count(start) != 1 or end not in text.split(start)[1]:
        sys.exit(f"{path} has no place for {name}: {start}{end}")
    before, rest = text.split(start)
    path.write_text(f"{before}{start}\n{body}\n\n{end}{rest.split(end, 1)[1]}")
