"""Metrics as a TensorBoard event file.

The file is made anew of all rows so far, each time: a resumed run repeats nothing in it, and it can
be stored like any other file.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from paris_ray.artifacts import EVENTS
from paris_ray.errors import ConfigError
from paris_ray.folders import Folder

TENSORBOARD = f"tensorboard/{EVENTS}"
AXIS, CLOCK = "samples_seen", "unix_time"


class EventFile:
    """A tracker whose place is the model's own folder.

    Args:
        folder: Of the model.

    Raises:
        ConfigError: with what to install, unless the package `tensorboard` is there.
    """

    def __init__(self, folder: Folder) -> None:
        require_tensorboard()
        self._folder = folder

    def open(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """The file needs no beginning: it is written whole."""

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Show all rows so far."""
        self._folder.write(TENSORBOARD, event_file(rows))

    def close(self) -> None:
        """A file that was written whole needs no end."""


def require_tensorboard() -> None:
    """Raise ConfigError, saying what to install, unless the package `tensorboard` is there."""
    try:
        import tensorboard  # noqa: F401
    except ModuleNotFoundError:
        raise ConfigError(
            "tensorboard=true needs the package tensorboard: pip install 'paris_ray[paris]'"
        ) from None


def event_file(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Return an event file with a scalar for each number of each row.

    Args:
        rows: `samples_seen`, which is the horizontal axis, `unix_time` and numbers by name; None
            where there is none.
    """
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    buffer = io.BytesIO()
    writer = RecordWriter(buffer)
    writer.write(Event(file_version="brain.Event:2").SerializeToString())
    for row in rows:
        values = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in row.items()
            if name not in (AXIS, CLOCK) and value is not None
        ]
        event = Event(wall_time=row[CLOCK], step=row[AXIS], summary=Summary(value=values))
        writer.write(event.SerializeToString())
    return buffer.getvalue()
