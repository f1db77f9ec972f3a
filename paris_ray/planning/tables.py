"""Tables of a terminal, and the numbers in them."""

from collections.abc import Sequence

PREFIXES = {"E": 10**18, "P": 10**15, "T": 10**12, "G": 10**9, "M": 10**6, "k": 10**3}
COLUMN_GAP = "  "


def number(value: float | None, digits: int = 0) -> str:
    """Return a number, or that it is unknown."""
    return "unknown" if value is None else f"{value:,.{digits}f}"


def scaled(value: float, unit: str) -> str:
    """Return a value with the decimal prefix that suits it: `17.6 GB`."""
    for prefix, size in PREFIXES.items():
        if value >= size:
            return f"{value / size:.1f} {prefix}{unit}"
    return f"{value:.0f} {unit}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as lines; the first column is aligned left, the others right."""
    width = max(map(len, rows))
    padded = [[*row, *[""] * (width - len(row))] for row in rows]
    widths = [max(map(len, column)) for column in zip(*padded, strict=True)]
    lines = []
    for first, *others in padded:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(size) for cell, size in zip(others, widths[1:], strict=True)]
        lines.append(COLUMN_GAP.join(cells).rstrip())
    return "\n".join(lines)
