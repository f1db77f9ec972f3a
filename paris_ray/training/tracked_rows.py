"""What all trackers share: the rows of a training, and that their packages may be missing."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from paris_ray.errors import ConfigError

AXIS, CLOCK = "samples_seen", "unix_time"
# The horizontal axis, the clock, and numbers by name; None where there is none.
Rows = Sequence[Mapping[str, Any]]


def numbers_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is shown of a row over its axis."""
    return {n: v for n, v in row.items() if n not in (AXIS, CLOCK) and v is not None}


def rows_after(shown: int, rows: Rows) -> Rows:
    """Return the rows beyond a place on the axis, up to which a tracker has been shown all.

    It is not told by their number: a training that is killed while it writes its checkpoint has
    shown more than the process that goes on knows of.
    """
    return [row for row in rows if row[AXIS] > shown]


def require(module: str, setting: str, package: str, extra: str) -> None:
    """Raise ConfigError, saying what to install, unless a module can be imported.

    Args:
        module: Which.
        setting: What asks for it, such as `tensorboard=true`.
        package: Which brings it.
        extra: Of ours, which installs it.
    """
    try:
        import_module(module)
    except ModuleNotFoundError:
        raise ConfigError(
            f"{setting} needs the package {package}: pip install 'paris_ray[{extra}]'"
        ) from None
