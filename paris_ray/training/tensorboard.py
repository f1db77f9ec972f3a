"""Metrics as a TensorBoard event file.

The file is made anew of all rows so far, each time: a resumed run repeats nothing in it, and it can
be stored like any other file.
"""

import io

from paris_ray.artifacts import EVENTS
from paris_ray.folders import Folder
from paris_ray.training.tracked_rows import AXIS, CLOCK, Rows, numbers_of, require

TENSORBOARD = f"tensorboard/{EVENTS}"


class EventFile:
    """A tracker whose place is the model's own folder.

    Args:
        folder: Of the model.

    Raises:
        ConfigError: with what to install, unless the package `tensorboard` is there.
    """

    def __init__(self, folder: Folder) -> None:
        require("tensorboard", "tensorboard=true", "tensorboard", "paris")
        self._folder = folder

    def open(self, rows: Rows) -> None:
        """The file needs no beginning: it is written whole."""

    def write(self, rows: Rows) -> None:
        """Show all rows so far."""
        self._folder.write(TENSORBOARD, event_file(rows))

    def close(self) -> None:
        """A file that was written whole needs no end."""


def event_file(rows: Rows) -> bytes:
    """Return an event file with a scalar for each number of each row."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    buffer = io.BytesIO()
    writer = RecordWriter(buffer)
    writer.write(Event(file_version="brain.Event:2").SerializeToString())
    for row in rows:
        values = [Summary.Value(tag=n, simple_value=v) for n, v in numbers_of(row).items()]
        event = Event(wall_time=row[CLOCK], step=row[AXIS], summary=Summary(value=values))
        writer.write(event.SerializeToString())
    return buffer.getvalue()
