"""How many bytes of which files a process reads and writes, as `folders.Folder` sees them."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Traffic:
    """What was moved while it was recorded.

    Attributes:
        read: Size of every file that was opened, by its URI: once, however often that was, and
            whole, though of a table only some columns may have been wanted.
        written: Bytes that were written, by the file's URI: of one that is replaced, of all of its
            versions.
    """

    read: dict[str, int] = field(default_factory=dict)
    written: Counter[str] = field(default_factory=Counter)


_lock = threading.Lock()
_recording: list[Traffic] = []


@contextmanager
def recorded() -> Iterator[Traffic]:
    """Record what all threads of this process move meanwhile."""
    traffic = Traffic()
    _recording.append(traffic)
    try:
        yield traffic
    finally:
        _recording.remove(traffic)


def note_read(uri: str, size: Callable[[], int]) -> None:
    """Tell that a file is read; its size, in bytes, is asked for if somebody records."""
    if _recording:
        read = size()
        with _lock:
            for traffic in _recording:
                traffic.read[uri] = read


def note_written(uri: str, size: Callable[[], int]) -> None:
    """Tell that a file was written; its size, in bytes, is asked for if somebody records."""
    if _recording:
        written = size()
        with _lock:
            for traffic in _recording:
                traffic.written[uri] += written
