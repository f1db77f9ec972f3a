"""Why rows of a corpus are not used, in one line."""

from collections import Counter
from collections.abc import Container, Mapping

from paris_ray.corpora import REASONS, QuarantinedRow
from paris_ray.embeddings import part_names, read_parts
from paris_ray.folders import Folder

SHOWN = 200  # characters: a stranger's file name or caption may be of any length


def describe_bad_rows(counts: Mapping[str, int], example: QuarantinedRow) -> str:
    """Return what is wrong with rows, and with one of them.

    Args:
        counts: How many rows are bad for each of `REASONS`.
        example: One of them.
    """
    reasons = ", ".join(f"{count} {reason} ({REASONS[reason]})" for reason, count in counts.items())
    key, detail = example.key[:SHOWN], example.detail[:SHOWN]
    return f"{reasons}; such as {key!r}, {example.reason}: {detail!r}"


class BadRows:
    """Counts bad rows as they are met, and keeps the first; as text, what to add to an error."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first: QuarantinedRow | None = None

    def add(self, row: QuarantinedRow) -> None:
        """Count one more."""
        self.counts[row.reason] += 1
        self.first = self.first or row

    def __str__(self) -> str:
        """Return a colon and what is wrong; nothing, if nothing is."""
        return "" if self.first is None else f": {describe_bad_rows(self.counts, self.first)}"


def first_bad_row(quarantine: Folder, reasons: Container[str]) -> QuarantinedRow:
    """Return the first row of a run's `quarantine/` with one of some reasons, which it has."""
    columns = ("key", "reason", "detail")
    tables = (read_parts(quarantine, [name], columns) for name in part_names(quarantine))
    rows = (QuarantinedRow(**row) for table in tables for row in table.to_pylist())
    return next(row for row in rows if row.reason in reasons)
