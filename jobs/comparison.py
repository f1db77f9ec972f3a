"""What jobs share that compare many runs: the earlier numbers they take, the page, the command."""

import argparse
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jobs.command import (
    parser,
    ray_session,
    refuse_absent_config,
    refuse_relative_paths,
    refuse_unreachable,
)
from paris_ray.config import Config, load, local_paths, with_absolute_paths
from paris_ray.errors import ConfigError


def comparison_parser(
    description: str, *, page: str, default: Path | None = None
) -> argparse.ArgumentParser:
    """Return the parser of `jobs.command.parser` with `--known`, and an option for the page.

    Args:
        description: Of the job.
        page: The option's name; what it is given is `page` of the arguments.
        default: Where the page is written by default; None: nowhere.
    """
    options = parser(description)
    options.set_defaults(page_option=page)
    told = "the .json beside an earlier page: arms that it has are not run again"
    options.add_argument("--known", type=Path, help=told)
    told = "the page, a name that ends in .md; a .json is written beside it"
    options.add_argument(page, dest="page", type=Path, default=default, help=told)
    return options


def read_comparison(
    arguments: argparse.Namespace, overrides: Sequence[str]
) -> tuple[Config, dict[str, Any]]:
    """Return the configuration that is compared, and what an earlier comparison wrote.

    Args:
        arguments: Of `comparison_parser`.
        overrides: The job's own; those of the command line come after them.

    Raises:
        ConfigError: if an option is not allowed, or the earlier numbers cannot be read.
    """
    refuse_absent_config(arguments.config)
    config = load(arguments.config, [*overrides, *arguments.overrides])
    given = {"--known": arguments.known, arguments.page_option: arguments.page}
    places = {option: str(path) for option, path in given.items() if path is not None}
    refuse_relative_paths(local_paths(config) | places)
    if arguments.page is not None and arguments.page.suffix != ".md":
        told = f"{arguments.page_option}={str(arguments.page)!r}"
        raise ConfigError(f"{told} is not allowed: a name that ends in .md")
    return config, {} if arguments.known is None else _read_known(arguments.known)


@contextmanager
def comparing(config: Config, address: str | None) -> Iterator[Config]:
    """Connect to a Ray, or start one; yield the configuration with paths that every node knows."""
    refuse_unreachable(local_paths(config))
    with ray_session(address):
        yield with_absolute_paths(config)


def told_command(module: str) -> str:
    """Return the command of this process as a page tells it.

    Where the runs are is this machine's affair, and changes no number.
    """
    told = [each for each in sys.argv[1:] if not each.startswith("run_dir=")]
    return shlex.join(["python", "-m", module, *told])


def _read_known(known: Path) -> dict[str, Any]:
    try:
        found = json.loads(known.read_bytes())
        _ = [arm["digest"] for arm in found["arms"]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"--known={str(known)!r} is not allowed: a .json of this job and version ({error!r})"
        ) from None
    return dict(found)
