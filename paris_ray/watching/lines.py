"""Files of JSON lines that somebody else is writing: each line is read once."""

from typing import Any
from zlib import crc32

from paris_ray.folders import Folder, Stamp
from paris_ray.json_documents import load_json

MAX_BYTES_PER_LOOK = 8 << 20  # of a long file the next look reads on
MAX_NUMBER = 2**53  # beyond it neighbours are equal to a browser, which then counts without end


class GrowingRows:
    """The rows of one file, read on from where the last look ended.

    A file that does not go on as it was, because a training went back to its checkpoint, is read
    anew. A last line without its end is left for the next look; what is no JSON object is skipped.

    Args:
        folder: Where the file is, or will be.
        name: Its name.

    Attributes:
        rows: All rows so far, in order.
    """

    def __init__(self, folder: Folder, name: str) -> None:
        self.folder, self.name = folder, name
        self.rows: list[dict[str, Any]] = []
        self._stamp: Stamp | None = None
        self._offset, self._last_line = 0, b""

    @property
    def version(self) -> str:
        """What changes with the rows, also where they became others of the same number."""
        return f"{len(self.rows)}-{crc32(self._last_line):x}"

    def look(self, stamp: Stamp | None) -> bool:
        """Read what is new; return whether there was anything, or the file began anew.

        Args:
            stamp: Of the file now; None: it is not there.

        Raises:
            ArtifactError: if it cannot be read.
        """
        if stamp == self._stamp:
            return False
        if stamp is None:
            return self._forget()
        changed, self._stamp = False, None
        with self.folder.open(self.name) as file:
            if not self._goes_on(file, stamp.size):
                changed = self._forget()
            file.seek(self._offset)
            payload = bytes(file.read(MAX_BYTES_PER_LOOK))
        if len(payload) < MAX_BYTES_PER_LOOK:
            self._stamp = stamp
        return self._take(payload) or changed

    def _goes_on(self, file: Any, size: int) -> bool:
        if size < self._offset:
            return False
        file.seek(self._offset - len(self._last_line))
        return bytes(file.read(len(self._last_line))) == self._last_line

    def _forget(self) -> bool:
        had_rows = bool(self.rows)
        self.rows, self._offset, self._last_line, self._stamp = [], 0, b"", None
        return had_rows

    def _take(self, payload: bytes) -> bool:
        """Add the rows of whole lines; return whether there were any."""
        end = payload.rfind(b"\n") + 1
        if end == 0 and len(payload) == MAX_BYTES_PER_LOOK:
            end = len(payload)  # no line of ours is so long
        if end == 0:
            return False
        lines = payload[:end].splitlines(keepends=True)
        self._offset, self._last_line = self._offset + end, lines[-1]
        rows = [row for row in map(_parsed, lines) if row is not None]
        self.rows += rows
        return bool(rows)


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        row = load_json(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def number(value: object) -> float | None:
    """Return a value if it is a number that is not too large, else None: files may say anything."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) <= MAX_NUMBER else None
