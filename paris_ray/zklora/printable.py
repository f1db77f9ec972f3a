"""What other parties write, before it is logged, kept or shown."""


def printable(text: str, most: int) -> str:
    """Return what another party wrote, harmless in a terminal, and at most so long."""
    return "".join(c if c.isprintable() else "?" for c in text[:most])
